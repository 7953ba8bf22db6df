"""The command's listener: its errors in words, and what it leaves behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import stat
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from meshllm.cli.control import ask_node
from meshllm.cli.http import bind, serving, until_signal, url_of
from meshllm.errors import MeshLlmError
from meshllm.paths import control_socket


def test_a_port_that_is_taken_or_that_cannot_be() -> None:
    with contextlib.closing(bind("127.0.0.1", 0)) as listener:
        listener.listen()
        port = listener.getsockname()[1]
        assert url_of(listener) == f"http://127.0.0.1:{port}/v1"
        with pytest.raises(MeshLlmError, match=rf"^port {port} is in use; choose another with --console$"):
            bind("127.0.0.1", port, "--console")
    for host, wrong in (("192.0.2.1", 0), ("no such host", 0)):
        with pytest.raises(MeshLlmError, match=rf"^cannot listen on {host} port {wrong}: "):
            bind(host, wrong)


def test_ipv6_is_written_in_brackets() -> None:
    with contextlib.closing(bind("::1", 0)) as listener:
        assert url_of(listener).startswith("http://[::1]:")


def application() -> web.Application:
    async def hello(_request: web.Request) -> web.Response:
        return web.json_response({"hello": "there"})

    async def refuse(_request: web.Request) -> web.Response:
        return web.json_response({"error": "no such model"}, status=400)

    app = web.Application()
    app.router.add_get("/hello", hello)
    app.router.add_get("/refuse", refuse)
    return app


def test_a_unix_socket_is_this_users_and_is_removed(tmp_path: Path) -> None:
    async def main() -> None:
        path = tmp_path / "control.sock"
        path.touch()  # of a process that was killed
        async with serving(application(), path):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as session:
                assert await (await session.get("http://node/hello")).json() == {"hello": "there"}
        assert not path.exists()

    asyncio.run(main())


def test_the_node_behind_a_port_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))

    async def main() -> None:
        with pytest.raises(MeshLlmError, match="no mesh-llm of yours answers on port 9555"):
            await ask_node(9555, "GET", "/hello")
        async with serving(application(), control_socket(9555)):
            assert await ask_node(9555, "GET", "/hello") == {"hello": "there"}
            with pytest.raises(MeshLlmError, match=r"^no such model$"):
                await ask_node(9555, "GET", "/refuse")

    asyncio.run(main())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_work_in_order(number: signal.Signals) -> None:
    steps: list[str] = []

    async def work() -> None:
        os.kill(os.getpid(), number)
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)
            steps.append("tidied up")

    asyncio.run(until_signal(work()))
    assert steps == ["tidied up"]


def test_what_the_work_raises_comes_out() -> None:
    async def work() -> None:
        raise MeshLlmError("the reason")

    with pytest.raises(MeshLlmError, match="the reason"):
        asyncio.run(until_signal(work()))


def test_bound_sockets_are_closed_after_an_error() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for _ in range(20):
            with pytest.raises(MeshLlmError):
                bind("127.0.0.1", taken.getsockname()[1])
    assert len(os.listdir("/proc/self/fd")) <= before + 1
