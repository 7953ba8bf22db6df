"""What all open dashboards show: at most one snapshot a second, made once for all viewers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import orjson

_INTERVAL_S = 1.0


class Feed:
    """Snapshots, as JSON, of what `describe` returns, while `run` runs and `viewers` is above zero."""

    def __init__(self, describe: Callable[[], Awaitable[object]]) -> None:
        self._describe = describe
        self._changed = asyncio.Condition()
        self.snapshot = b"{}"
        self.version = 0
        self.viewers = 0

    async def run(self) -> None:
        while True:
            if self.viewers:
                await self._look()
            await asyncio.sleep(_INTERVAL_S)

    async def _look(self) -> None:
        snapshot = orjson.dumps(await self._describe())
        if snapshot != self.snapshot:
            async with self._changed:
                self.snapshot = snapshot
                self.version += 1
                self._changed.notify_all()

    async def first(self) -> bytes:
        """A fresh snapshot, for a new viewer."""
        await self._look()
        return self.snapshot

    async def after(self, version: int, timeout_s: float) -> bool:
        """Waits for a snapshot newer than `version`; False when none came within `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(lambda: self.version > version)
                return True
        except TimeoutError:
            return False
