"""How to launch coding agents with this endpoint: `mesh-llm agents`, and the lines that a node prints at its start."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Sequence
from typing import Any

import click
import orjson

from meshllm.cli.control import ask_node
from meshllm.cli.options import Command, port
from meshllm.errors import MeshLlmError
from meshllm.node.status import Snippet

_PROVIDER = "mesh-llm"
NO_KEY = "mesh-llm"  # for programs that insist on a key where none is needed
OWN_KEY = "YOUR_API_KEY"  # stands for the user's key, which is never printed


def launch_lines(url: str, models: Sequence[str], key: str) -> list[str]:
    """One line for each agent, or none without models. `url` ends in /v1."""
    if not models:
        return []
    pi, goose = _commands(url, models[0], key)
    return [f"pi:    {pi}   (once: mesh-llm agents)", f"goose: {goose}"]


def snippets(url: str, models: Sequence[str], key: str) -> list[Snippet]:
    """Commands and configuration to copy, or none without models. `url` ends in /v1."""
    if not models:
        return []
    pi, goose = _commands(url, models[0], key)
    config = orjson.dumps(_pi_models(url, models, key), option=orjson.OPT_INDENT_2).decode()
    return [
        Snippet("pi", pi),
        Snippet("~/.pi/agent/models.json for pi", config),
        Snippet("goose", goose),
    ]


def _commands(url: str, model: str, key: str) -> tuple[str, str]:
    """For pi and for goose. Model names come from other nodes, so they are quoted for the shell."""
    base, name = url.removesuffix("/v1"), shlex.quote(model)
    goose = f"GOOSE_PROVIDER=openai OPENAI_HOST={base} OPENAI_API_KEY={key} GOOSE_MODEL={name} goose session"
    return f"pi --provider {_PROVIDER} --model {name}", goose


def _pi_models(url: str, models: Sequence[str], key: str) -> dict[str, Any]:
    provider = {"baseUrl": url, "api": "openai-completions", "apiKey": key, "models": [{"id": name} for name in models]}
    return {"providers": {_PROVIDER: provider}}


@click.command("agents", cls=Command)
@port()
def agents(port: int) -> None:
    """Print commands that start the coding agents pi and goose.

    With them, the agents use the models that are served now.
    """
    found = asyncio.run(ask_node(port, "GET", "/status"))["agents"]
    if not found:
        raise MeshLlmError("no model is ready yet; mesh-llm status shows why")
    click.echo("\n\n".join(f"# {each['title']}\n{each['text']}" for each in found))
