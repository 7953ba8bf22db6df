"""Waiting for a condition on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


async def until(check: Callable[[], object], timeout_s: float = 60) -> None:
    """Raises TimeoutError when it does not become true."""
    async with asyncio.timeout(timeout_s):
        while not check():  # noqa: ASYNC110
            await asyncio.sleep(0.002)
