"""The differences to Apache Kafka 4.3.1 that are meant: each as narrow as its reason, named in docs/broker.md."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.differential.program import Program
from tests.differential.world import CLOSED

__all__ = ["DELIBERATE", "Deliberate", "explain"]


@dataclass(frozen=True)
class Deliberate:
    """`explains(program, at, ours, kafka)` is whether this reason accounts for all of a difference in step `at`.

    `parts`: from here on the two brokers are in different states by design, and the program ends. `hidden`: they may
    part although the answers of the step are the same. `rare`: not every ten thousand programs meet it; a regression
    or an earlier series did.
    """

    name: str
    sentence: str
    """As it stands in docs/broker.md."""
    explains: Callable[[Program, int, Any, Any], bool]
    parts: bool
    hidden: bool = False
    rare: bool = False


def _unserved_apis(program: Program, at: int, ours: Any, kafka: Any) -> bool:
    """Only keys that ours does not have are missing, and only features that belong to them."""
    if program[at][0] != "api_versions" or not isinstance(ours, dict):
        return False
    served = {item["api_key"] for item in ours["api_keys"]}
    theirs = [item for item in kafka["api_keys"] if item["api_key"] in served]
    same = [item for item in ours["api_keys"] if item["api_key"] != 22]
    return same == [item for item in theirs if item["api_key"] != 22] and ours["error_code"] == kafka["error_code"]


def _zombie(program: Program, at: int, ours: Any, kafka: Any) -> bool:
    """InitProducerId over an open transaction of the same producer id with an epoch that is not its own."""
    if program[at][0] != "init" or ours["before"] is None or ours["before"] != kafka["before"]:
        return False
    before, asked = ours["before"], ours["asked"]
    return bool(
        before["transaction_state"] == "Ongoing"
        and asked["producer_id"] == before["producer_id"]
        and asked["epoch"] != before["producer_epoch"]
        and ours["answer"]["error_code"] in (47, 90)
    )


def _older_end(program: Program, at: int, ours: Any, kafka: Any) -> bool:
    """Kafka still knows the epoch before that of the last TV2 end, though a TV1 transaction came after it."""
    name, parameters = program[at]
    if name == "end" and parameters["version"] == 5 and isinstance(kafka, dict):
        older = any(name == "end" and earlier["version"] < 5 for name, earlier in program[:at])
        return bool(older and ours["error_code"] == 90 and kafka["error_code"] in (0, 48))
    if name != "init" or ours["before"] is None or ours["before"] != kafka["before"]:
        return False
    before, asked = ours["before"], ours["asked"]
    return bool(
        before["transaction_state"].startswith("Complete")
        and (asked["producer_id"], asked["epoch"]) == (before["producer_id"], before["producer_epoch"] - 1)
        and ours["answer"]["error_code"] in (47, 90)
        and kafka["answer"] | {"error_code": 0} == kafka["answer"]
        and kafka["answer"]["producer_epoch"] == before["producer_epoch"]
        and any(name == "end" and earlier["version"] < 5 for name, earlier in program[:at])
    )


def _others_offsets(program: Program, at: int, ours: Any, kafka: Any) -> bool:
    """TxnOffsetCommit under a transactional id that the producer id is not of."""
    if program[at][0] != "commit_in_transaction" or program[at][1]["variant"] != "other":
        return False
    pairs = [
        (one["error_code"], other["error_code"])
        for mine, theirs in zip(ours["topics"], kafka["topics"], strict=False)
        for one, other in zip(mine["partitions"], theirs["partitions"], strict=False)
    ]
    return all(one == other or (one, other) == (49, 47) for one, other in pairs)


def _fenced_commit(program: Program, at: int, ours: Any, kafka: Any) -> bool:
    """EndTxn v5 with the epoch before the one at which the coordinator aborted: a commit."""
    name, parameters = program[at]
    return bool(
        name == "end"
        and parameters["version"] == 5
        and parameters["commit"]
        and ours == kafka | {"error_code": 90}
        and kafka["error_code"] == 48
    )


def _partition_codes(answer: Any) -> list[int]:
    """The codes of a Produce answer, in the order in which both sides have their partitions."""
    return [item["error_code"] for topic in answer["responses"] for item in topic["partition_responses"]]


def _produced(program: Program, at: int, ours: Any, kafka: Any, *pairs: tuple[int, int]) -> bool:
    """Every partition has the same code on both sides, or one of these pairs of codes, and at least one has."""
    if program[at][0] != "produce" or CLOSED in (ours, kafka) or not isinstance(ours, dict):
        return False
    codes = list(zip(_partition_codes(ours), _partition_codes(kafka), strict=False))
    different = [pair for pair in codes if pair[0] != pair[1]]
    return bool(different) and all(pair in pairs for pair in different)


def _checked_by_coordinator(program: Program, at: int, ours: Any, kafka: Any) -> bool:
    """Kafka asks nobody while the log has the producer's transaction open."""
    parameters = program[at][1]
    refusals = [(code, taken) for code in (47, 48, 49, 120) for taken in (0, 2, 10, 21, 32, 45, 76, 87)]
    return bool(
        _produced(program, at, ours, kafka, *refusals)
        and parameters["transactional"]
        and any(name == "produce" and earlier["transactional"] for name, earlier in program[:at])
    )


def _no_producer(program: Program, at: int, ours: Any, kafka: Any) -> bool:
    parameters = program[at][1]
    refusals = [(code, taken) for code in (48, 49, 87, 120) for taken in (0, 32)]
    return bool(
        _produced(program, at, ours, kafka, *refusals)
        and parameters["transactional"]
        and (not parameters["slot"] or parameters["variant"] == "none")
    )


_REFUSED_BEFORE = ((0, 45), (45, 0), (48, 45))


def _refused_before(program: Program, at: int, ours: Any, kafka: Any) -> bool:
    """A sequence is in order on one side alone, and a transactional batch may have been refused here."""
    if program[at][0] != "produce" or not (
        _refused_unseen(program, at, ours, kafka) or _produced(program, at, ours, kafka, *_REFUSED_BEFORE)
    ):
        return False
    return _transactional_before(program, at)


def _refused_unseen(program: Program, at: int, ours: Any, kafka: Any) -> bool:
    """A Produce without an answer: one side or both closed the connection, and nobody says over which partition."""
    return bool(program[at][1]["acks"] == 0 and CLOSED in (ours, kafka) and {ours, kafka} <= {"no answer", CLOSED})


def _and_refused_before(program: Program, at: int) -> tuple[tuple[int, int], ...]:
    """What another partition of the same answer may have for that reason."""
    return _REFUSED_BEFORE if _transactional_before(program, at) else ()


def _transactional_before(program: Program, at: int) -> bool:
    """Earlier in the program a transactional batch went to the same partition."""
    here = {(topic, partition) for topic, partition, _ in program[at][1]["parts"]}
    return any(
        name == "produce"
        and earlier["transactional"]
        and here & {(topic, partition) for topic, partition, _ in earlier["parts"]}
        for name, earlier in program[:at]
    )


def _same_fetch(ours: Any, kafka: Any, same: Callable[[dict[str, Any], dict[str, Any]], bool]) -> bool:
    """Two Fetch answers that are the same but for partitions that are `same`."""
    if not isinstance(ours, dict) or not isinstance(kafka, dict):
        return False
    if ours | {"responses": []} != kafka | {"responses": []} or len(ours["responses"]) != len(kafka["responses"]):
        return False
    for mine, theirs in zip(ours["responses"], kafka["responses"], strict=True):
        rest = {"partitions": []}
        if mine | rest != theirs | rest or len(mine["partitions"]) != len(theirs["partitions"]):
            return False
        for one, other in zip(mine["partitions"], theirs["partitions"], strict=True):
            if one != other and not same(one, other):
                return False
    return True


def _aborted_later(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Kafka's list of aborted transactions has more, but only such as begin behind the last batch that is sent."""
    rest = {"aborted_transactions": None}
    if one | rest != other | rest or one["aborted_transactions"] is None or other["aborted_transactions"] is None:
        return False
    extra = [item for item in other["aborted_transactions"] if item not in one["aborted_transactions"]]
    end = max((item["base_offset"] + item["last_offset_delta"] for item in one["records"]), default=-1)
    return all(item["first_offset"] > end for item in extra)


def _segment_ends(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Kafka's batches are the first of ours, with old timestamps before new ones: there a segment ended."""
    rest = {"aborted_transactions": None, "records": None}
    mine, theirs = one["records"] or (), other["records"] or ()
    return bool(one | rest == other | rest and theirs and theirs == mine[: len(theirs)])


def _stable_at_start(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """The log begins inside a batch, below which a transaction is open: Kafka's LSO is the batch's base."""
    rest = {"last_stable_offset": None}
    start = one.get("log_start_offset", one["last_stable_offset"])
    return bool(
        one | rest == other | rest and one["last_stable_offset"] == start and other["last_stable_offset"] < start
    )


def _start_inside_a_batch(program: Program, at: int, ours: Any, kafka: Any) -> bool:
    deleted = any(name == "delete_records" for name, _ in program[:at])
    return deleted and program[at][0] == "fetch" and _same_fetch(ours, kafka, _stable_at_start)


def _aborted_of_what_is_sent(program: Program, at: int, ours: Any, kafka: Any) -> bool:
    return program[at][0] == "fetch" and _same_fetch(ours, kafka, _aborted_later)


def _over_segments(program: Program, at: int, ours: Any, kafka: Any) -> bool:
    return program[at][0] == "fetch" and _same_fetch(ours, kafka, _segment_ends)


def _opaque(program: Program, at: int, ours: Any, kafka: Any) -> bool:
    """A batch with a right header and checksum around a record that is none."""
    if program[at][0] != "produce" or not any(spec["defect"] == "unfit-body" for *_, spec in program[at][1]["parts"]):
        return False
    if program[at][1]["acks"] == 0:  # Whatever else is in the request, only ours has the batch now.
        return {ours, kafka} <= {"no answer", CLOSED}
    ours_first = [(code, found) for code in (0, 45, 47, 48, 87) for found in (87, 2, -1)]
    return _produced(program, at, ours, kafka, *_and_refused_before(program, at), *ours_first)


def _unknown_codec(program: Program, at: int, ours: Any, kafka: Any) -> bool:
    if program[at][0] != "produce" or not any(spec["defect"] == "codec" for *_, spec in program[at][1]["parts"]):
        return False
    if program[at][1]["acks"] == 0:  # Apache Kafka may have refused the whole request.
        return _refused_unseen(program, at, ours, kafka)
    codes = (0, 2, 3, 10, 21, 32, 45, 47, 48, 49, 53, 76, 87, 120)
    opaque = [(0, 87)] if any(spec["defect"] == "unfit-body" for *_, spec in program[at][1]["parts"]) else []
    others = (*_and_refused_before(program, at), *opaque)
    return _produced(program, at, ours, kafka, *others, *((code, -1) for code in codes))


def _duplicates_time(program: Program, at: int, ours: Any, kafka: Any) -> bool:
    """Where a batch of a CreateTime topic was there already, Kafka has its timestamp."""
    if program[at][0] != "produce" or CLOSED in (ours, kafka) or not isinstance(ours, dict):
        return False
    pairs = list(zip(ours["responses"], kafka["responses"], strict=False))
    if any(len(mine["partition_responses"]) != len(theirs["partition_responses"]) for mine, theirs in pairs):
        return False
    for mine, theirs in pairs:
        for one, other in zip(mine["partition_responses"], theirs["partition_responses"], strict=True):
            if one != other and (one["log_append_time"] is not None or other | {"log_append_time": None} != one):
                return False
    return True


_MIN_REPLICAS = "min.insync.replicas"


def _one_node_config(entry: dict[str, Any]) -> dict[str, Any]:
    """A described setting, as it would be if Kafka had not set min.insync.replicas for its cluster."""
    if entry["name"] != _MIN_REPLICAS or entry["config_source"] != 3:
        return entry
    synonyms = [item for item in entry.get("synonyms", ()) if item["source"] != 3]
    return entry | {"config_source": 5} | ({"synonyms": synonyms} if "synonyms" in entry else {})


def _cluster_default(program: Program, at: int, ours: Any, kafka: Any) -> bool:
    """The value of min.insync.replicas is 1 on both sides; in Kafka it was set for the cluster."""
    name, where = program[at][0], {"create": "topics", "describe_configs": "results"}
    if name not in where or not isinstance(kafka, dict):
        return False
    found = [item | {"configs": [_one_node_config(one) for one in item["configs"]]} for item in _described(kafka, name)]
    return bool(ours == kafka | {where[name]: found})


def _described(answer: Any, name: str) -> list[dict[str, Any]]:
    items = answer["topics" if name == "create" else "results"]
    return [item for item in items if "configs" in item and item["configs"] is not None]


def _validated_id(program: Program, at: int, ours: Any, kafka: Any) -> bool:
    name, parameters = program[at]
    if name != "create" or not parameters["validate_only"] or not isinstance(kafka, dict):
        return False
    without = [item | {"topic_id": None} for item in kafka["topics"]]
    return bool(ours == kafka | {"topics": without} or _cluster_default(program, at, ours, kafka | {"topics": without}))


def _late_instance(program: Program, at: int, ours: Any, kafka: Any) -> bool:
    """A member id that was given without an instance id comes back with one."""
    if program[at][0] != "join" or not program[at][1]["instance"] or program[at][1]["member"] != "mine":
        return False
    return any(answer["error_code"] == -1 for answer in kafka["answers"].values())


def _only_pending(program: Program, at: int, ours: Any, kafka: Any) -> bool:
    """All offsets of a group, stable ones: ours names partitions to wait for (88) that Kafka leaves out."""
    if program[at][0] != "offset_fetch" or program[at][1]["topics"] is not None or not program[at][1]["stable"]:
        return False

    def known(answer: Any) -> list[Any]:
        groups = answer.get("groups", [answer])
        topics = [topic for group in groups for topic in group["topics"]]
        items = [(topic, item) for topic in topics for item in topic["partitions"]]
        return [(topic | {"partitions": []}, item) for topic, item in items]

    extra = [item for item in known(ours) if item not in known(kafka)]
    return all(item in known(ours) for item in known(kafka)) and all(item["error_code"] == 88 for _, item in extra)


def _idle_listed(program: Program, at: int, ours: Any, kafka: Any) -> bool:
    if program[at][0] != "list_transactions" or program[at][1]["duration"] < 0:
        return False
    states = [item for item in kafka["transaction_states"] if item["transaction_state"] == "Ongoing"]
    return bool(ours == kafka | {"transaction_states": states})


def _left_before_joining(program: Program, at: int, ours: Any, kafka: Any) -> bool:
    """The others rebalance: who waits in SyncGroup is told so (27)."""
    if program[at][0] != "leave" or CLOSED in (ours, kafka) or not ours["never joined"]:
        return False
    mine, theirs = ({slot: found["error_code"] for slot, found in one["answers"].items()} for one in (ours, kafka))
    told = {slot: 27 for slot, found in kafka["answers"].items() if slot not in mine and "assignment" in found}
    return bool(ours | {"answers": None} == kafka | {"answers": None} and mine | told == theirs)


def _another_leader(program: Program, at: int, ours: Any, kafka: Any) -> bool:
    """The leader left while others join: they are told the same, but for who of them leads."""
    if program[at][0] not in ("leave", "join") or not isinstance(ours, dict) or not isinstance(kafka, dict):
        return False
    if not any(name == "leave" for name, _ in program[: at + 1]):
        return False

    def rest(answer: Any) -> Any:
        blank = {"leader": None, "members": None}
        told = {
            slot: {name: blank.get(name, value) for name, value in one.items()}
            for slot, one in answer["answers"].items()
        }
        return answer | {"answers": told}

    def members(answer: Any) -> list[Any]:
        return [one["members"] for one in answer["answers"].values() if one.get("members")]

    return bool(rest(ours) == rest(kafka) and len(members(ours)) == 1 and members(ours) == members(kafka))


def _group_of_nobody(program: Program, at: int, ours: Any, kafka: Any) -> bool:
    """A JoinGroup without a protocol type: refused by both."""
    return bool(
        program[at][0] == "join"
        and not program[at][1]["protocol_type"]
        and ours == kafka
        and any(answer["error_code"] == 23 for answer in ours["answers"].values())
    )


def _left_while_synchronising(program: Program, at: int, ours: Any, kafka: Any) -> bool:
    """A member's SyncGroup waits for the leader when it leaves."""
    if program[at][0] != "leave" or not isinstance(ours, dict) or not isinstance(kafka, dict):
        return False
    extra = {name: answer for name, answer in ours["answers"].items() if name not in kafka["answers"]}
    rest = {name: answer for name, answer in ours["answers"].items() if name not in extra}
    synced = all(answer.get("error_code") == 25 and "assignment" in answer for answer in extra.values())
    return bool(extra and synced and ours | {"answers": rest} == kafka)


def _waits_for_who_never_came(program: Program, at: int, ours: Any, kafka: Any) -> bool:
    """The last member left a group in which somebody else was told to come back with an id."""
    name = program[at][0]
    earlier = {name for name, _ in program[:at]}
    if not {"leave", "join"} <= earlier or not isinstance(ours, dict) or not isinstance(kafka, dict):
        return False
    if name == "join":
        codes = [
            (one["error_code"], kafka["answers"].get(slot, {}).get("error_code"))
            for slot, one in ours["answers"].items()
        ]
        return any(pair[1] == 23 and pair[0] in (0, 25, 79) for pair in codes)
    where, field = {"describe_groups": ("groups", "group_state"), "list_groups": ("groups", "group_state")}.get(
        name, ("", "")
    )
    if not where or len(ours[where]) != len(kafka[where]):
        return False
    pairs = [(one, other) for one, other in zip(ours[where], kafka[where], strict=True) if one != other]
    return all((one.get(field), other.get(field)) == ("Empty", "PreparingRebalance") for one, other in pairs)


def _refused_marker(program: Program, at: int, ours: Any, kafka: Any) -> bool:
    """A partition has seen a later epoch of the producer than that of the marker."""
    later = any(name == "produce" and step["variant"] in ("far", "next", "last") for name, step in program[:at])
    return bool(program[at][0] == "end" and later and isinstance(ours, dict) and ours | {"hangs": True} == kafka)


def _began_with_a_refused_commit(program: Program, at: int, group: int) -> bool:
    """Of nobody, before anybody joined: who joins such a group is not shown before something of it is written."""
    steps = [(name, step) for name, step in program[:at] if step.get("group") == group]
    joined = next((number for number, (name, _) in enumerate(steps) if name == "join"), 0)
    return any(name == "commit" and step["member"][0] == "none" for name, step in steps[:joined])


def _is_unwritten(program: Program, at: int, ours: list[Any], kafka: list[Any]) -> bool:
    """What differs are groups that Apache Kafka does not show yet."""
    if program[at][0] == "list_groups":
        extra = [item for item in ours if item not in kafka]
        groups = [int(item["group_id"].removeprefix("~g")) for item in extra]
        return all(item in ours for item in kafka) and all(
            _began_with_a_refused_commit(program, at, group) for group in groups
        )
    pairs = zip(program[at][1]["groups"], ours, kafka, strict=True)
    return all(
        theirs["group_state"] == "Dead" and _began_with_a_refused_commit(program, at, group)
        for group, mine, theirs in pairs
        if mine != theirs
    )


def _group_of_refused_offsets(program: Program, at: int, ours: Any, kafka: Any) -> bool:
    """To a commit of a member there is no such group, or no such member; earlier offsets of nobody may be refused."""
    commits = ("commit", "commit_in_transaction")
    name, parameters = program[at]
    if not isinstance(ours, dict) or not isinstance(kafka, dict):
        return False
    if name == "delete_groups":
        found = {
            (one["error_code"], other["error_code"])
            for one, other in zip(ours["results"], kafka["results"], strict=False)
            if one != other
        }
        return found == {(69, 0)} and any(name in commits for name, _ in program[:at])
    if name in ("describe_groups", "list_groups"):  # Whether Kafka's own is shown depends on what is written after it.
        mine, theirs = (answer["groups"] for answer in (ours, kafka))
        parted = [item for item in mine if item not in theirs] + [item for item in theirs if item not in mine]
        states = {item.get("group_state", "Empty") for item in parted}
        if not any(name in commits for name, _ in program[:at]):
            return False
        return states <= {"Empty", "Dead"} or _is_unwritten(program, at, mine, theirs)
    if name not in commits:
        return False
    if [len(topic["partitions"]) for topic in ours["topics"]] != [
        len(topic["partitions"]) for topic in kafka["topics"]
    ]:
        return False
    pairs = {
        (one["error_code"], other["error_code"])
        for mine, theirs in zip(ours["topics"], kafka["topics"], strict=True)
        for one, other in zip(mine["partitions"], theirs["partitions"], strict=True)
        if one != other
    }
    earlier = [step for name, step in program[:at] if name in commits and step["group"] == parameters["group"]]
    joined = any(name == "join" and step["group"] == parameters["group"] for name, step in program[:at])
    of_nobody = any(step["member"][0] == "none" or not joined for step in earlier)
    return bool(pairs and pairs <= {(22, 25), (69, 25)} and of_nobody)


def _topic_named_twice(program: Program, at: int, ours: Any, kafka: Any) -> bool:
    """OffsetCommit or Produce with two ids that no topic has; both are one id in the end."""
    name = program[at][0]
    if name not in ("commit", "produce") or not isinstance(ours, dict) or not isinstance(kafka, dict):
        return False
    topics, partitions = ("topics", "partitions") if name == "commit" else ("responses", "partition_responses")
    mine, theirs = (
        [(topic.get("topic_id"), item) for topic in answer[topics] for item in topic[partitions]]
        for answer in (ours, kafka)
    )
    return mine == theirs


def _deleted_topics_offsets(program: Program, at: int, ours: Any, kafka: Any) -> bool:
    """Only offsets of a topic that the program deleted are there on one side and gone on the other."""
    if program[at][0] != "offset_fetch" or not isinstance(ours, dict) or not isinstance(kafka, dict):
        return False
    return any(name == "delete" for name, _ in program[:at]) and _offsets(ours) < _offsets(kafka)


def _offsets(answer: dict[str, Any]) -> set[tuple[Any, ...]]:
    """Every offset that an OffsetFetch answer has."""
    return {
        (topic.get("name", topic.get("topic_id")), item["partition_index"], item["committed_offset"])
        for group in answer.get("groups", [answer])
        for topic in group["topics"]
        for item in topic["partitions"]
        if item["committed_offset"] >= 0
    }


def _deleted_records_time(program: Program, at: int, ours: Any, kafka: Any) -> bool:
    """ListOffsets by time where DeleteRecords took records from a segment that is still there."""
    name, parameters = program[at]
    if name != "list_offsets" or not any(name == "delete_records" for name, _ in program[:at]):
        return False
    if not any(time >= 0 or time == -3 for *_, time in parameters["parts"]) or CLOSED in (ours, kafka):
        return False
    unknown = {"timestamp": None, "offset": None, "leader_epoch": None}

    def rest(answer: Any) -> Any:
        return [
            (topic["name"], [item | {key: None for key in unknown if key in item} for item in topic["partitions"]])
            for topic in answer["topics"]
        ]

    return bool(rest(ours) == rest(kafka))


DELIBERATE: tuple[Deliberate, ...] = (
    Deliberate(
        "APIs that are not served",
        "An API that is not in this table is not advertised, and a request for it closes the connection.",
        _unserved_apis,
        parts=False,
    ),
    Deliberate(
        "zombie init",
        "InitProducerId with a stale epoch is fenced without touching the live transaction; Apache Kafka "
        "4.3.1 aborts it.",
        _zombie,
        parts=True,
        hidden=True,
    ),
    Deliberate(
        "a retry of what came before",
        "InitProducerId or EndTxn with the epoch before the last is fenced when a transaction of the older protocol "
        "came after it; Apache Kafka 4.3.1 takes it for a retry.",
        _older_end,
        parts=True,
    ),
    Deliberate(
        "offsets under another's id",
        "TxnOffsetCommit with another's producer id is INVALID_PRODUCER_ID_MAPPING; "
        "Apache Kafka may call its epoch stale.",
        _others_offsets,
        parts=False,
        rare=True,
    ),
    Deliberate(
        "48 -> 90",
        "A commit of a transaction that the coordinator aborted is PRODUCER_FENCED, not INVALID_TXN_STATE "
        "(KAFKA-20785).",
        _fenced_commit,
        parts=False,
    ),
    Deliberate(
        "no producer id",
        "A transactional batch without a producer id is refused; Apache Kafka 4.3.1 appends it.",
        _no_producer,
        parts=True,
    ),
    Deliberate(
        "every transactional produce is checked",
        "A transactional Produce is checked against the coordinator every time, and refused from the moment "
        "EndTxn is decided.",
        _checked_by_coordinator,
        parts=True,
    ),
    Deliberate(
        "a refused batch leaves nothing",
        "A transactional batch that was refused leaves nothing behind; "
        "Apache Kafka 4.3.1 remembers its sequence and measures the first one by it.",
        _refused_before,
        parts=True,
        hidden=True,
    ),
    Deliberate(
        "opaque batches",
        "A batch with a right header and checksum is appended whatever its records are; Apache Kafka reads "
        "each of them.",
        _opaque,
        parts=True,
        hidden=True,
    ),
    Deliberate(
        "unknown codec",
        "A compression codec that does not exist is UNSUPPORTED_COMPRESSION_TYPE; Apache Kafka 4.3.1 answers "
        "UNKNOWN_SERVER_ERROR.",
        _unknown_codec,
        parts=True,
        hidden=True,
    ),
    Deliberate(
        "the time of a duplicate",
        "A batch that is there already is answered without LogAppendTimeMs on CreateTime topics; Apache "
        "Kafka 4.3.1 sends its timestamp.",
        _duplicates_time,
        parts=False,
    ),
    Deliberate(
        "min.insync.replicas",
        "The default of min.insync.replicas is a default; Apache Kafka 4.3.1 sets it for the cluster when it "
        "is formatted.",
        _cluster_default,
        parts=False,
    ),
    Deliberate(
        "the id of a topic that is not made",
        "CreateTopics with validateOnly has no topic id to show; Apache Kafka shows one that nothing has.",
        _validated_id,
        parts=False,
    ),
    Deliberate(
        "late instance id",
        "A member may name its group.instance.id when it comes back with the id it was given; Apache Kafka "
        "4.3.1 answers UNKNOWN_SERVER_ERROR.",
        _late_instance,
        parts=True,
    ),
    Deliberate(
        "stable at the start",
        "The last stable offset is never below the log's start; "
        "Apache Kafka's may be where the batch begins that the start lies in.",
        _start_inside_a_batch,
        parts=True,
        rare=True,
    ),
    Deliberate(
        "fetch over segments",
        "A Fetch reads on in the next segment; Apache Kafka's answer ends where a segment does.",
        _over_segments,
        parts=True,
    ),
    Deliberate(
        "all offsets to wait for",
        "OffsetFetch of all offsets with RequireStable names those that only an open transaction has (88); "
        "Apache Kafka leaves them out.",
        _only_pending,
        parts=False,
    ),
    Deliberate(
        "idle ids",
        "ListTransactions with a duration lists open transactions alone; Apache Kafka 4.3.1 also ids that have none.",
        _idle_listed,
        parts=False,
    ),
    Deliberate(
        "left before joining",
        "Whoever leaves a group before it joined changes nothing; in Apache Kafka the others rebalance.",
        _left_before_joining,
        parts=True,
        hidden=True,
    ),
    Deliberate(
        "who leads next",
        "When a leader leaves, whoever joined first of those that are left leads; Apache Kafka takes any of them.",
        _another_leader,
        parts=True,
        rare=True,
    ),
    Deliberate(
        "a group of nobody",
        "A JoinGroup that is refused makes no group; in Apache Kafka an empty one stays behind.",
        _group_of_nobody,
        parts=True,
        hidden=True,
    ),
    Deliberate(
        "a refused marker",
        "A decided transaction is complete without a marker in a partition that has seen a later epoch of its "
        "producer; in Apache Kafka 4.3.1 it never is.",
        _refused_marker,
        parts=True,
        rare=True,
    ),
    Deliberate(
        "a group of refused offsets",
        "An offset commit that is refused makes no group; in Apache Kafka an empty one stays behind, and "
        "who joins it is not shown before something of the group is written.",
        _group_of_refused_offsets,
        parts=False,
    ),
    Deliberate(
        "a topic named twice",
        "An OffsetCommit or Produce that names a topic id twice is answered twice; Apache Kafka puts the partitions "
        "together.",
        _topic_named_twice,
        parts=False,
    ),
    Deliberate(
        "left while synchronising",
        "Whoever leaves while its SyncGroup waits is told so (UNKNOWN_MEMBER_ID); Apache Kafka 4.3.1 never answers it.",
        _left_while_synchronising,
        parts=True,
    ),
    Deliberate(
        "waiting for who never came",
        "A group whose last member left is empty; Apache Kafka waits for whoever was told to come back with an id.",
        _waits_for_who_never_came,
        parts=True,
        rare=True,
    ),
    Deliberate(
        "the offsets of a deleted topic",
        "The committed offsets of a topic are deleted with it; in Apache Kafka a moment later.",
        _deleted_topics_offsets,
        parts=False,
    ),
    Deliberate(
        "the time of deleted records",
        "ListOffsets by time knows only records that DeleteRecords left; Apache Kafka also looks at those before them "
        "in the segment, and answers with one of them or with nothing.",
        _deleted_records_time,
        parts=False,
    ),
    Deliberate(
        "aborted transactions of what is sent",
        "Fetch lists the aborted transactions of the batches that it sends; Apache Kafka also those of some "
        "that come later.",
        _aborted_of_what_is_sent,
        parts=False,
    ),
)


def explain(program: Program, at: int, ours: Any, kafka: Any) -> Deliberate | None:
    """The reason why two answers differ, or two states do behind them, if it is a deliberate one."""
    for reason in DELIBERATE:
        if (ours != kafka or reason.hidden) and reason.explains(program, at, ours, kafka):
            return reason
    return None
