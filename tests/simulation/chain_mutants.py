"""Protections of the engine, the owner of requests and the sink, taken away one at a time; see `mutants.py`."""

from __future__ import annotations

from typing import Any

from semel.client.admin import Admin
from semel.client.producer import TransactionalProducer
from semel.coordinator.offsets import OffsetStore
from semel.ingress import rules
from semel.ingress.rules import Verdict
from semel.processing.engine import Engine
from semel.processing.quick import Quick, Unfinished
from semel.processing.scope import RecordScope
from semel.processing.stores import Store, Stores
from semel.sinks.engine import SinkEngine
from semel.sinks.sql.sink import SqlSink
from semel.types import GroupMetadata
from tests.simulation.mutants import Mutant, instead

__all__ = ["CHAIN_MUTANTS"]

CHAIN_MUTANTS: dict[str, Mutant] = {}


@instead(CHAIN_MUTANTS, "offsets are sent without the member's generation", TransactionalProducer, "send_offsets")
def _(real: Any, self: Any, offsets: Any, group: GroupMetadata) -> Any:
    return real(self, offsets, GroupMetadata(group.group_id))


@instead(CHAIN_MUTANTS, "state is not restored", Store, "begin")
def _(real: Any, self: Any, changelog: Any, *args: Any) -> int:
    real(self, changelog, *args)
    end: int = changelog.end
    return end


@instead(CHAIN_MUTANTS, "state on disk counts as complete up to the changelog's end", Store, "begin")
def _(real: Any, self: Any, changelog: Any, *args: Any) -> int:
    start: int = real(self, changelog, *args)
    return changelog.end if start > changelog.start else start  # type: ignore[no-any-return]


@instead(CHAIN_MUTANTS, "state on disk claims more of the changelog than it has", Stores, "apply")
def _(real: Any, self: Any, changes: Any, written: Any, began: float) -> None:
    real(self, changes, {at: end + 3 for at, end in written.items()}, began)


@instead(CHAIN_MUTANTS, "the inner loop passes over a record that its handler fails at", Quick, "work")
def _(real: Any, self: Any, pending: Any, *args: Any) -> Any:
    rest = real(self, pending, *args)
    if isinstance(rest, Unfinished) and rest.error is not None:
        pending.popleft()
        return True
    return rest


@instead(CHAIN_MUTANTS, "state changes before the transaction is committed", Engine, "_transact")
async def _(real: Any, self: Any, unit: Any, *args: Any) -> None:
    self._stores.apply(unit.changes, {}, 0.0)
    await real(self, unit, *args)


@instead(CHAIN_MUTANTS, "the next unit does not see what the one on its way changes", RecordScope, "begin")
def _(real: Any, self: Any, unit: Any, partition: int) -> None:
    real(self, unit, partition)
    self._layers = self._layers[:1]


@instead(CHAIN_MUTANTS, "an aborted unit is not worked on again", Engine, "_recover")
async def _(real: Any, self: Any, recovery: Any) -> None:
    kept = {at: held.position for at, held in self._inputs.items()}
    await real(self, recovery)
    for at, held in self._inputs.items():
        held.position = max(held.position, kept.get(at, 0))


@instead(CHAIN_MUTANTS, "a committed offset counts from when its transaction ended", OffsetStore, "end_transaction")
def _(real: Any, self: Any, producer_id: int, commit: bool) -> Any:
    # Of two transactional ids in turn, the later transaction's markers may be written first.
    for group_id, partition in self._transactions.get(producer_id, ()) if commit else ():
        self._stable.get(group_id, {}).pop(partition, None)
    return real(self, producer_id, commit)


# --- The owner of requests ---


@instead(CHAIN_MUTANTS, "a key that is known is run again", rules, "judge")
def _(real: Any, *args: Any) -> Verdict:
    return Verdict.RUN


@instead(CHAIN_MUTANTS, "a known key answers for any body", rules, "judge")
def _(real: Any, *args: Any) -> Verdict:
    verdict: Verdict = real(*args)
    return Verdict.REPLAY if verdict is Verdict.REUSED else verdict


@instead(CHAIN_MUTANTS, "requests that were not answered are deleted too", Admin, "delete_records")
async def _(real: Any, self: Any, offsets: Any) -> Any:
    ends = await self.list_offsets(list(offsets), "high_watermark")
    return await real(self, ends)


# --- The sink ---


@instead(CHAIN_MUTANTS, "the position is committed before the effects", SqlSink, "_advance")
def _(real: Any, self: Any, moves: Any) -> None:
    real(self, moves)
    self._database.commit()
    self._database.begin()


@instead(CHAIN_MUTANTS, "the sink goes on after an outage without going back", SinkEngine, "_began_outage")
def _(real: Any, self: Any, error: Any) -> None:
    real(self, error)
    for partition in self._partitions.values():
        partition.is_stale = False
