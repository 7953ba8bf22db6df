"""`mesh-llm token`: makes another invite token, or revokes one."""

from __future__ import annotations

import asyncio
import re

import click

from meshllm.cli.control import ask_node
from meshllm.cli.options import Command, option, port

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@click.command("token", cls=Command)
@port()
@option("--expires", metavar="TIME", help="How long the token is valid, such as 30m, 24h or 7d; default: forever.")
@option("--revoke", metavar="TOKEN", help="Revoke this token: no more nodes can join with it. Prints none.")
def token(port: int, expires: str | None, revoke: str | None) -> None:
    """Print an invite token, or revoke one."""
    if revoke:
        asyncio.run(ask_node(port, "POST", "/revoke", {"token": revoke}))
        click.echo("revoked: no more nodes can join with it; those that have joined stay")
    else:
        click.echo(asyncio.run(ask_node(port, "POST", "/token", {"expires_s": parse_time(expires)}))["token"])


def parse_time(text: str | None) -> float:
    """Seconds in a text such as "24h"; 0 for None. Raises click.BadParameter."""
    if text is None:
        return 0.0
    match = re.fullmatch(r"(\d+)([smhd])", text.strip().lower())
    if not match or int(match[1]) == 0:
        raise click.BadParameter("expected a number followed by s, m, h or d, such as 24h", param_hint="--expires")
    return float(int(match[1]) * _UNITS_S[match[2]])
