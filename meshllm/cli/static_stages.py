"""`mesh-llm --stage ADDRESS ...`: one model over device servers named by the user, without a mesh."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Sequence
from dataclasses import replace

from meshllm import rpc
from meshllm.api import Access, RequestInfo, Served, Upstream, make_app
from meshllm.api.latencies import Latencies
from meshllm.api.routing import Load, check_capability, find_model
from meshllm.cli.http import access_of, bind, serving, until_signal, url_of
from meshllm.cli.options import ServeConfig
from meshllm.cli.output import Output, open_engine_log
from meshllm.engine import Engine, LaunchSpec, StageAddress, StageServer, find_binaries, make_launch_spec
from meshllm.engine.fit import advice, context_of
from meshllm.engine.launch import plan_arguments
from meshllm.engine.memory import measure
from meshllm.errors import EngineError
from meshllm.mesh.engine_status import EngineStatus
from meshllm.models.store import resolve
from meshllm.node.drafts import Drafting

_STAGE_TIMEOUT_S = 10.0
_SPARE = 0.95  # of a device's memory is planned with
_UNLIMITED = 1 << 60  # on the host the user decides


class _StaticStages:
    """The engine as the target of API requests."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        model = engine.spec.model
        projector = engine.spec.projector is not None
        self._model = Served(
            model.name, model.fingerprint().hex(), model.size_bytes, model.n_trunk, projector, model.capability
        )
        self._load = Load(time.monotonic)
        self.latencies = Latencies()

    def reason_for(self, info: RequestInfo) -> str:
        return self._engine.reason

    def served(self) -> list[Served]:
        return [self._model]

    async def acquire(self, info: RequestInfo, timeout_s: float, is_new: bool) -> Upstream | None:
        if info.model:
            find_model(info.model, [(self._model.name, self._model.fingerprint)], [])
        check_capability(self._model.capability, info)
        return Upstream(self._engine.socket, self._load) if await self._engine.wait_ready(timeout_s) else None

    def failure_passes(self) -> bool:
        """False: only the user can bring back a stage named by hand."""
        return False

    def describe(self) -> dict[str, EngineStatus]:
        return {"engine": self._engine.describe()}


async def serve_static_stages(config: ServeConfig) -> None:
    output = Output(verbose=config.verbose, json=config.log_json)
    output.show_logs()
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(contextlib.closing(bind(config.host, config.port)))
        log_file = stack.enter_context(open_engine_log(output, config.engine_log))
        model = resolve(config.model[0] if config.model else None)
        speculation = Drafting(config.draft, config.draft_tokens).for_model(model)
        servers = []
        for address in config.stages:
            info = await asyncio.to_thread(rpc.probe, address, _STAGE_TIMEOUT_S)
            servers.append(StageServer(StageAddress(address, address, address), info))
        binaries = find_binaries(config.bin_dir)
        spec = make_launch_spec(
            model=model,
            binaries=binaries,
            servers=servers,
            split=config.tensor_split,
            host_device=config.device,
            extra_args=config.llama_args,
            speculation=speculation,
        )
        spec = await asyncio.to_thread(_with_context, spec, servers, config)
        engine = Engine(spec, output.emit, output.progress, log_file)
        await until_signal(_run(engine, listener, access_of(config), output))


def _with_context(spec: LaunchSpec, servers: Sequence[StageServer], config: ServeConfig) -> LaunchSpec:
    """With the longest context for which the stages have memory; llama-server's own choice if llama.cpp cannot say.

    Raises EngineError when that is too short.
    """
    try:
        arguments = plan_arguments(spec.model, config.llama_args)
        memory = measure(spec.binaries.measure, arguments, spec.model.fingerprint().hex())
    except EngineError:
        return spec
    free = [int(_SPARE * device.memory_free) for server in servers for device in server.info.devices]
    layers = [*(stage.n_layers for stage in spec.stages), spec.host_layers]
    lent = [*free, _UNLIMITED]
    n_ctx, least = context_of(memory, layers, lent, config.min_ctx), memory.least_ctx(config.min_ctx)
    if not n_ctx and not memory.n_ctx:
        most = context_of(memory, layers, lent, 0)
        raise EngineError(
            f"{spec.model.name} does not fit with {least:,} tokens of context on its stages{advice(most)}"
        )
    return replace(spec, n_ctx=n_ctx)


async def _run(engine: Engine, listener: socket.socket, access: Access, output: Output) -> None:
    async def announce() -> None:
        await engine.first_ready.wait()
        output.emit(f"the API is at {url_of(listener)}")

    async with serving(make_app(_StaticStages(engine), access), listener):
        announced = asyncio.create_task(announce(), name="announce")
        try:
            await engine.run()
        finally:
            announced.cancel()
