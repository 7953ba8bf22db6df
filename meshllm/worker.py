"""What a node computes with: its device server for others' models, and the engine of its own when it is host.

Only nodes that compute import this module; a lite client needs no compiled code.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from meshllm import rpc
from meshllm.engine import Engine, EnginePlan, EngineState, StageServer, find_binaries, plan_engine
from meshllm.errors import EngineError, MeshLlmError
from meshllm.mesh.announcement import ModelInfo
from meshllm.mesh.plan import Group
from meshllm.models import Model, offered_models, resolve

RESERVE = 0.1  # of a device's memory, for the KV cache and compute buffers
_PROBE_TIMEOUT_S = 15.0
_LOG_INTERVAL_S = 0.5
_RETRY_S = 3.0


@dataclass(frozen=True)
class WorkerConfig:
    models: tuple[str, ...]
    default_model: bool  # take one when none is named
    device: str | None
    threads: int  # of a CPU; 0 for ggml's default
    max_vram_bytes: int
    bin_dir: Path | None
    engine_args: tuple[str, ...]


@dataclass(frozen=True)
class StageDoor:
    """A stage as the host reaches it: a socket on this machine, and its name beside the other stages."""

    name: str
    socket: Path
    peer_address: str


class Worker:
    """`say` gets one line per event, `progress` the present step of loading.

    Raises MeshLlmError when a model that was named is broken or missing.
    """

    def __init__(
        self, config: WorkerConfig, say: Callable[[str], None], progress: Callable[[str], None], log: IO[str] | None
    ) -> None:
        self._config = config
        self._say, self._progress, self._log = say, progress, log
        self._binaries = find_binaries(config.bin_dir)
        named = [resolve(name) for name in config.models]
        if not named and config.default_model:
            named = [resolve(None)]
        self.wants = tuple(model_info(model) for model in named)
        models = {model_info(model).fingerprint: model for model in [*offered_models(say), *named]}
        self._models: dict[str, Model] = models
        self._server: rpc.DeviceServer | None = None
        self.engine: Engine | None = None

    # --- what the node announces ---

    @property
    def models(self) -> tuple[ModelInfo, ...]:
        return tuple(model_info(model) for model in self._models.values())

    @property
    def engine_version(self) -> str:
        return f"ggml {rpc.ggml_version()}"

    def device_name(self) -> str:
        return ", ".join(d.description for d in self._devices())[:80]

    def memory_bytes(self) -> int:
        """That models may take: ggml's own figure, under the cap, less the reserve."""
        cap = self._config.max_vram_bytes
        free = [min(d.memory_free, d.memory_total) for d in self._devices()]
        return int(sum(min(m, cap) if cap else m for m in free) * (1 - RESERVE))

    def _devices(self) -> list[rpc.DeviceInfo]:
        """All GPUs, or the CPU; or the one that the user named."""
        devices = rpc.list_devices()
        if self._config.device:
            chosen = [d for d in devices if d.name == self._config.device]
            if not chosen:
                names = ", ".join(d.name for d in devices)
                raise EngineError(f"there is no device {self._config.device} here; --device may name: {names}")
            return chosen
        return [d for d in devices if d.type in ("GPU", "IGPU")] or [d for d in devices if d.type == "CPU"]

    # --- the device server ---

    def start_server(self, socket: Path) -> None:
        self._server = rpc.DeviceServer(
            f"unix:{socket}",
            [self._config.device] if self._config.device else [],
            [(model.fingerprint(), model.files) for model in self._models.values()],
            threads=self._config.threads,
            memory_limit_bytes=self._config.max_vram_bytes,
        )

    async def report(self) -> None:
        """What the device server has to say, until cancelled."""
        while True:
            await asyncio.sleep(_LOG_INTERVAL_S)
            for line in self._server.take_log() if self._server else ():
                self._say(line)

    async def stop_server(self) -> None:
        if self._server:
            await asyncio.to_thread(self._server.stop)

    def server_counters(self) -> dict[str, int]:
        return self._server.counters() if self._server else {}

    # --- the engine ---

    async def serve(self, group: Group, doors: Sequence[StageDoor]) -> None:
        """Runs the engine as host of `group` until cancelled. Raises EngineError when it cannot run without stages."""
        while True:
            try:
                plan = await self._plan(group, doors)
                self.engine = Engine(plan, self._say, self._progress, self._log)
                await self.engine.run()
            except MeshLlmError as error:
                if not group.stages:
                    raise
                self._say(f"{error}; trying again in {_RETRY_S:g} s")
            finally:
                self.engine = None
            await asyncio.sleep(_RETRY_S)

    async def _plan(self, group: Group, doors: Sequence[StageDoor]) -> EnginePlan:
        model = self._models[group.model.fingerprint]
        servers: list[StageServer] = []
        for door in doors:
            address = f"unix:{door.socket}"
            info = await asyncio.to_thread(rpc.probe, address, _PROBE_TIMEOUT_S)
            servers.append(StageServer(door.name, address, door.peer_address, info))
        shares: list[float] = []
        for server, share in zip(servers, group.shares, strict=False):
            memory = [max(device.memory_free, 1) for device in server.info.devices]
            shares += [share * m / sum(memory) for m in memory]
        split = [*shares, group.shares[-1]] if servers else None
        plan = plan_engine(model, self._binaries, servers, split, self._config.device, self._config.engine_args)
        for stage in plan.stages:
            if not stage.has_model:
                self._say(f"{stage.name} does not have {model.name}: its weights travel over the network")
        return plan

    @property
    def ready(self) -> bool:
        return self.engine is not None and self.engine.state is EngineState.READY


def model_info(model: Model) -> ModelInfo:
    with contextlib.suppress(UnicodeEncodeError):
        model.name.encode()
        return ModelInfo(model.name[:80], model.fingerprint().hex(), model.size_bytes, model.n_layers)
    return ModelInfo(ascii(model.name)[:80], model.fingerprint().hex(), model.size_bytes, model.n_layers)
