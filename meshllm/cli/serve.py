"""`mesh-llm [serve]`: one model, on this machine or over device servers, at one endpoint."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import click
from aiohttp import web

from meshllm import rpc
from meshllm.api import make_app
from meshllm.cli.output import Output
from meshllm.engine import Engine, find_binaries, plan_engine
from meshllm.errors import MeshLlmError
from meshllm.models import resolve

_STAGE_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class ServeConfig:
    model: str | None
    host: str
    port: int
    stages: tuple[str, ...]
    tensor_split: tuple[float, ...] | None
    host_device: str | None
    bin_dir: Path | None
    engine_log: Path | None
    verbose: bool
    engine_args: tuple[str, ...]


def parse_split(_ctx: click.Context, _param: click.Parameter, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter("write numbers with commas between, such as 0.67,0.33") from None


@click.command(context_settings={"ignore_unknown_options": False})
@click.option("--model", help="A GGUF file, or the name of a model on disk.")
@click.option("--port", default=9337, show_default=True, help="Port of the API.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address of the API.")
@click.option(
    "--stage",
    "stages",
    multiple=True,
    metavar="ADDRESS",
    help="A device server that takes layers; repeatable, in order.",
)
@click.option(
    "--tensor-split",
    callback=parse_split,
    metavar="R,R",
    help="Share of each stage; one more for the host's own.",
)
@click.option(
    "--device",
    "host_device",
    metavar="NAME",
    help="The host's own device with --stage; default: the first GPU, or the CPU.",
)
@click.option("--bin-dir", type=click.Path(path_type=Path, file_okay=False), help="Folder of another llama-server.")
@click.option(
    "--engine-log",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write all that llama-server prints to a file.",
)
@click.option("--verbose", is_flag=True, help="Show all that llama-server prints.")
@click.argument("engine_args", nargs=-1, type=click.UNPROCESSED, metavar="[-- LLAMA_SERVER_OPTIONS]")
def serve(**options: object) -> None:
    """Serve a model (the default command). What follows -- goes to llama-server as it is."""
    run = _runner()
    run(_serve(ServeConfig(**options)))  # type: ignore[arg-type]


def _runner() -> Callable[[Awaitable[None]], None]:
    if sys.platform == "win32":
        return asyncio.run  # type: ignore[return-value]
    import uvloop

    return uvloop.run  # type: ignore[return-value]


async def _serve(config: ServeConfig) -> None:
    output = Output(verbose=config.verbose)
    listener = bind(config.host, config.port)
    with contextlib.closing(listener):
        model = resolve(config.model)
        binaries = find_binaries(config.bin_dir)
        servers = [
            (address, await asyncio.to_thread(rpc.probe, address, _STAGE_TIMEOUT_S)) for address in config.stages
        ]
        plan = plan_engine(model, binaries, servers, config.tensor_split, config.host_device, config.engine_args)
        for stage in plan.stages:
            if not stage.has_model:
                output.say(f"{stage.address} does not have {model.name}: its weights travel over the network")
        with contextlib.ExitStack() as stack:
            log_file = output.engine_log()
            if config.engine_log:
                try:
                    log_file = stack.enter_context(config.engine_log.open("w"))
                except OSError as error:
                    raise MeshLlmError(f"cannot write {config.engine_log}: {error.strerror}") from error
            engine = Engine(plan, output.say, output.progress, log_file)
            await _run(engine, listener, config, output)


def bind(host: str, port: int) -> socket.socket:
    """Before anything else is started. Raises MeshLlmError."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
        return listener
    except (OSError, OverflowError) as error:
        if getattr(error, "errno", None) == 98 or "in use" in str(error):
            raise MeshLlmError(f"port {port} is in use; choose another with --port") from None
        raise MeshLlmError(f"cannot listen on {host} port {port}: {error}") from None


async def _run(engine: Engine, listener: socket.socket, config: ServeConfig, output: Output) -> None:
    """Until a signal comes or the engine gives up."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    runner = web.AppRunner(make_app(engine), handler_cancellation=True, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    supervised = asyncio.create_task(engine.run(), name="engine")
    try:
        await web.SockSite(runner, listener, backlog=1024).start()
        announced = asyncio.create_task(_announce(engine, listener, output), name="announce")
        stopped = asyncio.create_task(stop.wait(), name="stop")
        await asyncio.wait({supervised, stopped}, return_when=asyncio.FIRST_COMPLETED)
        announced.cancel()
        stopped.cancel()
    finally:
        supervised.cancel()
        await runner.cleanup()
        with contextlib.suppress(asyncio.CancelledError):
            await supervised


async def _announce(engine: Engine, listener: socket.socket, output: Output) -> None:
    await engine.first_ready.wait()
    host, port = listener.getsockname()[:2]
    output.say(f"the API is at http://{f'[{host}]' if ':' in host else host}:{port}/v1")
