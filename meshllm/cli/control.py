"""Requests to the node that runs on this machine, over its control socket."""

from __future__ import annotations

from typing import Any

import aiohttp

from meshllm.errors import MeshLlmError
from meshllm.paths import control_socket


async def ask_node(port: int, method: str, path: str, body: object | None = None) -> Any:
    """The decoded JSON, or the text, that the node behind this API port answers. Raises MeshLlmError."""
    socket = control_socket(port)
    try:
        async with (
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(path=str(socket))) as session,
            session.request(method, f"http://node{path}", json=body) as response,
        ):
            answer: Any = await (response.json() if response.content_type == "application/json" else response.text())
    except (aiohttp.ClientError, OSError):
        raise MeshLlmError(
            f"no mesh-llm of yours answers on port {port} of this machine; start one, or give its port with --port"
        ) from None
    if response.status != 200:
        raise MeshLlmError(str(answer.get("error")))
    return answer
