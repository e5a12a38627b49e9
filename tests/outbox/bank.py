"""An app that keeps accounts and tells of every payment, and a look at what its transactions left."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from semel import App
from semel.databases import Database

SCHEMA = "CREATE TABLE account (id VARCHAR(40) PRIMARY KEY, balance BIGINT NOT NULL)"
INSERT = "INSERT INTO account (id, balance) VALUES (?, ?)"


class Paid(msgspec.Struct, frozen=True):
    cents: int


class Bank:
    """`look` is a connection of the test's own; the app has `url`, which may lead through a proxy."""

    def __init__(self, url: str, look: Database) -> None:
        self.app = App("bank")
        self.paid = self.app.topic("paid", key=str, value=Paid)
        self.raw = self.app.topic("raw", key=bytes, value=bytes)
        self.database = self.app.database(url, outbox=True, connections=4)
        self._look = look
        self.woken = 0
        self.app.writer("database").on_commit(self._wake)

    def _wake(self) -> None:
        self.woken += 1

    def rows(self) -> list[tuple[Any, ...]]:
        """Topic, key and value of the outbox's rows, in order."""
        found = self._look.query("SELECT topic, record_key, record_value FROM semel_outbox ORDER BY seq")
        return [(topic, bytes(key or b""), bytes(value or b"")) for topic, key, value in found]

    def balances(self) -> dict[str, int]:
        return dict(self._look.query("SELECT id, balance FROM account"))

    def open_account(self, name: str, cents: int) -> None:
        """A row and the record that tells of it."""
        with self.app.transaction(self.database) as tx:
            tx.execute(INSERT, (name, cents))
            tx.send(self.paid.record(name, Paid(cents)))

    def told(self) -> dict[str, int]:
        """The balances, as the records tell them."""
        return {key.decode(): msgspec.json.decode(value)["cents"] for _, key, value in self.rows()}

    def run(self, work: Any) -> Any:
        """Run a coroutine function with an open transaction in a loop of its own."""

        async def whole() -> Any:
            async with self.app.transaction(self.database) as tx:
                return await work(tx)

        return asyncio.run(whole())
