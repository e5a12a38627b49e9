"""Rules of the dual write, taken away one at a time; see `mutants.py`."""

from __future__ import annotations

from typing import Any

from semel.client.producer import TransactionalProducer
from semel.client.two_phase import NOTHING_PREPARED
from semel.databases.postgres import PostgresDatabase
from semel.dualwrite import recipe, session
from semel.dualwrite.sql import MARK
from semel.dualwrite.store import Decision
from tests.simulation.mutants import Mutant, instead

__all__ = ["DUAL_MUTANTS"]

DUAL_MUTANTS: dict[str, Mutant] = {}


@instead(DUAL_MUTANTS, "nobody compares the fence", PostgresDatabase, "execute")
def _(real: Any, self: Any, sql: str, parameters: Any = ()) -> int:
    if sql == MARK:
        sql, parameters = "UPDATE semel_txn SET prepared = ? WHERE slot = ?", parameters[:2]
    return int(real(self, sql, parameters))


@instead(DUAL_MUTANTS, "a commit in doubt is looked for without its lock", session, "read_decision")
def _(real: Any, database: Any, slot: str) -> Decision:
    rows = database.query("SELECT owner, owner_epoch, prepared FROM semel_txn WHERE slot = ?", (slot,))
    return Decision(*rows[0])


@instead(DUAL_MUTANTS, "what a predecessor left open is aborted", recipe, "end")
async def _(real: Any, env: Any, producer: TransactionalProducer, decided: Any, **options: Any) -> None:
    await real(env, producer, NOTHING_PREPARED, **options)
