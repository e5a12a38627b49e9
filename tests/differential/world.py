"""What a program knows while it runs against one broker."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from uuid import UUID

from tests.differential.answers import Names, plain
from tests.differential.connection import Closed, Connection

__all__ = ["CLOSED", "UNKNOWN_TOPIC_ID", "World"]

RETRIABLE = frozenset((14, 15, 16, 51))
"""Loading, not there yet, elsewhere, markers under way: Kafka works in the background, and clients ask again."""
PATIENCE_SECONDS = 20.0
UNKNOWN_TOPIC_ID = UUID(int=0xD1FF)
UNKNOWN_PRODUCER_ID = 5_000_000_000
CLOSED = "the connection was closed"


def first_code(value: Any) -> int:
    """The first error code that stands in an answer."""
    if isinstance(value, dict):
        for name, item in value.items():
            if name.endswith("error_code") and item:
                return int(item)
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            code = first_code(item)
            if code:
                return code
    return 0


class World:
    """One program's side at one broker. `joins` is what the other side's `harvest` found, step by step, if it ran."""

    def __init__(self, bootstrap: str, mark: str, joins: list[set[str]] | None = None) -> None:
        self._bootstrap = bootstrap
        self.mark = mark
        self.names = Names(f"{mark}-")
        self.names.give("topic", UNKNOWN_TOPIC_ID, "an unknown id")
        self.names.give("producer", UNKNOWN_PRODUCER_ID, "unknown")
        self._connection: Connection | None = None
        self.topic_ids: dict[int, UUID] = {}
        self.identities: dict[str, list[tuple[int, int]]] = {}
        self.sequences: dict[tuple[int, int, str, int], list[tuple[int, int]]] = {}
        """Batches that were accepted: first sequence and number of records, by producer id, epoch and partition."""
        self.members: dict[str, str] = {}
        """Member ids by slot."""
        self.given: set[str] = set()
        """Member ids that were given (KIP-394) and not joined with yet."""
        self.generations: dict[str, int] = {}
        self.session: tuple[int, int] = (0, 0)
        """Fetch session id and next epoch."""
        self.sessions: list[int] = []
        self.hangs = False
        """Whether a decided transaction never came to its end."""
        self._member_connections: dict[str, Connection] = {}
        self.harvests: list[set[str]] = []
        self._joins = joins

    # --- Connections ---

    def close(self) -> None:
        for connection in (self._connection, *self._member_connections.values()):
            if connection is not None:
                connection.close()
        self._connection = None
        self._member_connections.clear()

    @property
    def connection(self) -> Connection:
        if self._connection is None:
            self._connection = Connection(self._bootstrap, "program")
        return self._connection

    def once(self, key: int, version: int, /, **fields: Any) -> Any:
        """The plain answer, or CLOSED."""
        try:
            return plain(self.connection.ask(key, version, **fields))
        except Closed:
            self.connection.close()
            self._connection = None
            return CLOSED

    def ask(self, key: int, version: int, /, **fields: Any) -> Any:
        """The plain answer; one that says "not yet" is asked for again."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        pause = 0.001
        while True:
            answer = self.once(key, version, **fields)
            if first_code(answer) not in RETRIABLE or time.monotonic() > deadline:
                return answer
            time.sleep(pause)
            pause = min(pause * 2, 0.05)

    def tell(self, key: int, version: int, /, **fields: Any) -> Any:
        """Send a request that has no answer; whether the connection survived it is the answer."""
        try:
            self.connection.send(key, version, answered=False, **fields)
            self.connection.ask(18, 0)
        except Closed:
            self.connection.close()
            self._connection = None
            return CLOSED
        return "no answer"

    def until(self, what: str, done: Callable[[], bool]) -> None:
        """Wait for what a broker does in the background."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        pause = 0.001
        while not done():
            assert time.monotonic() < deadline, f"{what}: never"
            time.sleep(pause)
            pause = min(pause * 2, 0.05)

    # --- Names ---

    def topic(self, index: int) -> str:
        return f"{self.mark}-t{index}"

    def topic_id(self, index: int) -> UUID:
        return self.topic_ids.get(index, UNKNOWN_TOPIC_ID)

    def topic_key(self, index: int, by_id: bool, name: str = "name") -> dict[str, Any]:
        return {"topic_id": self.topic_id(index)} if by_id else {name: self.topic(index)}

    def transactional_id(self, slot: str | None) -> str | None:
        return slot if not slot else f"{self.mark}-{slot}"

    def group(self, index: int) -> str:
        return f"{self.mark}-g{index}"

    def identity(self, slot: str, variant: str) -> tuple[int, int]:
        """Producer id and epoch; `variant` says how they relate to what the slot was given last."""
        history = self.identities.get(slot)
        if variant == "none":
            return -1, -1
        if variant == "half":
            return 5, -1
        if not history or variant == "unknown":
            return UNKNOWN_PRODUCER_ID, 0
        producer_id, epoch = history[-1]
        if variant == "before":
            return history[-2] if len(history) > 1 else (producer_id, epoch)
        if variant == "first":
            return history[0]
        if variant == "other":
            others = [found[-1][0] for name, found in sorted(self.identities.items()) if name != slot]
            return (others[0] if others else UNKNOWN_PRODUCER_ID), epoch
        step = {"now": 0, "next": 1, "stale": -1, "far": 7, "last": 32767 - epoch}[variant]
        return producer_id, max(epoch + step, 0)

    def learn_identity(self, slot: str, answer: Any) -> None:
        """Remember an identity that the broker handed out."""
        if answer == CLOSED or answer["error_code"] or answer.get("producer_id", -1) < 0:
            return
        history = self.identities.setdefault(slot, [])
        known = [producer_id for producer_id, _ in history]
        self.names.give("producer", answer["producer_id"], f"{slot}#{len(set(known))}")
        history.append((answer["producer_id"], answer["producer_epoch"]))

    # --- Waiting for what Kafka does in the background ---

    def settle(self) -> bool:
        """Until the markers of every decided transaction are written; False when they never are."""
        ids = [self.transactional_id(slot) for slot in self.identities if slot.startswith("x")]
        if not ids or self.hangs:
            return not self.hangs

        def done() -> bool:
            answer = self.ask(65, 0, transactional_ids=ids)
            return not any(item["transaction_state"].startswith("Prepare") for item in answer["transaction_states"])

        try:
            self.until("markers", done)
        except AssertionError:
            self.hangs = True
        return not self.hangs

    def transaction(self, slot: str) -> Any:
        """The slot's transactional id as DescribeTransactions shows it."""
        return self.ask(65, 0, transactional_ids=[self.transactional_id(slot)])["transaction_states"][0]

    def timed_out(self, slot: str) -> None:
        """Until the slot's transaction is no longer open."""

        def done() -> bool:
            return not self.transaction(slot)["transaction_state"].startswith(("Ongoing", "Prepare"))

        self.until("time-out", done)

    def described(self, index: int) -> Any:
        """The topic in Metadata."""
        found = self.ask(
            3,
            12,
            topics=[{"name": self.topic(index), "topic_id": None}],
            allow_auto_topic_creation=False,
            include_topic_authorized_operations=False,
        )
        return found["topics"][0]

    def topic_ready(self, index: int) -> None:
        """Until every partition has a leader that answers; its id is known then."""
        name = self.topic(index)

        def done() -> bool:
            topic = self.described(index)
            if topic["error_code"] or any(item["error_code"] for item in topic["partitions"]):
                return False
            items = [
                {"partition_index": item["partition_index"], "current_leader_epoch": -1, "timestamp": -1}
                for item in topic["partitions"]
            ]
            offsets = self.ask(2, 7, replica_id=-1, isolation_level=0, topics=[{"name": name, "partitions": items}])
            if any(item["error_code"] for item in offsets["topics"][0]["partitions"]):
                return False
            self.topic_ids[index] = topic["topic_id"]
            return True

        self.until(f"leaders of {name}", done)
        self.names.give("topic", self.topic_ids[index], f"t{index}")

    def topic_gone(self, index: int) -> None:
        name = self.topic(index)

        def done() -> bool:
            item = [{"partition_index": 0, "current_leader_epoch": -1, "timestamp": -1}]
            offsets = self.ask(2, 7, replica_id=-1, isolation_level=0, topics=[{"name": name, "partitions": item}])
            return bool(self.described(index)["error_code"] == 3 and first_code(offsets) == 3)

        self.until(f"end of {name}", done)

    # --- Group members: each has a connection of its own, on which an answer may be long in coming ---

    def member_connection(self, slot: str) -> Connection:
        found = self._member_connections.get(slot)
        if found is None:
            found = self._member_connections[slot] = Connection(self._bootstrap, "member")
        return found

    def drop_member_connection(self, slot: str) -> None:
        self._member_connections.pop(slot).close()

    def harvest(self) -> dict[str, Any]:
        """Answers that came to waiting members by now.

        The first broker asked is ours: it answers in the order of requests, so what is not there after a few more
        of them comes later. The second is waited for as long as it takes to bring the same answers.
        """
        expected = None if self._joins is None else self._joins[len(self.harvests)]
        for _ in range(6):
            self.once(18, 0)
        waiting = {slot: item for slot, item in self._member_connections.items() if item.waits}
        found: dict[str, Any] = {}
        for slot, connection in sorted(waiting.items()):
            sure = expected is not None and slot in expected
            if connection.ready(5.0 if sure else 0.05):
                try:
                    found[slot] = plain(connection.receive())
                except Closed:
                    found[slot] = CLOSED
                    self.drop_member_connection(slot)
        self.harvests.append(set(found))
        return found
