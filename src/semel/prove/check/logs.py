"""One pass over the raw log of each partition: who wrote what, how each transaction ended, what a reader can see.

Batch headers are judged as they come (offsets, checksums, epochs, sequence numbers). A record counts for its attempt
when its transaction's marker comes, or at once when it is in none. Only partitions whose keys or values matter are
decoded whole.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from crc32c import crc32c

from semel.errors import CorruptBatch
from semel.prove.check.bodies import bodies, ends_committed, proof_of, proofs
from semel.prove.check.evidence import LENGTH_FROM, Log, LogBatch
from semel.prove.check.findings import Findings
from semel.prove.check.model import (
    ATTEMPT_BITS,
    FAIL,
    NARROW,
    PARKED_BIT,
    RELEASED,
    Attempts,
    Lane,
    Model,
    ReadLane,
    value_digest,
)
from semel.wire.records import BatchHeader, decode_records

__all__ = ["ABORTED", "COMMITTED", "CONTROL", "HOLE", "SPLIT", "UNDECIDED", "VISIBLE", "LogFacts", "LogPass"]

HOLE, VISIBLE, GONE, CONTROL, UNDECIDED = range(5)
"""What stands at an offset: nothing, a record that can be read, one of an aborted transaction, a marker, one of an open
transaction."""

COMMITTED, ABORTED, SPLIT, UNENDED = 1, 2, 4, 8
"""Flags of an attempt: records of it stand in a committed or an aborted transaction; in two transactions of one
partition, or in one with another attempt's; in one that is still open."""

SEQUENCES = 1 << 31
PLACES_MAX = 10
"""Places that are named of one attempt that nobody knows."""
_CRC_FROM = 21
"""Where a batch's checksummed part begins."""
_TRANSACTIONAL, _CONTROL = 0x10, 0x20
_VISIBLE, _GONE, _UNDECIDED = bytes((VISIBLE,)), bytes((GONE,)), bytes((UNDECIDED,))
_BITS = {b"%d" % j: 1 << j for j in range(NARROW)}
_ORDER = {b"%d" % j: j for j in range(NARROW)}


class _Open(NamedTuple):
    """An open transaction of one producer in one partition."""

    epoch: int
    first: int
    entries: list[tuple[int, list[bytes | None]]]
    """(base offset, where each record came from) of each batch."""


class _Place(NamedTuple):
    """What the front of a header stands for: one attempt and one partition of its input."""

    attempt: int
    lane: Lane
    low: int
    size: int


@dataclass(slots=True)
class LogFacts:
    """What one partition's log says, an element an offset from `start` on."""

    log: Log
    start: int
    state: bytearray
    writer: array[int]
    """The attempt whose visible record stands there."""
    keys: array[int] | None = None
    """Hash of a visible record's key, where keys matter."""
    survivors: dict[int, int] = field(default_factory=dict)
    """Lane number to the input offset of its first output behind `cut`."""
    cut: int = -1
    """Where the log is whole from, if retention or compaction took records before."""


class LogPass:
    """Takes in one log after the other; what it learns of attempts stands in the model afterwards."""

    def __init__(
        self, model: Model, findings: Findings, keyed: frozenset[str] = frozenset(), inert: frozenset[str] = frozenset()
    ) -> None:
        self._model = model
        self._units: Attempts = model.units
        self._findings = findings
        self._keyed = keyed
        self.conflicts: dict[tuple[int, int], bool] = {}
        """(lane, input) with outputs of several attempts: whether one output is there twice."""
        self.unknown: dict[str, list[str]] = {}
        """Attempts that the history does not name, and where their records stand."""
        self.misplaced: dict[str, list[str]] = {}
        """Senders' attempts at places that nobody was told."""
        self.strays: dict[int, list[str]] = {}
        """Attempts with outputs of inputs that no unit names."""
        self.ends: dict[tuple[int, int], tuple[int, bool]] = {}
        """(producer, epoch) under transactions V2 to how its transaction ended, and whether records name attempts."""
        self.answers = ""
        """The topic of replies: what stands there is no effect."""
        self.effect_lane: dict[int, bytearray] = {}
        """Lane of requests to which of them have effects."""
        self.inert = inert
        """Topics to which no unit writes."""

    # --- One log ---

    def read(self, log: Log) -> LogFacts:
        """Read one log whole."""
        size = max(0, log.end - log.start)
        facts = LogFacts(log, log.start, bytearray(size), array(ATTEMPT_BITS, bytes(4 * size)))
        facts.cut = log.start if log.start > log.begin else -1
        if log.topic in self._keyed:
            facts.keys = array("q", bytes(8 * size))
        _Reading(self, self._model, self._findings, facts).run()
        return facts

    def resolve(self, front: bytes) -> tuple[int, Lane | None]:
        """The attempt and the lane that a header's front `a|topic|partition` names."""
        name, topic, partition = front.decode().split("|")
        attempt = self._units.index.get(name, 0)
        if not attempt:
            return 0, None
        component = self._units.components[self._units.component[attempt]]
        number = self._units.lane_numbers.get((component, topic, int(partition)))
        return attempt, None if number is None else self._units.lanes[number]


class _Reading:
    """The pass over one log."""

    def __init__(self, whole: LogPass, model: Model, findings: Findings, facts: LogFacts) -> None:
        self._whole = whole
        self._units = model.units
        self._findings = findings
        self._facts = facts
        self._log = facts.log
        place = (self._log.topic, self._log.partition)
        self._reads: ReadLane | None = model.reads.get(place)
        self._sent = model.sent.get(place)
        self._unsettled = model.unsettled
        self._places: dict[bytes, _Place | None] = {}
        self._last: dict[int, tuple[int, int]] = {}
        self._open: dict[int, _Open] = {}
        self._before: dict[int, set[int]] = {}
        self._producers: dict[int, tuple[int, int]] = {}
        self._is_whole = self._reads is not None or facts.keys is not None
        self._is_reply = self._log.topic == whole.answers

    def run(self) -> None:
        log, end, producers = self._log, self._log.end, self._producers
        count, expected = 0, self._log.start
        try:
            for batch in log.batches():
                header, buffer, at = batch
                base, length, _, _, crc, attributes, last_delta, _, _, producer, epoch, sequence, records = header
                if base >= end:
                    break
                if crc32c(buffer[at + _CRC_FROM : at + LENGTH_FROM + length]) != crc:
                    self._findings.add("L16", f"{log}@{base}", "the batch's checksum is wrong, and it was served")
                if base != expected or records != last_delta + 1:
                    self._offsets(batch, expected)
                expected = max(expected, base + last_delta + 1)
                if producer >= 0:
                    if producers.get(producer) == (epoch, sequence):
                        producers[producer] = (epoch, (sequence + last_delta + 1) % SEQUENCES)
                    else:
                        self._producer(batch)
                if attributes & _CONTROL:
                    self._marker(batch)
                else:
                    self._records(batch, bool(attributes & _TRANSACTIONAL))
                count += records
        except (CorruptBatch, IndexError) as error:
            self._findings.add("L16", f"{log}@{expected}", f"a batch cannot be read: {error}")
            expected = end
        if expected < end and not log.is_compacted:
            self._findings.add("L16", f"{log}@{expected}", f"nothing is there, and the log is said to end at {end}")
        for producer, held in self._open.items():
            self._unended(producer, held)
        if not self._open and log.stable < end:
            self._findings.add("L15", str(log), f"the last stable offset stays at {log.stable}, below the end {end}")
        self._findings.checked["records"] += count

    # --- Batches ---

    def _offsets(self, batch: LogBatch, expected: int) -> None:
        """A batch that does not begin where the one before ended, or that has fewer records than offsets."""
        header, log = batch.header, self._log
        if header.base_offset < expected and expected > log.start:
            until = min(header.last_offset, expected - 1)
            why = f"a second batch stands at offsets {header.base_offset} to {until}"
            self._findings.add("L1", f"{log}@{header.base_offset}", why)
        elif header.base_offset > expected and not log.is_compacted:
            why = f"offsets {expected} to {header.base_offset - 1} are missing"
            self._findings.add("L16", f"{log}@{expected}", why)
        if log.is_compacted and not header.is_control:
            # Records before this point may be gone without being lost.
            is_whole = header.record_count == header.last_offset_delta + 1
            self._facts.cut = header.base_offset if is_whole else header.next_offset
            self._facts.survivors.clear()

    def _producer(self, batch: LogBatch) -> None:
        """A batch that does not simply continue its producer's numbers."""
        header, log = batch.header, self._log
        producer, epoch, sequence = header.producer_id, header.producer_epoch, header.base_sequence
        known = self._producers.get(producer)
        if known is not None and epoch < known[0]:
            why = f"producer {producer} wrote in epoch {epoch} after epoch {known[0]} had begun"
            self._findings.add("L8", f"{log}@{header.base_offset}", why)
            return
        if header.is_control:
            self._producers[producer] = (epoch, known[1] if known is not None and known[0] == epoch else 0)
            return
        due = known[1] if known is not None and known[0] == epoch else 0
        is_told = known is not None or log.start == 0  # What a producer wrote below the log's start is not known.
        if sequence != due and is_told and not log.is_compacted:
            why = f"producer {producer}, epoch {epoch}: sequence {sequence} where {due} was due"
            self._findings.add("L9", f"{log}@{header.base_offset}", why)
        self._producers[producer] = (epoch, (sequence + header.last_offset_delta + 1) % SEQUENCES)

    # --- Records ---

    def _records(self, batch: LogBatch, is_transactional: bool) -> None:
        header = batch.header
        base, size, start = header.base_offset, header.record_count, self._facts.start
        if size != header.last_offset_delta + 1:
            self._sparse(batch)
            return
        found = self._decode_whole(batch) if self._is_whole else proofs(batch)
        if base < start:  # The log begins inside this batch.
            found = found[start - base :]
            base, size = start, len(found)
        if not is_transactional:
            self._facts.state[base - start : base - start + size] = _VISIBLE * size
            self._apply([(base, found)])
            return
        self._facts.state[base - start : base - start + size] = _UNDECIDED * size
        self._hold(header, (base, found))

    def _hold(self, header: BatchHeader, entry: tuple[int, list[bytes | None]]) -> None:
        """Records that wait for the marker of their transaction."""
        held = self._open.get(header.producer_id)
        if held is None:
            held = self._open[header.producer_id] = _Open(header.producer_epoch, entry[0], [])
        held.entries.append(entry)

    def _sparse(self, batch: LogBatch) -> None:
        """A batch of which compaction took records: each that is left has a place of its own."""
        header, facts = batch.header, self._facts
        for record in decode_records(batch.buffer, batch.at, header, "", 0):
            at = record.offset - facts.start
            if at < 0:
                continue
            if facts.keys is not None and record.key is not None and record.value is not None:
                facts.keys[at] = hash(record.key) | 1
            entry = (record.offset, [proof_of(record)])
            if header.is_transactional:
                self._hold(header, entry)
                facts.state[at] = UNDECIDED
            else:
                facts.state[at] = VISIBLE
                self._apply([entry])

    def _decode_whole(self, batch: LogBatch) -> list[bytes | None]:
        """Keys and values too: they are compared with what readers got."""
        keys, digests, start = self._facts.keys, self._reads.digests if self._reads else (), self._facts.start
        found = []
        for at, (key, value, proof) in enumerate(bodies(batch), batch.header.base_offset):
            found.append(proof)
            if keys is not None and key is not None and value is not None and at >= start:
                keys[at - start] = hash(key) | 1
            if at < len(digests) and digests[at] and digests[at] != value_digest(value):
                why = "a reader got another value than the final log has"
                self._findings.add("L1", f"{self._log}@{at}", why)
        return found

    # --- Ends of transactions ---

    def _marker(self, batch: LogBatch) -> None:
        header, facts = batch.header, self._facts
        commit = ends_committed(batch)
        if header.base_offset >= facts.start:
            facts.state[header.base_offset - facts.start] = CONTROL
        held = self._open.pop(header.producer_id, None)
        if held is None:
            return
        kind = COMMITTED if commit else ABORTED
        attempts = self._attempts_of(held)
        self._agree(header.producer_id, held, header.producer_epoch, kind, header.base_offset, bool(attempts))
        units = self._units
        for attempt in attempts:
            units.flags[attempt] |= kind
        again = self._before.get(header.producer_id)
        if len(attempts) > 1 or (again and not again.isdisjoint(attempts)):
            for attempt in attempts if len(attempts) > 1 else attempts & (again or set()):
                units.flags[attempt] |= SPLIT
        self._before[header.producer_id] = attempts
        fill = _VISIBLE if commit else _GONE
        for base, found in held.entries:
            at = base - facts.start
            facts.state[at : at + len(found)] = fill * len(found)
        if commit:
            self._apply(held.entries)

    def _agree(self, producer: int, held: _Open, epoch: int, kind: int, offset: int, is_named: bool) -> None:
        """Changelogs name no attempt. Under V2 (the marker has the next epoch) the epoch names the transaction."""
        if epoch != held.epoch + 1:
            return
        known, was_named = self._whole.ends.setdefault((producer, held.epoch), (kind, is_named))
        if known != kind and not (is_named and was_named):
            names = {COMMITTED: "committed", ABORTED: "aborted"}
            self._findings.add(
                "L6",
                f"producer {producer}, epoch {held.epoch}",
                f"{names[kind]} at {self._log}@{offset}, {names[known]} in another partition",
            )

    def _attempts_of(self, held: _Open) -> set[int]:
        # All records of a batch are of one attempt, unless somebody mixed transactions up: look at both ends.
        ends = {proof for _, found in held.entries for proof in (found[0], found[-1]) if proof is not None}
        index = self._units.index
        attempts = {
            index.get(name.decode(errors="replace"), 0) for name in {proof.partition(b"|")[0] for proof in ends}
        }
        attempts.discard(0)
        return attempts

    def _unended(self, producer: int, held: _Open) -> None:
        attempts = self._attempts_of(held)
        names = tuple(self._units.names[attempt] for attempt in sorted(attempts))
        for attempt in attempts:
            self._units.flags[attempt] |= UNENDED
        self._findings.add(
            "L15",
            f"{self._log}@{held.first}",
            f"the transaction of producer {producer}, epoch {held.epoch}, is open; readers wait behind it",
            names,
        )

    # --- What is visible ---

    def _resolve(self, front: bytes) -> _Place | None:
        attempt, lane = self._whole.resolve(front)
        place = None if lane is None else _Place(attempt, lane, lane.low, len(lane.mask))
        if len(self._places) > 100_000:
            self._places.clear()
        self._places[front] = place
        return place

    def _apply(self, entries: list[tuple[int, list[bytes | None]]]) -> None:
        """Visible records count for their attempts: which outputs of which inputs are there, and in which order."""
        if self._sent is None and not any(proof for _, found in entries for proof in found):
            return
        places, bits, order, last = self._places, _BITS, _ORDER, self._last
        visible, start, writer = self._units.visible, self._facts.start, self._facts.writer
        cut, survivors, sent = self._facts.cut, self._facts.survivors, self._sent
        effects = None if self._is_reply else self._whole.effect_lane
        for base, found in entries:
            offset = base - 1
            for proof in found:
                offset += 1
                if proof is None:
                    if sent is not None:
                        self._plain(offset)
                    continue
                if sent is not None and b"|" not in proof:
                    self._from_outside(proof.decode(errors="replace"), offset)
                    continue
                try:
                    front, at, j, _ = proof.rsplit(b"|", 3)
                    bit = bits[j]
                    place = places[front]
                    if place is None:
                        raise KeyError
                except (ValueError, KeyError):
                    self._unusual(proof, offset)
                    continue
                attempt, lane, low, size = place
                input_at = int(at)
                i = input_at - low
                if not 0 <= i < size:
                    note_place(self._whole.strays, attempt, f"{self._log}@{offset}")
                    continue
                mask = lane.mask
                if not mask[i]:
                    mask[i] = bit
                    lane.owner[i] = attempt
                elif lane.owner[i] == attempt and not mask[i] & bit:
                    mask[i] |= bit
                elif not self._again(lane, i, attempt, bit, offset):
                    continue
                visible[attempt] += 1
                writer[offset - start] = attempt
                rank = input_at << 6 | order[j]
                before = last.get(lane.number)
                if before is not None and rank < before[0]:
                    self._disorder(lane, input_at, attempt, before, offset)
                if 0 <= cut <= offset:
                    survivors.setdefault(lane.number, input_at)
                last[lane.number] = (rank, attempt)
                if effects is not None and (flags := effects.get(lane.number)) is not None:
                    flags[i] = 1

    def _again(self, lane: Lane, i: int, attempt: int, bit: int, offset: int) -> bool:
        """An output of an input that has outputs of another attempt, or this very one; whether it counts."""
        is_doubled = bool(lane.mask[i] & bit)
        key = (lane.number, i)
        if lane.owner[i] == attempt and is_doubled and key not in self._whole.conflicts:
            self._findings.add(
                "L2",
                f"{self._log}@{offset}",
                f"output {bit.bit_length() - 1} of {lane.topic}-{lane.partition}@{lane.low + i} stands here once more",
                (self._units.names[attempt],),
            )
            return False
        self._whole.conflicts[key] = self._whole.conflicts.get(key, False) or is_doubled
        lane.mask[i] |= bit
        return True

    def _disorder(self, lane: Lane, input_at: int, attempt: int, before: tuple[int, int], offset: int) -> None:
        """An output before which one of a later input stands, of the same component and input partition."""
        if lane.component.endswith(RELEASED):
            return  # Keys are released when an operator says so.
        if self._whole.conflicts.get((lane.number, input_at - lane.low)):
            return  # It is there a second time: that is what is reported.
        names = self._units.names
        was = before[0] >> 6
        if before[1] == attempt:
            why = f"output of {lane.topic}-{lane.partition}@{input_at} after one of @{was}, of the same attempt"
            self._findings.add("L10", f"{self._log}@{offset}", why, (names[attempt],))
            return
        why = f"{lane}: the output of offset {input_at} stands behind that of offset {was}"
        self._findings.add("E7", f"{self._log}@{offset}", why, (names[before[1]], names[attempt]))

    def _unusual(self, proof: bytes, offset: int) -> None:
        """A record from outside, a parked one, one with many siblings, or one that nobody knows."""
        parts = proof.rsplit(b"|", 4)
        if len(parts) < 4:
            self._from_outside(proof.decode(errors="replace"), offset)
            return
        is_parked = parts[-1] == b"parked"
        try:
            front, at, j = proof.rsplit(b"|", 4)[:3] if is_parked else proof.rsplit(b"|", 3)[:3]
            place = self._places.get(front) or self._resolve(front)
            input_at, number = int(at), int(j)
        except (ValueError, UnicodeDecodeError):
            self._findings.add("E3", f"{self._log}@{offset}", f"its header says {proof[:80]!r}, which names no attempt")
            return
        if place is None:
            self._unknown(front, offset)
            return
        attempt, lane, low, size = place
        i = input_at - low
        if not 0 <= i < size:
            note_place(self._whole.strays, attempt, f"{self._log}@{offset}")
            return
        if is_parked:
            bit = PARKED_BIT
        elif number < NARROW:
            bit = 1 << number
        else:
            bit = 0
        if not lane.mask[i] and i not in lane.wide:
            lane.mask[i], lane.owner[i] = bit, attempt
            if not bit:
                lane.wide[i] = 1 << (number - NARROW)
        elif not bit:
            extra = 1 << (number - NARROW)
            if lane.wide.get(i, 0) & extra or lane.owner[i] != attempt:
                if lane.owner[i] == attempt:
                    self._findings.add(
                        "L2", f"{self._log}@{offset}", f"output {number} of {lane} @{input_at} stands here once more"
                    )
                    return
                self._whole.conflicts[lane.number, i] = True
            lane.wide[i] = lane.wide.get(i, 0) | extra
        elif lane.owner[i] == attempt and not lane.mask[i] & bit:
            lane.mask[i] |= bit
        elif not self._again(lane, i, attempt, bit, offset):
            return
        self._units.visible[attempt] += 1
        self._facts.writer[offset - self._facts.start] = attempt
        rank = input_at << 6 | min(number, NARROW)
        before = self._last.get(lane.number)
        if before is not None and rank < before[0]:
            self._disorder(lane, input_at, attempt, before, offset)
        if 0 <= self._facts.cut <= offset:
            self._facts.survivors.setdefault(lane.number, input_at)
        self._last[lane.number] = (rank, attempt)
        flags = self._whole.effect_lane.get(lane.number)
        if flags is not None and not self._is_reply and not is_parked:
            flags[i] = 1

    def _unknown(self, front: bytes, offset: int) -> None:
        attempt, _ = self._whole.resolve(front)
        where = f"{self._log}@{offset}"
        if attempt:
            note_place(self._whole.strays, attempt, where)
        elif offset >= self._log.begin:
            note_place(self._whole.unknown, front.decode(errors="replace").partition("|")[0], where)

    # --- From outside ---

    def _plain(self, offset: int) -> None:
        """A record without a name where a sender was told that his stands."""
        sent = self._sent
        if sent is not None and offset < len(sent):
            sent[offset] = 0

    def _from_outside(self, attempt: str, offset: int) -> None:
        sent = self._sent
        if sent is not None and offset < len(sent) and sent[offset] == hash(attempt) | 1:
            sent[offset] = 0
            return
        known = self._unsettled.get(attempt)
        where = f"{self._log}@{offset}"
        if known is not None and known.outcome == FAIL:
            why = f"the sender of {known.id} was told that it failed, and it can be read"
            self._findings.add("L4", where, why)
            self._findings.add("E17", where, why)
        else:
            note_place(self._whole.misplaced, attempt, where)


def note_place(known: dict[Any, list[str]], attempt: str | int, place: str) -> None:
    """Remember where records of an attempt stand that is in none of the history's places; the first ones are enough."""
    places = known.setdefault(attempt, [])
    if len(places) < PLACES_MAX:
        places.append(place)
