"""Connects streams of the mesh with Unix sockets of this machine, byte for byte."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

from meshllm.quic.transport import Stream
from meshllm.tasks import OwnedTasks

_BACKLOG = 128
_RETRY_S = 0.1


async def serve_stream(stream: Stream, path: Path) -> None:
    """Connects a peer's stream to a server on this machine."""
    sock = socket.socket(socket.AF_UNIX)
    sock.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(sock, str(path))
    except OSError:
        sock.close()
        stream.abort()
        return
    await stream.splice(sock)


class Tunnels:
    """Unix sockets that lead to peers: each connection is spliced to a new stream.

    Use as `async with`; leaving the block ends all connections.
    """

    def __init__(self) -> None:
        self._listeners: dict[Path, asyncio.Task[None]] = {}
        self._tasks = OwnedTasks()

    async def __aenter__(self) -> Tunnels:
        await self._tasks.__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        for path in list(self._listeners):
            await self.close(path)
        await self._tasks.__aexit__(*exc)

    async def open(self, path: Path, open_stream: Callable[[], Awaitable[Stream]]) -> None:
        """Does nothing if the tunnel is open. Raises OSError."""
        if path in self._listeners:
            return
        _remove(path)
        listener = socket.socket(socket.AF_UNIX)
        try:
            listener.setblocking(False)
            listener.bind(str(path))
            listener.listen(_BACKLOG)
        except BaseException:
            listener.close()
            raise
        self._listeners[path] = asyncio.create_task(
            self._accept(listener, path, open_stream), name=f"tunnel {path.name}"
        )

    async def _accept(self, listener: socket.socket, path: Path, open_stream: Callable[[], Awaitable[Stream]]) -> None:
        with listener:
            while True:
                try:
                    sock, _ = await asyncio.get_running_loop().sock_accept(listener)
                except OSError:  # too many open files, or the caller has left
                    await asyncio.sleep(_RETRY_S)
                    continue
                if self._tasks.spawn(partial(_forward, sock, open_stream), f"through tunnel {path.name}") is None:
                    sock.close()

    async def close(self, path: Path) -> None:
        if listener := self._listeners.pop(path, None):
            listener.cancel()
            await asyncio.gather(listener, return_exceptions=True)
            _remove(path)


async def _forward(sock: socket.socket, open_stream: Callable[[], Awaitable[Stream]]) -> None:
    with sock:  # until the splice takes it over
        stream = await open_stream()
        await stream.splice(sock)


def _remove(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
