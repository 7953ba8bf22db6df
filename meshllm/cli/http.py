"""Listens on the API's port, and runs until a signal arrives."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

from meshllm.api import Access
from meshllm.cli.options import ServeConfig, is_loopback
from meshllm.errors import MeshLlmError


def bind(host: str, port: int, option: str = "--port") -> socket.socket:
    """A bound socket, before anything else starts. `option` is what chooses the port. Raises MeshLlmError."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
        return listener
    except (OSError, OverflowError) as error:
        if getattr(error, "errno", None) == errno.EADDRINUSE or "in use" in str(error):
            raise MeshLlmError(f"port {port} is in use; choose another with {option}") from None
        raise MeshLlmError(f"cannot listen on {host} port {port}: {error}") from None


def access_of(config: ServeConfig) -> Access:
    """Who may use the API and the dashboard, as the user chose."""
    return Access(config.api_key, config.cors_origin, is_loopback(config.host) and is_loopback(config.console_host))


def url_of(listener: socket.socket) -> str:
    """Base URL of the API on a bound socket."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


@asynccontextmanager
async def serving(app: web.Application, where: socket.socket | Path) -> AsyncIterator[None]:
    """Serves the application on a bound socket, or on a Unix socket that only this user can open."""
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        if isinstance(where, Path):
            _remove(where)
            await web.UnixSite(runner, str(where)).start()
            os.chmod(where, 0o600)
        else:
            await web.SockSite(runner, where, backlog=1024).start()
        yield
    finally:
        await runner.cleanup()
        if isinstance(where, Path):
            _remove(where)


def _remove(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


async def until_signal(work: Coroutine[Any, Any, None]) -> None:
    """Runs `work` until it ends or SIGINT or SIGTERM arrives. Raises what `work` raises."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    task = asyncio.create_task(work, name="work")
    stopped = asyncio.create_task(stop.wait(), name="signal")
    try:
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopped.cancel()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
