"""`mesh-llm token`: another invite token, or one taken back."""

from __future__ import annotations

import asyncio
import re

import click

from meshllm.cli.control import ask_node, port_option

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@click.command("token")
@port_option
@click.option("--expires", metavar="TIME", help="How long it admits, such as 30m, 24h or 7d; default: for ever.")
@click.option("--revoke", metavar="TOKEN", help="Let this token admit nobody any more.")
def token(port: int, expires: str | None, revoke: str | None) -> None:
    """Print an invite token for the mesh."""
    if revoke:
        asyncio.run(ask_node(port, "POST", "/revoke", {"token": revoke}))
        click.echo("revoked: whoever has joined with it stays, nobody else can use it")
    else:
        click.echo(asyncio.run(ask_node(port, "POST", "/token", {"expires_s": parse_time(expires)}))["token"])


def parse_time(text: str | None) -> float:
    """Seconds; 0 for None."""
    if text is None:
        return 0.0
    match = re.fullmatch(r"(\d+)([smhd])", text.strip().lower())
    if not match or int(match[1]) == 0:
        raise click.BadParameter("write a number and s, m, h or d, such as 24h", param_hint="--expires")
    return float(int(match[1]) * _UNITS_S[match[2]])
