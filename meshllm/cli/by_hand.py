"""`mesh-llm --stage ADDRESS ...`: one model over device servers that the user names, without a mesh."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any

from meshllm import rpc
from meshllm.api import make_app
from meshllm.cli.endpoint import bind, serving, until_signal, url_of
from meshllm.cli.output import Output, open_engine_log
from meshllm.cli.serve import ServeConfig
from meshllm.engine import Engine, StageServer, find_binaries, plan_engine
from meshllm.models import resolve

_STAGE_TIMEOUT_S = 10.0


class _ByHand(Engine):
    """The engine as the API's target."""

    def describe(self) -> dict[str, Any]:
        return {"engine": super().describe()}


async def serve_by_hand(config: ServeConfig) -> None:
    output = Output(verbose=config.verbose, json=config.log_json)
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(contextlib.closing(bind(config.host, config.port)))
        log_file = stack.enter_context(open_engine_log(output, config.engine_log))
        model = resolve(config.model[0] if config.model else None)
        servers = []
        for address in config.stages:
            info = await asyncio.to_thread(rpc.probe, address, _STAGE_TIMEOUT_S)
            servers.append(StageServer(address, address, address, info))
        binaries = find_binaries(config.bin_dir)
        plan = plan_engine(model, binaries, servers, config.tensor_split, config.device, config.engine_args)
        for stage in plan.stages:
            if not stage.has_model:
                output.say(f"{stage.name} does not have {model.name}: its weights travel over the network")
        engine = _ByHand(plan, output.say, output.progress, log_file)
        await until_signal(_run(engine, listener, output))


async def _run(engine: Engine, listener: socket.socket, output: Output) -> None:
    async def announce() -> None:
        await engine.first_ready.wait()
        output.say(f"the API is at {url_of(listener)}")

    async with serving(make_app(engine), listener):
        announced = asyncio.create_task(announce(), name="announce")
        try:
            await engine.run()
        finally:
            announced.cancel()
