"""Waiting with a limit: a member, a relay or an engine that is closed while news comes must end, not wait for ever."""

from __future__ import annotations

import asyncio

import pytest

from semel.env import comes


def test_it_says_whether_the_event_came() -> None:
    async def play() -> list[bool]:
        event = asyncio.Event()
        said = [await comes(event, 0), await comes(event, 0.01)]
        asyncio.get_running_loop().call_soon(event.set)
        return [*said, await comes(event, None), await comes(event, 0)]

    assert asyncio.run(play()) == [False, False, True, True]


@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("first", ["event", "cancellation"])
def test_a_cancellation_that_arrives_with_the_event_is_not_lost(first: str, turns: int) -> None:
    async def play() -> None:
        event = asyncio.Event()

        async def loop() -> None:
            while True:
                event.clear()
                await comes(event, 3600)

        task = asyncio.create_task(loop())
        for _ in range(3):
            await asyncio.sleep(0)
        steps = [event.set, task.cancel] if first == "event" else [task.cancel, event.set]
        steps[0]()
        for _ in range(turns):
            await asyncio.sleep(0)
        steps[1]()
        try:
            done, _ = await asyncio.wait([task], timeout=10)
            assert done, "the task goes on although it was cancelled"
            assert task.cancelled()
        finally:
            task.cancel()

    asyncio.run(play())
