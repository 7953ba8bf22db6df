"""How coding agents are pointed at the endpoint: `mesh-llm agents`, and the lines at the start."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Sequence
from typing import Any

import click
import orjson

from meshllm.cli.ask_node import ask_node, port_option

_PROVIDER = "mesh-llm"


def launch_lines(url: str, models: Sequence[str]) -> list[str]:
    """`url` ends in /v1."""
    if not models:
        return []
    pi, goose = _commands(url, models[0])
    return [f"pi:    {pi}   (once: mesh-llm agents)", f"goose: {goose}"]


def _commands(url: str, model: str) -> tuple[str, str]:
    """Names of models are others' text: quoted for the shell."""
    base, name = url.removesuffix("/v1"), shlex.quote(model)
    goose = f"GOOSE_PROVIDER=openai OPENAI_HOST={base} OPENAI_API_KEY=mesh-llm GOOSE_MODEL={name} goose session"
    return f"pi --provider {_PROVIDER} --model {name}", goose


def snippets(url: str, models: Sequence[str]) -> list[dict[str, str]]:
    """What the dashboard offers to copy: title and text."""
    if not models:
        return []
    pi, goose = _commands(url, models[0])
    config = orjson.dumps(pi_models(url, models), option=orjson.OPT_INDENT_2).decode()
    return [
        {"title": "pi", "text": pi},
        {"title": "~/.pi/agent/models.json for pi", "text": config},
        {"title": "goose", "text": goose},
    ]


def pi_models(url: str, models: Sequence[str]) -> dict[str, Any]:
    """What belongs into ~/.pi/agent/models.json."""
    provider = {
        "baseUrl": url,
        "api": "openai-completions",
        "apiKey": "mesh-llm",
        "models": [{"id": name} for name in models],
    }
    return {"providers": {_PROVIDER: provider}}


@click.command("agents")
@port_option
def agents(port: int) -> None:
    """Print how to launch pi and goose with the models served now."""
    names = asyncio.run(_served(port))
    url = f"http://localhost:{port}/v1"
    for line in launch_lines(url, names):
        click.echo(line)
    click.echo("\nfor pi, in ~/.pi/agent/models.json:")
    click.echo(orjson.dumps(pi_models(url, names), option=orjson.OPT_INDENT_2))


async def _served(port: int) -> list[str]:
    answer = await ask_node(port, "GET", "/status")
    return [str(name) for name in answer["served"]]
