"""The window alone: results in order, lanes in turn, a bound on what runs, and nothing that goes on after its end."""

from __future__ import annotations

import asyncio
import random
from collections import Counter, defaultdict
from typing import Any

import pytest

from semel.processing.window import Window


@pytest.mark.parametrize("seed", range(20))
def test_results_come_in_order_and_each_lane_in_turn(seed: int) -> None:
    rng = random.Random(seed)
    limit = rng.randint(1, 6)
    lanes = [rng.choice([None, "a", "b", "c"]) for _ in range(60)]
    delays = [rng.randint(0, 4) for _ in lanes]
    running: Counter[Any] = Counter()
    begun: dict[Any, list[int]] = defaultdict(list)
    taken: list[int] = []
    most = 0

    async def run(number: int) -> int:
        nonlocal most
        lane = lanes[number]
        begun[lane].append(number)
        running[lane] += 1
        most = max(most, running.total())
        assert lane is None or running[lane] == 1, f"two calls at once in lane {lane}"
        assert all(lanes[earlier] != lane or earlier in taken for earlier in range(number) if lane is not None)
        for _ in range(delays[number]):
            await asyncio.sleep(0)
        running[lane] -= 1
        return number * 10

    async def main() -> None:
        window = Window(limit, run, lambda number: lanes[number])
        waiting = list(range(len(lanes)))
        while waiting or window:
            while waiting and window.has_room:
                window.admit(waiting.pop(0))
            number, result = await window.take()
            assert result == number * 10
            taken.append(number)
            window.taken()
        await window.close()

    asyncio.run(main())
    assert taken == list(range(len(lanes)))
    assert most <= limit
    assert begun["a"] == [number for number in taken if lanes[number] == "a"]


def test_calls_run_at_once_as_far_as_the_limit_allows() -> None:
    async def main() -> int:
        meeting = asyncio.Barrier(4)

        async def run(number: int) -> int:
            await meeting.wait()  # Without three others at the same moment this never ends.
            return number

        window = Window(4, run, lambda number: None)
        for number in range(8):
            window.admit(number)
        for _ in range(8):
            async with asyncio.timeout(30):
                await window.take()
            window.taken()
        await window.close()
        return len(window)

    assert asyncio.run(main()) == 0


def test_an_error_is_raised_when_its_item_is_first_and_the_others_keep_their_results() -> None:
    async def run(number: int) -> int:
        if number == 1:
            raise ValueError("one")
        if number == 2:
            raise ValueError("two")
        return number

    async def main() -> list[Any]:
        window = Window(4, run, lambda number: None)
        for number in range(4):
            window.admit(number)
        found: list[Any] = []
        while window:
            try:
                found.append((await window.take())[1])
            except ValueError as error:
                found.append(str(error))
            window.taken()
        await window.close()
        return found

    assert asyncio.run(main()) == [0, "one", "two", 3]


def test_close_ends_every_call() -> None:
    ended: list[int] = []

    async def run(number: int) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(number)

    async def main() -> set[Any]:
        window = Window(2, run, lambda number: None)
        for number in range(5):
            window.admit(number)
        await asyncio.sleep(0)
        await window.close()
        assert not window
        return asyncio.all_tasks() - {asyncio.current_task()}

    assert asyncio.run(main()) == set()
    assert sorted(ended) == [0, 1], "what had not begun must not begin while the window closes"


def test_it_says_when_it_is_full() -> None:
    async def run(number: int) -> None:
        await asyncio.Event().wait()

    async def main() -> None:
        window = Window(2, run, lambda number: None)
        admitted = 0
        while window.has_room:
            window.admit(admitted)
            admitted += 1
        assert admitted == 10
        await window.close()

    asyncio.run(main())
