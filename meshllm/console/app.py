"""The dashboard's HTTP application: page, events, changes, metrics, and the API for its chat."""

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
# A page of another origin cannot set this header without a preflight request, which is refused.
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
    """What the dashboard needs of its node."""

    async def describe_all(self) -> FullStatus: ...

    def make_token(self, expires_s: float = 0) -> str: ...
    def drop(self, name: str, undo: bool) -> str: ...


def make_console(node: ConsoleNode, target: PublicTarget, access: Access) -> web.Application:
    """The dashboard's application: the page and what it asks, and the API beside them for its chat."""
    console = _Console(node)
    routes = [
        web.get("/", console.page),
        web.get("/{file:" + "|".join(name.replace(".", r"\.") for name in _FILES) + "}", console.page),
        web.get("/api/status", console.status),
        web.get("/api/events", console.events),
        web.post("/api/token", console.token),
        web.post("/api/drop", console.drop),
        web.get("/metrics", console.metrics),
    ]
    app = make_app(target, access, routes, public=("/", *(f"/{name}" for name in _FILES)))
    app.cleanup_ctx.append(console.run_feed)
    return app


class _Console:
    """One handler per route."""

    def __init__(self, node: ConsoleNode) -> None:
        self._node = node
        self._feed = Feed(node.describe_all)
        self._contents = {name: (files("meshllm.console") / "page" / name).read_bytes() for name in _FILES}

    async def run_feed(self, _app: web.Application) -> AsyncIterator[None]:
        """Keeps the feed running while the application serves."""
        task = asyncio.create_task(self._feed.run(), name="console feed")
        yield
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    async def page(self, request: web.Request) -> web.Response:
        name = request.match_info.get("file") or "index.html"
        content = self._contents[name]
        return web.Response(body=content, content_type=_FILES[name], charset="utf-8", headers=_HEADERS)

    async def status(self, _request: web.Request) -> web.Response:
        return web.json_response(body=orjson.dumps(await self._node.describe_all()))

    async def events(self, request: web.Request) -> web.StreamResponse:
        """The status as server-sent events: at once, and after each change."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
        await response.prepare(request)
        feed = self._feed
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

    async def token(self, request: web.Request) -> web.StreamResponse:
        if refused := _guarded(request):
            return refused
        try:
            return web.json_response({"token": self._node.make_token()})
        except MeshLlmError as error:
            return error_response(503, "unavailable_error", str(error))

    async def drop(self, request: web.Request) -> web.StreamResponse:
        if refused := _guarded(request):
            return refused
        try:
            asked = orjson.loads(await request.read())
            return web.json_response({"name": self._node.drop(str(asked["model"]), bool(asked["undo"]))})
        except (orjson.JSONDecodeError, KeyError, TypeError):
            return error_response(400, "invalid_request_error", 'the body must be {"model": NAME, "undo": false}')
        except MeshLlmError as error:
            return error_response(404, "not_found_error", str(error))

    async def metrics(self, _request: web.Request) -> web.Response:
        body = render(await self._node.describe_all())
        return web.Response(body=body, content_type="text/plain", charset="utf-8")


def _guarded(request: web.Request) -> web.Response | None:
    """A refusal of a request without the guard header; None lets it pass."""
    if GUARD_HEADER not in request.headers:
        return error_response(403, "permission_error", f"the header {GUARD_HEADER}: 1 is required")
    return None
