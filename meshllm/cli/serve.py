"""`mesh-llm [serve]`: a node of the mesh, or one model over device servers named by hand; one endpoint either way."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import click

from meshllm.cli.options import ServeConfig, is_loopback, parse_split

_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command(context_settings={"ignore_unknown_options": False})
@click.option(
    "--model",
    multiple=True,
    help="A GGUF file, or a name; repeatable. What is not on disk comes from the mesh, or is downloaded.",
)
@click.option("--join", metavar="TOKEN", help="Join the mesh of this invite token.")
@click.option("--client", is_flag=True, help="Only use the mesh: no GPU, no model, no engine. Needs --join.")
@click.option("--port", default=9337, show_default=True, help="Port of the API.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address of the API.")
@click.option("--bind-port", default=0, help="UDP port of the mesh, to be forwarded by a router; default: any.")
@click.option(
    "--quic",
    type=click.Choice(["native", "aioquic"]),
    help="Engine of the mesh's links; default: the native one, and aioquic with --client or where it is not built.",
)
@click.option(
    "--advertise",
    multiple=True,
    metavar="HOST[:PORT]",
    help="Where others reach this node from outside, such as a router that forwards --bind-port; repeatable.",
)
@click.option("--name", help="What this node is called; default: the host's name.")
@click.option("--identity", type=_FILE, help="File of this node's key; default: in the user's data directory.")
@click.option("--no-fetch", is_flag=True, help="Get no model files from the mesh or the hub.")
@click.option(
    "--draft", metavar="MODEL", help="A small model that guesses ahead, or ngram; default: what the catalog pairs."
)
@click.option("--draft-max", default=8, show_default=True, type=click.IntRange(min=1), help="Tokens guessed at a time.")
@click.option("--no-draft", is_flag=True, help="No guessing ahead.")
@click.option(
    "--console", is_flag=False, flag_value=3131, type=int, metavar="[PORT]", help="A dashboard; default port: 3131."
)
@click.option(
    "--console-host",
    default="127.0.0.1",
    show_default=True,
    help="Address of the dashboard; one that others reach needs --api-key.",
)
@click.option("--api-key", default="", help="Whoever uses the API has to give it.")
@click.option(
    "--cors-origin",
    multiple=True,
    metavar="ORIGIN",
    help="Web pages that may use the API beside this machine's own, such as https://chat.example; * for all.",
)
@click.option("--split", is_flag=True, help="Split the model over the mesh even if it fits on one machine.")
@click.option("--max-vram", type=click.FloatRange(min=0, min_open=True), metavar="GB", help="Memory lent of a device.")
@click.option(
    "--tensor-split",
    callback=parse_split,
    metavar="R,R",
    help="Share of each stage in order and, last, of the host.",
)
@click.option("--device", metavar="NAME", help="The ggml device to use; default: all GPUs, or the CPU.")
@click.option("--threads", default=0, help="Threads of a CPU that computes for others; default: the number of cores.")
@click.option("--stage", "stages", multiple=True, metavar="ADDRESS", help="Without a mesh: a device server by hand.")
@click.option("--bin-dir", type=click.Path(path_type=Path, file_okay=False), help="Folder of another llama-server.")
@click.option("--engine-log", type=_FILE, help="Write all that llama-server prints to a file.")
@click.option("--log-json", is_flag=True, help="One JSON object per event.")
@click.option("--verbose", is_flag=True, help="Show all that llama-server prints.")
@click.argument("engine_args", nargs=-1, type=click.UNPROCESSED, metavar="[-- LLAMA_SERVER_OPTIONS]")
def serve(**options: object) -> None:
    """Serve a model (the default command). What follows -- goes to llama-server as it is."""
    config = ServeConfig(**options)  # type: ignore[arg-type]
    if config.client and not config.join:
        raise click.UsageError("--client needs --join TOKEN: a client has nothing of its own to serve")
    if config.client and config.model:
        raise click.UsageError("--client takes no --model; the mesh has its models")
    if len(config.model) > 1 and config.stages:
        raise click.UsageError("--stage serves one --model")
    if config.console is not None and not is_loopback(config.console_host) and not config.api_key:
        raise click.UsageError("--console-host beyond this machine needs --api-key KEY")
    if config.draft and config.no_draft:
        raise click.UsageError("--draft and --no-draft exclude each other")
    if config.stages and (config.join or config.client or config.split):
        raise click.UsageError("--stage names device servers by hand and goes without a mesh")
    if config.stages:
        from meshllm.cli.static_stages import serve_static_stages as work
    else:
        from meshllm.cli.node import serve_node as work
    runner()(work(config))


def runner() -> Callable[[Coroutine[Any, Any, None]], None]:
    if sys.platform == "win32":
        return asyncio.run
    import uvloop

    return uvloop.run
