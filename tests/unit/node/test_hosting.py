"""Moving from one group to another: draining, failing, and what is announced meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from support.waiting import until

from meshllm.errors import EngineError, MeshLlmError
from meshllm.mesh.announcement import Announcement, ModelInfo, Serving
from meshllm.mesh.groups import Group
from meshllm.node.hosting import Hosting
from meshllm.tasks import Changes

ME, PEER = "a" * 64, "b" * 64
MODEL, OTHER = ModelInfo("m", "e" * 64, 1000, 4), ModelInfo("other", "f" * 64, 1000, 4)
ALONE, ALONE_OTHER = (Group(model, ME, (), (1.0,), (5000,)) for model in (MODEL, OTHER))
WITH_PEER = Group(MODEL, ME, (PEER,), (0.5, 0.5), (2500, 2500))


class FakeMesh:
    def __init__(self) -> None:
        self.me = Announcement(ME, 1)
        self.changes = Changes()
        self.peer: Announcement | None = Announcement(PEER, 1)

    @property
    def membership(self) -> Any:
        return SimpleNamespace(present=lambda: {ME: self.me} | ({PEER: self.peer} if self.peer else {}))

    def name_of(self, node_id: str) -> str:
        return node_id[:3]

    def announce(self, me: Announcement) -> None:
        self.me = me
        self.changes.notify()


@dataclass
class FakeWorker:
    """Its engine is ready when it is told so, and fails when it is told so."""

    named: list[ModelInfo] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    served: list[tuple[Group, list[tuple[str, Path]]]] = field(default_factory=list)
    engine: Any = None
    on_change: Callable[[], None] = lambda: None

    @property
    def ready(self) -> bool:
        return self.engine is not None and self.engine.ready

    def emit(self, line: str) -> None:
        self.lines.append(line)

    async def serve(self, group: Group, stages: list[tuple[str, Path]], on_change: Callable[[], None]) -> None:
        self.served.append((group, stages))
        self.on_change = on_change
        failure = asyncio.get_running_loop().create_future()
        self.engine = SimpleNamespace(ready=False, stage_lost=False, socket=Path("/engine"), failure=failure)
        try:
            await failure
        finally:
            self.engine = None
            on_change()

    def become_ready(self) -> None:
        self.engine.ready = True
        self.on_change()


class Setup:
    def __init__(self) -> None:
        self.mesh, self.worker = FakeMesh(), FakeWorker()
        self.hosting = Hosting(cast(Any, self.mesh), cast(Any, self.worker), lambda i: Path(f"/{i[:3]}.sock"))

    @property
    def announced(self) -> tuple[Serving, ...]:
        return self.mesh.me.serving

    async def serving(self, group: Group) -> None:
        await self.hosting.follow(group)
        await until(lambda: self.worker.engine)
        self.worker.become_ready()
        await until(lambda: self.announced and self.announced[0].ready)


def run(work: Callable[[Setup], Awaitable[None]]) -> None:
    async def main() -> None:
        setup = Setup()
        watching = asyncio.create_task(setup.hosting.run())
        try:
            await work(setup)
            assert not watching.done()
        finally:
            watching.cancel()
            await setup.hosting.stop()
            await asyncio.gather(watching, return_exceptions=True)

    asyncio.run(main())


def test_ready_is_announced_when_the_engine_is() -> None:
    async def work(setup: Setup) -> None:
        await setup.hosting.follow(WITH_PEER)
        assert setup.announced == (Serving(MODEL.fingerprint, (PEER,), False),) and setup.hosting.socket is None
        await until(lambda: setup.worker.engine)
        assert setup.worker.served == [(WITH_PEER, [("bbb", Path("/bbb.sock"))])]
        setup.worker.become_ready()
        await until(lambda: setup.announced == (Serving(MODEL.fingerprint, (PEER,), True),))
        assert setup.hosting.socket == Path("/engine") and setup.hosting.n_elections == 1

    run(work)


def test_an_engine_finishes_its_requests_before_another_group_begins() -> None:
    async def work(setup: Setup) -> None:
        await setup.serving(ALONE)
        with setup.hosting.load:
            with setup.hosting.load:
                await setup.hosting.follow(ALONE_OTHER)
                assert setup.announced == (Serving(MODEL.fingerprint, (), False),) and setup.hosting.socket is None
                seen = setup.mesh.changes.version
            assert setup.mesh.changes.version == seen  # one of two
        assert setup.mesh.changes.version > seen
        await setup.hosting.follow(ALONE_OTHER)
        await until(lambda: len(setup.worker.served) == 2)
        assert setup.hosting.fingerprint == OTHER.fingerprint

    run(work)


def test_a_group_that_comes_back_ends_the_draining() -> None:
    async def work(setup: Setup) -> None:
        await setup.serving(ALONE)
        with setup.hosting.load:
            await setup.hosting.follow(None)
            assert not setup.announced[0].ready
            await setup.hosting.follow(ALONE)
        assert setup.announced[0].ready and setup.hosting.socket and len(setup.worker.served) == 1

    run(work)


def test_an_engine_that_lost_a_stage_has_nothing_to_finish() -> None:
    async def work(setup: Setup) -> None:
        await setup.serving(WITH_PEER)
        setup.mesh.peer = None
        with setup.hosting.load:
            await setup.hosting.follow(ALONE)
        await until(lambda: len(setup.worker.served) == 2)

    run(work)


def test_a_stage_of_another_host_waits_until_that_lets_go() -> None:
    async def work(setup: Setup) -> None:
        setup.mesh.peer = Announcement(PEER, 1, serving=(Serving(OTHER.fingerprint, (ME,), True),))
        await setup.hosting.follow(ALONE)
        assert setup.announced == () and setup.worker.served == []
        setup.mesh.peer = Announcement(PEER, 2)
        await setup.hosting.follow(ALONE)
        assert setup.announced != ()

    run(work)


def test_a_model_that_the_mesh_chose_and_that_fails_is_left_to_others() -> None:
    async def work(setup: Setup) -> None:
        await setup.serving(ALONE)
        assert setup.hosting.take_failure() is None
        setup.worker.engine.failure.set_exception(EngineError("cannot serve m"))
        await setup.hosting.wait_ended()
        assert setup.hosting.take_failure() == MODEL and setup.hosting.take_failure() is None
        assert setup.announced == () and setup.worker.lines == [
            "cannot serve m; this node will not serve m (mesh-llm status shows which nodes do)"
        ]

    run(work)


@pytest.mark.parametrize("error", [EngineError("cannot serve m"), RuntimeError("a fault of ours")])
def test_a_model_that_the_user_named_ends_the_node(error: Exception) -> None:
    async def work(setup: Setup) -> None:
        if isinstance(error, MeshLlmError):
            setup.worker.named.append(MODEL)
        await setup.serving(ALONE)
        setup.worker.engine.failure.set_exception(error)
        await setup.hosting.wait_ended()
        with pytest.raises(type(error)):
            setup.hosting.take_failure()

    run(work)
