"""Which cases there are: every failpoint by every action by first, second and last hit, and what leads to the point.

A point's *scene* is what has to happen beside ordinary load so that a process comes by. The table is generated from
`semel.failpoints.FAILPOINTS`; only scenes are written by hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple
from zlib import crc32

from semel.failpoints import FAILPOINTS

DELAY_SECONDS = 0.4

ELSEWHERE = {
    "program": "tests/outbox/test_transaction_crashes.py",
    "relay": "tests/outbox/test_crashes.py",
    "dual": "tests/dualwrite/test_crashes.py",
    "endpoint": "tests/ingress/test_idempotency_crashes.py",
    "search": "tests/sinks/test_search.py",
}
"""Roles whose points have their cases in a suite of their own: the chain comes by none of them."""
POINTS = {name: point for name, point in FAILPOINTS.items() if point.role not in ELSEWHERE}
"""The points of the chain."""


@dataclass(frozen=True)
class Scene:
    """What happens in a case beside orders, a repeated one, a refused one and some that cannot be processed."""

    also: str = ""
    """Armed in the same process, to lead it there."""
    others: Mapping[str, str] = field(default_factory=dict)
    """Armed in the processes of other roles."""
    before: str = ""
    """The process of this role before it died here."""
    torn: bool = False
    """Something torn stands behind the last batch of every log when the broker starts."""
    no_index: bool = False
    """The index files of closed segments are gone when the broker starts."""
    forgotten: bool = False
    """The broker has lost its log of transactions when it starts, as with the power."""
    old_state: bool = False
    """What the worker's tables of state hold is of another start of the machine when it starts."""
    bad_state: bool = False
    """The files of the worker's tables of state are damaged when it starts."""
    dual: bool = False
    """Nothing but the dual write of KIP-939 goes on: it comes by all that a broker does for a transaction."""
    joins: bool = False
    """A second worker comes, and goes again."""
    restarts: str = ""
    """A process of this role is killed in the middle."""
    much: bool = False
    """So many orders that segments are merged and deleted."""
    topics: bool = False
    """Topics are made and deleted."""
    doubt: bool = False
    """Some answers of the database to COMMIT are lost."""
    short: bool = False
    """Time-outs are short, because one of them is waited for."""
    releases: bool = False
    """Some customers cannot be worked on at first, in the processor and in the sink, and are released later."""
    stalls: bool = False
    """A worker stands still with a transaction open until that has timed out."""


_FAILING = "unit.after_produce:raise:2,unit.before_produce:raise:5,unit.before_end_transaction:raise:4"
SCENES: dict[str, Scene] = {
    "consume.before_revoke": Scene(joins=True, short=True),
    "consume.after_revoke": Scene(joins=True, short=True),
    "consume.before_assign": Scene(joins=True, short=True),
    "consume.after_assign": Scene(joins=True, short=True),
    "restore.after_offsets": Scene(joins=True, short=True),
    "restore.after_ends": Scene(joins=True, short=True),
    "restore.between_polls": Scene(joins=True, short=True),
    "restore.after_state": Scene(joins=True, short=True),
    "state.before_clear": Scene(old_state=True),
    "state.before_delete": Scene(bad_state=True),
    "sink.before_take_over": Scene(joins=True, short=True),
    "sink.before_fence_commit": Scene(joins=True, short=True),
    "sink.after_fence": Scene(joins=True, short=True),
    "release.asked": Scene(releases=True),
    "release.handled": Scene(releases=True),
    "sink.before_release": Scene(releases=True),
    "unit.before_recovery": Scene(also=_FAILING),
    "unit.after_abort": Scene(also=_FAILING),
    "unit.after_recovery": Scene(also=_FAILING),
    "producer.before_resolve": Scene(others={"broker": "broker.before_prepare:delay=4:2"}, short=True),
    "sink.before_seek": Scene(doubt=True),
    "sink.before_settle": Scene(doubt=True),
    "sink.after_settle": Scene(doubt=True),
    "broker.before_time_out": Scene(stalls=True, short=True),
    "broker.before_finish": Scene(before="broker.after_prepare:kill:2"),
    "broker.before_orphan": Scene(before="broker.before_offsets:kill:3", forgotten=True),
    "broker.before_metadata": Scene(topics=True),
    "broker.after_metadata": Scene(topics=True),
    "retention.between_deletions": Scene(much=True),
    "compaction.between_deletions": Scene(much=True),
    "recovery.before_cut": Scene(torn=True),
    "recovery.after_cut": Scene(torn=True),
    "recovery.before_index": Scene(no_index=True, restarts="worker"),
    "recovery.after_index": Scene(no_index=True, restarts="worker"),
}


SCENES |= dict.fromkeys(
    [
        *(
            "broker.after_join",
            "broker.before_append",
            "broker.after_append",
            "broker.before_init",
            "broker.after_init",
        ),
        *("broker.before_prepare", "broker.after_prepare", "broker.between_markers", "broker.after_markers"),
        *("broker.after_complete", "broker.before_metadata_rename", "recovery.before_scan"),
        *("log.before_write", "log.after_write", "log.before_sync", "log.after_sync", "log.before_roll"),
        *("log.after_seal", "log.after_roll", "log.before_snapshot", "log.after_snapshot"),
        *("file.before_write", "file.before_rename"),
    ],
    Scene(dual=True),
)


PARKING = frozenset(
    [
        *("owner.before_handler", "owner.after_handler", "owner.before_replay"),
        *("handler.between_effects", "sink.between_effects"),
    ]
)
"""Where an exception is taken for the record's fault: `raise` parks its key, visibly, and nothing of it is done."""


def scene_of(point: str) -> Scene:
    """What leads to a point; ordinary load where nothing is said."""
    return SCENES.get(point, Scene())


class Case(NamedTuple):
    """One case. `hit` is the number of the pass that acts; `which` says what that is meant to be."""

    point: str
    action: str
    which: str
    hit: int

    def __str__(self) -> str:
        return f"{self.point}:{self.action}:{self.which}"

    @property
    def spec(self) -> str:
        """As in SEMEL_FAILPOINT."""
        return f"{self.point}:{self.action}:{self.hit}"


def actions_of(point: str) -> list[str]:
    """Every action of a point; how much of a write is left is drawn from its name."""
    found = ["kill", "stop", "raise", f"delay={DELAY_SECONDS}"]
    if FAILPOINTS[point].in_task:
        found.append("cancel")
    if FAILPOINTS[point].writes:
        found += [f"torn={crc32(f'{point}{part}'.encode()) % 1_000}" for part in range(2)]
    return found


def hits_of(passes: int) -> dict[str, int]:
    """First, second and last pass, as far as they are different ones."""
    found = {"first": 1}
    if passes > 1:
        found["second"] = 2
    if passes > 2:
        found["last"] = passes
    return found


def cases(passes: Mapping[str, int]) -> Iterator[Case]:
    """Every case: first hits of all points, then second ones, then last ones; those of one role together.

    `passes`: how often a counted run came by each point.
    """
    points = sorted(POINTS, key=lambda name: (FAILPOINTS[name].role, name))
    for which in ("first", "second", "last"):
        for point in points:
            hit = hits_of(passes[point]).get(which)
            for action in actions_of(point):
                if hit and (which == "first" or not action.startswith("delay")):
                    yield Case(point, action, which, hit)
