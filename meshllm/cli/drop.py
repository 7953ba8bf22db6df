"""`mesh-llm drop`: stops serving a model everywhere in the mesh."""

from __future__ import annotations

import asyncio

import click

from meshllm.cli.control import ask_node
from meshllm.cli.options import Command, option, port


@click.command("drop", cls=Command)
@click.argument("model")
@option("--undo", is_flag=True, help="Allow the model to be served again.")
@port()
def drop(model: str, undo: bool, port: int) -> None:
    """Stop serving a model on all nodes.

    Responses in progress are completed.
    """
    name = asyncio.run(ask_node(port, "POST", "/drop", {"model": model, "undo": undo}))["name"]
    if undo:
        click.echo(f"{name} may be served again")
    else:
        click.echo(f"{name} is no longer served on any node; mesh-llm drop --undo {name} allows it again")
