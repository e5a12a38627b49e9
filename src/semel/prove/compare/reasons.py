"""Why: what in the protocol or in the library's code makes a finding happen. Shown only beside a finding."""

from __future__ import annotations

from typing import Protocol

__all__ = ["Found", "reason_for"]


class Found(Protocol):
    """What a reason depends on."""

    @property
    def peer(self) -> str: ...
    @property
    def fault(self) -> str: ...
    @property
    def promise(self) -> str: ...
    @property
    def struck(self) -> int: ...


_END_TXN = {"confluent-kafka": "EndTxn version 1", "quixstreams": "EndTxn version 1", "aiokafka": "EndTxn version 0"}
_OFFSETS = {
    "confluent-kafka": "TxnOffsetCommit version 3",
    "quixstreams": "TxnOffsetCommit version 3",
    "aiokafka": "TxnOffsetCommit version 0",
}
_SAME_NAME = (
    "it names its transaction by producer id and epoch, and in Kafka's transactions V1 both stay the same from one "
    "transaction to the next. Transactions V2 (KIP-890) raise the epoch at every end; this client does not speak them."
)
_AT_LEAST_ONCE = (
    "outputs and position are written separately, and what happens between the two is worked on again: at-least-once, "
    "and the documentation promises no more."
)


def reason_for(found: Found) -> str:
    """One or two sentences; empty where none is known: then the finding is news."""
    if found.promise == "at-least-once":
        return _AT_LEAST_ONCE
    end, offsets = _END_TXN.get(found.peer), _OFFSETS.get(found.peer)
    if found.fault == "late-commit" and end:
        return (
            f"the late {end} commits the half of the next transaction that is written so far: {_SAME_NAME} When that "
            "transaction then fails, its inputs are worked on again, and the half is there twice."
        )
    if found.fault == "late-abort" and end:
        return (
            f"the late {end} throws away what the next transaction has written so far: {_SAME_NAME} The client notices "
            "nothing, writes the rest, and commits it with the position of all of it."
        )
    if found.fault == "late-offsets" and offsets:
        return (
            f"the late {offsets} puts the older position in place of the next transaction's, which then commits it: "
            f"{_SAME_NAME} Whoever goes on from there works on the same inputs again."
        )
    if found.fault == "zombie" and found.peer == "aiokafka":
        return (
            "aiokafka sends TxnOffsetCommit version 0 only, without member id and generation (KIP-447; aiokafka issue "
            "844), so the coordinator takes the woken zombie's position although its partitions have another owner, "
            "who has worked on the same inputs meanwhile."
        )
    if found.fault == "late-abort" and found.peer == "quixstreams" and not found.struck:
        return "it never aborts: an error in the work ends the process, and its transaction is left to its time-out."
    return ""
