"""The dashboard's endpoint: the page, its events, what it may change, metrics, and the API for its chat."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from importlib.resources import files
from typing import Protocol

import orjson
from aiohttp import web

from meshllm.api import Access, PublicTarget, make_app
from meshllm.api.errors import error_response
from meshllm.console.feed import Feed
from meshllm.console.metrics import render
from meshllm.errors import MeshLlmError
from meshllm.node.status import FullStatus

_KEEP_ALIVE_S = 15.0
# A page of another origin cannot set it without asking, and is told no.
GUARD_HEADER = "X-Mesh-LLM-Console"
_FILES = {
    "index.html": "text/html",
    "style.css": "text/css",
    "api.js": "text/javascript",
    "app.js": "text/javascript",
    "view.js": "text/javascript",
    "chat.js": "text/javascript",
    "markdown.js": "text/javascript",
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class ConsoleNode(Protocol):
    """What the dashboard asks of its node."""

    async def describe_all(self) -> FullStatus: ...

    def make_token(self, expires_s: float = 0) -> str: ...
    def drop(self, name: str, undo: bool) -> str: ...


def make_console(node: ConsoleNode, target: PublicTarget, access: Access) -> web.Application:
    feed = Feed(node.describe_all)
    contents = {name: (files("meshllm.console") / "page" / name).read_bytes() for name in _FILES}

    async def run_feed(_app: web.Application) -> AsyncIterator[None]:
        task = asyncio.create_task(feed.run(), name="console board")
        yield
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    async def status(_request: web.Request) -> web.Response:
        return web.json_response(body=orjson.dumps(await node.describe_all()))

    async def events(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
        await response.prepare(request)
        feed.viewers += 1
        try:
            snapshot = await feed.first()
            while True:
                seen = feed.version  # before the write, which may take a while
                await response.write(b"data: " + snapshot + b"\n\n")
                while not await feed.after(seen, _KEEP_ALIVE_S):
                    await response.write(b": still here\n\n")
                snapshot = feed.snapshot
        finally:
            feed.viewers -= 1

    async def token(request: web.Request) -> web.StreamResponse:
        if refused := _guarded(request):
            return refused
        try:
            return web.json_response({"token": node.make_token()})
        except MeshLlmError as error:
            return error_response(503, "unavailable_error", str(error))

    async def drop(request: web.Request) -> web.StreamResponse:
        if refused := _guarded(request):
            return refused
        try:
            asked = orjson.loads(await request.read())
            return web.json_response({"name": node.drop(str(asked["model"]), bool(asked["undo"]))})
        except (orjson.JSONDecodeError, KeyError, TypeError):
            return error_response(400, "invalid_request_error", 'the body is to be {"model": NAME, "undo": false}')
        except MeshLlmError as error:
            return error_response(404, "not_found_error", str(error))

    async def metrics(_request: web.Request) -> web.Response:
        return web.Response(body=render(await node.describe_all()), content_type="text/plain", charset="utf-8")

    async def page(request: web.Request) -> web.Response:
        name = request.match_info.get("file") or "index.html"
        return web.Response(body=contents[name], content_type=_FILES[name], charset="utf-8", headers=_HEADERS)

    routes = [
        web.get("/", page),
        web.get("/{file:" + "|".join(name.replace(".", r"\.") for name in _FILES) + "}", page),
        web.get("/api/status", status),
        web.get("/api/events", events),
        web.post("/api/token", token),
        web.post("/api/drop", drop),
        web.get("/metrics", metrics),
    ]
    app = make_app(target, access, routes, public=("/", *(f"/{name}" for name in _FILES)))
    app.cleanup_ctx.append(run_feed)
    return app


def _guarded(request: web.Request) -> web.Response | None:
    if GUARD_HEADER not in request.headers:
        return error_response(403, "permission_error", f"this needs the header {GUARD_HEADER}: 1")
    return None
