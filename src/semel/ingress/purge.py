"""Requests that were answered are deleted: the topic of requests has no retention, because an unread one must stay.

The rule: below the position that the owners' group has committed, nothing is read again. What a request did, its
stored answer and its parked record stand in other topics since the transaction that moved the position.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from semel.client.admin import Admin
from semel.errors import SemelError
from semel.failpoints import failpoint
from semel.ingress.owner import COMPONENT
from semel.ingress.requests import requests_topic
from semel.types import TopicPartition

__all__ = ["purge", "purge_for_ever"]

log = logging.getLogger("semel.ingress")

PURGE_SECONDS = 60.0
"""Kafka deletes whole segments, and looks for them every five minutes; more often would free nothing more."""


async def purge(admin: Admin, app: str, partitions: int) -> dict[TopicPartition, int]:
    """Delete the requests that are done with; where each partition's log begins now. Raises `SemelError`."""
    wanted = [TopicPartition(requests_topic(app), number) for number in range(partitions)]
    # An open transaction may still move a position on; what is committed already stays below it.
    committed = await admin.committed_offsets(f"{app}.{COMPONENT}", wanted, require_stable=False)
    starts = await admin.list_offsets(committed, "earliest")
    due = {at: offset for at, offset in committed.items() if offset > starts[at]}
    failpoint("ingress.before_purge")
    return {**starts, **await admin.delete_records(due)}


async def purge_for_ever(admin: Admin, app: str, partitions: int, sleep: Callable[[float], Awaitable[None]]) -> None:
    """Purge once in a while until cancelled; a purge that fails is told, and the next one makes up for it."""
    while True:
        await sleep(PURGE_SECONDS)
        try:
            await purge(admin, app, partitions)
        except SemelError as error:
            log.warning("answered requests of %s are not deleted yet: %s", app, error)
