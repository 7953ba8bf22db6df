"""How coding agents are pointed at the endpoint: `mesh-llm agents`, and the lines at the start."""

from __future__ import annotations

import asyncio
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
    base = url.removesuffix("/v1")
    goose = f"GOOSE_PROVIDER=openai OPENAI_HOST={base} OPENAI_API_KEY=mesh-llm GOOSE_MODEL={models[0]} goose session"
    return [f"pi:    pi --provider {_PROVIDER} --model {models[0]}   (once: mesh-llm agents)", f"goose: {goose}"]


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
