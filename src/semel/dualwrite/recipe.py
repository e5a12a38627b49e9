"""Taking a slot over, in the one order that neither tears a predecessor's transaction nor lets it decide later.

1. Kafka: InitProducerId with keepPreparedTxn. The predecessor's producer is fenced, what it has open stays open and is
   named.
2. The database: the fence is raised and `prepared` read in one step, which waits for a commit under way. From here on
   nobody but us decides about this slot.
3. What is open is committed when its name is what the database holds, else aborted. Refused as fenced: another one
   took over meanwhile, and it is his.

Reading `prepared` before (1), or without raising the fence, is the mistake that looks harmless: two who recover at once
tear a transaction apart (models/DualWrite.tla has both).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NamedTuple, Protocol

from semel.client.producer import TransactionalProducer
from semel.client.two_phase import NOTHING_PREPARED, PreparedState, TwoPhaseMode
from semel.dualwrite.ending import end, put_away
from semel.dualwrite.plan import refusal
from semel.dualwrite.rows import Rows
from semel.dualwrite.store import Claim
from semel.env import Env
from semel.errors import OutcomeUnknown, Retriable, TwoPhaseCommitUnavailable
from semel.failpoints import failpoint

__all__ = ["FullRecipe", "Recipe", "Taken"]


class Taken(NamedTuple):
    """A slot that is ours."""

    producer: TransactionalProducer
    owner_epoch: int
    found: str
    """What became of the predecessor's transaction: `committed`, `aborted`, or `nothing` was open."""


class Recipe(Protocol):
    """How slots are taken over, and what their rows hold. Which one is used depends on what Kafka offers."""

    def accept(self, mode: TwoPhaseMode) -> None:
        """Learn what Kafka offers. Raises `TwoPhaseCommitUnavailable` where that is not enough."""

    async def take_over(self, rows: Rows, slot: str, owner: str) -> Taken:
        """Take a slot over. Raises `Retriable`, `Fenced` when another one does so too, `Fatal`, and `SlotOutOfUse`
        where what the database decided is lost."""

    def decision(self, owner_epoch: int, prepared: PreparedState) -> str:
        """What the database stores of a prepared transaction, as its decision."""

    async def rested(self, rows: Rows, slot: str, owner: str, decision: str) -> None:
        """Kafka has committed the slot's last decision, and nothing followed for a while."""


class FullRecipe:
    """For a Kafka that keeps prepared transactions: the embedded broker, and every one with keepPreparedTxn."""

    def __init__(
        self,
        env: Env,
        new_producer: Callable[[str], TransactionalProducer],
        resolve: Callable[[Rows, str, str, Claim], Awaitable[str]] | None = None,
    ) -> None:
        self._env = env
        self._new_producer = new_producer
        self._resolve = resolve
        """What ends the transactions of a slot that was worked on with the conditional recipe before."""

    def __repr__(self) -> str:
        return "<FullRecipe>"

    def accept(self, mode: TwoPhaseMode) -> None:
        if mode is not TwoPhaseMode.FULL:
            raise TwoPhaseCommitUnavailable(refusal(mode))

    def decision(self, owner_epoch: int, prepared: PreparedState) -> str:  # noqa: ARG002 - others need it
        return str(prepared)

    async def rested(self, rows: Rows, slot: str, owner: str, decision: str) -> None:
        """Nothing: Kafka hands over what is open, so what is not is ended."""

    async def take_over(self, rows: Rows, slot: str, owner: str) -> Taken:
        producer = self._new_producer(slot)
        try:
            await producer.init_transactions(keep_prepared=True)
            failpoint("dual.claim.after_init")
            claim = await rows.run(rows.store.claim, slot, owner)
            failpoint("dual.claim.after_fence")
            found, ongoing = "nothing", producer.prepared_state
            if "/" in claim.prepared and self._resolve is not None:
                found = await self._resolve(rows, slot, owner, claim)
            if ongoing.is_transaction:
                commit = claim.prepared == self.decision(claim.owner_epoch, ongoing)
                found = "committed" if commit else "aborted"
                failpoint("dual.claim.before_complete")
                await end(self._env, producer, ongoing if commit else NOTHING_PREPARED, patient=False)
                failpoint("dual.claim.after_complete")
        except OutcomeUnknown as error:
            await put_away(producer)
            raise Retriable(f"slot {slot} was not taken over, nothing is decided: {error}") from error
        except BaseException:
            await put_away(producer)
            raise
        return Taken(producer, claim.owner_epoch, found)
