"""`semel doctor txn`: what is open, which decision is right and why, and carrying it out in the only safe order.

For a slot of a dual write that order is: fence Kafka and keep the transaction (InitProducerId with keepPreparedTxn);
raise the database's fence, which waits for a commit under way, and read the row in the same step; then decide as the
row says. Read earlier, the row could still change. What the verbs show before `--yes` is read earlier: it only says
what will be asked for, and the row that is read under the fence has the last word.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import msgspec

from semel.app import App
from semel.client.cluster import KafkaClient
from semel.client.producer import TransactionalProducer
from semel.client.transaction_admin import OpenInLog, SavedEnd, TransactionAdmin
from semel.client.two_phase import NOTHING_PREPARED
from semel.databases.processes import ProcessIdentity
from semel.databases.spec import DatabaseSpec
from semel.dualwrite.conditional import ConditionalName
from semel.dualwrite.keeping import store_of
from semel.dualwrite.store import Claim, ResolvingStore, Store
from semel.errors import ConfigurationError, Fatal, Fenced, Retriable, SemelError
from semel.ops.audit import Decided, auditing
from semel.ops.diagnosis import Decision, Finding, Kind, OpenTransaction, judge
from semel.ops.gathering import Source, describe, gather, ids_of_slot, sources_of
from semel.ops.listings import tool_client
from semel.ops.park_verbs import who
from semel.settings import Settings

__all__ = ["Asked", "decide", "explain", "list_all", "render_finding"]

_WAITS = ("Ongoing", "Hanging")
Verb = Literal["commit", "abort"]


@dataclass(frozen=True, slots=True)
class Asked:
    """What an operator asks for: with `yes` it is done, else only said."""

    verb: Verb
    reason: str = ""
    yes: bool = False
    against: bool = False
    """Do it also where the database says otherwise, or cannot say."""


class _DecidedTransaction(Decided, frozen=True, kw_only=True):
    """What stands in the audit topic about a transaction."""

    verb: str
    transaction: dict[str, Any]
    against_the_database: bool = False
    outcome: str = ""


# --- Looking ---


async def list_all(settings: Settings, app: App | None, urls: Sequence[str]) -> list[dict[str, Any]]:
    """Every open transaction with what is right to do about it, the oldest first."""
    async with tool_client(settings) as client:
        return [row_of(item, judge(item)) for item in await gather(client, app, sources_of(app, urls))]


async def explain(settings: Settings, app: App | None, urls: Sequence[str], name: str) -> dict[str, Any]:
    """One of them. Raises `ConfigurationError` when nothing of that name is known."""
    async with tool_client(settings) as client:
        item = await _find(client, app, sources_of(app, urls), name)
    return row_of(item, judge(item))


def row_of(item: OpenTransaction, finding: Finding) -> dict[str, Any]:
    """A transaction and the finding about it, as the listings and the audit show them."""
    left = item.ends_in_seconds
    slot = item.slot
    return {
        "id": item.id,
        "kind": str(item.kind),
        "transaction": str(item.name),
        "state": item.state,
        "age_seconds": round(item.age_seconds, 1),
        "ends_in_seconds": None if left is None else round(left, 1),
        "partitions": [str(at) for at in item.partitions],
        "app": item.app,
        "component": item.component,
        "database": slot.database if slot else None,
        "row": None if slot is None or slot.row is None else msgspec.to_builtins(slot.row),
        "decision": str(finding.decision),
        "title": finding.title,
        "why": finding.why,
        "then": finding.then,
    }


def render_finding(row: dict[str, Any], output: str) -> str:
    """One finding, or what came of a verb, for people or as JSON."""
    if output == "json":
        return msgspec.json.encode(row).decode()
    left = row["ends_in_seconds"]
    ends = f"ends in {left} s" if left is not None else "ends never by itself" if row["state"] in _WAITS else "decided"
    lines = [
        f"{row['id']}: {row['title']}",
        f"  what      {row['kind']}, transaction {row['transaction']}, {row['state']}",
        f"  since     {row['age_seconds']} s, {ends}",
        f"  where     {', '.join(row['partitions']) or '-'}",
        f"  decision  {row['decision']}",
        f"  why       {row['why']}",
        f"  then      {row['then']}",
    ]
    lines += [f"  {name.ljust(9)} {row[name]}" for name in ("steps", "outcome") if name in row]
    return "\n".join("".join(c if c.isprintable() else repr(c)[1:-1] for c in line) for line in lines)


async def _find(client: KafkaClient, app: App | None, sources: Sequence[Source], name: str) -> OpenTransaction:
    for item in await gather(client, app, sources):
        if name in (item.id, str(item.name)):
            return item
    closed = None if "@" in name else await describe(client, app, sources, name)
    if closed is None:
        for own in await asyncio.to_thread(ids_of_slot, sources, name):
            closed = await describe(client, app, sources, own)
    if closed is None:
        raise ConfigurationError(
            f"nothing is open under {name!r}, and no coordinator knows such a transactional id. `semel doctor txn "
            "list` has everything that is open."
        )
    return closed


# --- Deciding ---


async def decide(settings: Settings, app: App | None, urls: Sequence[str], name: str, asked: Asked) -> dict[str, Any]:
    """Commit or abort one transaction, or only say how; the finding with `steps` and `outcome`.

    Raises `ConfigurationError`, with nothing changed, where the finding says otherwise.
    """
    if asked.yes and not asked.reason:
        raise ConfigurationError("a decision stays on record: say why with --reason. Nothing was changed.")
    sources = sources_of(app, urls)
    async with tool_client(settings) as client:
        item = await _find(client, app, sources, name)
        finding = judge(item)
        _check(item, finding, asked)
        row = row_of(item, finding) | {"steps": _steps(item, asked)}
        if not asked.yes:
            return row | {"outcome": "nothing was changed; --yes does it"}
        return row | {"outcome": await _audited(client, app, sources, item, asked, row)}


def _check(item: OpenTransaction, finding: Finding, asked: Asked) -> None:
    """Raise `ConfigurationError` for a decision that cannot be made, or that the database speaks against."""
    what = f"{item.id} ({item.name}): {finding.title}. {finding.why}"
    if finding.decision is Decision.NOTHING:
        raise ConfigurationError(f"there is nothing to decide about {what}")
    if asked.verb == "commit" and not (item.kind is Kind.SLOT or item.is_committed):
        raise ConfigurationError(
            f"nobody but its owner can commit {what} Kafka's interfaces for operators (KIP-664) can only abort. "
            f"Nothing was changed. {finding.then}"
        )
    if str(finding.decision) == asked.verb or asked.against:
        return
    if finding.decision is Decision.WAIT:  # Safe, as its owner does the work again; of a foreign one nobody knows.
        return
    raise ConfigurationError(
        f"{asked.verb} is not the right decision about {what} Right is: {finding.decision}. Nothing was changed. "
        f"{finding.then} --against-the-database does it all the same: {_consequence(asked.verb)}"
    )


def _consequence(verb: Verb) -> str:
    if verb == "commit":
        return "readers then see records whose rows the database does not have."
    return "its records are then lost in Kafka; rows that the database committed with it stay without them."


def _steps(item: OpenTransaction, asked: Asked) -> str:
    """What `--yes` would do, in order."""
    if item.kind is Kind.HANGING:
        return f"write the {asked.verb} marker for producer {item.name} into {item.partitions[0]} (WriteTxnMarkers)"
    if item.kind is not Kind.SLOT:
        return f"abort it and fence its producer (InitProducerId for {item.transactional_id!r})"
    assert item.slot is not None
    fence = f"raise the fence of row {item.slot.name} in {item.slot.database} and read it"
    if item.slot.row is None:
        fence = "leave the database alone, which " + ("cannot be read" if item.slot.problem else "has no such row")
    first = "" if item.slot.owner_epoch is not None else "fence Kafka and keep the transaction; "
    return f"{first}{fence}; {asked.verb}" + (
        f", AGAINST THE DATABASE: {_consequence(asked.verb)}" if asked.against else " if the row still says so"
    )


async def _audited(
    client: KafkaClient,
    app: App | None,
    sources: Sequence[Source],
    item: OpenTransaction,
    asked: Asked,
    row: dict[str, Any],
) -> str:
    decision = _DecidedTransaction(
        id=str(client.env.new_id()),
        state="asked",
        by=who(),
        reason=asked.reason,
        at_ms=client.env.wall_ms(),
        verb=asked.verb,
        transaction=row,
        against_the_database=asked.against,
    )
    async with auditing(client, app.name if app else "") as audit:
        await audit.write(item.id, decision, decision.at_ms)
        state, failure = "done", None
        try:
            outcome = await _carry_out(client, sources, item, asked)
        except SemelError as error:
            state, failure, outcome = "failed", error, str(error)
        ended = msgspec.structs.replace(decision, state=state, outcome=outcome)
        await audit.write(item.id, ended, client.env.wall_ms())
    if failure is not None:
        raise failure
    return outcome


async def _carry_out(client: KafkaClient, sources: Sequence[Source], item: OpenTransaction, asked: Asked) -> str:
    operator = TransactionAdmin(client)
    if item.kind is Kind.HANGING:
        at = OpenInLog(item.partitions[0], *item.name, item.start_offset, -1, -1)
        still = next((each for each in await operator.open_in_logs([at.partition]) if each[:4] == at[:4]), None)
        if still is None:
            return f"nothing was done: {item.id} is not open any more"
        await operator.end_hanging(still, commit=asked.verb == "commit")
        return f"{'committed' if asked.verb == 'commit' else 'aborted'}: {at.partition} has its marker"
    if item.kind is not Kind.SLOT:
        identity = await operator.fence(item.transactional_id)
        return f"aborted, and its producer fenced: the id is {identity} now"
    if item.slot is not None and item.slot.owner_epoch is not None:
        return await _decide_conditional(client, sources, item, asked, item.slot.owner_epoch)
    return await _decide_slot(client, sources, item, asked)


async def _decide_conditional(
    client: KafkaClient, sources: Sequence[Source], item: OpenTransaction, asked: Asked, epoch: int
) -> str:
    """Without keepPreparedTxn: fence the database and read, then end the transaction under its own id and name."""
    slot, operator = item.slot, TransactionAdmin(client)
    assert slot is not None
    store = None if slot.row is None else cast(ResolvingStore, _store_of(sources, item))
    owner = f"semel doctor {ProcessIdentity.current()} {client.env.new_id()}"
    try:
        claim = None if store is None else await asyncio.to_thread(store.claim, slot.name, owner)
        held = None if claim is None else ConditionalName.parse(claim.prepared)
        is_open = item.state == "Ongoing"
        says = is_open and held is not None and held[:2] == (epoch, item.name)
        if claim is not None and is_open and says != (asked.verb == "commit") and not asked.against:
            raise Retriable(
                f"the row changed meanwhile: it holds {claim.prepared!r} now, so {asked.verb} is not right for "
                f"{item.name}, and was not done. Look again."
            )
        if asked.verb == "commit":
            end = await operator.end_saved(item.transactional_id, item.name, commit=True)
            if end is not SavedEnd.ENDED:
                raise Retriable(f"{item.name} was not open any more ({end}): look again. Nothing was done.")
            if store is not None and held is not None and says:
                ended = str(held._replace(is_ended=True))
                await asyncio.to_thread(store.replace_prepared, slot.name, owner, str(held), ended)
            outcome = f"{item.name} is committed"
        else:
            await operator.fence(item.transactional_id)
            if store is not None:
                await asyncio.to_thread(store.mark_resolved, slot.name, owner, epoch)
            outcome = f"{item.name} is aborted" if is_open else f"slot {slot.name} is in use again"
        if store is not None:
            await asyncio.to_thread(store.release, slot.name, owner)
    finally:
        if store is not None:
            await asyncio.to_thread(store.close)
    return outcome


async def _decide_slot(client: KafkaClient, sources: Sequence[Source], item: OpenTransaction, asked: Asked) -> str:
    """Fence Kafka, fence the database, then decide by what the row held under its fence."""
    slot = item.slot
    assert slot is not None
    producer = TransactionalProducer(client, item.transactional_id, two_phase_commit=True)
    try:
        await producer.init_transactions(keep_prepared=True)
        ongoing = producer.prepared_state
        owner = f"semel doctor {ProcessIdentity.current()} {client.env.new_id()}"
        store = None if slot.row is None else _store_of(sources, item)
        try:
            claim = None if store is None else await asyncio.to_thread(store.claim, slot.name, owner)
            outcome = await _complete(producer, item, asked, claim)
            if store is not None:
                await asyncio.to_thread(store.release, slot.name, owner)
        finally:
            if store is not None:
                await asyncio.to_thread(store.close)
    except Fenced as error:
        raise Fenced(
            f"slot {slot.name} was taken over by another process in this moment, which decides as its row says: "
            f"nothing was decided here. Look again. ({error})"
        ) from error
    finally:
        await producer.close()
    if ongoing != item.name:
        return f"{item.name} was not open any more when the slot was fenced; {outcome}"
    return outcome


async def _complete(producer: TransactionalProducer, item: OpenTransaction, asked: Asked, claim: Claim | None) -> str:
    ongoing = producer.prepared_state
    if not ongoing.is_transaction:
        return "nothing is open: there was nothing to decide"
    says = None if claim is None else claim.prepared == str(ongoing)
    wanted = asked.verb == "commit"
    if ongoing != item.name and says is None:
        raise Retriable(
            f"{item.name} is not open any more, {ongoing} is, and no row decides about that one: look again. The slot "
            "is fenced, and nothing was decided."
        )
    if ongoing == item.name and asked.against:
        says = wanted
    if ongoing == item.name and says is not None and says != wanted:
        right = "commit" if says else "abort"
        raise Retriable(
            f"the row changed meanwhile: it holds {claim.prepared if claim else ''!r} now, so {right} is right for "
            f"{ongoing}, and {asked.verb} was not done. The slot is fenced and the transaction still open: run "
            f"`semel doctor txn {right}`, or let the app's next process recover it."
        )
    commit = wanted if says is None else says
    if await producer.complete(ongoing if commit else NOTHING_PREPARED):
        return f"{ongoing} is committed"
    return f"{ongoing} is aborted"


def _store_of(sources: Sequence[Source], item: OpenTransaction) -> Store:
    """A connection to the slot's rows. The doctor knows a slot by its name, so it needs no name of app and database."""
    assert item.slot is not None
    for source in sources:
        if item.slot.database in (source.name, source.url):
            return store_of(source.app, DatabaseSpec(source.name, source.url))
    raise Fatal(f"the database of slot {item.slot.name} is not among those that were named")
