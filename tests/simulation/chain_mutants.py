"""Protections of the engine, the owner of requests and the sink, taken away one at a time; see `mutants.py`."""

from __future__ import annotations

from typing import Any

from semel.client.admin import Admin
from semel.client.producer import TransactionalProducer
from semel.errors import OutcomeUnknown
from semel.processing import engine as engine_module
from semel.processing.engine import Engine
from semel.types import GroupMetadata
from tests.simulation.mutants import Mutant, instead

__all__ = ["CHAIN_MUTANTS"]

CHAIN_MUTANTS: dict[str, Mutant] = {}


@instead(CHAIN_MUTANTS, "offsets are sent without the member's generation", TransactionalProducer, "send_offsets")
def _(real: Any, self: Any, offsets: Any, group: GroupMetadata) -> Any:
    return real(self, offsets, GroupMetadata(group.group_id))


@instead(CHAIN_MUTANTS, "taking over does not wait for open transactions", Admin, "committed_offsets")
def _(real: Any, self: Any, group: str, partitions: Any, require_stable: bool = True) -> Any:
    return real(self, group, partitions, require_stable=False)


@instead(CHAIN_MUTANTS, "state is not restored", engine_module, "take_over")
async def _(real: Any, *args: Any, restore: bool) -> Any:
    return await real(*args, restore=False)


@instead(CHAIN_MUTANTS, "state changes before the transaction is committed", Engine, "_transact")
async def _(real: Any, self: Any, unit: Any, offsets: Any) -> None:
    self._stores.apply(unit.changes)
    await real(self, unit, offsets)


@instead(CHAIN_MUTANTS, "an aborted unit is not worked on again", Engine, "_recover")
async def _(real: Any, self: Any, recovery: Any) -> None:
    kept = {at: held.position for at, held in self._inputs.items()}
    await real(self, recovery)
    for at, held in self._inputs.items():
        held.position = max(held.position, kept.get(at, 0))


@instead(CHAIN_MUTANTS, "a unit of lost partitions is committed", Engine, "on_lost")
async def _(real: Any, self: Any, partitions: Any) -> None:
    self._forget(partitions)


@instead(CHAIN_MUTANTS, "a commit of unknown outcome counts as done", Engine, "_transact")
async def _(real: Any, self: Any, unit: Any, offsets: Any) -> None:
    try:
        await real(self, unit, offsets)
    except OutcomeUnknown:
        await self._producer.abort()
