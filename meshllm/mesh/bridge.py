"""Between streams of the mesh and Unix sockets of this machine: bytes in both directions, as they come."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

from meshllm.errors import MeshLlmError
from meshllm.mesh.transport import Stream

_CHUNK = 1 << 18


async def splice(stream: Stream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Until both directions have ended, or one has failed; then both are closed."""

    async def outward() -> None:
        while data := await reader.read(_CHUNK):
            await stream.write(data)
        stream.finish()

    async def inward() -> None:
        while data := await stream.read(_CHUNK):
            writer.write(data)
            await writer.drain()
        writer.write_eof()

    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(outward(), name="splice outward")
            group.create_task(inward(), name="splice inward")
    except* (MeshLlmError, OSError):
        pass  # whoever is at the other end of the socket sees it closed
    finally:
        stream.abort()
        writer.transport.abort()


async def serve_stream(stream: Stream, socket: Path) -> None:
    """A stream of a peer's, connected to a server on this machine."""
    try:
        reader, writer = await asyncio.open_unix_connection(str(socket))
    except OSError:
        stream.abort()
        return
    await splice(stream, reader, writer)


class Doors:
    """Unix sockets that lead to peers: what connects to one is spliced to a new stream.

    Use as `async with`; closing ends all that goes through.
    """

    def __init__(self) -> None:
        self._servers: dict[Path, asyncio.Server] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Doors:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        for path in list(self._servers):
            await self.close(path)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def open(self, path: Path, open_stream: Callable[[], Awaitable[Stream]]) -> None:
        """Nothing happens when the door is there already. Raises OSError."""
        if path in self._servers:
            return

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                stream = await open_stream()
            except MeshLlmError:
                writer.transport.abort()
                return
            await splice(stream, reader, writer)

        def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.spawn(connected(reader, writer), f"door {path.name}")

        _remove(path)
        self._servers[path] = await asyncio.start_unix_server(accepted, str(path))

    async def close(self, path: Path) -> None:
        if server := self._servers.pop(path, None):
            server.close()
            _remove(path)

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Owned by these doors."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            with contextlib.suppress(OSError, MeshLlmError):
                task.result()


def _remove(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
