"""The endpoint in front of servers that stream, fail and die, over real sockets in this process."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from support.waiting import until
from yarl import URL

from meshllm.api import proxy
from meshllm.api.access import Access
from meshllm.api.latencies import Latencies
from meshllm.api.routing import Load, RequestInfo
from meshllm.api.target import Served, Upstream
from meshllm.errors import UnknownModelError
from meshllm.mesh.engine_status import EngineStatus

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
CHAT = "/v1/chat/completions"


class FakeTarget:
    """Gives out the upstreams it was handed, one for each time that it is asked."""

    def __init__(self, *upstreams: Upstream | None) -> None:
        self.upstreams = list(upstreams)
        self.asked: list[tuple[RequestInfo, float, bool]] = []
        self.latencies = Latencies()
        self.passes = False
        self.busy = 3

    def reason_for(self, info: RequestInfo) -> str:
        return f"{info.model or 'the model'} is loading"

    async def acquire(self, info: RequestInfo, timeout_s: float, is_new: bool) -> Upstream | None:
        self.asked.append((info, timeout_s, is_new))
        if info.model == "unknown":
            raise UnknownModelError("the model 'unknown' is not served here; served: m")
        return self.upstreams.pop(0) if self.upstreams else None

    def failure_passes(self) -> bool:
        return self.passes

    def served(self) -> list[Served]:
        return [Served("m", "ab" * 32, 1000, 4)]

    def describe(self) -> object:
        return {"nodes": []}

    def describe_engine(self) -> EngineStatus | None:
        return None


class Setup:
    """`upstream(handler)` starts a server at a Unix socket; `client(target)` is a client of the endpoint before it."""

    def __init__(self, folder: Path, stack: AsyncExitStack) -> None:
        self.folder, self._stack, self._n = folder, stack, 0

    async def upstream(self, handler: Handler, **headers: str) -> Upstream:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", handler)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        self._stack.push_async_callback(runner.cleanup)
        self._n += 1
        path = self.folder / f"{self._n}.sock"
        await web.UnixSite(runner, str(path)).start()
        return Upstream(path, Load(time.monotonic), headers)

    async def client(self, target: FakeTarget, access: Access | None = None) -> TestClient[Any, Any]:
        return await self.client_of(proxy.make_app(target, access or Access()))

    async def client_of(self, app: web.Application) -> TestClient[Any, Any]:
        server = TestServer(app, handler_cancellation=True)
        return await self._stack.enter_async_context(TestClient(server, auto_decompress=False))


def run(folder: Path, work: Callable[[Setup], Awaitable[None]]) -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack, asyncio.timeout(60):
            await work(Setup(folder, stack))

    asyncio.run(main())


async def hello(request: web.Request) -> web.Response:
    return web.json_response({"path": request.raw_path, "body": (await request.read()).decode()})


async def dies(request: web.Request) -> web.Response:
    """Like an engine that is killed: the connection ends without an answer."""
    assert request.transport
    request.transport.abort()
    return web.Response()


async def fails(_request: web.Request) -> web.Response:
    return web.json_response({"error": {"message": "compute error"}}, status=500)


def test_a_request_and_its_answer_pass_unchanged(tmp_path: Path) -> None:
    async def work(setup: Setup) -> None:
        target = FakeTarget(await setup.upstream(hello))
        client = await setup.client(target)
        answer = await client.post(URL(f"{CHAT}?a=b%2Fc%7E", encoded=True), json={"model": "m"})
        assert answer.status == 200
        assert await answer.json() == {"path": f"{CHAT}?a=b%2Fc%7E", "body": '{"model": "m"}'}
        info, timeout_s, is_new = target.asked[0]
        assert (info.model, is_new) == ("m", True) and timeout_s == pytest.approx(proxy.HOLD_S, abs=1)
        assert target.latencies.status().answer.count == target.latencies.status().first_byte.count == 1

    run(tmp_path, work)


def test_an_answer_streams_while_it_is_written(tmp_path: Path) -> None:
    async def work(setup: Setup) -> None:
        seen = asyncio.Event()

        async def stream(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            await response.write(b"data: one\n\n")
            await seen.wait()
            await response.write(b"data: two\n\n")
            return response

        upstream = await setup.upstream(stream)
        answer = await (await setup.client(FakeTarget(upstream))).post(CHAT, json={"stream": True})
        assert await answer.content.readany() == b"data: one\n\n"
        assert upstream.load.through_here == 1
        seen.set()
        assert await answer.read() == b"data: two\n\n"
        await until(lambda: upstream.load.through_here == 0)

    run(tmp_path, work)


def test_headers_that_are_not_for_the_engine_stay_here(tmp_path: Path) -> None:
    async def work(setup: Setup) -> None:
        async def echo(request: web.Request) -> web.Response:
            names = [name.lower() for name in request.headers]
            answer = {"Mesh-LLM-Busy": "7", "Access-Control-Allow-Origin": "*", "Connection": "X-Hop", "X-Hop": "1"}
            return web.json_response(names, headers={**answer, "X-Engine": "1"})

        upstream = await setup.upstream(echo, **{"Mesh-LLM-Model": "f"})
        client = await setup.client(FakeTarget(upstream), Access("secret"))
        sent = {"Authorization": "Bearer secret", "Mesh-LLM-Model": "forged", "Connection": "X-Mine", "X-Mine": "1"}
        answer = await client.post(CHAT, json={}, headers={**sent, "X-Request-Id": "5"})
        names = await answer.json()
        assert "x-request-id" in names and names.count("mesh-llm-model") == 1
        assert not {"authorization", "x-mine"} & set(names)
        assert answer.headers["X-Engine"] == "1"
        assert not {"Mesh-LLM-Busy", "Access-Control-Allow-Origin", "X-Hop"} & set(answer.headers)
        assert upstream.load.total == 6  # of the seven that the server counted, this one has ended

    run(tmp_path, work)


def test_servers_that_cannot_be_reached_are_passed_over(tmp_path: Path) -> None:
    async def work(setup: Setup) -> None:
        gone = [Upstream(tmp_path / f"none-{i}", Load(time.monotonic)) for i in range(5)]
        target = FakeTarget(*gone, await setup.upstream(hello))
        answer = await (await setup.client(target)).post(CHAT, json={"model": "m"})
        assert answer.status == 200 and (await answer.json())["body"] == '{"model": "m"}'
        assert all(upstream.load.total > 100 for upstream in gone)
        assert [is_new for _, _, is_new in target.asked] == [True] + [False] * 5  # one request is counted once

    run(tmp_path, work)


def test_a_request_that_kills_engines_is_given_up(tmp_path: Path) -> None:
    async def work(setup: Setup) -> None:
        target = FakeTarget(*[await setup.upstream(dies) for _ in range(4)])
        answer = await (await setup.client(target)).post(CHAT, json={"model": "m"})
        assert answer.status == 503 and answer.headers["Retry-After"] == "2"
        error = (await answer.json())["error"]
        assert (error["type"], error["message"]) == ("unavailable_error", "m is loading")
        assert len(target.asked) == 3 and len(target.upstreams) == 1

    run(tmp_path, work)


@pytest.mark.parametrize("passes", [True, False])
def test_an_error_of_an_engine_that_lost_a_stage_is_tried_again(tmp_path: Path, passes: bool) -> None:
    async def work(setup: Setup) -> None:
        target = FakeTarget(await setup.upstream(fails), await setup.upstream(hello))
        target.passes = passes
        answer = await (await setup.client(target)).post(CHAT, json={})
        assert answer.status == (200 if passes else 500)
        if not passes:
            assert (await answer.json())["error"]["message"] == "compute error"

    run(tmp_path, work)


def test_a_host_without_an_engine_sends_the_request_on(tmp_path: Path) -> None:
    async def work(setup: Setup) -> None:
        async def elsewhere(_request: web.Request) -> web.Response:
            return web.Response(status=503, headers={"Mesh-LLM-Ask-Again": "1"})

        target = FakeTarget(*[await setup.upstream(elsewhere) for _ in range(5)], await setup.upstream(hello))
        assert (await (await setup.client(target)).post(CHAT, json={})).status == 200
        assert not target.upstreams

    run(tmp_path, work)


def test_an_answer_cut_off_does_not_look_complete(tmp_path: Path) -> None:
    async def work(setup: Setup) -> None:
        async def dies_half_way(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse()
            await response.prepare(request)
            await response.write(b"half")
            assert request.transport
            request.transport.abort()
            await asyncio.sleep(10)
            return response

        upstream, spare = await setup.upstream(dies_half_way), await setup.upstream(hello)
        target = FakeTarget(upstream, spare)
        answer = await (await setup.client(target)).post(CHAT, json={})
        with pytest.raises(aiohttp.ClientPayloadError):
            await answer.read()
        assert target.upstreams == [spare]  # what has begun cannot be tried again
        await until(lambda: upstream.load.through_here == 0)
        assert target.latencies.status().answer.count == 0

    run(tmp_path, work)


def test_a_client_that_goes_ends_the_work(tmp_path: Path) -> None:
    async def work(setup: Setup) -> None:
        working, cancelled = asyncio.Event(), asyncio.Event()

        async def forever(_request: web.Request) -> web.Response:
            working.set()
            try:
                await asyncio.sleep(60)
            finally:
                cancelled.set()
            return web.Response()

        upstream = await setup.upstream(forever)
        client = await setup.client(FakeTarget(upstream))
        asking = asyncio.create_task(client.post(CHAT, json={}))
        await working.wait()
        asking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asking
        await cancelled.wait()
        await until(lambda: upstream.load.through_here == 0)

    run(tmp_path, work)


@pytest.mark.parametrize(
    ("body", "status", "kind", "message"),
    [
        (b'{"model": "unknown"}', 404, "not_found_error", "the model 'unknown' is not served here; served: m"),
        (b"{", 400, "invalid_request_error", "the body is not JSON"),
        (b'{"a": NaN}', 400, "invalid_request_error", "the body is not JSON"),
        (b"x" * 5000, 413, "invalid_request_error", "the body is over 0 MiB"),
    ],
)
def test_bad_requests_are_refused_as_openai_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: bytes, status: int, kind: str, message: str
) -> None:
    monkeypatch.setattr(proxy, "MAX_BODY_BYTES", 4096)

    async def work(setup: Setup) -> None:
        client = await setup.client(FakeTarget())
        answer = await client.post(CHAT, data=body, headers={"Content-Type": "application/json"})
        error = (await answer.json())["error"]
        assert (answer.status, error["code"], error["type"]) == (status, status, kind)
        assert error["message"].startswith(message)

    run(tmp_path, work)


def test_only_posts_are_demand_and_health_is_not_held(tmp_path: Path) -> None:
    async def work(setup: Setup) -> None:
        target = FakeTarget()
        client = await setup.client(target)
        assert (await client.get("/health")).status == 503
        assert (await client.get("/props")).status == 503
        (_, health_s, health_new), (_, props_s, props_new) = target.asked
        assert health_s <= 0 < props_s and not health_new and not props_new
        assert target.latencies.status().answer.count == 0

    run(tmp_path, work)


def test_what_the_endpoint_answers_itself(tmp_path: Path) -> None:
    async def work(setup: Setup) -> None:
        client = await setup.client(FakeTarget())
        for path in ("/v1/models", "/models"):
            assert [m["id"] for m in (await (await client.get(path)).json())["data"]] == ["m"]
        assert (await (await client.get("/v1/models/m")).json())["meta"]["n_layers"] == 4
        missing = await client.get("/v1/models/other/name")
        assert missing.status == 404 and "'other/name'" in (await missing.json())["error"]["message"]
        assert await (await client.get("/mesh/status")).json() == {"nodes": []}

    run(tmp_path, work)


def test_other_nodes_are_told_how_busy_the_engine_is(tmp_path: Path) -> None:
    async def work(setup: Setup) -> None:
        async def headers(request: web.Request) -> web.Response:
            return web.json_response(list(request.headers))

        own = FakeTarget(await setup.upstream(headers))
        client = await setup.client_of(proxy.make_peer_app(own))
        answer = await client.post(CHAT, data=b"anything", headers={"Mesh-LLM-Model": "f" * 64})
        assert answer.headers["Mesh-LLM-Busy"] == "3"
        assert "Mesh-LLM-Model" not in await answer.json()
        assert own.asked[0][0] == RequestInfo("f" * 64) and own.asked[0][1] <= 0
        refused = await client.post(CHAT, data=b"anything")
        assert refused.status == 503 and refused.headers["Mesh-LLM-Ask-Again"] == "1"
        assert await (await client.get("/mesh/engine")).json() is None

    run(tmp_path, work)
