"""Valkey or Redis as a sink sees it: one connection, three scripts, and where everything of a partition is kept."""

from __future__ import annotations

import logging

import msgspec

from semel.databases.database import without_password
from semel.databases.valkey.connection import ValkeyConnection, packed
from semel.processing.parklog import Command, Outcome
from semel.sinks.contract import Unavailable
from semel.sinks.noted.place import Change, ParkedRecord, Place
from semel.sinks.valkey.scripts import APPLY, RENEW, TAKE_OVER

__all__ = ["ValkeyStore"]

log = logging.getLogger("semel.sinks")

INDEX = b"semel:positions"


class ValkeyStore(ValkeyConnection):
    """A connection; errors are `Unavailable`, with the connection closed. Used by one thread at a time."""

    away = Unavailable

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._take_over = self.script(TAKE_OVER)
        self._renew = self.script(RENEW)
        self._apply = self.script(APPLY)

    def check(self) -> None:
        """Raises `ConfigurationError` where effects could not be exactly once; warns where they may come late."""
        self.info()
        settings = self.settings()
        if settings is None:
            return
        if settings.get("appendonly") != "yes" or settings.get("appendfsync") != "always":
            log.warning(
                "%s has appendonly=%s and appendfsync=%s: after a crash it may lose what it acknowledged. Position and "
                "effects go back together, and what Kafka still has is applied again. appendonly yes and appendfsync "
                "always lose nothing.",
                without_password(self.url), settings.get("appendonly"), settings.get("appendfsync"),
            )  # fmt: skip

    def take_over(self, place: Place, topic_id: str, start: int | None, owner: str) -> list[str]:
        """The script's answer; without `start` a position that is not there is not made."""
        begin = "" if start is None else str(start)
        return self.run(self._take_over, [place.key("position"), INDEX], [topic_id, begin, owner, place.name])

    def renew(self, place: Place, owner: str) -> list[str]:
        """The script's answer: our epoch is a higher one after it, so nothing on its way can be done any more."""
        return self.run(self._renew, [place.key("position")], [owner])

    def is_start_accepted(self, sink: str) -> bool:
        """Whether an operator said that a sink may begin where the log begins."""
        with self.reaching():
            return bool(self._client.exists(f"semel:accept_start:{sink}"))

    def apply(self, place: Place, change: Change) -> list[str]:
        """The script's answer. After `Unavailable` nobody knows whether it was done."""
        return self._change(place, change, "")

    def look(self, place: Place, change: Change) -> list[str]:
        """What `apply` would answer, as far as that can be seen without doing it."""
        return self._change(place, change, "look")

    def _change(self, place: Place, change: Change, mode: str) -> list[str]:
        keys = [place.key(what) for what in ("position", "parked", "parked_keys", "park_commands", "park_outcomes")]
        effects = list(change.effects)
        arguments: list[str | bytes] = [
            str(change.epoch),
            str(change.start),
            str(change.end),
            str(change.records),
            packed(effects),
            packed([(b"%d" % offset, msgspec.json.encode(item), item.key) for offset, item in change.parked]),
            packed([(b"%d" % offset, key) for offset, key in change.released]),
            packed([(b"%d" % offset, msgspec.json.encode(item)) for offset, item in change.failed]),
            packed(_command(change.command)),
            mode,
        ]
        return self.run(self._apply, [*keys, *dict.fromkeys(effect[1] for effect in effects)], arguments)

    def parked_keys(self, place: Place) -> tuple[set[bytes], int]:
        """Keys that block their later records, and how many records wait."""
        with self.reaching():
            keys = self._client.hkeys(place.key("parked_keys"))
            return set(keys), int(self._client.hlen(place.key("parked")))

    def parked(self, place: Place) -> dict[int, ParkedRecord]:
        """Everything that is parked, in order."""
        with self.reaching():
            found = self._client.hgetall(place.key("parked"))
        decode = msgspec.json.Decoder(ParkedRecord).decode
        return {offset: decode(raw) for offset, raw in sorted((int(at), raw) for at, raw in found.items())}

    def ask(self, place: Place, command: Command) -> None:
        """Leave a command beside the parked records."""
        with self.reaching():
            self._client.hset(place.key("park_commands"), command.id, msgspec.json.encode(command))

    def commands(self, place: Place) -> list[Command]:
        """What is asked for, the oldest first."""
        with self.reaching():
            found = self._client.hvals(place.key("park_commands"))
        commands = [msgspec.json.decode(raw, type=Command) for raw in found]
        return sorted(commands, key=lambda command: (command.at_ms, command.id))

    def outcome(self, place: Place, command: str) -> Outcome | None:
        """What was done for a command so far; None for nothing."""
        with self.reaching():
            raw = self._client.hget(place.key("park_outcomes"), command)
        return None if raw is None else msgspec.json.decode(raw, type=Outcome)

    def position(self, place: Place) -> tuple[int, int] | None:
        """next_offset and owner_epoch; None where there is none."""
        with self.reaching():
            found = self._client.hmget(place.key("position"), "next_offset", "owner_epoch")
        return None if found[0] is None else (int(found[0]), int(found[1]))

    def places(self) -> list[Place]:
        """Every partition of every sink that was ever at work here."""
        with self.reaching():
            return sorted(Place.parse(name.decode()) for name in self._client.smembers(INDEX))


def _command(command: tuple[str, Command | None, Outcome] | None) -> list[bytes]:
    if command is None:
        return []
    name, left, outcome = command
    return [name.encode(), b"" if left is None else msgspec.json.encode(left), msgspec.json.encode(outcome)]
