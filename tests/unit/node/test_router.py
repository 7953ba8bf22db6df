"""Where a node sends requests, over a mesh, tunnels and hosting that are told what they are."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from meshllm.api.proxy import MODEL_HEADER
from meshllm.api.routing import Load, RequestInfo
from meshllm.errors import UnknownModelError, WrongModelError
from meshllm.mesh.announcement import Announcement, Capability, ModelInfo, Need, ProjectorInfo, Serving
from meshllm.mesh.groups import Group, Placement, StageStatus
from meshllm.node.router import LocalTarget, Router
from meshllm.quic.transport import StreamKind
from meshllm.tasks import Changes

ME, NEAR, FAR = "a" * 64, "b" * 64, "c" * 64
SMALL, BIG = ModelInfo("small-Q4_0", "1" * 64, 10**9, 8), ModelInfo("big-Q4_0", "2" * 64, 9 * 10**9, 80)


class FakeMesh:
    def __init__(self) -> None:
        self.me = Announcement(ME, 1)
        self.changes = Changes()
        self.others: dict[str, Announcement] = {}
        self.rtts = {NEAR: 0.01, FAR: 0.05}
        self.opened: list[tuple[str, StreamKind]] = []
        self.membership = SimpleNamespace(present=lambda: {ME: self.me} | self.others)

    def host(self, node_id: str, model: ModelInfo, ready: bool = True) -> None:
        self.others[node_id] = Announcement(
            node_id, 1, models=(model,), serving=(Serving(model.fingerprint, (), ready),)
        )
        self.changes.notify()

    def link(self, node_id: str) -> Any:
        return SimpleNamespace(rtt_s=self.rtts[node_id]) if node_id in self.rtts else None


class FakeTunnels:
    def __init__(self) -> None:
        self.paths: list[Path] = []

    async def open(self, path: Path, _open_stream: object) -> None:
        self.paths.append(path)


class FakeHosting:
    def __init__(self, model: ModelInfo) -> None:
        self.socket: Path | None = Path("/engine")
        self.fingerprint = model.fingerprint
        self.engine: Any = None
        self.load = Load(time.monotonic)


def make(mesh: FakeMesh, hosting: FakeHosting | None = None) -> Router:
    describe = cast(Any, lambda: None)
    return Router(cast(Any, mesh), cast(Any, FakeTunnels()), Path("/f"), cast(Any, hosting), describe)


def where(router: Router, model: str = "", *, is_new: bool = False) -> tuple[str, str] | None:
    upstream = asyncio.run(router.acquire(RequestInfo(model), 0.0, is_new))
    return (str(upstream.socket), upstream.headers.get(MODEL_HEADER, "")) if upstream else None


def test_the_engine_here_comes_first_then_the_nearest_host() -> None:
    mesh, hosting = FakeMesh(), FakeHosting(SMALL)
    mesh.me = replace(mesh.me, models=(SMALL,))
    mesh.host(FAR, SMALL)
    mesh.host(NEAR, SMALL)
    router = make(mesh, hosting)
    assert where(router, "small") == ("/engine", "")
    with hosting.load:
        assert where(router, "small") == (f"/f/http-{NEAR[:16]}.sock", SMALL.fingerprint)
    hosting.socket = None  # it drains
    del mesh.rtts[NEAR]  # not linked yet
    assert where(router, "small") == (f"/f/http-{FAR[:16]}.sock", SMALL.fingerprint)


def test_a_host_that_failed_is_asked_last() -> None:
    mesh = FakeMesh()
    mesh.host(NEAR, SMALL)
    mesh.host(FAR, SMALL)
    router = make(mesh)
    upstream = asyncio.run(router.acquire(RequestInfo("small"), 0.0, False))
    assert upstream and NEAR[:16] in str(upstream.socket)
    upstream.load.fail()
    assert FAR[:16] in str(where(router, "small"))


def test_a_request_without_a_name_goes_to_the_nearest_model() -> None:
    mesh = FakeMesh()
    mesh.host(FAR, SMALL)
    mesh.host(NEAR, BIG)
    assert where(make(mesh)) == (f"/f/http-{NEAR[:16]}.sock", BIG.fingerprint)


def test_a_request_goes_to_a_model_that_can_do_what_it_needs() -> None:
    mesh = FakeMesh()
    mesh.host(NEAR, SMALL)
    mesh.host(FAR, BIG)
    capabilities = {BIG.fingerprint: Capability.EMBEDDING}
    mesh.others[FAR] = replace(mesh.others[FAR], capabilities=capabilities)
    router = make(mesh)

    def asked(model: str, needs: Capability | None) -> str:
        upstream = asyncio.run(router.acquire(RequestInfo(model, needs=needs), 0.0, False))
        assert upstream
        return upstream.headers[MODEL_HEADER]

    assert [asked("", needs) for needs in (None, *Capability)] == [
        SMALL.fingerprint,
        SMALL.fingerprint,
        BIG.fingerprint,
        SMALL.fingerprint,  # nothing ranks here: llama-server says so
    ]
    assert asked("small", Capability.EMBEDDING) == SMALL.fingerprint  # it may have been started so
    with pytest.raises(WrongModelError, match="only makes embeddings"):
        asked("big", Capability.COMPLETION)
    assert [model.capability for model in router.served()] == [Capability.EMBEDDING, Capability.COMPLETION]
    del mesh.others[NEAR]
    with pytest.raises(WrongModelError, match="only makes embeddings"):
        asked("", Capability.COMPLETION)


def test_names_that_nobody_serves() -> None:
    mesh = FakeMesh()
    assert where(make(mesh), "anything") is None  # nobody serves anything yet
    mesh.host(NEAR, SMALL)
    with pytest.raises(UnknownModelError, match="served: small-Q4_0"):
        where(make(mesh), "gpt-4")
    assert make(mesh).reason_for(RequestInfo("gpt-4")) == "no model is served in this mesh"


def test_each_new_request_counts_as_demand_once() -> None:
    mesh = FakeMesh()
    mesh.host(NEAR, SMALL)
    router = make(mesh)
    for is_new in (True, False, False):
        where(router, "small", is_new=is_new)
    with pytest.raises(UnknownModelError):
        where(router, "gpt-4", is_new=True)
    assert router.rates.per_minute(time.monotonic()) == {SMALL.fingerprint: pytest.approx(1.0, rel=0.1)}


def test_a_request_is_held_until_a_host_is_ready() -> None:
    async def main() -> None:
        mesh = FakeMesh()
        router = make(mesh)
        group = Group(SMALL, NEAR, (), (1.0,), (1,))
        router.update([Placement(SMALL, (group,), Need(0, 1, 0, 0), (1,), {NEAR: StageStatus.HOST})])
        asking = asyncio.create_task(router.acquire(RequestInfo("small"), 30.0, True))
        mesh.host(NEAR, SMALL, ready=False)
        for _ in range(5):
            await asyncio.sleep(0)
        assert not asking.done()
        assert router.reason_for(RequestInfo("small")) == "the model is loading"
        mesh.host(NEAR, SMALL)
        async with asyncio.timeout(10):
            upstream = await asking
        assert upstream and upstream.headers == {MODEL_HEADER: SMALL.fingerprint}

    asyncio.run(main())


def test_a_model_that_waits_for_memory_is_refused_at_once() -> None:
    router = make(FakeMesh())
    router.update([Placement(BIG, (), Need(0, 10 * 10**9, 0, 0), (2 * 10**9,), {ME: StageStatus.NO_MEMORY})])
    assert asyncio.run(router.acquire(RequestInfo("big"), 60.0, True)) is None
    assert router.reason_for(RequestInfo("big")) == "Waiting for more peers: need 10.0 GB, have 2.0 GB"
    router.update([Placement(BIG, (), Need(0, 10 * 10**9, 0, 0), (2 * 10**9,), {ME: StageStatus.FETCHING})])
    assert router.reason_for(RequestInfo("big")) == "the model is on its way to a machine that will serve it"


def test_what_is_served_is_listed_once_under_its_first_name() -> None:
    mesh = FakeMesh()
    mesh.host(NEAR, SMALL)
    mesh.host(FAR, replace(SMALL, name="also-Q4_0"))
    served = make(mesh).served()
    assert [(s.name, s.fingerprint, s.n_layers) for s in served] == [("also-Q4_0", SMALL.fingerprint, 8)]
    assert where(make(mesh), "small") == where(make(mesh), "also")
    assert [s.has_projector for s in served] == [False]
    mesh.others[FAR] = replace(mesh.others[FAR], projectors={SMALL.fingerprint: ProjectorInfo("f" * 64, 1000)})
    assert [s.has_projector for s in make(mesh).served()] == [True]


def test_other_nodes_reach_the_engine_here_and_nothing_beyond() -> None:
    mesh, hosting = FakeMesh(), FakeHosting(SMALL)
    mesh.host(NEAR, BIG)
    local = LocalTarget(make(mesh, hosting))
    for name, served in ((SMALL.fingerprint, True), ("", True), (BIG.fingerprint, False), ("small", False)):
        upstream = asyncio.run(local.acquire(RequestInfo(name), 60.0, True))
        assert bool(upstream) is served
        assert not upstream or upstream.load is hosting.load
    with hosting.load:
        assert local.busy == 1
    hosting.socket = None
    assert asyncio.run(local.acquire(RequestInfo(), 60.0, True)) is None
    assert LocalTarget(make(mesh)).busy == 0
