"""The file that a node wants: fetched, given up, and never the end of the node."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from meshllm.errors import ModelError
from meshllm.mesh.announcement import Announcement, ModelInfo, ProjectorInfo
from meshllm.node import files as module
from meshllm.node.files import ModelFiles

ME, PEER = "a" * 64, "b" * 64
MODEL = ModelInfo("m", "f" * 64, 1000, 4)


@dataclass
class FakeMesh:
    """One peer that has the model, with these projectors."""

    me: Announcement = field(default_factory=lambda: Announcement(ME, 1, fetches=True))
    projectors: dict[str, ProjectorInfo] = field(default_factory=dict)

    @property
    def membership(self) -> Any:
        peer = Announcement(PEER, 1, models=(MODEL,), projectors=self.projectors)
        return SimpleNamespace(present=lambda: {ME: self.me, PEER: peer})

    def announce(self, me: Announcement) -> None:
        self.me = me


class FakeStore:
    takes_projectors = True

    def __init__(self) -> None:
        self.models: dict[str, object] = {}

    def scan(self) -> bool:
        return False


async def fetched(monkeypatch: pytest.MonkeyPatch, fail: Callable[[], None]) -> tuple[FakeMesh, list[str]]:
    """Wants the model, whose transfer does what `fail` does, until that was announced as failed."""

    class Failing:
        def __init__(self, *_args: object) -> None:
            pass

        async def run(self) -> None:
            fail()

    monkeypatch.setattr(module, "Fetch", Failing)
    monkeypatch.setattr(module, "tidy", lambda: None)
    monkeypatch.setattr(module, "can_be_had", lambda _name: False)
    mesh = FakeMesh()
    lines: list[str] = []
    files = ModelFiles(
        cast(Any, mesh), cast(Any, FakeStore()), Path("/leash"), lambda: None, lines.append, lambda _text: None
    )
    running = asyncio.create_task(files.run())
    files.want(MODEL)
    async with asyncio.timeout(5):
        while not mesh.me.cannot_fetch or mesh.me.fetching:
            assert not running.done()
            await asyncio.sleep(0)
    files.want(None)
    await asyncio.sleep(0.01)
    assert not running.done()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert running.cancelled()
    return mesh, lines


def test_a_model_that_cannot_be_had_is_left_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ModelError("no peer has it")

    mesh, lines = asyncio.run(fetched(monkeypatch, fail))
    assert mesh.me.cannot_fetch == (MODEL.fingerprint,) and lines == ["cannot fetch m: no peer has it"]


def test_a_fault_of_ours_in_fetching_ends_neither_the_node_nor_later_stops(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise RuntimeError("a fault of ours")

    with caplog.at_level(logging.ERROR, "meshllm"):
        mesh, _lines = asyncio.run(fetched(monkeypatch, fail))
    assert mesh.me.cannot_fetch == (MODEL.fingerprint,) and mesh.me.fetching == {}
    assert "a fault of ours" in caplog.text and "Traceback" in caplog.text


@pytest.mark.parametrize("fails", [False, True])
def test_the_projector_is_fetched_before_the_model(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """A model without it is better than none."""
    asked: list[tuple[str, str, list[str]]] = []
    done = asyncio.Event()

    class Fetch:
        def __init__(self, model: ModelInfo, owners: Callable[[], list[str]], *rest: Any) -> None:
            self._model = model
            asked.append((model.fingerprint, rest[2] if len(rest) > 2 else "", owners()))

        async def run(self) -> None:
            if self._model is MODEL:
                done.set()
            elif fails:
                raise ModelError("no space")

    monkeypatch.setattr(module, "Fetch", Fetch)
    monkeypatch.setattr(module, "tidy", lambda: None)
    monkeypatch.setattr(module, "can_be_had", lambda _name: False)
    lines: list[str] = []

    async def fetch() -> None:
        mesh: Any = FakeMesh(projectors={MODEL.fingerprint: ProjectorInfo("e" * 64, 100)})
        store: Any = FakeStore()
        files = ModelFiles(mesh, store, Path("/leash"), lambda: None, lines.append, lambda _text: None)
        running = asyncio.create_task(files.run())
        files.want(MODEL)
        async with asyncio.timeout(5):
            await done.wait()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(fetch())
    assert asked == [("e" * 64, "mmproj-m.gguf", [PEER]), (MODEL.fingerprint, "", [PEER])]
    assert lines == (["no space; m will take no images here"] if fails else [])


@pytest.mark.parametrize("lies", ["in the models folder", "elsewhere", "and the user wants no projector"])
def test_a_projector_that_a_peer_got_later(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lies: str) -> None:
    """It is fetched once, for a model that lies where a projector beside it would be found."""
    monkeypatch.setenv("MESH_LLM_MODELS", str(tmp_path))
    asked: list[str] = []

    class Fetch:
        def __init__(self, model: ModelInfo, *_rest: Any) -> None:
            asked.append(model.fingerprint)

        async def run(self) -> None:
            raise ModelError("no space")

    monkeypatch.setattr(module, "Fetch", Fetch)
    monkeypatch.setattr(module, "tidy", lambda: None)

    async def look() -> None:
        mesh = FakeMesh()
        mesh.me = Announcement(ME, 1, models=(MODEL,), fetches=True)
        store = FakeStore()
        store.takes_projectors = lies != "and the user wants no projector"
        folder = Path("/elsewhere") if lies == "elsewhere" else tmp_path
        store.models[MODEL.fingerprint] = SimpleNamespace(projector=None, files=(str(folder / "m.gguf"),))
        files = ModelFiles(
            cast(Any, mesh), cast(Any, store), Path("/leash"), lambda: None, lambda _line: None, lambda _text: None
        )
        running = asyncio.create_task(files.run())
        for model in (MODEL, None, MODEL, None):
            files.want(model)
            await asyncio.sleep(0.01)
        assert not asked
        mesh.projectors = {MODEL.fingerprint: ProjectorInfo("e" * 64, 100)}
        files.want(MODEL)
        for _ in range(3):
            await asyncio.sleep(0.01)
            files._wake.set()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(look())
    assert asked == (["e" * 64] if lies == "in the models folder" else [])
