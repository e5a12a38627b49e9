"""The slots of one database in one process: claimed for sessions, told to Kafka, and recovered when an owner is gone.

Everything happens in one event loop. Whoever's name is in a slot's row is responsible for it: as long as that is an
owner of ours, the slot is in use, being taken over, or *forsaken*: left by us in a state that only recovery can judge.
The sweep takes forsaken slots back, and those of owners that died or gave no sign of life for a lease.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any

from semel.client.admin import Admin
from semel.client.cluster import KafkaClient
from semel.client.producer import TransactionalProducer
from semel.client.transaction_state import State
from semel.client.two_phase import NOTHING_PREPARED, TwoPhaseMode
from semel.databases.processes import ProcessIdentity, is_alive
from semel.dualwrite.ending import end, put_away
from semel.dualwrite.limits import BEAT_SECONDS, KAFKA_SECONDS, LEASE_SECONDS
from semel.dualwrite.measures import Measures
from semel.dualwrite.recipe import FullRecipe, Recipe
from semel.dualwrite.rows import Rows
from semel.dualwrite.slots import Slot, SlotState
from semel.dualwrite.store import LEAVE_RELEASED, OUT_OF_USE, SlotOutOfUse, SlotRow
from semel.dualwrite.writing import Outgoing, Writing
from semel.env import Env, comes
from semel.errors import Fatal, Fenced, OutcomeUnknown, Retriable, SemelError
from semel.failpoints import failpoint

__all__ = ["Keeper"]

log = logging.getLogger("semel.dualwrite")

_AWAY_SECONDS = 1.0
"""After a claim that failed, the next ones are told so at once: each would hold its caller up."""


class Keeper:
    """One a process and database. `rows` serves claims, signs of life and releases, `recovery` what may have to wait
    for somebody else's transaction. `slot_prefix` begins the names of the slots.

    `is_dead` says for certain of an owner that it is gone; without it the process in its text is looked for.
    `confirm` is called in the thread of `rows` when a slot was claimed, and raises where it must not be used.
    """

    def __init__(
        self,
        app: str,
        slot_prefix: str,
        client: KafkaClient,
        rows: Rows,
        recovery: Rows,
        writing: Writing,
        env: Env,
        measures: Measures,
        *,
        create_tables: bool = False,
        recipe: Recipe | None = None,
        is_dead: Callable[[str], bool] | None = None,
        confirm: Callable[[], None] | None = None,
    ) -> None:
        self._app = app
        self._prefix = slot_prefix
        self._client = client
        self._rows, self._recovery = rows, recovery
        self._writing = writing
        self._env = env
        self._measures = measures
        self._create_tables = create_tables
        self._recipe = recipe or FullRecipe(env, self._producer)
        self._is_dead = is_dead or _process_is_gone
        self._confirm = confirm
        self._identity = str(ProcessIdentity.current())
        self._held: dict[str, Slot] = {}
        self._taking: set[str] = set()
        """Slots that are being taken over."""
        self._forsaken: dict[str, str] = {}
        """Slots with our name in their row that are to be taken over anew, by a claim or by the sweep."""
        self._seen: dict[str, tuple[str, int, float]] = {}
        """Owner and sign of life of others' slots, and since when they are the same, by our own clock."""
        self._news = asyncio.Event()
        self._ready = asyncio.Event()
        self._opening = asyncio.Lock()
        self._away: tuple[float, str] | None = None
        """Until when claims are refused, and why."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._told: set[str] = set()
        measures.watch(self._count, self._oldest)

    def __repr__(self) -> str:
        return f"<Keeper {self._prefix}* {len(self._held)} slots, {len(self._forsaken)} forsaken>"

    def _count(self, state: SlotState) -> int:
        return sum(slot.state is state for slot in list(self._held.values()))

    def _oldest(self) -> float:
        now = self._env.monotonic()
        open_since = [slot.since for slot in list(self._held.values()) if slot.prepared.is_transaction]
        return max((now - since for since in open_since), default=0.0)

    def _producer(self, slot: str) -> TransactionalProducer:
        return TransactionalProducer(
            self._client, slot, delivery_timeout_ms=int(KAFKA_SECONDS * 1000), two_phase_commit=True
        )

    # --- Beginning and end ---

    async def mode(self) -> TwoPhaseMode:
        """What Kafka offers under the slots' names. Raises `Retriable` when it does not answer."""
        try:
            await self._client.refresh_metadata()
            return await Admin(self._client).two_phase_mode(f"{self._prefix}0")
        except OutcomeUnknown as error:
            raise Retriable(f"Kafka does not answer: {error}") from error

    async def open(self) -> None:
        """Once: see that Kafka offers what the recipe needs, and that the rows are ours in this cluster.

        Raises `TwoPhaseCommitUnavailable`, `ConfigurationError`, or `Retriable` while one of them is away.
        """
        async with self._opening:
            if self._ready.is_set():
                return
            self._recipe.accept(await self.mode())
            environment = self._client.cluster_id
            await self._rows.run(self._rows.store.open, self._app, environment, create_tables=self._create_tables)
            self._ready.set()
            self._news.set()

    async def run(self) -> None:
        """Signs of life, and recovery of slots whose owner is gone, until it is cancelled. The first look is at once.

        What cannot be done is logged and tried again: who claims a slot gets the error.
        """
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._live(), name="signs of life")
            tasks.create_task(self._watch(), name="recovery")

    async def _live(self) -> None:
        """A recovery may have to wait for long, and nobody must take us for dead meanwhile."""
        while True:
            owned = {slot.name: slot.owner for slot in self._held.values()}
            if owned:
                with suppress(SemelError):  # Who needs the database hears of it.
                    await self._rows.run(self._rows.store.beat, owned)
                    for slot in list(self._held.values()):
                        await self._rest(slot)
            await asyncio.sleep(BEAT_SECONDS)

    async def _rest(self, slot: Slot) -> None:
        # Under REPEATABLE READ a transaction that is open could not change the row any more.
        if slot.state is SlotState.IDLE and slot.committed and not slot.in_use:
            decision, slot.committed = slot.committed, ""
            await self._recipe.rested(self._rows, slot.name, slot.owner, decision)

    async def _watch(self) -> None:
        while True:
            self._news.clear()
            try:
                await self.open()
                await self.sweep()
            except Retriable as error:
                self._news.clear()  # What it left behind waits for the next look, too.
                self._tell(f"nothing can be recovered now; trying on: {error}")
            except Fatal as error:
                self._tell(f"nothing can be recovered: {error}")
            except Exception:
                self._news.clear()
                log.exception("recovery failed unexpectedly; trying on")
            # Not all processes at once: who recovers the same slot only gets in the other's way.
            await comes(self._news, BEAT_SECONDS * (0.8 + 0.4 * self._env.rng.random()))

    async def close(self) -> None:
        """Wait until Kafka knows every decision, then give the slots back. Whoever has no time cancels it: what is left
        then is recovered by others."""
        for slot in list(self._held.values()):
            await self._at_rest(slot)
            await self.release(slot)
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def abandon(self) -> None:
        """Stop all producers at once."""
        for slot in list(self._held.values()):
            if slot.ending is not None:
                slot.ending.cancel()
                await asyncio.gather(slot.ending, return_exceptions=True)
            await put_away(slot.producer)
        self._held.clear()

    # --- A slot for a session ---

    async def claim(self) -> Slot:
        """A slot of one's own, recovered if need be.

        Raises `Retriable` while Kafka or the database is away, `Fenced` when another one took it meanwhile (ask again),
        `ConfigurationError`.
        """
        if self._away is not None and self._env.monotonic() < self._away[0]:
            raise Retriable(self._away[1])
        try:
            await self.open()
            try:
                slot = await self._claim()
            except SlotOutOfUse as error:
                raise Fenced(f"a slot is out of use, and the next claim gets another one: {error}") from error
        except Retriable as error:
            self._away = (self._env.monotonic() + _AWAY_SECONDS, str(error))
            raise
        self._away = None
        self._held[slot.name] = slot
        if self._confirm is not None:
            try:
                await self._rows.run(self._confirm)
            except BaseException:
                self.giving_back(slot)
                raise
        return slot

    async def _claim(self) -> Slot:
        """One that we forsook, or that was released, or a new one. What a candidate holds is not looked at."""
        owner = self._new_owner()
        rows = await self._rows.run(self._rows.store.slots)
        for row in rows:
            if self._forsaken.get(row.slot) == row.owner and row.slot not in self._taking:
                return await self._take(row.slot, owner, self._recovery)
        await self._client.refresh_metadata()  # A Kafka that is away must not leave a new slot behind every time.
        for row in rows:
            taken = row.owner == LEAVE_RELEASED and await self._reserve(row, owner)
            if taken and row.slot not in self._taking:  # Else our own recovery is behind somebody else's.
                break
        else:
            row = await self._rows.run(self._rows.store.add, owner)
            self._forsaken[row.slot] = owner
        failpoint("dual.claim.after_reserve")
        return await self._take(row.slot, owner, self._rows)

    async def _reserve(self, row: SlotRow, owner: str) -> bool:
        """Whether the slot was free. Until it is taken over it is forsaken, also where nobody answered: it may be."""
        taken = True
        try:
            taken = await self._rows.run(self._rows.store.reserve, row, owner)
        finally:
            if taken:
                self._forsaken[row.slot] = owner
        return taken

    def _new_owner(self) -> str:
        return f"{self._identity} claim={self._env.new_id().hex}"

    async def _take(self, name: str, owner: str, rows: Rows) -> Slot:
        """Take a slot over. Whatever goes wrong, it is forsaken then, if our name got into its row."""
        assert name not in self._taking, "one of us at a time"
        self._taking.add(name)
        try:
            taken = await self._recipe.take_over(rows, name, owner)
        except BaseException:
            self._forsaken[name] = owner
            raise
        finally:
            self._taking.discard(name)
        self._forsaken.pop(name, None)
        self._measures.recovered(taken.found)
        if taken.found != "nothing":
            log.info("slot %s was left with an open transaction: %s.", name, taken.found)
        return Slot(name, owner, taken.owner_epoch, taken.producer)

    async def release(self, slot: Slot) -> None:
        """Give a slot back that has nothing open; one that is lost is left to recovery."""
        if self._held.get(slot.name) is not slot:
            return
        del self._held[slot.name]
        await put_away(slot.producer)
        if slot.state is SlotState.IDLE:
            with suppress(SemelError, RuntimeError):  # As below; whoever comes next looks at Kafka then.
                await self._rest(slot)
            await self._give_back(slot.name, slot.owner)
        elif not slot.is_lost:
            self._forsake(slot.name, slot.owner)

    def giving_back(self, slot: Slot) -> None:
        """The same in the background, after Kafka was told what there is to tell."""

        async def work() -> None:
            await self._at_rest(slot)
            await self.release(slot)

        self._spawn(work(), f"release {slot.name}")

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _give_back(self, name: str, owner: str) -> None:
        """Where that does not work now the slot is forsaken: the next claim has it, or the next sweep tries again."""
        try:
            await self._rows.run(self._rows.store.release, name, owner)
        except (SemelError, RuntimeError) as error:
            # RuntimeError: the interpreter ends, no thread takes work any more.
            self._forsaken[name] = owner  # Without news of it: a database that is away is asked again in a while.
            log.debug("slot %s could not be given back: %s", name, error)

    # --- A transaction ---

    async def write(self, slot: Slot, records: Sequence[Outgoing]) -> str:
        """Step 1: the records in a Kafka transaction that is prepared; what the database is to store of it.

        Raises `Retriable`, `Fenced`, `Fatal`: nothing is committed, and what was begun is aborted.
        """
        try:
            async with asyncio.timeout(KAFKA_SECONDS):
                await self._at_rest(slot)
                if slot.is_lost:
                    raise Retriable(f"{self._lost(slot)}: run it again.")
                slot.state = SlotState.WRITING
                slot.prepared = await self._writing.prepare(slot.producer, records)
        except TimeoutError:
            self._undo(slot)
            raise Retriable(
                f"Kafka did not take {len(records)} records within {KAFKA_SECONDS:g} s. Nothing was committed: the "
                "database transaction is rolled back."
            ) from None
        except Fenced as error:
            self._undo(slot)
            raise Fenced(f"{self._lost(slot)} ({error}).") from error
        except BaseException:
            self._undo(slot)
            raise
        slot.state, slot.since = SlotState.PREPARED, self._env.monotonic()
        slot.committed = ""
        return self._recipe.decision(slot.owner_epoch, slot.prepared)

    def _lost(self, slot: Slot) -> str:
        return (
            f"slot {slot.name} was taken over by another process, which took this one for dead. Nothing was committed; "
            "the next transaction has another slot"
        )

    def _undo(self, slot: Slot) -> None:
        if slot.producer.state in (State.Fenced, State.Failed):
            self.forsake(slot)
        elif slot.state is SlotState.WRITING:
            self.decide(slot, commit=False)

    async def _at_rest(self, slot: Slot) -> None:
        """Wait until Kafka was told how the slot's last transaction ended."""
        if slot.ending is not None:
            await asyncio.wait([slot.ending])

    def decide(self, slot: Slot, *, commit: bool) -> None:
        """The database has decided: Kafka is told, for as long as that takes. Returns at once."""
        if slot.state in (SlotState.WRITING, SlotState.PREPARED):
            slot.state = SlotState.COMPLETING
            slot.ending = asyncio.create_task(self._end(slot, commit), name=f"end {slot.name}")

    def fenced(self, slot: Slot) -> None:
        """The row is not ours any more, and nothing was committed: what is open is aborted, and the slot given up."""
        slot.state, slot.ending = (
            SlotState.COMPLETING,
            asyncio.create_task(self._give_up(slot), name=f"end {slot.name}"),
        )

    async def _give_up(self, slot: Slot) -> None:
        await self._end(slot, commit=False)
        self.forsake(slot)

    async def _end(self, slot: Slot, commit: bool) -> None:
        try:
            failpoint("dual.before_complete")
            await end(self._env, slot.producer, slot.prepared if commit else NOTHING_PREPARED)
            failpoint("dual.after_complete")
        except asyncio.CancelledError:
            self.forsake(slot)
            raise
        except Fenced as error:
            # Another one recovers the slot, by the row: it comes to the same decision.
            log.warning("slot %s was taken over while Kafka was told how its transaction ends: %s", slot.name, error)
            self._measures.ended("fenced")
            self.forsake(slot)
        except Fatal as error:
            self._measures.ended("lost" if commit else "aborted")
            log.error("slot %s, transaction %s: %s", slot.name, slot.prepared, error)
            self.forsake(slot)
        except Exception:
            log.exception("slot %s: the end of its transaction failed; it is recovered", slot.name)
            self.forsake(slot)
        else:
            self._measures.ended("committed" if commit else "aborted")
            if slot.is_lost:
                return
            if commit:
                slot.committed = self._recipe.decision(slot.owner_epoch, slot.prepared)
            slot.state, slot.prepared, slot.ending = SlotState.IDLE, NOTHING_PREPARED, None

    def forsake(self, slot: Slot) -> None:
        """Nobody knows how the slot's transaction ended, or the slot is not ours: it is recovered like a dead one."""
        if slot.is_lost:
            return
        if slot.ending is not None and slot.ending is not asyncio.current_task():
            slot.ending.cancel()
        slot.state, slot.prepared = SlotState.LOST, NOTHING_PREPARED
        if self._held.get(slot.name) is slot:  # We may have claimed one of this name again meanwhile.
            del self._held[slot.name]
        self._forsake(slot.name, slot.owner)
        self._spawn(put_away(slot.producer), f"put away {slot.name}")

    def unknown(self, slot: Slot) -> None:
        """Nobody could say whether the database committed."""
        self._measures.ended("unknown")
        self.forsake(slot)

    def _forsake(self, name: str, owner: str) -> None:
        self._forsaken[name] = owner
        self._news.set()

    # --- Slots whose owner is gone ---

    async def sweep(self) -> None:
        """Recover every slot whose owner is gone, and give it back. Raises `Retriable` when something is away."""
        forsaken = list(self._forsaken)
        rows = {row.slot: row for row in await self._rows.run(self._rows.store.slots)}
        for name in forsaken:
            if name not in rows or rows[name].owner != self._forsaken.get(name):
                self._forsaken.pop(name, None)  # It is somebody else's by now.
        for name in self._seen.keys() - rows.keys():
            del self._seen[name]
        gone = [row for row in rows.values() if self._is_gone(row)]
        away: Retriable | None = None
        for number, row in enumerate(gone):
            self._measures.in_doubt(len(gone) - number)
            try:
                await self._recover(row)
            except Retriable as error:
                away = error
        if away is not None:
            raise away
        self._measures.in_doubt(0)

    def _is_gone(self, row: SlotRow) -> bool:
        held = self._held.get(row.slot)
        is_ours = row.slot in self._taking or (held is not None and held.owner == row.owner)
        if row.owner.startswith(OUT_OF_USE):
            return False
        if row.owner == LEAVE_RELEASED or is_ours:
            self._seen.pop(row.slot, None)
            return False
        if self._forsaken.get(row.slot) == row.owner or self._is_dead(row.owner):
            return True
        now = self._env.monotonic()
        seen = self._seen.get(row.slot)
        if seen is None or seen[:2] != (row.owner, row.beat):
            self._seen[row.slot] = (row.owner, row.beat, now)
            return False
        return now - seen[2] >= LEASE_SECONDS

    async def _recover(self, row: SlotRow) -> None:
        if row not in await self._rows.run(self._rows.store.slots) or row.slot in self._taking:
            return  # Somebody else did it while we were at another one, or is at it.
        owner = self._new_owner()
        try:
            slot = await self._take(row.slot, owner, self._recovery)
        except SlotOutOfUse:
            self._measures.ended("lost")  # The recipe has told it.
            return
        except Fatal as error:
            if row.slot not in self._told:
                self._told.add(row.slot)
                log.error("slot %s cannot be recovered, and what it holds open holds up readers: %s", row.slot, error)
            return
        except Fenced as error:
            log.info("slot %s is being recovered by somebody else: %s", row.slot, error)
            return
        failpoint("dual.claim.before_release")
        await put_away(slot.producer)
        await self._give_back(slot.name, slot.owner)

    def _tell(self, text: str) -> None:
        if text not in self._told:
            self._told.clear()
            self._told.add(text)
            log.warning("%s", text)


def _process_is_gone(owner: str) -> bool:
    """Whether the owner was a process of this machine that has ended."""
    identity = ProcessIdentity.parse(owner)
    here = ProcessIdentity.current()
    return identity is not None and identity.host == here.host and not is_alive(identity)
