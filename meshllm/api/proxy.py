"""Forwards every request to a llama-server, here or behind another node; answers itself while there is none."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import aiohttp
import orjson
from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from meshllm.api.access import KEY_HEADERS, Access, add_cors, middleware
from meshllm.api.errors import error_response
from meshllm.api.latencies import Latencies
from meshllm.api.routing import RequestInfo, needed_for, read_request_info
from meshllm.api.target import PeerTarget, PublicTarget, Served, Target, Upstream
from meshllm.errors import NotJsonError, UnknownModelError, WrongModelError

HOLD_S = 60.0  # how long a request waits while its engine is loading
MAX_BODY_BYTES = 64 << 20  # requests may contain images
_RETRY_S = 0.1
_READ_IN_THREAD = 1 << 20  # bytes of JSON above which parsing would hold up the event loop
# Between nodes only:
MODEL_HEADER = "Mesh-LLM-Model"  # in requests: the fingerprint that the sender believes the host serves
ENGINE_PATH = "/mesh/engine"  # answers with the host's EngineStatus
_TRY_ELSEWHERE = "Mesh-LLM-Ask-Again"  # in answers: the host has no engine for the request
_BUSY = "Mesh-LLM-Busy"  # in answers: requests in work at the host
_OURS = "mesh-llm-"
_MAX_ATTEMPTS = 3  # of a request that may itself be what kills the engine
_MAX_CONNECTIONS = 512
# RFC 9110 section 7.6.1: these belong to the connection, not to the message
_HOP_BY_HOP = {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer"}
_HOP_BY_HOP |= {"transfer-encoding", "upgrade", "proxy-connection"}


class _TryElsewhere(aiohttp.ClientError):
    """This server gave no result; another may serve the request."""


class _Sessions:
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


_SESSIONS = web.AppKey("upstreams", _Sessions)


def make_app(
    target: PublicTarget, access: Access, routes: Sequence[web.RouteDef] = (), public: Collection[str] = ()
) -> web.Application:
    """The endpoint for users. `routes` precede its own; `public` paths need no key."""
    endpoint = _PublicEndpoint(target, access)
    app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[middleware(access, {"/health", *public})])
    app.on_response_prepare.append(add_cors)
    app.cleanup_ctx.append(_with_sessions)
    app.router.add_routes(routes)
    app.router.add_get("/mesh/status", endpoint.status)
    app.router.add_get("/v1/models", endpoint.models)
    app.router.add_get("/models", endpoint.models)
    app.router.add_get("/v1/models/{name:.+}", endpoint.model)
    app.router.add_route("*", "/{path:.*}", endpoint.forward)
    return app


def make_peer_app(own: PeerTarget) -> web.Application:
    """The endpoint for other nodes: it reaches the engine of this node, and nothing beyond it."""
    endpoint = _PeerEndpoint(own)
    app = web.Application(client_max_size=MAX_BODY_BYTES)
    app.cleanup_ctx.append(_with_sessions)
    app.router.add_get(ENGINE_PATH, endpoint.engine)
    app.router.add_route("*", "/{path:.*}", endpoint.forward)
    return app


async def _with_sessions(app: web.Application) -> AsyncIterator[None]:
    app[_SESSIONS] = _Sessions()
    yield
    await app[_SESSIONS].close()


class _PublicEndpoint:
    """One handler per route."""

    def __init__(self, target: PublicTarget, access: Access) -> None:
        self._target, self._access = target, access

    async def forward(self, request: web.Request) -> web.StreamResponse:
        body = await _read_body(request)
        if isinstance(body, web.Response):
            return body
        try:
            info = await _read_request_info(request, body)
        except NotJsonError as error:
            return error_response(400, "invalid_request_error", str(error))
        headers = _end_to_end(request.headers)
        for name in [n for n in headers if self._is_private(n)]:
            headers.popall(name, None)
        latencies = self._target.latencies if request.method == "POST" else None
        forwarding = _Forwarding(request, body, info, headers, self._target, _outer_headers, latencies)
        return await forwarding.run(0.0 if request.path == "/health" else HOLD_S)

    def _is_private(self, header: str) -> bool:
        """Whether the header is for this endpoint, and not for the engine."""
        return header.lower().startswith(_OURS) or bool(self._access.api_key and header.lower() in KEY_HEADERS)

    async def models(self, _request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [_describe_model(m) for m in self._target.served()]})

    async def model(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        found = next((m for m in self._target.served() if m.name == name), None)
        if found is None:
            return error_response(
                404, "not_found_error", f"the model '{name}' is not served here; /v1/models lists what is"
            )
        return web.json_response(_describe_model(found))

    async def status(self, _request: web.Request) -> web.Response:
        return web.json_response(body=orjson.dumps(self._target.describe()))


class _PeerEndpoint:
    def __init__(self, own: PeerTarget) -> None:
        self._own = own

    async def forward(self, request: web.Request) -> web.StreamResponse:
        body = await _read_body(request)
        if isinstance(body, web.Response):
            return body
        info = RequestInfo(request.headers.get(MODEL_HEADER, ""))
        headers = _end_to_end(request.headers)
        headers.popall(MODEL_HEADER, None)
        return await _Forwarding(request, body, info, headers, self._own, self._with_load).run(0.0)

    def _with_load(self, answer: CIMultiDict[str]) -> CIMultiDict[str]:
        answer[_BUSY] = str(self._own.busy)
        return answer

    async def engine(self, _request: web.Request) -> web.Response:
        return web.json_response(body=orjson.dumps(self._own.describe_engine()))


async def _read_body(request: web.Request) -> bytes | web.Response:
    """The whole body, so that it can be sent again if the engine dies; or the error."""
    try:
        return await request.read()
    except web.HTTPRequestEntityTooLarge:
        return error_response(413, "invalid_request_error", f"the body is over {MAX_BODY_BYTES >> 20} MiB")


async def _read_request_info(request: web.Request, body: bytes) -> RequestInfo:
    model = request.query.get("model", "")
    is_json = bool(body) and request.content_type == "application/json"
    if len(body) > _READ_IN_THREAD:
        info = await asyncio.to_thread(read_request_info, body, model, is_json)
    else:
        info = read_request_info(body, model, is_json)
    return replace(info, needs=needed_for(request.path))


@dataclass(frozen=True)
class _Forwarding:
    """One request on its way to a server, and to another if that one fails."""

    request: web.Request
    body: bytes
    info: RequestInfo
    headers: CIMultiDict[str]
    target: Target
    answer_headers: Callable[[CIMultiDict[str]], CIMultiDict[str]]
    latencies: Latencies | None = None

    async def run(self, hold_s: float) -> web.StreamResponse:
        """Answers with an error if no server takes the request in `hold_s` seconds. The answer has no time limit."""
        deadline, attempts = time.monotonic() + hold_s, 0
        is_new = self.request.method == "POST"
        try:
            while upstream := await self.target.acquire(self.info, deadline - time.monotonic(), is_new):
                is_new = False
                try:
                    with upstream.load:
                        return await self._try(upstream)
                except aiohttp.ClientError as error:
                    upstream.load.fail()
                    # No part of an answer was sent. A server that refuses connections did not die of this request.
                    attempts += not isinstance(error, aiohttp.ClientConnectorError | _TryElsewhere)
                    if attempts >= _MAX_ATTEMPTS or time.monotonic() >= deadline:
                        break
                    await asyncio.sleep(_RETRY_S)
        except UnknownModelError as error:
            return error_response(404, "not_found_error", str(error))
        except WrongModelError as error:
            return error_response(400, "invalid_request_error", str(error))
        return _unavailable(self.target.reason_for(self.info))

    async def _try(self, upstream: Upstream) -> web.StreamResponse:
        """Raises aiohttp.ClientError as long as no part of the answer has been sent.

        When the client disconnects, aiohttp cancels this, which ends the work in the engine.
        """
        began = time.monotonic()
        session = self.request.app[_SESSIONS].session(upstream.socket)
        async with session.request(
            self.request.method,
            URL(f"http://engine{self.request.raw_path}", encoded=True),
            headers=CIMultiDict([*self.headers.items(), *upstream.headers.items()]),
            data=self.body or None,
            allow_redirects=False,
        ) as answer:
            if (busy := answer.headers.get(_BUSY, "")).isdigit():
                upstream.load.report(int(busy))
            if _TRY_ELSEWHERE in answer.headers or (answer.status == 500 and self.target.failure_passes()):
                raise _TryElsewhere
            return await self._send_back(answer, began)

    async def _send_back(self, answer: aiohttp.ClientResponse, began: float) -> web.StreamResponse:
        headers = self.answer_headers(_end_to_end(answer.headers))
        response = web.StreamResponse(status=answer.status, headers=headers)
        if "Content-Length" not in answer.headers and self.request.method != "HEAD":
            response.enable_chunked_encoding()
        await response.prepare(self.request)
        if self.latencies:
            self.latencies.first_byte.observe(time.monotonic() - began)
        try:
            async for chunk in answer.content.iter_any():
                await response.write(chunk)
        except aiohttp.ClientError:
            # The engine died in the middle: a truncated answer must not look complete.
            if self.request.transport:
                self.request.transport.abort()
            raise asyncio.CancelledError from None
        with contextlib.suppress(ConnectionError):
            await response.write_eof()
        if self.latencies:
            self.latencies.answer.observe(time.monotonic() - began)
        return response


def _end_to_end(headers: CIMultiDictProxy[str]) -> CIMultiDict[str]:
    """The headers that belong to the message rather than to one of the two connections."""
    named = {name.strip().lower() for name in headers.get("Connection", "").split(",")}
    return CIMultiDict((k, v) for k, v in headers.items() if k.lower() not in _HOP_BY_HOP | named)


def _outer_headers(headers: CIMultiDict[str]) -> CIMultiDict[str]:
    """Leaves out the mesh's own headers, and the engine's CORS headers: the endpoint sets its own."""
    theirs = (_OURS, "access-control-")
    return CIMultiDict((k, v) for k, v in headers.items() if not k.lower().startswith(theirs))


def _describe_model(model: Served) -> dict[str, object]:
    meta = {"fingerprint": model.fingerprint, "size": model.size_bytes, "n_layers": model.n_layers}
    capabilities = [str(model.capability), *(["multimodal"] if model.has_projector else [])]
    about = {"object": "model", "created": 0, "owned_by": "mesh-llm", "capabilities": capabilities, "meta": meta}
    return {"id": model.name} | about


def _unavailable(reason: str) -> web.Response:
    response = error_response(503, "unavailable_error", reason or "the model is restarting; try again in a few seconds")
    response.headers["Retry-After"] = "2"
    response.headers[_TRY_ELSEWHERE] = "1"  # read by other nodes only
    return response
