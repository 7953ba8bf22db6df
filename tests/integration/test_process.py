"""A child on its leash: its output, its end, and nothing of it left."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.waiting import until

from meshllm.engine.binaries import find_binaries
from meshllm.engine.process import LeashedProcess
from meshllm.errors import EngineError


def shell(script: str, lines: list[str] | None = None, log: io.StringIO | None = None) -> LeashedProcess:
    return process(["/bin/sh", "-c", script], lines, log)


def process(command: Sequence[str], lines: list[str] | None = None, log: io.StringIO | None = None) -> LeashedProcess:
    seen = lines if lines is not None else []
    return LeashedProcess(find_binaries(None).leash, command, os.environ, seen.append, log)


async def ended(child: LeashedProcess) -> int:
    async with child:
        return await child.wait()


def test_output_comes_line_by_line_and_is_logged() -> None:
    lines: list[str] = []
    log = io.StringIO()
    assert asyncio.run(ended(shell("echo one; echo two >&2; printf 'tail\\377'", lines, log))) == 0
    assert lines == ["one", "two", "tail\ufffd"]
    assert log.getvalue() == "one\ntwo\ntail\ufffd\n"


@pytest.mark.parametrize(("script", "status"), [("exit 3", 3), ("kill -9 $$", 128 + 9), ("kill -15 $$", 128 + 15)])
def test_the_status_says_how_it_ended(script: str, status: int) -> None:
    assert asyncio.run(ended(shell(script))) == status


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("echo '0.01 E first'; echo '0.02 E second'; echo after", "first"),
        ("echo '0.01 E first'; echo '0.02 E mesh-llm: the stage is full'", "mesh-llm: the stage is full"),
        ("echo last; echo", "last"),
        ("true", "it printed nothing"),
    ],
)
def test_the_error_that_counts(script: str, error: str) -> None:
    child = shell(script)
    asyncio.run(ended(child))
    assert child.last_error() == error


def test_a_line_without_end_costs_nothing() -> None:
    lines: list[str] = []
    script = "head -c 3000000 /dev/zero | tr '\\0' x; echo; echo after"
    assert asyncio.run(ended(shell(script, lines))) == 0
    assert lines[-1] == "after" and max(map(len, lines)) <= 1 << 20


def test_programs_that_are_none() -> None:
    missing = LeashedProcess(Path("/nowhere/leash"), ["true"], os.environ, lambda _line: None, None)
    with pytest.raises(EngineError, match=r"cannot start /nowhere/leash: No such file"):
        asyncio.run(ended(missing))
    assert asyncio.run(ended(process(["/nowhere/program"]))) != 0


def test_leaving_the_block_ends_the_process() -> None:
    async def main() -> int:
        lines: list[str] = []
        child = shell("echo $$; exec sleep 100", lines)
        async with asyncio.timeout(20), child:
            await until(lambda: lines)
        return int(lines[0])

    pid = asyncio.run(main())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_health_is_asked_until_it_is_well(tmp_path: Path) -> None:
    async def main() -> None:
        answers = [b"503 Busy", b"200 OK"]
        asked: list[bytes] = []

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            asked.append(await reader.readuntil(b"\r\n\r\n"))
            status = answers[min(len(asked), len(answers)) - 1]
            writer.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                await writer.drain()
            writer.close()

        child = shell("sleep 100")
        async with asyncio.timeout(20), child:
            waiting = asyncio.create_task(child.wait_healthy(tmp_path / "late.sock"))
            await asyncio.sleep(0)
            assert not waiting.done()
            async with await asyncio.start_unix_server(answer, tmp_path / "late.sock"):
                await waiting
        assert len(asked) == 2 and asked[0].startswith(b"GET /health ")

    asyncio.run(main())
