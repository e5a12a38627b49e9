"""The facts about open transactions: what coordinators, logs and databases say, joined. Looks, and changes nothing."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from semel.app import App
from semel.client.admin import Admin, DescribedTransaction
from semel.client.cluster import KafkaClient
from semel.client.markers import behind, unmarked
from semel.client.transaction_admin import OpenInLog, TransactionAdmin
from semel.client.two_phase import PreparedState
from semel.databases.database import Database, is_cache, is_documents, without_password
from semel.databases.processes import ProcessIdentity, is_alive
from semel.databases.spec import DatabaseSpec
from semel.dualwrite.conditional import ConditionalName, own_id
from semel.dualwrite.keeping import step_store_of
from semel.dualwrite.store import slot_prefix
from semel.dualwrite.tables import read_meta
from semel.errors import ConfigurationError, SemelError
from semel.ops.databases import connected
from semel.ops.diagnosis import UNKNOWN, Decision, Kind, OpenTransaction, Slot, TxnRow, judge

__all__ = ["OPEN", "Source", "describe", "gather", "ids_of_slot", "sources_of"]

OPEN = ("Ongoing", "PrepareCommit", "PrepareAbort")
HANGS_SECONDS = 0.2
"""Between the two looks at a transaction that no coordinator knows: a marker that is just being written is no cause."""

_SLOT = re.compile(r"(?P<slot>.+\.dual\.[^/]+\.\d+?)(?:\.(?P<epoch>\d+))?")
_NUMBERS = re.compile(r"\d+(\.\d+)?")
_LANE = re.compile(r".+\.outbox\.[0-9a-f-]+\.\d+")


@dataclass(frozen=True, slots=True)
class Source:
    """A database that may hold slots; `app` is empty where only its URL is known."""

    url: str
    name: str
    app: str = ""

    @property
    def prefix(self) -> str:
        """What the slots in it are called, before their number; empty where nobody said."""
        return slot_prefix(self.app, self.name) if self.app else ""


def sources_of(app: App | None, urls: Iterable[str]) -> list[Source]:
    """The databases to ask: those of the app, and those named by their URL."""
    others = [spec for spec in (*app.caches.values(), *app.document_stores.values()) if spec.dual_write] if app else []
    own = [Source(spec.url, spec.name, app.name) for spec in (*app.databases.values(), *others)] if app else []
    return own + [Source(url, without_password(url)) for url in urls]


async def gather(client: KafkaClient, app: App | None, sources: Sequence[Source]) -> list[OpenTransaction]:
    """Every transaction that is open in the cluster, the oldest first.

    Raises `Retriable` when Kafka does not answer. A database that does not is said in what it should have told.
    """
    admin = Admin(client)
    # The logs first: what ends between the two looks is then open in neither.
    in_logs = await TransactionAdmin(client).open_in_logs(await behind(admin))
    listed = await admin.list_transactions(states=list(OPEN))
    described = await admin.describe_transactions([item.transactional_id for item in listed])
    known = [item for item in described if item.state in OPEN]
    now_ms = client.env.wall_ms()
    hanging = await _hanging(client, in_logs, known)
    names = [item.transactional_id for item in known]
    rows = await asyncio.to_thread(_rows_of, sources, names, client.cluster_id) if names else {}
    found = [_known(item, now_ms, app, rows) for item in known]
    ended = {item.at[:3]: (item.transactional_id, item.commit) for item in await unmarked(client, hanging)}
    found += [_unknown(item, now_ms, *ended.get(item[:3], ("", False))) for item in hanging]
    found += await _ended_and_in_doubt(client, app, sources, set(names))
    return sorted(found, key=lambda item: -item.age_seconds)


async def describe(
    client: KafkaClient, app: App | None, sources: Sequence[Source], name: str
) -> OpenTransaction | None:
    """One transactional id, open or not; None when neither the coordinator nor a row knows it."""
    found = await Admin(client).describe_transactions([name])
    rows = await asyncio.to_thread(_rows_of, sources, [name], client.cluster_id)
    return _known(found[0], client.env.wall_ms(), app, rows) if found else _forgotten(name, rows.get(name))


async def _ended_and_in_doubt(
    client: KafkaClient, app: App | None, sources: Sequence[Source], seen: Collection[str]
) -> list[OpenTransaction]:
    """Transactions of the conditional recipe that a database decided, and that Kafka did not keep open for it."""
    named = await asyncio.to_thread(_conditional_ids, sources, client.cluster_id)
    found = []
    for name in sorted(set(named) - set(seen)):
        item = await describe(client, app, sources, name)
        if item is not None and judge(item).decision is not Decision.NOTHING:
            found.append(item)
    return found


async def _hanging(
    client: KafkaClient, in_logs: Sequence[OpenInLog], known: Sequence[DescribedTransaction]
) -> list[OpenInLog]:
    """What is open in a log, was unknown to every coordinator after that, and is still open."""
    places = {(item.producer_id, at) for item in known for at in item.partitions}
    suspects = [item for item in in_logs if (item.producer_id, item.partition) not in places]
    if not suspects:
        return []
    await asyncio.sleep(HANGS_SECONDS)
    again = await TransactionAdmin(client).open_in_logs({item.partition: None for item in suspects})
    still = {(item.partition, item.name, item.start_offset) for item in again}
    return [item for item in suspects if (item.partition, item.name, item.start_offset) in still]


# --- Whose it is ---


def _known(item: DescribedTransaction, now_ms: int, app: App | None, rows: Mapping[str, Slot]) -> OpenTransaction:
    name = item.transactional_id
    found = OpenTransaction(
        transactional_id=name,
        name=PreparedState(item.producer_id, item.producer_epoch),
        state=item.state,
        age_seconds=max(0.0, (now_ms - item.start_ms) / 1000) if item.start_ms >= 0 else 0.0,
        timeout_ms=item.timeout_ms,
        partitions=item.partitions,
        kind=Kind.FOREIGN,
    )
    if name in rows:
        return replace(found, kind=Kind.SLOT, slot=rows[name])
    if _LANE.fullmatch(name) and (app is None or name.startswith(f"{app.name}.outbox.")):
        return replace(found, kind=Kind.LANE, app=name.partition(".outbox.")[0])
    for component in _components(app):
        if app is not None and name.startswith(f"{app.name}.{component}."):
            return replace(found, kind=Kind.COMPONENT, app=app.name, component=component)
    return found


def _forgotten(name: str, slot: Slot | None) -> OpenTransaction | None:
    """An id of the conditional recipe that Kafka has forgotten, as it does in a week without use, and a row has not."""
    held = None if slot is None or slot.row is None else ConditionalName.parse(slot.row.prepared)
    if slot is None or held is None or held.owner_epoch != slot.owner_epoch:
        return None
    return OpenTransaction(name, held.name, UNKNOWN, 0.0, 0, (), Kind.SLOT, slot=slot)


def _components(app: App | None) -> list[str]:
    if app is None:
        return []
    return [*(item.name for item in app.components()), *app.sinks, "requests"]


def _unknown(item: OpenInLog, now_ms: int, ended_as: str, is_committed: bool) -> OpenTransaction:
    return OpenTransaction(
        transactional_id="",
        name=item.name,
        state="Hanging",
        age_seconds=max(0.0, (now_ms - item.last_timestamp_ms) / 1000),
        timeout_ms=0,
        partitions=(item.partition,),
        kind=Kind.HANGING,
        start_offset=item.start_offset,
        ended_as=ended_as,
        is_committed=is_committed,
    )


# --- What the databases say ---


def _rows_of(sources: Sequence[Source], names: Collection[str], environment: str) -> dict[str, Slot]:
    """What is known of each of these ids that is a slot of a dual write. Blocks; does not raise."""
    found: dict[str, Slot] = {}
    for source in sources:
        # A name may fit the slots of two databases: the one that has its row is the one.
        wanted = [name for name in names if _may_be_of(source, name) and not (name in found and found[name].row)]
        said = _ask(source, wanted, environment) if wanted else {}
        found |= {name: slot for name, slot in said.items() if slot.row or name not in found}
    for name in names:
        parts = _SLOT.fullmatch(name)
        if name not in found and parts is not None:
            slot = name if parts["epoch"] is None else parts["slot"]
            problem = "nobody said in which database it is: name the app, or the database with --database URL"
            found[name] = Slot(slot, "?", problem=problem)
    return found


def _conditional_ids(sources: Sequence[Source], environment: str) -> list[str]:
    """The transactional ids whose last decision is not known to be carried out. Blocks; does not raise."""
    found = []
    for source in _in_sql(sources):
        try:
            with connected(source.url) as database:
                if database is None or _problem_of(database, source, environment):
                    continue
                for slot, prepared, resolved in database.query("SELECT slot, prepared, resolved_epoch FROM semel_txn"):
                    held = ConditionalName.parse(prepared)
                    if held is not None and not held.is_ended and held.owner_epoch > resolved:
                        found.append(own_id(slot, held.owner_epoch))
        except SemelError:
            continue  # What is open says so itself: its database does not answer.
    return found


def _in_sql(sources: Sequence[Source]) -> list[Source]:
    """Where the conditional recipe may be."""
    return [source for source in sources if _is_sql(source)]


def _is_sql(source: Source) -> bool:
    return not (is_cache(source.url) or is_documents(source.url))


def ids_of_slot(sources: Sequence[Source], slot: str) -> list[str]:
    """The id under which the slot's last decision was made, where it has one of the conditional recipe. Blocks."""
    found = []
    for source in _in_sql(sources):
        try:
            with connected(source.url) as database:
                rows = database.query("SELECT prepared FROM semel_txn WHERE slot = ?", (slot,)) if database else []
        except SemelError:
            continue
        found += [own_id(slot, held.owner_epoch) for (text,) in rows if (held := ConditionalName.parse(text))]
    return found


def _may_be_of(source: Source, name: str) -> bool:
    if not source.prefix:
        return _SLOT.fullmatch(name) is not None
    return name.startswith(source.prefix) and _NUMBERS.fullmatch(name[len(source.prefix) :]) is not None


def _ask(source: Source, names: Sequence[str], environment: str) -> dict[str, Slot]:
    where = source.name
    try:
        if not _is_sql(source):
            return _ask_store(source, names, environment)
        with connected(source.url) as database:
            if database is None:
                raise ConfigurationError(f"there is no database at {without_password(source.url)}")
            problem = _problem_of(database, source, environment)
            if problem:
                return {name: Slot(name, where, problem=problem) for name in names}
            return {name: _slot(database, where, name) for name in names}
    except SemelError as error:
        return {name: Slot(name, where, problem=f"it cannot be read: {error}") for name in names}


def _ask_store(source: Source, names: Sequence[str], environment: str) -> dict[str, Slot]:
    found, store = {}, step_store_of(source.app, DatabaseSpec(source.name, source.url))
    try:
        for name in names:
            theirs = store.environment_of(name)
            if theirs not in (None, "", environment):
                found[name] = Slot(name, source.name, problem=_elsewhere(source, str(theirs), environment))
                continue
            held = store.decided(name)
            row = None if held is None else TxnRow(held.owner_epoch, held.owner, held.prepared)
            found[name] = Slot(name, source.name, row, owner_runs=None if row is None else _runs(row.owner))
    finally:
        store.close()
    return found


def _elsewhere(source: Source, theirs: str, environment: str) -> str:
    return (
        f"the rows of {source.name} belong to another environment: Kafka cluster {theirs!r}, not this "
        f"one, {environment!r}. They say nothing about its transactions"
    )


def _problem_of(database: Database, source: Source, environment: str) -> str:
    """Why the rows in this database say nothing about this cluster's transactions; empty when they do."""
    meta = read_meta(database)
    if meta.environment not in (None, environment):
        return _elsewhere(source, str(meta.environment), environment)
    if source.app and meta.app not in (None, source.app):
        return f"the rows of {source.name} belong to another app, {meta.app!r}"
    return ""


def _slot(database: Database, where: str, name: str) -> Slot:
    """The row of a slot by its transactional id, which may end with the owner's epoch (the conditional recipe)."""
    sql = "SELECT slot, owner_epoch, owner, prepared, resolved_epoch FROM semel_txn WHERE slot = ?"
    head, _, tail = name.rpartition(".")
    for slot, epoch in ((name, None), (head, int(tail) if tail.isdigit() else None)):
        rows = database.query(sql, (slot,))
        if rows:
            row = TxnRow(*rows[0][1:])
            return Slot(slot, where, row, owner_runs=_runs(row.owner), owner_epoch=epoch)
    return Slot(name, where)


def _runs(owner: str) -> bool | None:
    """Whether the owner's process runs; None where that cannot be seen from this host."""
    identity = ProcessIdentity.parse(owner)
    if identity is None or identity.host != ProcessIdentity.current().host:
        return None if identity else False
    return is_alive(identity)
