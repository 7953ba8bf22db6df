"""Keeps llama-server running: starts it, watches it and its stages, restarts it, ends it."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import zip_longest
from typing import IO

from meshllm import rpc
from meshllm.engine.counters import COUNTERS_FILE_BYTES, Counters, LinkState, read_counters
from meshllm.engine.launch import LaunchSpec
from meshllm.engine.process import LeashedProcess
from meshllm.errors import EngineError, MeshLlmError
from meshllm.mesh.engine_status import EngineHost, EngineModel, EngineStatus, SpeculationStatus, Tokens
from meshllm.paths import private_folder, remove_stale_folders
from meshllm.tasks import Changes

_COUNTERS_S = 0.2  # between looks at the counters: another process writes them, and cannot notify
_PROBE_INTERVAL_S, _PROBE_TIMEOUT_S = 0.5, 2.0
_FIRST_BACKOFF_S, _LAST_BACKOFF_S = 0.5, 30.0
_STEADY_S = 60.0  # after this long in good health, a crash starts the back-off from its beginning
_MAX_FAILED_STARTS = 3
_DRAFT_LINE = re.compile(r"draft acceptance = \S+ \(\s*(\d+) accepted /\s*(\d+) generated\), mean len =\s+([\d.]+)")
_SPEED_LINE = re.compile(r"print_timing: .*\| +(prompt )?eval time = +([\d.]+) ms / +(\d+) tokens")
_CONTEXT_LINE = re.compile(r"llama_context: n_ctx +=\s+(\d+)")
_BUFFER_LINE = re.compile(r"load_tensors:\s+(\S+) model buffer size =\s+([\d.]+ MiB)")


class EngineState(enum.StrEnum):
    STARTING = "starting"
    LOADING = "loading"
    READY = "ready"
    STAGE_LOST = "stage lost"  # until all stages answer again
    CRASHED = "crashed"  # until the next start
    STOPPED = "stopped"


class Engine:
    """llama-server for one model. `run()` keeps it alive; the other methods may be called meanwhile.

    `emit` prints one line per event, `progress` shows the current step of loading. `on_change` is called when `state`
    changes.
    """

    def __init__(
        self,
        spec: LaunchSpec,
        emit: Callable[[str], None],
        progress: Callable[[str], None],
        log_file: IO[str] | None = None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.spec = spec
        self.state = EngineState.STARTING
        self.restarts = 0
        self.reason = ""  # why it is not ready
        self._emit = emit
        self._progress = progress
        self._log_file = log_file
        self._on_change = on_change
        self.first_ready = asyncio.Event()
        self._changes = Changes()
        self._buffers: dict[str, str] = {}
        self._n_ctx, self._tokens_per_s = 0, 0.0
        self._tokens = Tokens()
        self._drafted, self._accepted, self._steps = 0, 0, 0.0
        remove_stale_folders()
        self._folder = private_folder()
        self.socket = self._folder / "engine.sock"
        self._counters_path = self._folder / "counters.bin"

    def counters(self) -> Counters:
        return read_counters(self._counters_path)

    async def wait_ready(self, timeout_s: float) -> bool:
        """Waits while the engine loads. Returns whether requests can be served."""
        if self.stage_lost:
            return False  # the library knows before `_watch_stages` looks
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self.state not in (EngineState.READY, EngineState.STAGE_LOST):
                    await self._changes.wait(self._changes.version)
        return self.state is EngineState.READY

    @property
    def stage_lost(self) -> bool:
        return bool(self.spec.stages) and self.counters().state is LinkState.LOST

    def describe(self) -> EngineStatus:
        spec, counters = self.spec, self.counters().stages
        stages = zip_longest(spec.stages, counters[: len(spec.stages)])
        return EngineStatus(
            state=str(self.state),
            reason=self.reason,
            restarts=self.restarts,
            model=EngineModel(spec.model.name, spec.model.size_bytes, spec.model.n_layers),
            host=EngineHost(spec.host_device, spec.host_layers),
            stages=tuple(stage.status(of_stage) for stage, of_stage in stages),
            n_ctx=self._n_ctx,
            tokens=self._tokens,
            tokens_per_s=self._tokens_per_s,
            speculation=self._describe_speculation(),
        )

    def _describe_speculation(self) -> SpeculationStatus | None:
        if (speculation := self.spec.speculation) is None:
            return None
        return SpeculationStatus(
            draft=speculation.name,
            n_max=speculation.n_max,
            drafted=self._drafted,
            accepted=self._accepted,
            tokens_per_step=round((self._accepted + self._steps) / self._steps, 2) if self._steps else 0,
        )

    async def run(self) -> None:
        """Returns only by cancellation, or raises EngineError when the model cannot be served here."""
        backoff_s, failed_starts = _FIRST_BACKOFF_S, 0
        for name in dict.fromkeys(stage.name for stage in self.spec.stages if not stage.has_model):
            self._emit(
                f"{name} does not have {self.spec.model.name} on disk: the weights are sent to it over the network"
            )
        try:
            while True:
                began = time.monotonic()
                was_ready = await self._run_once()
                if self.state is EngineState.STAGE_LOST:
                    failed_starts = 0
                    await self._wait_for_stages()
                elif not was_ready and (speculation := self.spec.speculation) and speculation.by_default:
                    self._emit(f"{self.reason}; starting {self.spec.model.name} again without speculative decoding")
                    self.spec = replace(self.spec, speculation=None)
                    continue  # whatever else is wrong, the next start tells
                else:
                    failed_starts = 0 if was_ready else failed_starts + 1
                    if failed_starts and (self.restarts == 0 or failed_starts >= _MAX_FAILED_STARTS):
                        hint = "; -- --no-mmproj leaves its projector out" if "mmproj" in self.reason else ""
                        raise EngineError(f"cannot serve {self.spec.model.name}: {self.reason}{hint}")
                    if was_ready and time.monotonic() - began > _STEADY_S:
                        backoff_s = _FIRST_BACKOFF_S
                    self._emit(
                        f"llama-server stopped ({self.reason}); restarting it in {backoff_s:g} s (-v shows its output)"
                    )
                    await asyncio.sleep(backoff_s)
                    backoff_s = min(2 * backoff_s, _LAST_BACKOFF_S)
                self.restarts += 1
        finally:
            self._enter(EngineState.STOPPED, "the engine was stopped")
            shutil.rmtree(self._folder, ignore_errors=True)

    def _environment(self) -> dict[str, str]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("GGML_BACKEND_PATH", "MESH_LLM_"))}
        if self.spec.stages:
            config = self._folder / "backend.json"
            config.write_bytes(self.spec.backend_config(self._counters_path))
            environment["GGML_BACKEND_PATH"] = str(self.spec.binaries.backend)
            environment["MESH_LLM_BACKEND_CONFIG"] = str(config)
        return environment

    async def _run_once(self) -> bool:
        """One run of llama-server. Returns whether it was ever ready; `state` and `reason` hold why it ended."""
        self.socket.unlink(missing_ok=True)
        self._counters_path.write_bytes(bytes(COUNTERS_FILE_BYTES))
        self._buffers.clear()
        self._enter(EngineState.LOADING, "the model is loading")
        command = self.spec.command(self.socket)
        process = LeashedProcess(
            self.spec.binaries.leash,
            command,
            self._environment(),
            self._read_line,
            self._log_file,
        )
        was_ready = False
        async with process, asyncio.TaskGroup() as group:
            ended = group.create_task(process.wait(), name="engine end")
            healthy = group.create_task(process.wait_healthy(self.socket), name="engine health")
            lost = group.create_task(self._watch_stages(), name="engine stages")
            tasks = (ended, healthy, lost)
            while True:
                pending = {task for task in tasks if not task.done()}
                done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                if lost in done:
                    await self._let_errors_out(ended)
                    break
                if ended in done:
                    self._note_end(process, ended.result(), was_ready)
                    break
                was_ready = True
                self._become_ready()
            for task in tasks:
                task.cancel()
        return was_ready

    def _become_ready(self) -> None:
        self._enter(EngineState.READY, "")
        self.first_ready.set()
        self._emit(f"ready: {self.spec.model.name}{self._where()}")

    def _note_end(self, process: LeashedProcess, status: int, was_ready: bool) -> None:
        counters = self.counters()
        if counters.state is LinkState.LOST:
            self._enter(EngineState.STAGE_LOST, counters.error)
            self._emit(self.reason)
        elif was_ready:
            self._enter(EngineState.CRASHED, f"signal {status - 128}" if status > 128 else f"exit status {status}")
        else:
            self._enter(EngineState.CRASHED, process.last_error())

    def _enter(self, state: EngineState, reason: str) -> None:
        self.state, self.reason = state, reason
        self._changes.notify()
        self._on_change()

    async def _watch_stages(self) -> None:
        """Returns when the library reports a lost stage."""
        while True:
            await asyncio.sleep(_COUNTERS_S)
            counters = self.counters()
            if self.state is EngineState.LOADING and self.spec.stages:
                self._report_loading(counters)
            if counters.state is LinkState.LOST:
                self._enter(EngineState.STAGE_LOST, counters.error)
                self._emit(f"{counters.error}; requests to {self.spec.model.name} fail until that stage is back")
                return

    async def _let_errors_out(self, ended: asyncio.Task[int]) -> None:
        """Lets llama-server run until the stages are back, so that its clients receive their errors."""
        waiting = asyncio.create_task(self._wait_for_stages(), name="stages")
        try:
            await asyncio.wait({waiting, ended}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await waiting

    async def _wait_for_stages(self) -> None:
        missing = {stage.at.address for stage in self.spec.stages}
        while missing:
            for address in sorted(missing):
                with contextlib.suppress(MeshLlmError):
                    await asyncio.to_thread(rpc.probe, address, _PROBE_TIMEOUT_S)
                    missing.discard(address)
            if missing:
                await asyncio.sleep(_PROBE_INTERVAL_S)

    # --- what llama-server prints ---

    def _read_line(self, line: str) -> None:
        if match := _SPEED_LINE.search(line):
            kind = "prompt" if match[1] else "generated"
            self._tokens = replace(self._tokens, **{kind: getattr(self._tokens, kind) + int(match[3])})
            if not match[1] and float(match[2]) > 0:
                self._tokens_per_s = round(int(match[3]) / float(match[2]) * 1000, 1)
        elif (match := _CONTEXT_LINE.search(line)) and not self._n_ctx:
            self._n_ctx = int(match[1])
        elif match := _DRAFT_LINE.search(line):
            accepted, mean_length = int(match[1]), float(match[3])
            self._accepted += accepted
            self._drafted += int(match[2])
            self._steps += accepted / (mean_length - 1) if mean_length > 1 else 0.0
        elif match := _BUFFER_LINE.search(line):
            self._buffers[match[1]] = match[2]
            if not self.spec.stages:
                self._progress(f"loading {self.spec.model.name}{self._where()}")

    def _where(self) -> str:
        parts = []
        for device, size in self._buffers.items():
            number = device.removeprefix("STAGE")
            stage = self.spec.stages[int(number)] if number.isdigit() else None
            parts.append(f"{device} {stage.name}: {size}" if stage else f"{device}: {size}")
        return f" ({', '.join(parts)})" if parts else ""

    def _report_loading(self, counters: Counters) -> None:
        loaded = sum(c.weight_bytes_local + c.weight_bytes_sent for c in counters.stages)
        expected = sum(stage.weight_bytes for stage in self.spec.stages)
        percent = min(100, 100 * loaded // expected) if expected else 100
        self._progress(f"loading {self.spec.model.name}: {percent}%{self._where()}")
