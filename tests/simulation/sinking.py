"""The sink in the simulated world: the real `SinkEngine` and `SqlSink` in fibers, and what must be in the database."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from semel.databases.spec import DatabaseSpec
from semel.env import Env
from semel.processing.metrics import Metrics
from semel.processing.topics import Topic
from semel.settings import Settings
from semel.sinks.engine import SinkEngine
from semel.sinks.spec import SinkSpec
from semel.types import TopicPartition
from tests.simulation.workers import APP, COUNTED, Poison, is_poison

if TYPE_CHECKING:
    from tests.simulation.chain import ChainWorld

__all__ = ["LEDGER", "SINK", "check_database", "sink_engine"]

SINK = "ledger"
LEDGER, TOTALS = "ledger", "totals"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS ledger (effect TEXT);
CREATE TABLE IF NOT EXISTS totals (name TEXT PRIMARY KEY, amount BIGINT NOT NULL);
"""


def sink_engine(world: ChainWorld, settings: Settings, env: Env, slot: int) -> SinkEngine:
    """Applies what was counted. The totals are few, so partitions meet at their rows; the ledger takes everything."""
    rng = world.stream(f"sink handler of {env.rng.random()}")
    share = world.plan.knobs["poison"]

    def apply(records: Sequence[Any], db: Any) -> None:
        rows = [record.value.decode() for record in records]
        rng.shuffle(rows)  # So that two owners may lock the same totals in another order.
        for value in rows:
            if is_poison(value, share):
                raise Poison(value)
            name = value.split("|")[2]
            db.execute("INSERT INTO ledger (effect) VALUES (?)", (value,))
            db.execute(
                "INSERT INTO totals (name, amount) VALUES (?, 1) ON CONFLICT (name) "
                "DO UPDATE SET amount = totals.amount + 1",
                (name,),
            )

    database = DatabaseSpec("database", "postgresql://model/db", _SCHEMA)
    topic: Topic[Any, Any] = Topic(COUNTED, bytes, bytes)
    spec = SinkSpec(SINK, topic, database, apply, max_records=2)
    return SinkEngine(APP, spec, world.bootstrap, settings, env, Metrics(), slot=slot, executor=world.fiber())


def positions(world: ChainWorld) -> dict[TopicPartition, int]:
    """Where the sink is in each partition."""
    if "semel_position" not in world.database.server.tables:
        return {}
    rows = world.database.server.committed("semel_position")
    return {TopicPartition(row["topic"], row["part"]): row["next_offset"] for row in rows}


def check_database(world: ChainWorld, counted: dict[TopicPartition, list[str]]) -> None:
    """Each record once in the ledger or among the parked, with the totals to match; nothing else."""
    fail, server = world.history.fail, world.database.server
    due: Counter[str] = Counter()
    due_parked: Counter[str] = Counter()
    for values in counted.values():
        blocked: set[str] = set()
        for value in values:
            key = value.split("|")[0]
            if key in blocked or is_poison(value, world.plan.knobs["poison"]):
                blocked.add(key)
                due_parked[value] += 1
            else:
                due[value] += 1
    got = Counter(row["effect"] for row in server.committed(LEDGER))
    parked = Counter(bytes(row["record_value"]).decode() for row in server.committed("semel_parked"))
    for what, wanted, found in (("effect", due, got), ("parked effect", due_parked, parked)):
        if wanted - found:
            fail(f"{what} lost", f"{dict(wanted - found)}, and too many are {dict(found - wanted)}")
        elif found - wanted:
            fail(f"{what} doubled", f"{dict(found - wanted)}")
    totals = {row["name"]: row["amount"] for row in server.committed(TOTALS)}
    if totals != dict(Counter(value.split("|")[2] for value in got.elements())):
        fail("torn database transaction", f"the totals are {totals}, the ledger has {dict(got)}")
