"""`mesh-llm [serve]`: a node of a mesh, or one model over device servers named by hand; one endpoint either way."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

import click

from meshllm.cli.options import (
    PORT,
    Command,
    ServeConfig,
    ctx,
    is_loopback,
    max_vram,
    min_ctx,
    option,
    parse_split,
    port,
    threads,
)

_FILE = click.Path(path_type=Path, dir_okay=False)
_EXAMPLES = """\b
Examples:
  mesh-llm                                  the only model on disk, or the default
  mesh-llm --model qwen3-32b -- -c 16384    by name; -c is llama-server's option
  mesh-llm --model ~/models/my.gguf         a file
  mesh-llm --join TOKEN                     lend this machine to a mesh
  mesh-llm --client --join TOKEN            use a mesh without a GPU
  mesh-llm --console                        with the dashboard
"""

_model = partial(option, group="Model")
_mesh = partial(option, group="Mesh")
_api = partial(option, group="API")
_engine = partial(option, group="Engine")


@click.command(cls=Command, epilog=_EXAMPLES)
@_model(
    "--model",
    multiple=True,
    metavar="MODEL",
    help="GGUF file or model name; repeatable. A model that is not on disk is copied from the mesh or downloaded.",
)
@_model("--no-fetch", is_flag=True, help="Never copy or download model files.")
@_model(
    "--draft",
    metavar="MODEL",
    help="Draft model for speculative decoding, EAGLE-3 and DFlash included; or mtp for the model's own NextN layers, "
    "or ngram, or a ngram type of llama-server, to draft from repetition; default: mtp where the model has such "
    "layers, or else the draft that the catalog pairs with it, if that is on disk.",
)
@_model(
    "--draft-max",
    type=click.IntRange(min=1),
    metavar="N",
    help="Tokens drafted per step; default: 3 with mtp, 8 with a draft model or ngram.",
)
@_model("--no-draft", is_flag=True, help="Turn speculative decoding off.")
@_mesh("--join", metavar="TOKEN", help="Join the mesh that issued this invite token.")
@_mesh(
    "--client", is_flag=True, help="Use the mesh and lend nothing: no model is stored or computed here. Needs --join."
)
@_mesh("--name", metavar="NAME", help="Name of this node; default: the machine's host name.")
@_mesh("--identity", type=_FILE, metavar="FILE", help="Key file of this node; default: in the user's data directory.")
@_mesh("--bind-port", type=PORT, default=0, metavar="PORT", help="UDP port of the mesh; default: any free port.")
@_mesh(
    "--advertise",
    multiple=True,
    metavar="HOST[:PORT]",
    help="Address at which others reach this node, such as a router that forwards --bind-port; repeatable.",
)
@_mesh(
    "--quic",
    type=click.Choice(["native", "aioquic"]),
    help="QUIC stack; default: native, or aioquic with --client or where native was not built.",
)
@_mesh("--split", is_flag=True, help="Split the model over the mesh even if it fits on one machine.")
@_mesh(
    "--tensor-split",
    callback=parse_split,
    metavar="R,R",
    help="Shares of the model, such as 0.6,0.4: for each stage in order and, last, for the host; default: by memory.",
)
@_mesh(
    "--stage",
    "stages",
    multiple=True,
    metavar="ADDRESS",
    help="Without a mesh: use the device server at this address as a stage; repeatable.",
)
@port(group="API")
@_api("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Address the API listens on.")
@_api("--api-key", default="", metavar="KEY", help="API key that clients must send, except to /health; default: none.")
@_api(
    "--cors-origin",
    multiple=True,
    metavar="ORIGIN",
    help="Origin whose web pages may call the API, such as https://chat.example; * allows all; repeatable. "
    "Pages served from this machine always may.",
)
@_api(
    "--console",
    is_flag=False,
    flag_value=3131,
    type=PORT,
    metavar="[PORT]",
    help="Serve the web dashboard; default port: 3131.",
)
@_api(
    "--console-host",
    default="127.0.0.1",
    show_default=True,
    metavar="ADDRESS",
    help="Address the dashboard listens on; one that others can reach needs --api-key.",
)
@_engine("--device", metavar="NAME", help="Device to use, such as CUDA0; default: all GPUs, or else the CPU.")
@max_vram(group="Engine")
@threads(group="Engine")
@ctx(group="Engine")
@min_ctx(group="Engine")
@_engine(
    "--bin-dir",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="FOLDER",
    help="Folder of another build of llama-server.",
)
@_engine("--engine-log", type=_FILE, metavar="FILE", help="Write llama-server's output to a file.")
@_engine("-v", "--verbose", is_flag=True, help="Print llama-server's output, debug lines and tracebacks.")
@_engine("--log-json", is_flag=True, help="Print events as JSON, one object per line.")
@click.argument("engine_args", nargs=-1, type=click.UNPROCESSED, metavar="[-- LLAMA_SERVER_OPTIONS]")
def serve(**options: object) -> None:
    """Serve a model (the default command).

    Everything after -- is passed to llama-server unchanged.
    """
    config = ServeConfig(**options)  # type: ignore[arg-type]
    _check(config)
    if config.stages:
        from meshllm.cli.static_stages import serve_static_stages as work
    else:
        from meshllm.cli.node import serve_node as work
    _runner()(work(config))


def _check(config: ServeConfig) -> None:
    """Raises click.UsageError for options that do not go together."""
    if config.client and not config.join:
        raise click.UsageError("--client needs --join TOKEN: a client has nothing of its own to serve")
    if config.client and config.model:
        raise click.UsageError("--client takes no --model: it uses the models that the mesh serves")
    if len(config.model) > 1 and config.stages:
        raise click.UsageError("--stage works with a single --model")
    if config.console is not None and not is_loopback(config.console_host) and not config.api_key:
        raise click.UsageError("other machines can reach this --console-host, so --api-key KEY is needed")
    if config.draft and config.no_draft:
        raise click.UsageError("--draft and --no-draft cannot be combined")
    if config.stages and (config.join or config.client or config.split):
        raise click.UsageError("--stage works without a mesh: it cannot be combined with --join, --client or --split")


def _runner() -> Callable[[Coroutine[Any, Any, None]], None]:
    if sys.platform == "win32":
        return asyncio.run
    import uvloop

    return uvloop.run
