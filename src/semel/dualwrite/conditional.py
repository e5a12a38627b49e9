"""The dual write on a Kafka that does not hand prepared transactions over: every released Apache Kafka.

There a takeover by InitProducerId aborts what is open, also where the database has committed. So nobody takes a
transactional id over: each owner of a slot works under an id of its own, `{slot}.{owner_epoch}`, and its successor ends
the decided transaction by its saved name (EndTxn v5, which transactions V2 tie to one transaction), and only then
fences the old id. The order:

1. The database: the fence is raised and `prepared` is read in one step. Older owners can decide nothing any more.
2. The transaction S that the row names, where it is not known to be ended: EndTxn(commit) under its own id.
3. The row says that S is ended (`.../committed`). Only its owner can say so: who lost the slot meanwhile stops here.
   It comes before (4), because after InitProducerId Kafka does not tell any more how S ended.
4. InitProducerId for every older id that was used and is not marked resolved: its producer is fenced, what it has open
   is aborted. None of that was decided. Then they are marked resolved.
5. InitProducerId for our own id, which nobody ever used. Then the row once more: a successor that came before (5) found
   nothing to fence and looks there no more, so what was begun under the id could stay open; one that comes now fences.

**The condition.** A transaction that the coordinator aborts between the database's COMMIT and (2) is lost: the rows
stay, its records are gone. It happens when nobody recovers the slot within `transaction.timeout.ms` of the
transaction's begin. Where Kafka grants transactions without a time-out (enable2Pc, `TwoPhaseMode.NO_RECOVERY`) it does
not happen. A lost one is found at the next takeover, and told; the slot is out of use until an operator has looked.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import NamedTuple, Self, cast

from semel.client.admin import Admin, DescribedTransaction
from semel.client.cluster import KafkaClient
from semel.client.producer import TransactionalProducer
from semel.client.transaction_admin import SavedEnd, TransactionAdmin
from semel.client.two_phase import NO_TIMEOUT_MS, PreparedState, TwoPhaseMode
from semel.dualwrite.ending import put_away
from semel.dualwrite.recipe import Taken
from semel.dualwrite.rows import Rows
from semel.dualwrite.store import ENDED, Claim, ResolvingStore, SlotOutOfUse
from semel.errors import ConfigurationError, ErrorCode, Fatal, Fenced, SemelError, TwoPhaseCommitUnavailable
from semel.failpoints import failpoint

__all__ = ["CONDITION_TIMEOUT_MS", "ConditionalName", "ConditionalRecipe", "own_id"]

log = logging.getLogger("semel.dualwrite")

CONDITION_TIMEOUT_MS = 900_000
"""How long a slot may wait for its recovery: the most that Kafka grants by default (transaction.max.timeout.ms)."""
_LATE = 0.5
"""A recovery that came after this share of the time-out is told: the next one may be too late."""
_NAME = re.compile(rf"(\d+)/(\d+):(\d+)({ENDED})?")


def own_id(slot: str, owner_epoch: int) -> str:
    """The transactional id of one owner of a slot."""
    return f"{slot}.{owner_epoch}"


class ConditionalName(NamedTuple):
    """What the row holds: whose transaction it was, its name, and whether Kafka is known to have committed it."""

    owner_epoch: int
    name: PreparedState
    is_ended: bool = False

    def __str__(self) -> str:
        return f"{self.owner_epoch}/{self.name}" + (ENDED if self.is_ended else "")

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Read a row's `prepared`; None for nothing yet, and for a name of the full recipe."""
        found = _NAME.fullmatch(text)
        if found is None:
            return None
        return cls(int(found[1]), PreparedState(int(found[2]), int(found[3])), found[4] is not None)


class ConditionalRecipe:
    """See the module. `new_producer` makes the producer of an id: with two-phase commit where Kafka has it, else one
    whose transactions are prepared until their time-out."""

    def __init__(self, client: KafkaClient, new_producer: Callable[[str, bool], TransactionalProducer]) -> None:
        self._client = client
        self._new_producer = new_producer
        self._two_phase = False

    def __repr__(self) -> str:
        return f"<ConditionalRecipe {'two-phase commit' if self._two_phase else 'with a time-out'}>"

    def accept(self, mode: TwoPhaseMode) -> None:
        """Learn what Kafka offers. Raises `TwoPhaseCommitUnavailable` where the recipe is not safe at all."""
        if mode is TwoPhaseMode.TRANSACTIONS_V1:
            raise TwoPhaseCommitUnavailable(
                f"the conditional dual write cannot be done on this Kafka. {mode.meaning} Raise the feature "
                "transaction.version to 2, or use outbox=True."
            )
        self._two_phase = mode in (TwoPhaseMode.FULL, TwoPhaseMode.NO_RECOVERY)
        if not self._two_phase:
            log.warning(
                "the dual write is conditional on this Kafka (%s): a process that is killed between the database's "
                "COMMIT and the end in Kafka must be followed by another one within the time-out of its transaction, "
                "or its records are lost.",
                mode,
            )

    def decision(self, owner_epoch: int, prepared: PreparedState) -> str:
        """What the database stores: the name, and under which id it is to be found."""
        return str(ConditionalName(owner_epoch, prepared))

    async def take_over(self, rows: Rows, slot: str, owner: str) -> Taken:
        """Take a slot over. Raises `Retriable`, `Fenced`, `SlotOutOfUse` where a decided transaction is lost."""
        # Every claim takes an id of its own: while Kafka is away none is made, or thousands would have to be looked at.
        await self._described(slot)
        claim = await rows.run(rows.store.claim, slot, owner)
        failpoint("dual.claim.after_fence")
        found = await self.resolve(rows, slot, owner, claim)
        producer = self._new_producer(own_id(slot, claim.owner_epoch), self._two_phase)
        try:
            await self._initialize(producer)
            failpoint("dual.claim.after_init")
            now = await rows.run(rows.store.decided, slot)
            _need(now is not None and (now.owner, now.owner_epoch) == (owner, claim.owner_epoch), slot)
        except BaseException:
            await put_away(producer)
            raise
        return Taken(producer, claim.owner_epoch, found)

    async def _initialize(self, producer: TransactionalProducer) -> None:
        try:
            await producer.init_transactions()
        except Fatal as error:
            if error.code is not ErrorCode.INVALID_TRANSACTION_TIMEOUT:
                raise
            raise ConfigurationError(
                f"this Kafka grants no transaction the {producer.transaction_timeout_ms / 60_000:g} minutes in which a "
                "slot of the conditional dual write has to be recovered: raise its transaction.max.timeout.ms to "
                f"{producer.transaction_timeout_ms}. Nothing was done."
            ) from error

    async def rested(self, rows: Rows, slot: str, owner: str, decision: str) -> None:
        """Kafka has committed `decision`, and nothing followed: the row says so, as Kafka forgets an id in a week."""
        ended = ConditionalName.parse(decision)
        if ended is not None and not ended.is_ended:
            await rows.run(_store(rows).replace_prepared, slot, owner, decision, str(ended._replace(is_ended=True)))

    async def resolve(self, rows: Rows, slot: str, owner: str, claim: Claim) -> str:
        """Steps 2 to 4, also for the full recipe, of a slot that was worked on with this one before."""
        resolved = await rows.run(_store(rows).resolved, slot)
        held, found = ConditionalName.parse(claim.prepared), "nothing"
        for epoch in range(max(resolved, 0) + 1, claim.owner_epoch):
            transactional_id = own_id(slot, epoch)
            if held is not None and held.owner_epoch == epoch and not held.is_ended:
                found = await self._commit(rows, slot, owner, transactional_id, held)
            was = await self._described(transactional_id)
            if was is None:
                continue  # Nobody ever worked under it; and whoever comes for it yet would not be stopped by a fence.
            await TransactionAdmin(self._client).fence(transactional_id)
            failpoint("dual.claim.after_old_fence")
            if was.state == "Ongoing" and found == "nothing":
                found = "aborted"
        if resolved < claim.owner_epoch - 1:
            _need(await rows.run(_store(rows).mark_resolved, slot, owner, claim.owner_epoch - 1), slot)
        return found

    async def _commit(self, rows: Rows, slot: str, owner: str, transactional_id: str, held: ConditionalName) -> str:
        before = await self._described(transactional_id)
        failpoint("dual.claim.before_complete")
        end = await TransactionAdmin(self._client).end_saved(transactional_id, held.name, commit=True)
        failpoint("dual.claim.after_complete")
        after = before if end is SavedEnd.ENDED else await self._described(transactional_id)
        if end is SavedEnd.OTHERWISE or not (end is SavedEnd.ENDED or _owner_went_on(after, held.name)):
            await self._lost(rows, slot, owner, transactional_id, held, after)
        ended = held._replace(is_ended=True)
        _need(await rows.run(_store(rows).replace_prepared, slot, owner, str(held), str(ended)), slot)
        failpoint("dual.claim.after_ended")
        if before is not None and before.state == "Ongoing" and end is SavedEnd.ENDED:
            self._tell_late(slot, before)
            return "committed"
        return "nothing"

    async def _described(self, transactional_id: str) -> DescribedTransaction | None:
        found = await Admin(self._client).describe_transactions([transactional_id])
        return found[0] if found else None

    def _tell_late(self, slot: str, before: DescribedTransaction) -> None:
        """By clocks of two machines: it decides nothing."""
        age_ms = self._client.env.wall_ms() - before.start_ms
        if before.timeout_ms != NO_TIMEOUT_MS and age_ms > _LATE * before.timeout_ms:
            log.warning(
                "slot %s was recovered %.0f s after its transaction began, and Kafka would have aborted it after %.0f "
                "s: the records of a transaction that the database committed would be lost then. Start processes "
                "sooner after they were killed.",
                slot,
                age_ms / 1000,
                before.timeout_ms / 1000,
            )

    async def _lost(
        self,
        rows: Rows,
        slot: str,
        owner: str,
        transactional_id: str,
        held: ConditionalName,
        after: DescribedTransaction | None,
    ) -> None:
        producer, epoch = held.name
        text = (
            f"slot {slot}: the database committed transaction {held.name} of {transactional_id}; {_fate(after)} Its "
            f"rows are there. Its records were written to {await self._places(held.name)}, where they are until "
            "retention deletes them, for readers with isolation.level=read_uncommitted (producer "
            f"{producer}, epoch {epoch}): send them again where they are missing. The slot is out of use; `semel "
            f"doctor txn explain {transactional_id}` says more, and `semel doctor txn abort` gives it back."
        )
        log.error("%s", text)
        _need(await rows.run(_store(rows).retire, slot, owner, f"transaction {held.name} is lost"), slot)
        raise SlotOutOfUse(text)

    async def _places(self, name: PreparedState) -> str:
        """The partitions that the producer wrote to last in that transaction, as far as their leaders remember."""
        try:
            places = await TransactionAdmin(self._client).written_by(name)
        except SemelError as error:
            return f"partitions that cannot be asked for now ({error})"
        return ", ".join(map(str, places)) or "partitions that have forgotten the producer"


def _fate(after: DescribedTransaction | None) -> str:
    """What became of a decided transaction that could not be committed."""
    if after is not None and after.state in ("PrepareAbort", "CompleteAbort"):
        return (
            "Kafka aborted it, because nobody recovered it within its time-out, or somebody ended it: its records are "
            "LOST for readers of committed ones."
        )
    found = "does not know the id any more" if after is None else f"has the id as {after.state}, begun anew by somebody"
    return f"Kafka {found}, so nobody can tell whether it was committed: its records MAY BE LOST."


def _owner_went_on(now: DescribedTransaction | None, name: PreparedState) -> bool:
    """Whether the id is at a later transaction of the same producer: it began that one after this was committed.

    Only InitProducerId leaves an id `Empty`, and nobody of ours asks for it before the row says how this one ended.
    """
    if now is None or now.state in ("Empty", "Dead"):
        return False
    aborted = now.state in ("PrepareAbort", "CompleteAbort")
    if now.producer_id != name.producer_id:  # The epochs were used up, and it got the next producer id, from 0 on.
        return now.producer_epoch > 0 or not aborted
    return now.producer_epoch > name.epoch + aborted


def _store(rows: Rows) -> ResolvingStore:
    return cast(ResolvingStore, rows.store)  # The plan takes this recipe for SQL databases only.


def _need(changed: bool, slot: str) -> None:
    if not changed:
        raise Fenced(f"slot {slot} was taken over by another process while it was recovered: it is theirs.")
