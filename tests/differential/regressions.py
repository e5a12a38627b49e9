"""Programs that were answered differently once, small, by what was wrong with our answer."""

from __future__ import annotations

from typing import Any

from tests.differential.program import Program, Step

__all__ = ["REGRESSIONS"]


def _topics(first: dict[str, str] | None = None) -> Step:
    return "topic", {"configs": [first or {}, {}]}


def _produce(version: int, where: int = 0, **changed: Any) -> Step:
    batch = {"count": 1, "sequence": "next", "codec": 0, "time": "old", "keys": "both", "defect": ""}
    batch |= {name: changed.pop(name) for name in list(changed) if name in batch}
    fields = {"slot": "", "variant": "now", "transactional": False, "request_id": None, "acks": -1}
    return "produce", fields | {"version": version, "parts": [[where, 0, batch]]} | changed


def _init(timeout: int = 60_000) -> Step:
    return "init", {"version": 5, "slot": "x0", "variant": "none", "timeout": timeout}


def _join(version: int, slot: str, **changed: Any) -> Step:
    fields = {"group": 0, "member": "mine", "instance": None, "session": 30_000, "protocol_type": "consumer"}
    return "join", fields | {"version": version, "slot": slot, "protocols": ["range"]} | changed


def _add(version: int, **changed: Any) -> Step:
    return "add_partitions", {
        "version": version,
        "slot": "x0",
        "variant": "now",
        "parts": [[0, 0]],
        "verify_only": False,
    } | changed


def _fetch(version: int, partition: int = 0, **changed: Any) -> Step:
    fields = {"committed": True, "max_bytes": 1 << 20, "session": "", "leader_epoch": -1, "forget": []}
    return "fetch", fields | {"version": version, "parts": [[0, partition, 0, 1 << 20]]} | changed


_TIMED_OUT = [_init(60), _add(3), ("time_out", {"slot": "x0"})]
_IN_TRANSACTION = {"slot": "x0", "transactional": True, "request_id": "x0"}


def _in_session(session: str, parts: list[list[int]], forget: list[list[int]]) -> Step:
    fields = {"version": 16, "committed": False, "max_bytes": 1 << 20, "leader_epoch": -1}
    return "fetch", fields | {"session": session, "parts": parts, "forget": forget}


REGRESSIONS: dict[str, Program] = {
    "zstd in an old Produce": [_topics(), _produce(6, codec=4), _produce(6, codec=4, defect="two")],
    "transactional batch without an id": [
        _topics(),
        _produce(9, where=9, slot="x0", transactional=True),
    ],
    "acks come after the transaction": [_topics(), _produce(9, **_IN_TRANSACTION, acks=2), _produce(9, acks=2)],
    "the log's start with an error": [
        _topics(),
        _init(),
        _produce(9, slot="x0"),
        _produce(9, slot="x0", sequence="gap"),
    ],
    "a stale epoch before another's transaction": [
        _topics(),
        *_TIMED_OUT,
        _produce(9, slot="x0", transactional=True, request_id="x1"),
    ],
    "append time is not the client's to set": [
        _topics({"message.timestamp.type": "LogAppendTime"}),
        _produce(9, defect="append-time"),
        _produce(9, where=1, time="none", defect="append-time"),
    ],
    "the records that are to blame": [
        _topics({"cleanup.policy": "compact"}),
        _produce(9, count=3, keys="none"),
        _produce(9, count=3, keys="some", time="future"),
        _produce(9, keys="none", time="future"),
    ],
    "markers where the time is that of append": [
        _topics({"message.timestamp.type": "LogAppendTime"}),
        *_TIMED_OUT,
        _fetch(16, committed=False),
    ],
    "a batch larger than the limit": [
        _topics(),
        _produce(9, count=2),
        _fetch(8, parts=[[0, 1, 0, 80], [0, 0, 0, 80]]),
        _fetch(8, parts=[[0, 0, 0, 80]]),
        _produce(9, count=2, where=1),
        _fetch(8, parts=[[0, 0, 0, 80], [1, 0, 0, 80]]),
        _fetch(8, parts=[[0, 0, 0, 80], [1, 0, 0, 80]], max_bytes=1),
    ],
    "no aborted transactions of a partition that is not there": [_topics(), _fetch(5, 5), _fetch(13, 5)],
    "ListOffsets of another version": [
        _topics(),
        ("list_offsets", {"version": 3, "committed": False, "leader_epoch": -1, "parts": [[9, 0, -4]]}),
    ],
    "DeleteRecords where records are compacted": [
        _topics({"cleanup.policy": "compact"}),
        ("delete_records", {"version": 2, "topic": 0, "partition": 0, "offset": 0}),
    ],
    "offsets of no partition open no transaction": [
        _topics(),
        _init(),
        (
            "commit_in_transaction",
            {
                "version": 5,
                "slot": "x0",
                "variant": "now",
                "group": 0,
                "member": ["none", "", None],
                "parts": [[0, 5, 1]],
                "long_metadata": False,
            },
        ),
        _init(),
    ],
    "refused offsets make no group": [
        _topics(),
        (
            "commit",
            {"version": 7, "group": 0, "member": ["none", "", None], "parts": [[0, 0, 3]], "metadata": "m" * 5000},
        ),
        ("list_groups", {"version": 1, "states": [], "types": []}),
    ],
    "nobody waits for who leaves with the same request": [
        _topics(),
        _join(5, "c"),
        _join(4, "c"),
        _join(9, "b", instance="two"),
        _join(4, "a"),
        _join(4, "c"),
        ("leave", {"version": 4, "group": 0, "leaving": ["a", "c"], "instance": None}),
    ],
    "the largest timestamp is that of an open transaction": [
        _topics(),
        _init(),
        _produce(12, **_IN_TRANSACTION),
        *(
            ("list_offsets", {"version": version, "committed": True, "leader_epoch": -1, "parts": [[0, 0, -3]]})
            for version in (7, 9, 11)
        ),
    ],
    "the last partition of a session, asked for and forgotten at once": [
        _topics(),
        _produce(9, count=2),
        _in_session("new", [[0, 0, 0, 80]], []),
        _in_session("next", [[0, 0, 0, 80]], [[0, 0]]),
    ],
    "topics of unknown ids before unknown partitions": [
        _topics(),
        _in_session("new", [[0, 5, 0, 80]], []),
        _in_session("next", [[0, 0, 100, 80], [2, 1, 3, 80]], []),
    ],
    "what could not be read comes last": [
        _topics(),
        _in_session("new", [[9, 0, 8, 80]], []),
        _in_session("next", [[1, 0, 8, 80], [1, 1, 0, 80]], []),
    ],
    "a topic comes up again in the answer of a session": [
        _topics(),
        _in_session("new", [[0, 0, -1, 80], [1, 1, 1, 80]], [[0, 0]]),
        _in_session("next", [[0, 5, 0, 80]], []),
    ],
    "offsets of no partition make no group": [
        _topics(),
        (
            "commit",
            {"version": 7, "group": 0, "member": ["none", "", None], "parts": [[0, 5, 1]], "metadata": "kept"},
        ),
        ("delete_groups", {"version": 1, "groups": [0]}),
    ],
    "all offsets of a group, by every version": [
        _topics(),
        ("commit", {"version": 7, "group": 0, "member": ["none", "", None], "parts": [[0, 0, 1]], "metadata": "kept"}),
        *(
            (
                "offset_fetch",
                {"version": version, "groups": [0], "stable": True, "topics": None, "member": ["none", "", None]},
            )
            for version in range(2, 11)
        ),
    ],
    "the first rebalance waits for no id that was only given": [_topics(), _join(4, "b"), _join(0, "a")],
    "SyncGroup names its protocol": [
        _topics(),
        ("sync", {"version": 5, "group": 0, "member": ["now", "b", None], "assign": True, "protocol": [None, None]}),
    ],
    "an assignment is shown until the next": [
        _topics(),
        _join(1, "b"),
        ("sync", {"version": 3, "group": 0, "member": ["now", "b", None], "assign": True, "protocol": [None, None]}),
        _join(5, "b"),
        ("describe_groups", {"version": 5, "groups": [0]}),
    ],
    "AddOffsetsToTxn of a group without a name": [
        _topics(),
        _init(),
        ("add_offsets", {"version": 3, "slot": "x0", "variant": "now", "group": -1}),
        ("describe_transactions", {"slots": ["x0"]}),
    ],
    "verified by a fenced producer": [_topics(), *_TIMED_OUT, _add(5, verify_only=True)],
    "verified where there is no partition": [_topics(), _init(), _add(4, verify_only=True, parts=[[0, 0], [0, 5]])],
    "what is wrong first with a new topic": [
        _topics(),
        *(
            (
                "create",
                {
                    "version": 5,
                    "topic": 2,
                    "partitions": partitions,
                    "configs": {"retention.ms": "soon"},
                    "replication": replication,
                    "validate_only": False,
                    "odd": odd,
                },
            )
            for partitions, replication, odd in ((1, 3, ""), (0, -1, ""), (1, 3, "bad name"))
        ),
    ],
    "what may be done to a topic": [
        _topics(),
        ("describe_topic_partitions", {"topics": [0, 9], "limit": 2000, "cursor": None}),
        ("describe_topic_partitions", {"topics": [0], "limit": 2000, "cursor": [1, 0]}),
    ],
    "endpoints of another type": [
        _topics(),
        ("describe_cluster", {"version": 2, "endpoint_type": 2}),
        ("describe_cluster", {"version": 2, "endpoint_type": 7}),
    ],
    "synonyms of a setting": [
        _topics(),
        ("describe_configs", {"version": 4, "topic": 0, "keys": None, "synonyms": True}),
    ],
}
