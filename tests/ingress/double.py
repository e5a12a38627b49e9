"""A log in this process, for what the shell does when the log misbehaves; the real logs are in test_chain.py."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from semel.errors import Fatal, OutcomeUnknown, Retriable, SemelError
from semel.ingress.owner import Owner
from semel.ingress.requests import Stored, read_stored, requests_topic, responses_topic
from semel.processing.effects import Change, Effect, Write
from semel.types import Record


class MemoryStores:
    """The stores of one partition, written as the engine writes them: a written key moves to the end."""

    def __init__(self) -> None:
        self.tables: dict[str, dict[bytes, bytes]] = {}

    def get(self, store: str, key: bytes) -> bytes | None:
        return self.tables.get(store, {}).get(key)

    def items(self, store: str) -> Iterator[tuple[bytes, bytes]]:
        yield from list(self.tables.get(store, {}).items())

    def prefixed(self, store: str, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        yield from sorted(item for item in self.items(store) if item[0].startswith(prefix))

    def apply(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Change):
                table = self.tables.setdefault(effect.store, {})
                table.pop(effect.key, None)
                if effect.value is not None:
                    table[effect.key] = effect.value

    def stored(self) -> list[Stored]:
        return [read_stored(value) for value in self.tables.get("idempotency", {}).values()]


class Partition:
    """One partition of requests with its owner, run to completion on every append."""

    def __init__(self, owner: Owner, app: str = "shop", now_ms: int = 1_700_000_000_000) -> None:
        self.owner = owner
        self.app = app
        self.now_ms = now_ms
        self.stores = MemoryStores()
        self.effects: list[Write] = []
        self._offset = 0

    async def take(self, key: bytes, value: bytes) -> list[Record]:
        """Append and process one request; returns the replies."""
        record = Record(requests_topic(self.app), 0, self._offset, self.now_ms, key, value)
        self._offset += 1
        effects = await self.owner.handle(record, self.stores)
        self.stores.apply(effects)
        replies = []
        for effect in effects:
            if isinstance(effect, Write) and effect.topic == responses_topic(self.app):
                at = effect.partition or 0
                replies.append(Record(effect.topic, at, 0, self.now_ms, effect.key, effect.value, effect.headers))
            elif isinstance(effect, Write):
                self.effects.append(effect)
        return replies


class FoundRoute(NamedTuple):
    partitions: int
    reply_partition: int


class ScriptedLink:
    """`behaviour` says what the log does with the next appends: answer, silent, lost, unknown, refused."""

    def __init__(self, partition: Partition) -> None:
        self.partition = partition
        self.behaviour = "answer"
        self.open_errors: list[SemelError] = []
        self.opened = 0
        self.appended: list[tuple[int, bytes, bytes]] = []
        self.is_reachable = True
        self._replies: asyncio.Queue[list[Record] | SemelError] = asyncio.Queue()

    async def open(self, instance: bytes) -> FoundRoute:
        self.opened += 1
        if self.open_errors:
            raise self.open_errors.pop(0)
        return FoundRoute(4, 3)

    async def append(self, partition: int, key: bytes, value: bytes) -> None:
        await asyncio.sleep(0)
        if self.behaviour == "refused":
            raise Retriable("no broker")
        if self.behaviour == "broken":
            raise RuntimeError("a bug")
        if self.behaviour == "lost":
            raise OutcomeUnknown("no answer")
        self.appended.append((partition, key, value))
        if self.behaviour == "silent":
            return
        self._replies.put_nowait(await self.partition.take(key, value))
        if self.behaviour == "unknown":
            raise OutcomeUnknown("no answer, but it is there")

    async def replies(self) -> Sequence[Record]:
        found = await self._replies.get()
        if isinstance(found, SemelError):
            raise found
        return found

    def fail_reading(self, error: SemelError) -> None:
        self._replies.put_nowait(error)

    async def probe(self) -> None:
        if not self.is_reachable:
            raise Retriable("no broker")

    async def close(self) -> None:
        return


__all__ = ["Fatal", "MemoryStores", "Partition", "ScriptedLink"]
