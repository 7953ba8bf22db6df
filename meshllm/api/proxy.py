"""Passes every request on to llama-server, bytes as they come, and answers itself while there is none."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import asdict

import aiohttp
import orjson
from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy

from meshllm.engine import Engine, EngineState

HOLD_S = 60.0  # how long a request waits for an engine that is loading
_RETRY_S = 0.05
_MAX_CONNECTIONS = 512
# RFC 9110 section 7.6.1: these belong to one connection, not to the message
_HOP_BY_HOP = {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer"}
_HOP_BY_HOP |= {"transfer-encoding", "upgrade", "proxy-connection"}


def make_app(engine: Engine) -> web.Application:
    app = web.Application(client_max_size=0)
    session_key = web.AppKey("session", aiohttp.ClientSession)

    async def engine_session(app: web.Application) -> AsyncIterator[None]:
        connector = aiohttp.UnixConnector(path=str(engine.socket), limit=_MAX_CONNECTIONS)
        timeout = aiohttp.ClientTimeout(total=None)  # an answer may take hours
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False) as session:
            app[session_key] = session
            yield

    async def forward(request: web.Request) -> web.StreamResponse:
        if request.path == "/health":
            with contextlib.suppress(aiohttp.ClientError):
                return await pass_on(request, app[session_key])
            return unavailable(engine)
        deadline = time.monotonic() + HOLD_S
        while await engine.wait_ready(deadline - time.monotonic()):
            try:
                return await pass_on(request, app[session_key])
            except aiohttp.ClientConnectorError:
                await asyncio.sleep(_RETRY_S)  # it has just died, and its supervisor will see it in a moment
            except aiohttp.ClientError:
                break
        return unavailable(engine)

    async def status(_request: web.Request) -> web.Response:
        return web.json_response(body=orjson.dumps(describe(engine)))

    app.cleanup_ctx.append(engine_session)
    app.router.add_get("/mesh/status", status)
    app.router.add_route("*", "/{path:.*}", forward)
    return app


async def pass_on(request: web.Request, session: aiohttp.ClientSession) -> web.StreamResponse:
    """One request and its answer. When the client goes, aiohttp cancels us and with us the engine's work.

    Raises aiohttp.ClientError as long as nothing of the answer has been sent.
    """
    body = request.content if request.body_exists else None
    url = f"http://engine{request.raw_path}"
    async with session.request(
        request.method, url, headers=end_to_end(request.headers), data=body, allow_redirects=False
    ) as upstream:
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


def unavailable(engine: Engine) -> web.Response:
    """503 in the format of OpenAI's errors."""
    lost = engine.state is EngineState.STAGE_LOST
    message = engine.reason or "the engine is being restarted"
    error = {"message": message, "type": "unavailable_error", "code": 503}
    headers = {"Retry-After": "5" if lost else "1"}
    return web.json_response({"error": error}, status=503, headers=headers)


def describe(engine: Engine) -> dict[str, object]:
    """What GET /mesh/status answers."""
    plan = engine.plan
    counters = engine.counters()
    stages = [
        asdict(stage) | {"counters": counters.stages[i] if i < len(counters.stages) else {}}
        for i, stage in enumerate(plan.stages)
    ]
    return {
        "state": str(engine.state),
        "reason": engine.reason,
        "restarts": engine.restarts,
        "model": {
            "name": plan.model.name,
            "size_bytes": plan.model.size_bytes,
            "n_layers": plan.model.n_layers,
        },
        "host": {"device": plan.host_device, "n_layers": plan.host_layers},
        "stages": stages,
    }
