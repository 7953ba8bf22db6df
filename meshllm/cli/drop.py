"""`mesh-llm drop`: one model less in the mesh."""

from __future__ import annotations

import asyncio

import click

from meshllm.cli.control import ask_node, port_option


@click.command("drop")
@click.argument("model")
@click.option("--undo", is_flag=True, help="Let it be served again.")
@port_option
def drop(model: str, undo: bool, port: int) -> None:
    """Stop serving a model, on all nodes of the mesh; what is being answered is answered."""
    name = asyncio.run(ask_node(port, "POST", "/drop", {"model": model, "undo": undo}))["name"]
    if undo:
        click.echo(f"{name} may be served again")
    else:
        click.echo(f"{name} is dropped; mesh-llm drop --undo {name} brings it back")
