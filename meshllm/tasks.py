"""One way to run tasks that belong to somebody, to fail in them, and to wait for a change."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from meshllm.errors import MeshLlmError

_log = logging.getLogger(__name__)


class Changes:
    """Counts changes of a state that any number of tasks wait on. None is missed between a look and a wait:

    seen = changes.version
    ...  # look
    await changes.wait(seen)
    """

    def __init__(self) -> None:
        self.version = 0
        self._next = asyncio.Event()

    def notify(self) -> None:
        self.version += 1
        self._next.set()
        self._next = asyncio.Event()

    async def wait(self, seen: int) -> None:
        """Until there is a newer version than `seen`."""
        while self.version == seen:
            await self._next.wait()


class OwnedTasks:
    """Tasks that end with their owner. What goes wrong in one ends that one only. Use as `async with`."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._open = False

    async def __aenter__(self) -> OwnedTasks:
        self._open = True
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self._open = False
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def spawn(self, work: Callable[[], Coroutine[Any, Any, None]], name: str) -> asyncio.Task[None] | None:
        """None once the owner is leaving."""
        if not self._open:
            return None
        task = asyncio.create_task(contained(work, name), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def contained(work: Callable[[], Coroutine[Any, Any, None]], name: str) -> None:
    """Runs `work`. An expected failure is a debug line; any other is logged with its traceback."""
    try:
        await work()
    except (MeshLlmError, OSError) as error:  # TimeoutError is an OSError
        _log.debug("%s: %s", name, error)
    except Exception:
        _log.exception("internal error, please report it: %s failed", name)
