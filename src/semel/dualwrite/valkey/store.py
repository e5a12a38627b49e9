"""Slots in Valkey and Redis: a hash for each, an index of them, and whose they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from semel.databases.database import without_password
from semel.databases.valkey.connection import ValkeyConnection
from semel.dualwrite.store import LEAVE_RELEASED, OUT_OF_USE, Claim, Decision, SlotOutOfUse, SlotRow, slot_prefix
from semel.dualwrite.valkey.scripts import ADD, BEAT, CLAIM, OPEN, RESERVE
from semel.errors import ConfigurationError, Fatal
from semel.failpoints import failpoint

__all__ = ["SCHEMA_VERSION", "ValkeyStore", "check_server", "slot_key"]

SCHEMA_VERSION: Final = 1
SLOTS_MAX: Final = 1_000
"""Slots of one cache: as many transactions can be in doubt at once."""
_KEY = "semel:txn:"
_KEEPS_EVERYTHING = {"appendonly": "yes", "appendfsync": "always", "no-appendfsync-on-rewrite": "no"}
"""What loses nothing that was acknowledged, whatever dies."""


def slot_key(slot: str) -> str:
    """The key of a slot's hash."""
    return _KEY + slot


def check_server(connection: ValkeyConnection) -> None:
    """Raises `ConfigurationError` for a server that may lose what it acknowledged, or whose scripts may fail half-way.

    With a decision that is lost, Kafka has a transaction that the cache has not: nothing could put that right.
    """
    where = without_password(connection.url)
    info = connection.info()
    if info.get("role") != "master":
        raise ConfigurationError(f"{where} is a replica: transactions go to the server that it follows.")
    if int(str(info.get("redis_version", "0")).split(".")[0]) < 7:
        raise ConfigurationError(
            f"{where} is Redis {info.get('redis_version')}, whose scripts cannot tell whether a command will be "
            "allowed to them before they have done the ones before it. The dual write needs Valkey, or Redis 7."
        )
    settings = connection.settings()
    if settings is None:
        raise ConfigurationError(
            f"{where} does not tell its settings, so nobody knows whether it keeps what it acknowledges. Allow this "
            "user CONFIG GET (ACL: +config|get)."
        )
    wrong = {name: settings.get(name) for name, value in _KEEPS_EVERYTHING.items() if settings.get(name) != value}
    if wrong:
        raise ConfigurationError(
            f"{where} may lose what it acknowledged: it has {_settings(wrong)}. The dual write needs "
            f"{_settings({name: _KEEPS_EVERYTHING[name] for name in wrong})}, because a decision that is lost leaves "
            "Kafka with a transaction that the cache has not. (CONFIG SET, and the server's file, so that it stays.)"
        )


class ValkeyStore(ValkeyConnection):
    """One connection beside those of the sessions. See `semel.dualwrite.store.Store`."""

    def __init__(self, url: str, app: str, name: str) -> None:
        super().__init__(url)
        self._prefix = slot_prefix(app, name)
        self._meta = f"{_KEY}meta:{self._prefix}"
        self._index = f"{_KEY}slots:{self._prefix}"
        self._open = self.script(OPEN)
        self._add = self.script(ADD)
        self._reserve = self.script(RESERVE)
        self._claim = self.script(CLAIM)
        self._beat = self.script(BEAT)

    def migrate(self, app: str) -> None:
        """Make the place for the slots; it may run again. Which Kafka they belong to is written by the first claim."""
        self.open(app, "", create_tables=True)

    def environment_of(self, slot: str) -> str | None:
        """The Kafka cluster that a slot belongs to: empty where nobody wrote it yet, None where there are no slots."""
        with self.reaching():
            found = self._client.hget(f"{_KEY}meta:{slot.rstrip('0123456789')}", "environment")
        return None if found is None else str(found.decode())

    def open(self, app: str, environment: str, *, create_tables: bool) -> None:
        check_server(self)
        arguments = [str(SCHEMA_VERSION), environment, app, "create" if create_tables else ""]
        word, *rest = self.run(self._open, [self._meta], arguments)
        where = without_password(self.url)
        if word == "gone":
            raise ConfigurationError(
                f"there are no slots of {self._prefix}* in {where}: either the app was never set up there, or the "
                "server lost its data, and then nobody can decide about what Kafka holds open. Look with `semel doctor "
                "txn list`; when nothing is open, semel migrate makes them."
            )
        if word == "version":
            raise ConfigurationError(
                f"the slots of {self._prefix}* in {where} have schema version {rest[0]}, and this version of Semel "
                f"works with {SCHEMA_VERSION}. Use the version that made them."
            )
        if word == "environment":
            raise ConfigurationError(
                f"the dual write of {self._prefix}* in {where} belongs to the Kafka cluster {rest[0]!r}, and this "
                f"process is connected to {environment!r}, which would decide about transactions of the other. If this "
                f"server is a copy for another environment: DEL {self._meta} {self._index}, and every key that begins "
                f"with {_KEY}{self._prefix}; if the cluster was replaced on purpose: HSET {self._meta} environment "
                f"{environment}"
            )

    def slots(self) -> list[SlotRow]:
        found = []
        with self.reaching():
            for name in sorted(self._client.smembers(self._index)):
                slot = name.decode()
                row = self._client.hmget(slot_key(slot), "owner", "owner_epoch", "beat", "torn")
                if row[0] is None:
                    continue
                owner = row[0] if row[3] is None else OUT_OF_USE.encode() + row[3]
                found.append(SlotRow(slot, owner.decode(errors="replace"), int(row[1]), int(row[2])))
        return found

    def add(self, owner: str) -> SlotRow:
        word, *rest = self.run(self._add, [self._meta, self._index], [self._prefix, _KEY, owner, str(SLOTS_MAX)])
        if word == "full":
            raise ConfigurationError(
                f"the dual write in {without_password(self.url)} has {rest[0]} slots, and more than {SLOTS_MAX} are "
                "not made: as many transactions were open at once, or left in doubt. Lower connections=, and let the "
                "processes that own them end."
            )
        if word == "gone":
            raise self._lost(self._meta)
        return SlotRow(rest[0], owner, 0, 0)

    def reserve(self, row: SlotRow, owner: str) -> bool:
        answer = self.run(self._reserve, [slot_key(row.slot)], [owner, str(row.owner_epoch), LEAVE_RELEASED])
        return answer[0] == "ok"

    def claim(self, slot: str, owner: str) -> Claim:
        failpoint("dual.claim.before_fence")
        word, *rest = self.run(self._claim, [slot_key(slot)], [owner])
        if word == "gone":
            raise self._lost(slot_key(slot))
        if word == "torn":
            raise SlotOutOfUse(torn(self.url, slot, rest[0]))
        return Claim(int(rest[0]), rest[1])

    def decided(self, slot: str) -> Decision | None:
        with self.reaching():
            found = self._client.hmget(slot_key(slot), "owner", "owner_epoch", "prepared")
        return None if found[0] is None else Decision(found[0].decode(), int(found[1]), found[2].decode())

    def beat(self, owned: Mapping[str, str]) -> None:
        for slot, owner in owned.items():
            self.run(self._beat, [slot_key(slot)], [owner, "1"])

    def release(self, slot: str, owner: str) -> None:
        self.run(self._beat, [slot_key(slot)], [owner, "0"])

    def _lost(self, key: str) -> Fatal:
        return Fatal(
            f"{key} is gone from {without_password(self.url)}: it was deleted, or the server lost its data. Nothing is "
            "decided about what Kafka holds open: `semel doctor txn list` shows it."
        )


def torn(url: str, slot: str, text: str) -> str:
    """What is said about a slot that is torn."""
    return (
        f"slot {slot} in {without_password(url)}: a command failed in the middle of a script, and Valkey undoes "
        f"nothing: {text}. Put right by hand what those commands changed, decide the transaction with `semel doctor "
        f"txn commit` or `abort`, and then: HDEL {slot_key(slot)} torn"
    )


def _settings(values: Mapping[str, str | None]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
