"""One snapshot for all viewers, and none while nobody looks."""

from __future__ import annotations

import asyncio

from meshllm.console.feed import Feed


class Source:
    def __init__(self) -> None:
        self.value, self.n_asked = 0, 0

    async def __call__(self) -> object:
        self.n_asked += 1
        return {"value": self.value}


def test_a_new_viewer_gets_a_fresh_snapshot() -> None:
    async def work() -> None:
        source = Source()
        feed = Feed(source)
        assert await feed.first() == b'{"value":0}' and feed.version == 1
        assert await feed.first() == b'{"value":0}' and feed.version == 1  # nothing has changed
        source.value = 1
        assert await feed.first() == b'{"value":1}' and feed.version == 2

    asyncio.run(work())


def test_all_who_wait_see_a_change() -> None:
    async def work() -> None:
        source = Source()
        feed = Feed(source)
        await feed.first()
        waiting = [asyncio.create_task(feed.after(feed.version, 5)) for _ in range(3)]
        await asyncio.sleep(0)
        source.value = 1
        await feed.first()
        assert await asyncio.gather(*waiting) == [True] * 3
        assert not await feed.after(feed.version, 0.01)

    asyncio.run(work())


def test_nothing_is_asked_while_nobody_looks() -> None:
    async def work() -> None:
        source = Source()
        feed = Feed(source)
        task = asyncio.create_task(feed.run())
        await asyncio.sleep(0.01)
        assert source.n_asked == 0
        task.cancel()
        feed.viewers = 1
        task = asyncio.create_task(feed.run())
        await asyncio.sleep(0.01)
        task.cancel()
        assert source.n_asked == 1

    asyncio.run(work())
