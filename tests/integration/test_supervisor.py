"""The engine's supervisor, over a program that serves, fails, crashes and loses its stages as it is told."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from support.waiting import until

from meshllm import rpc
from meshllm.engine import supervisor
from meshllm.engine.binaries import Binaries, find_binaries
from meshllm.engine.launch import LaunchSpec, Stage, StageAddress
from meshllm.engine.speculation import NGRAM, Speculation
from meshllm.engine.supervisor import Engine, EngineState
from meshllm.errors import EngineError
from meshllm.models.store import load_model

FAKE = Path(__file__).parents[1] / "support" / "fake_llama_server.py"


@pytest.fixture
def binaries(tmp_path: Path) -> Binaries:
    script = tmp_path / "llama-server.py"
    shutil.copy(FAKE, script)
    program = tmp_path / "llama-server"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {script} "$@"\n')
    program.chmod(0o755)
    own = find_binaries(None)
    return Binaries(program, own.leash, own.backend)


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_FIRST_BACKOFF_S", 0.01)
    monkeypatch.setattr(supervisor, "_COUNTERS_S", 0.02)
    monkeypatch.setattr(supervisor, "_PROBE_INTERVAL_S", 0.05)


@pytest.fixture
def stage() -> Iterator[Stage]:
    """On a real device server, which only has to answer."""
    server = rpc.DeviceServer("127.0.0.1:0", threads=1)
    yield Stage(StageAddress("far", server.address, server.address), 0, "CPU", 30, True, 1000)
    server.stop()


class Setup:
    def __init__(self, spec: LaunchSpec) -> None:
        self.lines: list[str] = []
        self.steps: list[str] = []
        self.engine = Engine(spec, self.lines.append, self.steps.append)

    async def get(self, path: str) -> None:
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(path=str(self.engine.socket))) as session:
            with contextlib.suppress(aiohttp.ClientError):
                await session.get(f"http://engine{path}")

    def processes(self) -> list[str]:
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                found.append(path.read_bytes().decode(errors="replace"))
        return [command for command in found if str(self.engine.socket) in command]


@pytest.fixture
def spec(binaries: Binaries, model: Path) -> Callable[..., LaunchSpec]:
    def made(mode: str, *stages: Stage, **fields: Any) -> LaunchSpec:
        return LaunchSpec(load_model(model), binaries, stages, 0, "CPU", (mode,), **fields)

    return made


def run(spec: LaunchSpec, work: Callable[[Setup], Awaitable[None]]) -> Setup:
    """With the engine running; afterwards nothing of it is left."""

    async def main() -> Setup:
        setup = Setup(spec)
        async with asyncio.timeout(60):
            running = asyncio.create_task(setup.engine.run())
            try:
                await work(setup)
            finally:
                running.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await running
        assert setup.engine.state is EngineState.STOPPED
        assert not setup.engine.socket.parent.exists() and setup.processes() == []
        return setup

    return asyncio.run(main())


def test_an_engine_becomes_ready_and_leaves_nothing(spec: Callable[..., LaunchSpec]) -> None:
    async def work(setup: Setup) -> None:
        assert await setup.engine.wait_ready(30)
        assert setup.engine.first_ready.is_set() and setup.engine.reason == ""
        assert setup.processes()
        await until(lambda: setup.engine.describe().tokens.generated)
        status = setup.engine.describe()
        assert (status.state, status.n_ctx, status.restarts) == ("ready", 4096, 0)
        assert (status.tokens.prompt, status.tokens.generated, status.tokens_per_s) == (10, 20, 40.0)
        assert status.speculation
        assert (status.speculation.draft, status.speculation.drafted, status.speculation.accepted) == (NGRAM, 12, 6)
        assert status.speculation.tokens_per_step == 3.0

    setup = run(spec("serve", speculation=Speculation(NGRAM, 4)), work)
    name = setup.engine.spec.model.name
    assert setup.lines == [f"ready: {name} (CPU: 12.50 MiB)"]
    assert setup.steps == [f"loading {name} (CPU: 12.50 MiB)"]


def test_a_guess_that_nobody_asked_for_is_given_up(spec: Callable[..., LaunchSpec]) -> None:
    async def work(setup: Setup) -> None:
        assert await setup.engine.wait_ready(30)
        assert setup.engine.describe().speculation is None and setup.engine.restarts == 0

    by_default = spec("serve unless it guesses", speculation=Speculation("draft-mtp", 3, by_default=True))
    setup = run(by_default, work)
    name = setup.engine.spec.model.name
    assert setup.lines[0] == f"the head is broken; starting {name} again without speculative decoding"
    asked_for = Setup(spec("serve unless it guesses", speculation=Speculation("draft-mtp", 3)))
    with pytest.raises(EngineError, match="the head is broken"):
        asyncio.run(asked_for.engine.run())


def test_a_model_that_cannot_be_loaded_ends_it_with_the_first_error(spec: Callable[..., LaunchSpec]) -> None:
    setup = Setup(spec("fail"))
    with pytest.raises(EngineError, match=r"^cannot serve SmolLM2.*: the weights are broken$"):
        asyncio.run(setup.engine.run())
    assert setup.engine.restarts == 0 and not setup.engine.socket.parent.exists()


def test_a_program_that_cannot_be_started(spec: Callable[..., LaunchSpec], binaries: Binaries) -> None:
    binaries.llama_server.chmod(0o644)
    with pytest.raises(EngineError, match="cannot serve"):
        asyncio.run(Setup(spec("serve")).engine.run())


def has_restarted(engine: Engine, times: int) -> bool:
    return engine.restarts == times


def test_an_engine_that_crashes_is_started_again(spec: Callable[..., LaunchSpec]) -> None:
    async def work(setup: Setup) -> None:
        for restarts in (1, 2):
            assert await setup.engine.wait_ready(30)
            await setup.get("/end")
            await until(partial(has_restarted, setup.engine, restarts))
        assert await setup.engine.wait_ready(30)
        assert len(setup.processes()) <= 2  # the server and its leash, of this run only

    lines = [line for line in run(spec("serve"), work).lines if not line.startswith("ready")]
    stopped = "llama-server stopped (exit status 7); restarting it in {} s (-v shows its output)"
    assert lines == [stopped.format(seconds) for seconds in (0.01, 0.02)]


def test_an_engine_that_no_longer_starts_is_given_up(spec: Callable[..., LaunchSpec]) -> None:
    async def main() -> None:
        setup = Setup(spec("serve once"))
        running = asyncio.create_task(setup.engine.run())
        assert await setup.engine.wait_ready(30)
        await setup.get("/end")
        with pytest.raises(EngineError, match="the weights are broken"):
            await running
        assert setup.engine.restarts == 3

    asyncio.run(main())


def test_a_lost_stage_is_waited_for(spec: Callable[..., LaunchSpec], stage: Stage) -> None:
    async def work(setup: Setup) -> None:
        assert await setup.engine.wait_ready(30) and not setup.engine.stage_lost
        await setup.get("/lose")
        assert setup.engine.stage_lost
        assert not await setup.engine.wait_ready(30)
        await until(lambda: setup.engine.restarts == 1)
        await until(lambda: setup.engine.state is EngineState.READY)
        assert not setup.engine.stage_lost

    setup = run(spec("serve", stage), work)
    name = setup.engine.spec.model.name
    assert f"lost stage far; requests to {name} fail until that stage is back" in setup.lines
    assert not any("llama-server stopped" in line for line in setup.lines)


def test_who_waits_is_not_kept_longer_than_asked(spec: Callable[..., LaunchSpec]) -> None:
    async def main() -> None:
        engine = Setup(spec("serve")).engine
        assert not await engine.wait_ready(0.01)
        assert engine.state is EngineState.STARTING
        shutil.rmtree(engine.socket.parent)

    asyncio.run(main())


def test_what_the_environment_hides_from_llama_server(
    spec: Callable[..., LaunchSpec], stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MESH_LLM_API_KEY", "secret")
    monkeypatch.setenv("GGML_BACKEND_PATH", "/elsewhere")
    for stages in ((), (stage,)):
        engine = Setup(spec("serve", *stages)).engine
        environment = engine._environment()
        assert "MESH_LLM_API_KEY" not in environment and environment["PATH"] == os.environ["PATH"]
        backend = str(engine.spec.binaries.backend) if stages else None
        assert environment.get("GGML_BACKEND_PATH") == backend
        shutil.rmtree(engine.socket.parent)
