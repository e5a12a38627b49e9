"""A connection for transactions on Valkey or Redis: reads that are watched, and one script at the end.

What is read is watched (WATCH), and the script runs inside of EXEC: where anything that was read has changed, also
where it was changed back, nothing happens and the transaction is told. The server itself compares, in the same step.

A script whose answer is lost may have run, or may still run: its bytes may wait in the server. So whoever wants to know
raises the fence, which nothing on its way survives, and reads the slot in the same step.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from semel.databases.database import without_password
from semel.databases.settling import SETTLE_SECONDS, insist
from semel.databases.valkey.connection import (
    NoPermissionError,
    NoScriptError,
    ResponseError,
    ValkeyConnection,
    packed,
)
from semel.databases.valkey.effects import EffectRefused
from semel.dualwrite.target import Guard, LeftToAPerson
from semel.dualwrite.valkey.scripts import APPLY, RENEW
from semel.dualwrite.valkey.store import slot_key, torn
from semel.errors import ConditionFailed, ConfigurationError, Conflict, Fatal, Fenced, OutcomeUnknown, Retriable
from semel.failpoints import failpoint

__all__ = ["READS", "Condition", "ValkeySession", "Work"]

WATCHED_MAX: Final = 1_000
"""Keys that one transaction reads: the server looks through them at every write to one of them."""

READS: Final = frozenset(
    (
        *("BITCOUNT", "EXISTS", "GET", "GETBIT", "GETRANGE", "PTTL", "STRLEN", "TTL", "TYPE"),
        *("HEXISTS", "HGET", "HGETALL", "HKEYS", "HLEN", "HMGET", "HSTRLEN", "HVALS"),
        *("LINDEX", "LLEN", "LPOS", "LRANGE", "SCARD", "SISMEMBER", "SMEMBERS", "SMISMEMBER"),
        *("ZCARD", "ZCOUNT", "ZMSCORE", "ZRANGE", "ZRANK", "ZREVRANK", "ZSCORE"),
    )
)
"""Commands that only read, and whose first argument is their key."""


class Condition(NamedTuple):
    """The integer at `key`, or in `field` of the hash there, is at least `least`; what is not there counts as 0."""

    key: bytes
    least: int
    field: bytes | None = None

    @property
    def _packable(self) -> list[bytes]:
        return [self.key, b"%d" % self.least, *(() if self.field is None else (self.field,))]


class Work(NamedTuple):
    """What a transaction does: commands as name, key, arguments, and what must hold before the first."""

    effects: Sequence[tuple[bytes, ...]] = ()
    conditions: Sequence[Condition] = ()


class ValkeySession(ValkeyConnection):
    """See `semel.dualwrite.target.Target`."""

    def __init__(self, url: str, *, settle_seconds: float = SETTLE_SECONDS) -> None:
        super().__init__(url)
        self._settle_seconds = settle_seconds
        self._renew = self.script(RENEW)
        self._watched: set[bytes] = set()
        self._sha = b""
        self._open = False
        self.is_fence_raised = False
        """Whether an answer was lost, and so the fence of the slot raised: this owner writes under it no more."""

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction was begun and its connection is still there."""
        return self._open and self._link is not None

    def begin(self) -> None:
        """Begin: nothing is watched. Raises `Retriable` when the server is away."""
        self._watched.clear()
        self.is_fence_raised = False
        if not self.is_linked:
            self.close()
            [loaded] = self.send(("SCRIPT", "LOAD", APPLY))
            if isinstance(loaded, Exception):
                raise self._refused(loaded)
            self._sha = loaded
        self._open = True

    def read(self, name: str, key: bytes, *arguments: bytes) -> Any:
        """The raw answer to a command that reads; from here on the key is watched.

        Raises `Retriable` when the connection is gone, and with it what was watched: the transaction is over.
        """
        self._check_open()
        if key not in self._watched and len(self._watched) >= WATCHED_MAX:
            raise EffectRefused(f"one transaction reads at most {WATCHED_MAX} keys.")
        watched, found = self.send(("WATCH", key), (name, key, *arguments))
        if isinstance(watched, Exception):
            raise self._refused(watched)
        self._watched.add(key)
        if isinstance(found, Exception):
            raise EffectRefused(f"{name} {key!r:.100}: {found}") from found
        return found

    def commit(self, work: Work, guard: Guard | None) -> None:
        """Do the effects, if nothing that was read has changed and every condition holds; with the decision, if there
        is one, in the same step.

        Raises `Conflict`, `ConditionFailed`, `EffectRefused`, `Retriable`, `Fenced`, `ConfigurationError` or `Fatal`
        when nothing happened, `OutcomeUnknown` when nobody can tell within the limit, and `LeftToAPerson`.
        """
        self._check_open()
        if guard or any(work) or self._watched:
            arguments = self._script(work, guard)
            failpoint("dual.before_commit")
            try:
                _, queued, answer = self.send(("MULTI",), ("EVALSHA", *arguments), ("EXEC",))
            except Retriable as error:
                self._settle(error, guard)
            else:
                self._judge(queued, answer, work.conditions, guard)
        self._end()

    def rollback(self) -> None:
        """Forget what was watched, without raising."""
        if self._watched and self._link is not None:
            try:
                self.send(("UNWATCH",))
            except Retriable:
                self.close()
        self._end()

    def _end(self) -> None:
        self._open = False
        self._watched.clear()

    def _check_open(self) -> None:
        if not self.in_transaction:
            raise Retriable(
                f"the connection to {without_password(self.url)} was lost, and with it what this transaction had read. "
                "Nothing of it happened; run it again."
            )

    # --- The script ---

    def _script(self, work: Work, guard: Guard | None) -> list[str | bytes]:
        effects, conditions = work
        slot = slot_key(guard.slot).encode() if guard else b""
        keys = dict.fromkeys([slot, *(item.key for item in conditions), *(effect[1] for effect in effects)])
        head = (
            [str(guard.owner_epoch), guard.owner, "?" if guard.before is None else guard.before, guard.decision]
            if guard
            else ["", "", "", ""]
        )
        packable = packed([item._packable for item in conditions])
        return [self._sha, str(len(keys)), *keys, *head, packable, packed(list(effects))]

    def _judge(self, queued: Any, answer: Any, conditions: Sequence[Condition], guard: Guard | None) -> None:
        """Return where it was done, raise what it was not done for."""
        if answer is None:
            self._end()
            raise Conflict(
                "what this transaction read was changed by somebody else before it ended, and nothing of it happened. "
                "Run it again."
            )
        if isinstance(queued, Exception):  # Refused before anything of it ran.
            raise self._refused(queued)
        [found] = answer if isinstance(answer, list) else [answer]
        if isinstance(found, Exception):
            if isinstance(found, NoScriptError):
                self.close()  # The next transaction brings the script anew.
                raise Retriable(
                    f"{without_password(self.url)} has forgotten its scripts, and nothing happened: {found}"
                )
            self._settle(self._refused(found), guard)
            return
        word, *rest = (part.decode(errors="replace") for part in found)
        if word != "ok":
            raise self._answered(word, rest, conditions, guard)

    def _answered(self, word: str, rest: list[str], conditions: Sequence[Condition], guard: Guard | None) -> Exception:
        slot = guard.slot if guard else ""
        where = without_password(self.url)
        if word == "unmet":
            condition = conditions[int(rest[0]) - 1]
            name = condition.key.decode(errors="replace")
            if condition.field is not None:
                name += f" [{condition.field.decode(errors='replace')}]"
            return ConditionFailed(
                f"{name} is {rest[1] or 'not there'}, and has to be at least {condition.least}. Nothing happened."
            )
        if word == "bad":
            return EffectRefused(f"command {rest[0]} of the transaction: {rest[1]}. Nothing happened.")
        if word == "denied":
            return ConfigurationError(
                f"the user of {where} may not do command {rest[0]} of the transaction ({rest[1]}). Nothing happened."
            )
        if word == "refused":
            return self._refused(ResponseError(rest[0]))
        if word == "fenced":
            return Fenced(f"slot {slot} in {where} has owner {rest[1]!r} by now, epoch {rest[0]}. Nothing happened.")
        if word == "torn":
            return LeftToAPerson(torn(self.url, slot or "(none)", rest[0]))
        assert guard is not None
        state = "is gone" if word == "gone" else f"holds {rest[0]!r}, and this process wrote {guard.before!r} last"
        return Fatal(
            f"slot {slot} in {where} {state}: the server lost what it had acknowledged (FLUSHALL, a fail-over, a "
            "backup that was put back), and Kafka has transactions that it has not. Nothing happened now."
        )

    def _refused(self, error: Exception) -> Retriable | ConfigurationError:
        """What a server's refusal is; nothing of the transaction happened."""
        self.close()
        where, text = without_password(self.url), " ".join(str(error).split())
        if isinstance(error, NoPermissionError):
            return ConfigurationError(f"{where} does not allow what a transaction needs: {text}")
        return Retriable(f"{where} refused the transaction, and nothing of it happened: {text}")

    # --- No answer ---

    def _settle(self, cause: Exception, guard: Guard | None) -> None:
        """Return where the script ran; raise `cause` as `Retriable` where it did not and never will."""
        if guard is None:
            raise OutcomeUnknown(
                f"{cause}. The transaction sent no record, so it has no slot that would tell: it was done whole or not "
                "at all. Read what it was to change before you repeat it."
            ) from cause
        self.is_fence_raised = True
        try:
            failpoint("dual.settle.before")
            word, *rest = self._ask_slot(cause, guard)
            failpoint("dual.settle.after")
        except OutcomeUnknown:
            raise
        except Exception as error:
            raise self._unknown(f"and was not found out ({error})", cause, guard) from error
        if word == "torn":
            raise LeftToAPerson(torn(self.url, guard.slot, rest[0])) from cause
        if guard.decision in rest[1:3]:  # What the slot holds, and what it held when it changed hands.
            return
        if word == "ok" or (word == "fenced" and int(rest[0]) == guard.owner_epoch + 1):
            # The fence is above ours, and nobody has written over the decision: there was none, and will be none.
            raise Retriable(f"{cause}. Nothing of the transaction happened. Run it again.") from cause
        why = "and its slot has changed hands twice since" if word == "fenced" else "and its slot is gone"
        raise self._unknown(why, cause, guard) from cause

    def _ask_slot(self, cause: Exception, guard: Guard) -> list[str]:
        try:
            return insist(
                lambda: self.run(self._renew, [slot_key(guard.slot)], [guard.owner]),
                lambda error: isinstance(error, Retriable),
                time.monotonic() + self._settle_seconds,
            )
        except Retriable as error:
            raise self._unknown(f"and cannot be asked ({error})", cause, guard) from error

    def _unknown(self, why: str, cause: Exception, guard: Guard) -> OutcomeUnknown:
        return OutcomeUnknown(
            f"{cause} {why}. The transaction is done whole or not at all. When the server is there again, look before "
            f"you repeat it: HGET {slot_key(guard.slot)} prepared gives {guard.decision} if it was done."
        )
