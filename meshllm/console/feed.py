"""What all open dashboards show: one snapshot a second, made once however many look."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import orjson

_INTERVAL_S = 1.0


class Feed:
    """`describe` gives a record that JSON can be made of. `run` until cancelled; the rest meanwhile."""

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
        """For a viewer that has just come."""
        await self._look()
        return self.snapshot

    async def after(self, version: int, timeout_s: float) -> bool:
        """Whether there is a newer snapshot than that, in this time."""
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(lambda: self.version > version)
                return True
        except TimeoutError:
            return False
