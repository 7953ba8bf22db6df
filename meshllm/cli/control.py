"""Questions to the node that runs on this machine, over its control socket."""

from __future__ import annotations

from typing import Any

import aiohttp
import click

from meshllm.errors import MeshLlmError
from meshllm.paths import control_socket

port_option = click.option("--port", default=9337, show_default=True, help="API port of the node.")


async def ask_node(port: int, method: str, path: str, body: object | None = None) -> Any:
    socket = control_socket(port)
    try:
        async with (
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(path=str(socket))) as session,
            session.request(method, f"http://node{path}", json=body) as response,
        ):
            answer: Any = await (response.json() if response.content_type == "application/json" else response.text())
    except (aiohttp.ClientError, OSError):
        raise MeshLlmError(f"no node of yours runs with API port {port}; name another with --port") from None
    if response.status != 200:
        raise MeshLlmError(str(answer.get("error")))
    return answer
