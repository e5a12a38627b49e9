"""Going on where records are missing: what stands still for that reason, and an operator's word that it may go on.

Nothing here is done by itself. A processor or a sink whose next records were deleted unread (`DATA_GAP`), or whose
topic was deleted and made again (`TOPIC_RECREATED`), stands still. Whoever accepts that says why, and that stands in
the topic `<app>.semel.audit` before anything is changed, with what is skipped.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec

from semel.app import App
from semel.client.admin import Admin
from semel.client.cluster import KafkaClient
from semel.databases.database import Database, is_cache, is_search
from semel.env import Env
from semel.errors import ConfigurationError, Retriable, SemelError
from semel.ops.audit import Decided, auditing
from semel.ops.databases import connected
from semel.ops.listings import tool_client
from semel.ops.park_verbs import who
from semel.processing.watermarks import Watermarks
from semel.prove.drain import Consumes, consumers_of
from semel.settings import Settings
from semel.sinks.sql import positions
from semel.sinks.sql.positions import PositionKey
from semel.types import GroupMetadata, TopicPartition

__all__ = ["Gap", "accept_gaps"]

OPERATOR = "semel accept-gap"
_EMPTY = ("", "Empty", "Dead")
"""States of a group without members; a broker that does not tell the state refuses the commit itself."""


class Gap(msgspec.Struct, frozen=True, kw_only=True):
    """A partition that stands still: the position it has, and the one that it would go on from."""

    component: str
    topic: str
    partition: int
    problem: str
    was: int
    now: int
    skipped: int
    """Offsets that nobody will work on; of a topic that was made again nobody can say."""
    was_topic_id: str = ""
    """Of a topic that was made again: which one `was` belongs to."""

    @property
    def at(self) -> TopicPartition:
        return TopicPartition(self.topic, self.partition)


class _DecidedGap(Decided, frozen=True, kw_only=True):
    """What stands in the audit topic about a gap."""

    gap: Gap
    why: str = ""


async def accept_gaps(
    app: App, settings: Settings, *, component: str, partitions: Sequence[str], reason: str, dry_run: bool
) -> list[dict[str, Any]]:
    """Every gap, or those of one component or of some partitions (`topic-number`), with what came of it.

    Raises `ConfigurationError` for a component or partition that has no gap, and for a change without a reason.
    """
    if not dry_run and not reason:
        raise ConfigurationError("records are skipped for ever by this: say why with --reason, or look with --dry-run.")
    named = [item for item in consumers_of(app) if component in ("", item.component)]
    consumers = [item for item in named if not (is_cache(item.database) or is_search(item.database))]
    if not consumers:
        kept = "keeps its position in a cache or search: set next_offset there"
        why = kept if named else "is no processor or sink of the app"
        raise ConfigurationError(f"{component!r} {why}.")
    async with tool_client(settings) as client:
        gaps = [(item, gap) for item in consumers for gap in await _gaps_of(item, client, settings)]
        chosen = [(item, gap) for item, gap in gaps if not partitions or str(gap.at) in partitions]
        unknown = set(partitions) - {str(gap.at) for _, gap in chosen}
        if unknown:
            raise ConfigurationError(f"nothing stands still for missing records at {', '.join(sorted(unknown))}.")
        if dry_run:
            return [_row(gap, "would go on") for _, gap in chosen]
        return await _accept(app, chosen, client, settings, reason)


def _row(gap: Gap, outcome: str) -> dict[str, Any]:
    return {**msgspec.structs.asdict(gap), "outcome": outcome}


# --- Looking ---


async def _gaps_of(item: Consumes, client: KafkaClient, settings: Settings) -> list[Gap]:
    admin = Admin(client)
    topic = await client.topic(item.topic)
    places = [TopicPartition(item.topic, number) for number in range(topic.partitions)]
    starts = await admin.list_offsets(places, at="earliest")
    if item.database:
        said, old = await asyncio.to_thread(_rows, item, places, client.cluster_id, str(topic.topic_id))
    else:
        said = dict(await admin.committed_offsets(item.group, places, require_stable=True))
        identity = f"{client.cluster_id}/{topic.name}/{topic.topic_id}"
        known = Watermarks(settings.data).of_others(item.group, identity)
        old = {at: known[at.partition] for at in places if at.partition in known}
    gaps = []
    for at in places:
        was, start = said.get(at, -1), starts[at]
        if at in old:
            offset, old_id = old[at]
            gaps.append(Gap(component=item.component, topic=at.topic, partition=at.partition, problem="TOPIC_RECREATED",
                            was=offset, now=start, skipped=0, was_topic_id=old_id))  # fmt: skip
        elif 0 <= was < start:
            gaps.append(Gap(component=item.component, topic=at.topic, partition=at.partition, problem="DATA_GAP",
                            was=was, now=start, skipped=start - was))  # fmt: skip
    return gaps


def _rows(
    item: Consumes, places: Sequence[TopicPartition], cluster: str, topic_id: str
) -> tuple[dict[TopicPartition, int], dict[TopicPartition, tuple[int, str]]]:
    """What a sink's rows say of a topic, and of others that had its name before."""
    said: dict[TopicPartition, int] = {}
    old: dict[TopicPartition, tuple[int, str]] = {}
    with connected(item.database) as database:
        for at in places if database is not None else ():
            assert database is not None
            key = PositionKey(item.group, cluster, topic_id, at.partition)
            row, others = positions.read(database, key), positions.of_others(database, key, at.topic)
            if row is not None:
                said[at] = row.next_offset
            elif others:
                old[at] = others[0]
    return said, old


# --- Going on ---


async def _accept(
    app: App, chosen: Sequence[tuple[Consumes, Gap]], client: KafkaClient, settings: Settings, reason: str
) -> list[dict[str, Any]]:
    admin, env = Admin(client), Env()
    rows: list[dict[str, Any]] = []
    for item in {item.group: item for item, _ in chosen if not item.database}.values():
        await _check_stopped(admin, item.group)
    if not chosen:
        return []
    async with auditing(client, app.name) as audit:
        for item, gap in chosen:
            decision = _DecidedGap(
                id=str(env.new_id()), state="asked", by=who(), reason=reason, at_ms=env.wall_ms(), gap=gap
            )
            await audit.write(item.component, decision, decision.at_ms)
            try:
                await _go_on(item, gap, client, settings)
            except (SemelError, OSError) as error:
                failed = msgspec.structs.replace(decision, state="failed", why=str(error))
                await audit.write(item.component, failed, decision.at_ms)
                rows.append(_row(gap, f"not changed: {error}"))
                continue
            await audit.write(item.component, msgspec.structs.replace(decision, state="done"), decision.at_ms)
            rows.append(_row(gap, "goes on"))
    return rows


async def _check_stopped(admin: Admin, group: str) -> None:
    """Who works on the group would go on from what it has in memory."""
    states = {item.group_id: item.state for item in await admin.list_groups()}
    if states.get(group, "") not in _EMPTY:
        raise ConfigurationError(
            f"group {group} has members ({states[group]}): stop the workers, and run this again. Nothing was changed."
        )


async def _go_on(item: Consumes, gap: Gap, client: KafkaClient, settings: Settings) -> None:
    topic = await client.topic(gap.topic)
    if item.database:
        key = PositionKey(item.group, client.cluster_id, str(topic.topic_id), gap.partition)
        await asyncio.to_thread(_move_row, item.database, key, gap)
        return
    await Admin(client).commit_offsets(GroupMetadata(item.group), {gap.at: gap.now})
    if gap.was_topic_id:
        identity = f"{client.cluster_id}/{topic.name}/{topic.topic_id}"
        Watermarks(settings.data).forget_others(item.group, identity, gap.partition)


def _move_row(url: str, key: PositionKey, gap: Gap) -> None:
    with connected(url) as database:
        if database is None:
            raise Retriable("its database is not there any more")
        database.begin()
        try:
            if not _moved(database, key, gap):
                raise Retriable("its position has changed meanwhile: look again")
            database.commit()
        finally:
            database.rollback()


def _moved(database: Database, key: PositionKey, gap: Gap) -> bool:
    if gap.was_topic_id:
        return positions.begin_anew(database, key, gap.topic, gap.now, OPERATOR)
    return positions.skip(database, key, from_offset=gap.was, to_offset=gap.now, owner=OPERATOR)
