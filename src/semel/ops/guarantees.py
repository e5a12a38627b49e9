"""The guarantee report: for every edge of an app the atomic unit, the fence, what removes duplicates, what is weak.

A weakened promise is one that the app or its surroundings do not let Semel keep; each comes with its reason. With
`require="exactly-once"` those that break exactly-once itself refuse to start; the others are only told.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from semel.app import App
from semel.client.admin import Admin
from semel.client.cluster import KafkaClient
from semel.client.two_phase import TwoPhaseMode
from semel.databases.database import title_of
from semel.databases.spec import CacheSpec, DatabaseSpec, DocumentsSpec, SearchSpec
from semel.dualwrite.conditional import CONDITION_TIMEOUT_MS
from semel.dualwrite.plan import Plan, choose
from semel.dualwrite.store import slot_prefix
from semel.errors import ConfigurationError, TwoPhaseCommitUnavailable
from semel.ops.listings import tool_client
from semel.processing.component import Delivery, ProcessorSpec
from semel.settings import Settings
from semel.sinks.dedup import Dedup, Version, days_of
from semel.sinks.spec import SinkSpec

if TYPE_CHECKING:
    from semel.ingress.idempotency import Idempotency

__all__ = ["Edge", "check_required", "edges_of", "offered", "report"]

_OFFSETS_EXPIRE = (
    "a group without members for longer than the broker keeps its offsets (offsets.retention.minutes: 7 days on Apache "
    "Kafka, 400 days on the embedded broker) would start over on a host without this data folder; raise it above the "
    "longest stop"
)
_CACHE_LOSS = (
    "without appendonly yes and appendfsync always a crash of the server, and every fail-over to a replica, takes back "
    "effects together with their position; they come again as far as the topic still has them"
)
_CACHE_GONE = (
    "a server that lost everything (FLUSHALL) stops the sink (DATA_GAP); what it held can be built anew only where the "
    "topic still has all of it"
)
_SEARCH_BATCH = (
    "a batch is not one step: readers may find some of its documents before the others, and after a crash some of them "
    "are written again; each document ends at its newest version"
)
_SEARCH_OFFSETS = (
    "where put and delete get no version of the app's own, offsets are the versions: all changes of a document have to "
    "come from one partition, and a topic that gets more partitions stops the sink (PARTITIONS_ADDED)"
)
_SEARCH_GONE = (
    "an index that is made anew is built from the start of the log, which is all of it only where the topic still has "
    "it"
)
_ENGINES = "what a handler writes into a table that is not InnoDB is not undone with its transaction"
_KAFKA_FENCE = "producer epoch of {tid}, group generation in TxnOffsetCommit"


@dataclass(frozen=True, slots=True)
class Edge:
    """One step of the chain. `weakened` holds reasons; `breaks` those of them that end exactly-once."""

    edge: str
    atomic_unit: str
    fence: str
    dedup: str
    weakened: tuple[str, ...] = ()
    breaks: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The documented JSON names."""
        return {
            "edge": self.edge,
            "atomic_unit": self.atomic_unit,
            "fence": self.fence,
            "dedup": self.dedup,
            "weakened": list(self.weakened),
            "exactly_once": not self.breaks,
        }


def edges_of(app: App, transaction_version: int | None, mode: TwoPhaseMode | None = None) -> list[Edge]:
    """Every edge of the app. `transaction_version` is the cluster's finalized feature, `mode` what it offers of
    two-phase commit; None when it was not asked."""
    kafka = _kafka_notes(transaction_version)
    edges: list[Edge] = []
    for endpoint in app.endpoints.values():
        weakened, breaks = [*kafka, _OFFSETS_EXPIRE], []
        if endpoint.principal is None:
            weakened.append("responses are shared by all callers, because the endpoint has no principal=")
        if not endpoint.key_required:
            breaks.append("a request without an Idempotency-Key runs again when it is sent again (require_key=False)")
        edges.append(
            Edge(
                edge=f"{endpoint.method} {endpoint.path} -> {app.name}.requests",
                atomic_unit="one Kafka transaction: outputs, stored response, reply, input offset",
                fence=_KAFKA_FENCE.format(tid=f"{app.name}.requests.*"),
                dedup="Idempotency-Key, decided by the log; responses kept 24 h",
                weakened=(*weakened, *breaks),
                breaks=tuple(breaks),
            )
        )
    edges += [_keyed_edge(app, name, keyed) for name, keyed in app.idempotent]
    for processor in app.processors.values():
        store = f", state {', '.join(state.name for state in processor.states)}" if processor.states else ""
        if processor.delivery != "exactly-once":
            edges.append(_weak(processor, store))
            continue
        edges.append(
            Edge(
                edge=f"{processor.topic.name} -> {processor.name}",
                atomic_unit=f"one Kafka transaction: outputs{store}, input offset",
                fence=_KAFKA_FENCE.format(tid=f"{app.name}.{processor.name}.*"),
                dedup="position",
                weakened=(*kafka, _OFFSETS_EXPIRE),
            )
        )
    for spec in app.transactional:
        if spec.dual_write:
            edges.append(_dual_edge(app, spec, kafka, mode))
        elif spec.outbox:
            edges.append(_outbox_edge(app, spec, kafka))
    return edges + [_sink_edge(sink) for sink in app.sinks.values()]


_ORDER = (
    "records of one key are in the order of their transactions where each holds the lock of the key's row by its end"
)
_RESTORED = (
    "a database that is restored from a backup holds records that were published: `semel outbox declare-restored` lets "
    "the relay compare before it publishes"
)
_RUN_AGAIN = (
    "a transaction that the handler of an endpoint or a processor of this app opens is committed apart from Kafka's, "
    "and again when the handler runs again: open it in a web framework's endpoint, or let a sink write the rows"
)


def _outbox_edge(app: App, spec: DatabaseSpec, kafka: list[str]) -> Edge:
    """What app.transaction and enqueue_in promise: two steps, with the rows of the outbox between them."""
    weakened = [*kafka, _ORDER, _RESTORED]
    if app.endpoints or app.processors:
        weakened.append(_RUN_AGAIN)
    if title_of(spec.url) == "MariaDB":
        weakened.append(_ENGINES.replace("a handler", "a transaction"))
    return Edge(
        edge=f"transactions on {spec.name} ({title_of(spec.url)}) -> outbox -> their topics",
        atomic_unit=(
            "one database transaction: rows, records, its number; then one Kafka transaction: records, manifest of "
            "their rows"
        ),
        fence=f"locks of the rows; then producer epoch of {app.name}.outbox.*, one for each lane",
        dedup="the manifest names the rows that are published; each record has its id in semel-id",
        weakened=tuple(weakened),
    )


_FORGOTTEN = (
    "a transaction whose process died between the two commits holds up readers until another process of the app "
    "recovers it, within seconds, or an operator does (`semel doctor txn`)"
)
_TAKEN_BACK = (
    "what was sent after the backup that a database is restored from stays in Kafka, although the database does not "
    "know it"
)
_CACHE_ORDER = (
    "records of one key are in the order of their transactions where each reads the key that they stand for; those "
    "that only count have no order"
)
_DOCUMENT_ORDER = "records of one key that come from different transactions have no order"
_CACHE_TAKEN_OVER = (
    "a fail-over to a replica loses what it had not got yet, and Kafka has it: it is told when a slot is used again, "
    "and nothing puts it right"
)
_ONE_WAY = (
    "the plan of a database changes between outbox and dual write when the outbox is empty, and never for one process "
    "alone; what enqueue_in writes, and an instance that declares only outbox=True, goes by the outbox whatever holds, "
    "and comes later than a dual write of the same key"
)
_CONDITION = (
    "what the database committed is lost for Kafka when a process is killed between the two commits and no other one "
    f"recovers it within {CONDITION_TIMEOUT_MS // 60_000} minutes: this Kafka aborts it then. It is told when it "
    "happened"
)
_NOT_ASKED = (
    "the cluster was not asked (no --kafka): what it offers of two-phase commit decides whether the dual write can be "
    "done"
)


def _dual_edge(app: App, spec: DatabaseSpec, kafka: list[str], mode: TwoPhaseMode | None) -> Edge:
    """What app.transaction promises with a dual write, by what the broker offers; see `semel.dualwrite.plan`."""
    broken: list[str] = []
    try:
        plan, why = choose(spec.outbox, spec.dual_write, mode)
    except TwoPhaseCommitUnavailable as error:
        plan, why = Plan.DUAL_WRITE, "the app declares it"
        broken.append(str(error))
    if plan is Plan.OUTBOX:
        edge = _outbox_edge(app, spec, kafka)
        return replace(edge, weakened=(f"the outbox is used, because {why}", *edge.weakened, _ONE_WAY))
    weakened = [_NOT_ASKED] if mode is None else []
    if plan is Plan.CONDITIONAL and mode not in (None, TwoPhaseMode.FULL, TwoPhaseMode.NO_RECOVERY):
        broken.append(_CONDITION)
    in_cache, in_documents = isinstance(spec, CacheSpec), isinstance(spec, DocumentsSpec)
    order = (_CACHE_ORDER, _CACHE_TAKEN_OVER) if in_cache else (_DOCUMENT_ORDER,) if in_documents else (_ORDER,)
    weakened += [*broken, _FORGOTTEN, _TAKEN_BACK, *order]
    if spec.outbox:
        weakened.append(_ONE_WAY)
    if app.endpoints or app.processors:
        weakened.append(_RUN_AGAIN)
    title = "Valkey" if in_cache else "MongoDB's protocol" if in_documents else title_of(spec.url)
    if title == "MariaDB":
        weakened.append(_ENGINES.replace("a handler", "a transaction"))
    own = "; each owner has an id of its own" if plan is Plan.CONDITIONAL else ""
    return Edge(
        edge=f"transactions on {spec.name} ({title}) -> {plan} -> their topics",
        atomic_unit=(
            f"one Kafka transaction, prepared, and one script of {spec.name}: what was read is unchanged, conditions, "
            f"effects and its name; the script decides for both ({why})"
            if in_cache
            else f"one Kafka transaction, prepared, and one new document of {spec.name}, which holds its name and "
            f"decides for both ({why})"
            if in_documents
            else f"one Kafka transaction, prepared, and one of {spec.name}: rows and its name; COMMIT of {spec.name} "
            f"decides for both ({why})"
        ),
        fence=(
            f"producer epoch of {slot_prefix(app.name, spec.name)}*, one for each slot{own}; owner_epoch of the slot, "
            "raised before it is recovered"
        ),
        dedup="the name of the Kafka transaction in the slot's row; each record has its id in semel-id",
        weakened=tuple(weakened),
        breaks=tuple(broken),
    )


_SINK_STEPS: dict[Delivery, tuple[str, str, tuple[str, ...]]] = {
    "exactly-once": ("one database transaction: effects, position, owner epoch", "position row", ()),
    "at-least-once": (
        "two database transactions: effects, then position and parked records; the owner epoch in both",
        "none",
        ("effects are written again after a crash between effects and position (delivery='at-least-once')",),
    ),
    "at-most-once": (
        "two database transactions: position, then effects and parked records; the owner epoch in both",
        "position row",
        ("effects and parked records are lost in a crash between position and effects (delivery='at-most-once')",),
    ),
}


def _keyed_edge(app: App, name: str, keyed: Idempotency) -> Edge:
    """Endpoints of a web framework that write to a database under a key."""
    shared = () if keyed.principal else ("responses are shared by all callers, because there is no principal=",)
    return Edge(
        edge=f"HTTP with app.idempotency -> database {name} ({title_of(app.databases[name].url)})",
        atomic_unit="one database transaction: key, fingerprint, response, the endpoint's rows and records",
        fence="the primary key of semel_idempotency: who comes second waits for the first one's end",
        dedup=f"Idempotency-Key, decided by the database; kept {keyed.keep_days} to {keyed.keep_days + 1} days",
        weakened=shared,
    )


def _sink_edge(sink: SinkSpec) -> Edge:
    if isinstance(sink.database, CacheSpec):
        return Edge(
            edge=f"{sink.topic.name} -> {sink.name} (Valkey)",
            atomic_unit="one Lua script: effects, parked records, position",
            fence="owner_epoch in the position's hash, compared by the script",
            dedup="position",
            weakened=(_CACHE_LOSS, _CACHE_GONE),
        )
    if isinstance(sink.database, SearchSpec):
        return Edge(
            edge=f"{sink.topic.name} -> {sink.name} (OpenSearch)",
            atomic_unit="each document by itself, with its version; then the position, with what is parked",
            fence="version of each document (external_gte); owner_epoch in the position, by compare-and-set",
            dedup="the version: what is lower than the document's changes nothing",
            weakened=(_SEARCH_BATCH, _SEARCH_OFFSETS, _SEARCH_GONE),
        )
    kind = title_of(sink.database.url)
    unit, dedup, breaks = _SINK_STEPS[sink.delivery]
    fence = "owner_epoch in semel_position, compared by the first statement"
    dedup = dedup if sink.dedup is None else _known_by(sink.dedup)
    weakened = (*breaks, _ENGINES) if kind == "MariaDB" else breaks
    return Edge(f"{sink.topic.name} -> {sink.name} ({kind})", unit, fence, dedup, weakened=weakened, breaks=breaks)


def _known_by(dedup: Dedup) -> str:
    """How a sink knows what it has applied, with the days that its window has to cover."""
    if isinstance(dedup, Version):
        return "position row; version guard: what is not newer than its key is passed over"
    name = "semel-id" if dedup.id is None else "the id that the app reads"
    return (
        f"position row; inbox: {name}, kept {dedup.window_days} days >= {days_of(dedup, None)} (checked at start); "
        "what is older is parked as unprovable"
    )


_STEPS = {
    "at-least-once": (
        "none: outputs{store} first, then the input offset",
        "effects happen again after a crash between outputs and position (delivery='at-least-once')",
    ),
    "at-most-once": (
        "none: the input offset first, then outputs{store}",
        "effects and parked records are lost in a crash between position and outputs (delivery='at-most-once')",
    ),
}


def _weak(processor: ProcessorSpec, store: str) -> Edge:
    unit, reason = _STEPS[processor.delivery]
    zombie = "a worker that lost its partitions is kept out when it writes the position, not when it writes outputs"
    return Edge(
        edge=f"{processor.topic.name} -> {processor.name}",
        atomic_unit=unit.format(store=store),
        fence="group generation in OffsetCommit",
        dedup="none; within one life of a worker the producer's sequence numbers",
        weakened=(reason, zombie, _OFFSETS_EXPIRE),
        breaks=(reason,),
    )


def _kafka_notes(transaction_version: int | None) -> list[str]:
    if transaction_version is None:
        return ["the cluster was not asked (no --kafka): its transaction.version decides between V1 and V2"]
    if transaction_version < 2:
        return [
            f"transaction.version is {transaction_version}: the broker does not fence late requests, so a transaction "
            "with an unanswered request costs a new producer epoch before the next one (slower, still exactly once)"
        ]
    return []


async def report(app: App, settings: Settings) -> list[Edge]:
    """The edges of the app on the cluster that the settings name, which is asked for its transaction version."""
    if not settings.kafka:
        return edges_of(app, None)
    async with tool_client(settings) as client:
        return edges_of(app, client.transaction_version, await offered(app, client))


async def offered(app: App, client: KafkaClient) -> TwoPhaseMode | None:
    """What Kafka offers of two-phase commit under the names of the app's slots; None when nothing wants it."""
    for spec in app.transactional:
        if spec.dual_write:
            return await Admin(client).two_phase_mode(f"{slot_prefix(app.name, spec.name)}0")
    return None


def check_required(app: App, edges: list[Edge]) -> None:
    """Raise `ConfigurationError` when the app requires exactly-once and an edge cannot hold it."""
    if app.require != "exactly-once":
        return
    broken = [f"{edge.edge}: {reason}" for edge in edges for reason in edge.breaks]
    if broken:
        raise ConfigurationError(
            f'app {app.name} requires "exactly-once", which cannot hold. '
            + "; ".join(broken)
            + ". Change that, or drop require=."
        )
