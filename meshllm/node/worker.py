"""What a node computes with: a device server for the models of other hosts, and an engine when it is a host.

Only nodes that compute import this module; a lite client needs no compiled code.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from meshllm import rpc
from meshllm.engine import (
    Engine,
    EngineState,
    LaunchSpec,
    StageServer,
    find_binaries,
    make_launch_spec,
)
from meshllm.engine.fit import MIN_CTX, Fit, advice, as_split, best_fit, context_of, need, what_fits
from meshllm.engine.launch import StageAddress, plan_arguments, splits_tensors, takes_projector
from meshllm.engine.memory import ModelMemory, measure
from meshllm.errors import EngineError, MeshLlmError, NotOnDiskError
from meshllm.mesh.announcement import Capability, ModelInfo, Need, ProjectorInfo
from meshllm.mesh.groups import Group, Placement, needed_bytes
from meshllm.mesh.mesh import Mesh
from meshllm.models.download import can_be_had
from meshllm.models.store import Model, Store, resolve
from meshllm.models.transfer import Sharing
from meshllm.node.drafts import Drafting
from meshllm.node.files import ModelFiles, capabilities, model_info, model_infos, projector_infos
from meshllm.node.machine import available_ram
from meshllm.units import in_gb

RESERVE = 0.1  # of a device's memory, kept for what is guessed and for other programs
_PROBE_TIMEOUT_S = 15.0
_LOG_INTERVAL_S = 0.5
_FIRST_RETRY_S, _LAST_RETRY_S = 3.0, 60.0
_SPARE = 0.95  # of a device's memory is planned with: llama.cpp's figures are that exact
_FIT_MARGIN_MIB = 1024  # llama-server's own
_LESS, _LEAST_PART = 0.1, 0.6  # when that was too much after all


@dataclass(frozen=True)
class WorkerConfig:
    models: tuple[str, ...]
    begins: bool  # founds a mesh: serves a default model when none is named
    fetch: bool  # models that are not on disk
    draft: str | None  # as Drafting takes them
    draft_max: int | None
    device: str | None
    threads: int  # of a CPU; 0 for ggml's default
    max_vram_bytes: int
    bin_dir: Path | None
    engine_args: tuple[str, ...]
    min_ctx: int = MIN_CTX


class Worker:
    """`emit` gets one line per event, `progress` the present step of loading.

    Raises MeshLlmError when a model that was named is broken, or missing and cannot be had.
    """

    def __init__(
        self, config: WorkerConfig, emit: Callable[[str], None], progress: Callable[[str], None], log: IO[str] | None
    ) -> None:
        self._config = config
        self.emit, self._progress, self._log = emit, progress, log
        self._binaries = find_binaries(config.bin_dir)
        self._store = Store(emit, projectors=takes_projector(config.engine_args))
        self.named: list[ModelInfo] = []
        self.missing: dict[str, NotOnDiskError] = {}  # named by the user, and not on disk
        for name in config.models:
            try:
                self._add(resolve(name))
            except NotOnDiskError as error:
                if not config.fetch or (config.begins and not can_be_had(name)):
                    raise
                self.missing[name] = error
        if not config.models and config.begins:
            self._add(resolve(None))
        self._drafting = Drafting(config.draft, config.draft_max)
        self._store.scan()
        self.sharing = Sharing(lambda: self._store.shared)
        self._server: rpc.DeviceServer | None = None
        self.engine: Engine | None = None
        self._memories: dict[str, ModelMemory] = {}  # by fingerprint

    def _add(self, model: Model) -> None:
        self._store.add(model)
        info = model_info(model)
        self.named = [*(m for m in self.named if m != info), info]

    def files(self, mesh: Mesh) -> ModelFiles:
        return ModelFiles(mesh, self._store, self._binaries.leash, self._offer, self.emit, self._progress)

    # --- what the node announces ---

    @property
    def models(self) -> tuple[ModelInfo, ...]:
        return model_infos(self._store)

    @property
    def projectors(self) -> dict[str, ProjectorInfo]:
        return projector_infos(self._store)

    @property
    def capabilities(self) -> dict[str, Capability]:
        return capabilities(self._store)

    @property
    def fetches(self) -> bool:
        return self._config.fetch

    @property
    def ggml_version(self) -> str:
        return f"ggml {rpc.ggml_version()}"

    def device_name(self) -> str:
        return ", ".join(d.description for d in self._devices())[:80]

    def memory_bytes(self) -> int:
        """Memory for models: what ggml reports as free, capped, less the reserve and the draft model."""
        return max(0, int(self._free_bytes() * (1 - RESERVE)) - self._drafting.size_bytes)

    def _free_bytes(self) -> int:
        cap = self._config.max_vram_bytes
        free = [min(d.memory_free, d.memory_total, *_ram(d)) for d in self._devices()]
        return sum(min(m, cap) if cap else m for m in free)

    def _devices(self) -> list[rpc.DeviceInfo]:
        """The device that the user named, else all GPUs, else the CPU."""
        devices = rpc.list_devices()
        if self._config.device:
            chosen = [d for d in devices if d.name == self._config.device]
            if not chosen:
                names = ", ".join(d.name for d in devices)
                raise EngineError(f"this machine has no device {self._config.device}; there are: {names}")
            return chosen
        return [d for d in devices if d.type in ("GPU", "IGPU")] or [d for d in devices if d.type == "CPU"]

    # --- the device server ---

    def start_server(self, socket: Path) -> None:
        self._server = rpc.DeviceServer(
            f"unix:{socket}",
            [self._config.device] if self._config.device else [],
            self._model_files(),
            threads=self._config.threads,
            memory_limit_bytes=self._config.max_vram_bytes,
        )

    def _model_files(self) -> list[tuple[bytes, tuple[str, ...]]]:
        return [(bytes.fromhex(fingerprint), model.files) for fingerprint, model in self._store.models.items()]

    def _offer(self) -> None:
        """Gives the device server the models that are on disk now."""
        if self._server:
            try:
                self._server.set_models(self._model_files())
            except MeshLlmError as error:  # a file has just been deleted; the next scan will notice
                self.emit(str(error))

    async def report(self) -> None:
        """Prints the log of the device server, until cancelled."""
        while True:
            await asyncio.sleep(_LOG_INTERVAL_S)
            for line in self._server.take_log() if self._server else ():
                self.emit(line)

    async def stop_server(self) -> None:
        if self._server:
            await asyncio.to_thread(self._server.stop)

    def server_counters(self) -> dict[str, int]:
        return self._server.counters() if self._server else {}

    # --- the engine ---

    async def serve(self, group: Group, stages: Sequence[tuple[str, Path]], on_change: Callable[[], None]) -> None:
        """Runs the engine as host of `group` until cancelled. Raises EngineError when it cannot run without stages.

        `stages`: names of the peers, and the sockets that lead to their device servers. `on_change` is called when
        the state of the engine changes.
        """
        retry_s, told, part = _FIRST_RETRY_S, "", _SPARE
        while True:
            try:
                spec = await self._launch_spec(group, stages, part)
                self.engine = Engine(spec, self.emit, self._progress, self._log, on_change)
                await self.engine.run()
            except MeshLlmError as error:
                if not group.stages:
                    raise
                if "out of memory" in str(error) and part > _LEAST_PART and not group.by_hand:  # less than it said
                    part -= _LESS
                    self.emit(f"{error}; trying to do with {part:.0%} of all devices' memory")
                    continue
                if str(error) != told:
                    told, retry_s = str(error), _FIRST_RETRY_S
                    self.emit(f"{told}; trying again now and then")
            finally:
                self.engine = None
                on_change()
            await asyncio.sleep(retry_s)
            retry_s = min(2 * retry_s, _LAST_RETRY_S)

    async def _launch_spec(self, group: Group, stages: Sequence[tuple[str, Path]], part: float) -> LaunchSpec:
        """Raises EngineError if it does not fit into this part of each device's memory."""
        model = self._store.models.get(group.model.fingerprint)
        if model is None:
            raise EngineError(f"{group.model.name} is no longer on this machine's disk")
        servers: list[StageServer] = []
        for name, socket in stages:
            # Another stage finds a socket of the same name beside its own.
            at = StageAddress(name, f"unix:{socket}", f"unix:{socket.name}")
            servers.append(StageServer(at, await asyncio.to_thread(rpc.probe, at.address, _PROBE_TIMEOUT_S)))
        shares: list[float] = []
        for server, share in zip(servers, group.shares, strict=False):
            free = [max(device.memory_free, 1) for device in server.info.devices]
            shares += [share * n / sum(free) for n in free]
        split = [*shares, group.shares[-1]] if servers else None
        speculation = await asyncio.to_thread(self._drafting.for_model, model)
        args = (self._config.device, self._config.engine_args, speculation)
        spec = make_launch_spec(model, self._binaries, servers, split, *args)
        if not servers and spec.host_device != "CPU":
            return replace(spec, gpu_limits=self._gpu_limits())
        try:
            memory = await asyncio.to_thread(self._measure, model)
        except EngineError:
            return spec  # llama-server will say better what is wrong with the file
        lent = self._lent(group, servers, part)
        if group.by_hand or splits_tensors(self._config.engine_args):
            layers = [*(stage.n_layers for stage in spec.stages), spec.host_layers]
            return replace(spec, n_ctx=context_of(memory, layers, lent, self._config.min_ctx))
        fit = self._fit(spec, memory, lent)
        if servers:
            spec = make_launch_spec(model, self._binaries, servers, as_split(fit.layers), *args)
        return replace(spec, n_ctx=fit.n_ctx)

    def _lent(self, group: Group, servers: Sequence[StageServer], part: float) -> list[int]:
        """Bytes of each stage's device and, last, of this machine: no more than it has now, or has announced."""
        lent: list[int] = []
        for server, announced in zip(servers, group.memory, strict=False):
            free = [device.memory_free for device in server.info.devices]
            lent += [int(part * min(n, announced / _SPARE * n / max(sum(free), 1))) for n in free]
        free_here = self._free_bytes() - self._drafting.size_bytes
        return [*lent, int(part * min(free_here, group.memory[-1] / _SPARE))]

    def _gpu_limits(self) -> tuple[str, ...]:
        """llama-server itself fills GPUs, with layers in RAM if need be, but for a margin on each, in MiB."""
        options, cap = ["--fit-ctx", str(self._config.min_ctx)], self._config.max_vram_bytes
        if cap:
            margins = [max(_FIT_MARGIN_MIB, (d.memory_free - cap) >> 20) for d in self._devices()]
            options += ["--fit-target", ",".join(map(str, margins))]
        return tuple(options)

    def _fit(self, spec: LaunchSpec, memory: ModelMemory, lent: Sequence[int]) -> Fit:
        """The context and the layers of each device. Raises EngineError, which says what would fit."""
        model = spec.model
        *stages, here = lent
        fit = best_fit(memory, stages, here, self._config.min_ctx, model.n_nextn)
        if fit is None:
            wanted = memory.least_ctx(self._config.min_ctx)
            most = what_fits(memory, stages, here, model.n_nextn)
            raise EngineError(f"{model.name} does not fit with {wanted:,} tokens of context{advice(most)}")
        if spec.stages or fit.n_ctx < memory.n_ctx_train:
            sizes = [f"{in_gb(n)} on {stage.name}" for n, stage in zip(fit.sizes_bytes, spec.stages, strict=False)]
            sizes.append(f"{in_gb(fit.sizes_bytes[-1])} here")
            self.emit(f"{model.name} with {fit.n_ctx:,} tokens of context: {', '.join(sizes)}")
        return fit

    def _measure(self, model: Model) -> ModelMemory:
        key = model.fingerprint().hex()
        arguments = plan_arguments(model, self._config.engine_args)
        self._memories[key] = measure(self._binaries.measure, arguments, key)
        return self._memories[key]

    async def need(self, info: ModelInfo) -> Need:
        """What a model on disk takes with this machine as host, or a guess when llama.cpp does not say."""
        model = self._store.models.get(info.fingerprint)
        if model is not None:
            with contextlib.suppress(EngineError):  # which its engine will say better
                memory = await asyncio.to_thread(self._measure, model)
                return need(memory, memory.least_ctx(self._config.min_ctx), model.n_nextn)
        return Need(0, needed_bytes(info.size_bytes), 0, 0)

    def what_fits(self, placement: Placement) -> str:
        """The context that would fit now on the machines of a model that waits for more."""
        model = self._store.models.get(placement.model.fingerprint)
        memory = self._memories.get(placement.model.fingerprint)
        if model is None or memory is None or not placement.have_bytes:
            return ""
        *stages, here = placement.have_bytes
        return advice(what_fits(memory, stages, here, model.n_nextn))

    @property
    def ready(self) -> bool:
        return self.engine is not None and self.engine.state is EngineState.READY


def _ram(device: rpc.DeviceInfo) -> list[int]:
    """ggml takes all RAM for free."""
    return [available_ram()] if device.type == "CPU" else []
