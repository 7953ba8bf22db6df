"""Unix sockets that lead to peers, over sockets in this process."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from support.waiting import until

from meshllm.errors import TransportError
from meshllm.quic.tunnel import Tunnels, serve_stream


class Echo:
    """A stream whose other side sends everything back; `splice` is all that a tunnel asks of it."""

    def __init__(self) -> None:
        self.spliced = self.aborted = False

    async def splice(self, sock: socket.socket) -> None:
        self.spliced = True
        sock.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=sock)
        try:
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        finally:
            writer.close()

    def abort(self) -> None:
        self.aborted = True

    async def read(self, limit: int = 1 << 18) -> bytes:
        raise NotImplementedError

    async def write(self, data: bytes) -> None:
        raise NotImplementedError

    def finish(self) -> None:
        raise NotImplementedError


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(30):
            await work()

    asyncio.run(main())


async def echoed(path: Path, data: bytes) -> bytes:
    """What comes back before the connection ends, in whatever way."""
    reader, writer = await asyncio.open_unix_connection(str(path))
    answer = b""
    with contextlib.suppress(ConnectionError):
        writer.write(data)
        writer.write_eof()
        answer = await reader.read()
    writer.close()
    return answer


def test_every_connection_gets_a_stream(tmp_path: Path) -> None:
    async def work() -> None:
        path, streams = tmp_path / "peer.sock", list[Echo]()

        async def opened() -> Echo:
            streams.append(Echo())
            return streams[-1]

        async with Tunnels() as tunnels:
            await tunnels.open(path, opened)
            await tunnels.open(path, opened)  # is open already
            data = [bytes([i]) * 100_000 for i in range(5)]
            assert await asyncio.gather(*(echoed(path, d) for d in data)) == data
            assert len(streams) == 5
            await tunnels.close(path)
            await tunnels.close(path)
            assert not path.exists()

    run(work)


def test_a_peer_that_cannot_be_reached_ends_the_connection_only(tmp_path: Path) -> None:
    async def work() -> None:
        path, reachable = tmp_path / "peer.sock", False

        async def opened() -> Echo:
            if not reachable:
                raise TransportError("the link is gone")
            return Echo()

        async with Tunnels() as tunnels:
            await tunnels.open(path, opened)
            assert await echoed(path, b"hello") == b""
            reachable = True
            assert await echoed(path, b"hello") == b"hello"

    run(work)


def test_leaving_ends_connections_and_removes_sockets(tmp_path: Path) -> None:
    async def work() -> None:
        path = tmp_path / "peer.sock"
        path.touch()  # of a process that was killed

        async def opened() -> Echo:
            return Echo()

        async with Tunnels() as tunnels:
            await tunnels.open(path, opened)
            reader, writer = await asyncio.open_unix_connection(str(path))
            writer.write(b"x")
            assert await reader.read(1) == b"x"
        assert await reader.read() == b"" and not path.exists()
        writer.close()

    run(work)


def test_a_path_that_is_too_long(tmp_path: Path) -> None:
    async def work() -> None:
        async with Tunnels() as tunnels:
            with pytest.raises(OSError, match="too long"):
                await tunnels.open(tmp_path / ("x" * 200), lambda: asyncio.sleep(0, Echo()))

    run(work)


def test_a_peers_stream_reaches_a_server_here_or_is_dropped(tmp_path: Path) -> None:
    async def work() -> None:
        nobody = Echo()
        await serve_stream(nobody, tmp_path / "none.sock")
        assert nobody.aborted and not nobody.spliced

        accepted: list[int] = []

        def connected(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            accepted.append(1)
            writer.close()

        async with await asyncio.start_unix_server(connected, str(tmp_path / "api.sock")):
            stream = Echo()
            await serve_stream(stream, tmp_path / "api.sock")
            await until(lambda: accepted)
        assert stream.spliced and not stream.aborted

    run(work)
