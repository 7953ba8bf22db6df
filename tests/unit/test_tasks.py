"""Changes lose no notification; OwnedTasks contain what goes wrong."""

from __future__ import annotations

import asyncio
import logging

import pytest

from meshllm.errors import TransportError
from meshllm.tasks import Changes, OwnedTasks


def test_a_change_between_look_and_wait_is_not_missed() -> None:
    async def main() -> None:
        changes = Changes()
        seen = changes.version
        changes.notify()
        async with asyncio.timeout(1):
            await changes.wait(seen)

    asyncio.run(main())


def test_everybody_who_waits_is_woken_once_for_each_change() -> None:
    async def main() -> None:
        changes = Changes()
        woken: list[str] = []

        async def waiter(name: str) -> None:
            seen = changes.version
            while len(woken) < 6:
                await changes.wait(seen)
                seen = changes.version
                woken.append(name)

        tasks = [asyncio.create_task(waiter(name)) for name in "abc"]
        for _ in range(3):
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            changes.notify()
        async with asyncio.timeout(1):
            await asyncio.gather(*tasks)
        assert sorted(woken[:6]) == ["a", "a", "b", "b", "c", "c"]

    asyncio.run(main())


def test_a_waiter_can_be_cancelled_in_the_moment_of_a_change() -> None:
    """With asyncio.wait_for the cancellation would be lost (Python 3.11)."""

    async def main() -> None:
        changes = Changes()

        async def loop() -> None:
            while True:
                async with asyncio.timeout(10):
                    await changes.wait(changes.version)

        task = asyncio.create_task(loop())
        await asyncio.sleep(0)
        changes.notify()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            async with asyncio.timeout(1):
                await task

    asyncio.run(main())


def test_what_goes_wrong_in_a_task_is_logged_and_ends_only_that_task(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        finished = asyncio.Event()

        async def surprise() -> None:
            raise RuntimeError("a fault of ours")

        async def expected() -> None:
            raise TransportError("the peer is gone")

        async def good() -> None:
            finished.set()

        async with OwnedTasks() as tasks:
            for work in (surprise, expected, good):
                assert tasks.spawn(work, work.__name__)
            async with asyncio.timeout(1):
                await finished.wait()

    with caplog.at_level(logging.DEBUG, "meshllm"):
        asyncio.run(main())
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert [record.getMessage() for record in errors] == ["internal error, please report it: surprise failed"]
    assert errors[0].exc_info and "a fault of ours" in str(errors[0].exc_info[1])
    assert "expected: the peer is gone" in caplog.text


def test_tasks_end_with_their_owner_who_then_takes_no_more() -> None:
    async def main() -> None:
        tasks, ended = OwnedTasks(), []

        async def endless() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(True)

        assert tasks.spawn(endless, "too early") is None
        async with tasks:
            tasks.spawn(endless, "endless")
            await asyncio.sleep(0)
        assert ended == [True]
        assert tasks.spawn(endless, "too late") is None

    asyncio.run(main())
