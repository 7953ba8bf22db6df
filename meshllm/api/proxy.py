"""Passes every request on to a llama-server, here or behind another node, and answers itself while there is none."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Protocol

import aiohttp
import orjson
from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy

HOLD_S = 60.0  # how long a request waits for an engine that is loading
MAX_BODY_BYTES = 64 << 20  # images come inside
_RETRY_S = 0.1
_ASK_AGAIN = "Mesh-LLM-Ask-Again"  # from node to node: this host has no engine at present
_MAX_ATTEMPTS = 3  # a request that kills engines may not kill them for ever
_MAX_CONNECTIONS = 512
# RFC 9110 section 7.6.1: these belong to one connection, not to the message
_HOP_BY_HOP = {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer"}
_HOP_BY_HOP |= {"transfer-encoding", "upgrade", "proxy-connection"}


class Target(Protocol):
    """Who serves requests now."""

    @property
    def reason(self) -> str:
        """Why nobody does."""
        ...

    async def socket_for(self, timeout_s: float) -> Path | None:
        """The Unix socket that a request should go to; waits for one. None when there will be none in time."""
        ...

    def note_request(self) -> None:
        """A request came that wants a model's answer."""
        ...

    def failure_passes(self) -> bool:
        """Whether an engine that answers 500 has lost a machine which others will replace."""
        ...

    def describe(self) -> dict[str, Any]:
        """What GET /mesh/status answers."""
        ...


class _AskAgain(aiohttp.ClientError):
    """Nothing was computed, or nothing of it can be had; somebody else may serve the request."""


class _Upstreams:
    """One client session per Unix socket."""

    def __init__(self) -> None:
        self._sessions: dict[Path, aiohttp.ClientSession] = {}

    def session(self, socket: Path) -> aiohttp.ClientSession:
        if socket not in self._sessions:
            connector = aiohttp.UnixConnector(path=str(socket), limit=_MAX_CONNECTIONS)
            timeout = aiohttp.ClientTimeout(total=None)  # an answer may take hours
            self._sessions[socket] = aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False)
        return self._sessions[socket]

    async def close(self) -> None:
        for session in self._sessions.values():
            await session.close()


def make_app(target: Target) -> web.Application:
    app = web.Application(client_max_size=MAX_BODY_BYTES)
    upstreams_key = web.AppKey("upstreams", _Upstreams)

    async def with_upstreams(app: web.Application) -> AsyncIterator[None]:
        app[upstreams_key] = _Upstreams()
        yield
        await app[upstreams_key].close()

    async def forward(request: web.Request) -> web.StreamResponse:
        try:
            body = await request.read()  # whole, so that it can be sent again when the engine dies
        except web.HTTPRequestEntityTooLarge:
            return error_response(413, "invalid_request_error", f"the body is over {MAX_BODY_BYTES >> 20} MiB")
        hold_s = 0.0 if request.path == "/health" else HOLD_S
        if request.method == "POST":
            target.note_request()
        deadline, attempts = time.monotonic() + hold_s, 0
        while socket := await target.socket_for(deadline - time.monotonic()):
            try:
                return await pass_on(request, body, app[upstreams_key].session(socket), target)
            except aiohttp.ClientError as error:
                # Nothing was answered. Who cannot be connected to has not died of the request.
                attempts += not isinstance(error, aiohttp.ClientConnectorError | _AskAgain)
                if attempts >= _MAX_ATTEMPTS or time.monotonic() >= deadline:
                    break
                await asyncio.sleep(_RETRY_S)
        return unavailable(target)

    async def status(_request: web.Request) -> web.Response:
        return web.json_response(body=orjson.dumps(target.describe()))

    app.cleanup_ctx.append(with_upstreams)
    app.router.add_get("/mesh/status", status)
    app.router.add_route("*", "/{path:.*}", forward)
    return app


async def pass_on(
    request: web.Request, body: bytes, session: aiohttp.ClientSession, target: Target
) -> web.StreamResponse:
    """One request and its answer. When the client goes, aiohttp cancels us and with us the engine's work.

    Raises aiohttp.ClientError as long as nothing of the answer has been sent.
    """
    async with session.request(
        request.method,
        f"http://engine{request.raw_path}",
        headers=end_to_end(request.headers),
        data=body or None,
        allow_redirects=False,
    ) as upstream:
        if _ASK_AGAIN in upstream.headers or (upstream.status == 500 and target.failure_passes()):
            raise _AskAgain
        response = web.StreamResponse(status=upstream.status, headers=end_to_end(upstream.headers))
        if "Content-Length" not in upstream.headers and request.method != "HEAD":
            response.enable_chunked_encoding()
        await response.prepare(request)
        try:
            async for chunk in upstream.content.iter_any():
                await response.write(chunk)
        except aiohttp.ClientError:
            # The engine died in the middle: an answer cut off must not look complete.
            if request.transport:
                request.transport.abort()
            raise asyncio.CancelledError from None
        with contextlib.suppress(ConnectionError):
            await response.write_eof()
        return response


def end_to_end(headers: CIMultiDictProxy[str]) -> CIMultiDict[str]:
    """Without what concerns only one of the two connections."""
    named = {name.strip().lower() for name in headers.get("Connection", "").split(",")}
    return CIMultiDict((k, v) for k, v in headers.items() if k.lower() not in _HOP_BY_HOP | named)


def unavailable(target: Target) -> web.Response:
    response = error_response(503, "unavailable_error", target.reason or "the engine is being restarted")
    response.headers["Retry-After"] = "2"
    response.headers[_ASK_AGAIN] = "1"
    return response


def error_response(status: int, kind: str, message: str) -> web.Response:
    """In the format of OpenAI's errors."""
    return web.json_response({"error": {"message": message, "type": kind, "code": status}}, status=status)
