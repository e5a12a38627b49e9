"""Delivery modes: what a failure may cost in each of them, and what it must not."""

from __future__ import annotations

import asyncio
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from semel.errors import AbortTransaction, ErrorCode, Fatal, OutcomeUnknown, Retriable, SemelError
from semel.processing.component import Delivery
from semel.processing.supervisor import ChildSpec, Supervisor
from tests.conftest import Address
from tests.processing.running import copying_app, drained, feed, prepare, read_all
from tests.processing.test_engine import app_with, copied, copy, counted, everything, kafka_with, process
from tests.processing.test_engine_kafka import items_of, new_name, worker_environment

pytestmark = pytest.mark.usefixtures("impatient")


WEAK: list[Delivery] = ["at-least-once", "at-most-once"]
CALLS = ("send_batch", "after_send_batch", "commit_offsets", "after_commit_offsets")
ERRORS = (Retriable("later"), OutcomeUnknown("unknown"), AbortTransaction("no member now"))


@pytest.mark.parametrize("delivery", WEAK)
def test_when_nothing_fails_every_record_has_its_effects_once(delivery: Delivery) -> None:
    kafka = kafka_with(200)
    process(kafka, app_with(copy, delivery=delivery))
    assert copied(kafka) == everything(200)
    assert "end" not in kafka.calls, "a transaction is what this mode does without"
    first, second = (
        ("send_batch", "commit_offsets") if delivery == "at-least-once" else ("commit_offsets", "send_batch")
    )
    assert kafka.calls.index(first) < kafka.calls.index(second)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_at_least_once_loses_nothing(call: str, error: SemelError) -> None:
    kafka = kafka_with(60)
    kafka.fail(call, error, 2)
    process(kafka, app_with(copy, delivery="at-least-once"))
    assert set(copied(kafka)) == set(everything(60))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_at_most_once_doubles_nothing(call: str, error: SemelError) -> None:
    kafka = kafka_with(60)
    kafka.fail(call, error, 2)
    process(kafka, app_with(copy, delivery="at-most-once"))
    assert set(copied(kafka).values()) <= {1}
    if call == "commit_offsets":
        assert copied(kafka) == everything(60), "nothing was written, so nothing needs to be given up"


def test_at_least_once_state_holds_what_its_changelog_holds() -> None:
    """A position that was not written makes the records count again; the next owner must go on from that count."""
    kafka = kafka_with(50)
    kafka.fail("commit_offsets", AbortTransaction("no member now"))
    process(kafka, app_with(counted, state=True, delivery="at-least-once"))
    for key in range(5):
        kafka.append("in", b"k%d" % key, b"0", partition=key % 2)
    process(kafka, app_with(counted, state=True, delivery="at-least-once"))
    outputs = kafka.records("out")
    assert len(outputs) > 55, "what one unit held was counted again; how much that is depends on the machine"
    last = {record.key: int(record.value or b"") for record in outputs}
    assert last == Counter(record.key for record in outputs), "no count was lost or made twice"


def test_at_least_once_parks_what_the_broker_refuses() -> None:
    kafka = kafka_with(20)
    refusal = Fatal("too large for the topic")
    refusal.code = ErrorCode.MESSAGE_TOO_LARGE
    component = app_with(copy, delivery="at-least-once")
    writer_of = kafka.plain_producer

    def refusing(name: str, delivery: Delivery) -> Any:
        producer = writer_of(name, delivery)
        send = producer._writer.send_batch

        async def send_batch(topic: str, partition: int, batch: Any) -> int:
            if topic == "out" and b"\x0413" in batch.build():
                raise refusal
            return await send(topic, partition, batch)

        producer._writer.send_batch = send_batch  # type: ignore[method-assign]
        return producer

    kafka.plain_producer = refusing  # type: ignore[method-assign]
    process(kafka, component)
    assert kafka.values("a.semel.park.in") == [b"13", b"18"]
    assert set(copied(kafka)) == set(everything(20)) - {b"13", b"18"}


@pytest.mark.parametrize("delivery", WEAK)
def test_a_refusal_for_ever_ends_the_worker(delivery: Delivery) -> None:
    kafka = kafka_with(5)
    kafka.fail("commit_offsets", Fatal("GROUP_AUTHORIZATION_FAILED"))
    with pytest.raises(Fatal, match="AUTHORIZATION"):
        process(kafka, app_with(copy, delivery=delivery), lambda: False)


# --- Under kill -9 ---

TRAPS = {
    # Outputs acknowledged and positions not; positions written and nobody knows.
    "at-least-once": ["producer.before_offsets:kill:2", "producer.after_offsets:kill:2"],
    # Positions written and outputs not; outputs sent and not acknowledged.
    "at-most-once": ["producer.after_offsets:kill:2", "producer.after_send:kill:2"],
}


@pytest.mark.timeout(300)  # Three starts of a process, on a machine that may do much else.
@pytest.mark.parametrize("delivery", WEAK)
def test_a_worker_that_is_killed_between_the_two_steps_keeps_the_promise_of_its_mode(
    delivery: Delivery, embedded: Address, tmp_path: Path
) -> None:
    name, traps = new_name(), list(TRAPS[delivery])
    bootstrap = embedded.bootstrap
    exits: list[int] = []

    def environment() -> dict[str, str]:
        return {**os.environ, **worker_environment(bootstrap, traps.pop(0) if traps else "")}

    async def main() -> tuple[set[bytes], Counter[Any]]:
        await prepare(bootstrap, copying_app(name, delivery))
        command = [sys.executable, "-m", "tests.processing.running", name, "0", delivery]
        spec = ChildSpec("worker-0", command, environment, 0, tmp_path / "worker-0.log")
        supervisor = Supervisor([spec], silence_seconds=60, on_exit=lambda _, code: exits.append(code))
        running = asyncio.create_task(supervisor.run())
        items = items_of(40, seed=3)
        await feed(bootstrap, f"{name}.in", items)
        async with asyncio.timeout(240):
            while exits.count(-9) < len(TRAPS[delivery]):  # Each life needs some transactions to come to its trap.
                more = [(key, len(items) + number) for number, (key, _) in enumerate(items_of(5, seed=len(items)))]
                await feed(bootstrap, f"{name}.in", more)
                items.extend(more)
                await asyncio.sleep(0.05)
        await drained(bootstrap, f"{name}.count", f"{name}.in")
        await supervisor.drain()
        await running
        outputs = await read_all(bootstrap, f"{name}.out", 3)
        return {b"%d" % value for _, value in items}, Counter(record.value for record in outputs)

    wanted, found = asyncio.run(main())
    assert set(found) <= wanted
    if delivery == "at-least-once":
        assert set(found) == wanted
        assert max(found.values()) == 2, "who dies between outputs and position does the outputs again"
    else:
        assert set(found.values()) == {1}
        assert set(found) < wanted, "who dies between position and outputs gives the outputs up"
