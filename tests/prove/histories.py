"""Runs that never happened: a small app on made-up logs, with retries, aborts, unknown ends, takeovers and markers.

HTTP requests become orders, orders become inventory, a feed from outside is enriched or parked, and two sinks apply
orders and inventory to a ledger. Whatever `World.run` does is valid; `tests.prove.sabotage` spoils it.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from semel.history import Batch, BatchPart, Event, Http, Read, Send, Unit, UnitChange, UnitInput, UnitParked, digest
from semel.prove.check import Evidence, InDoubt, Ingress, LedgerRow, Log, ParkedRow, Position
from semel.wire.records import BatchBuilder, control_batch

REQUESTS, RESPONSES, OUTCOMES = "app.semel.requests", "app.semel.responses", "app.semel.state.idempotency"
TOPICS = {
    REQUESTS: 2,
    RESPONSES: 1,
    OUTCOMES: 2,
    "orders": 3,
    "inventory": 2,
    "feed": 2,
    "enriched": 2,
    "app.enrich.parked": 2,
}
INPUTS = {"requests": REQUESTS, "reserve": "orders", "enrich": "feed"}
SINKS = {"app.totals": "orders", "app.stock": "inventory"}
READ = ("inventory", "enriched")
TIMESTAMP = 1_700_000_000_000
VISIBLE, GONE, CONTROL, OPEN = b"v", b"a", b"c", b"o"


def scope(route: str, key: str) -> bytes:
    return sha256(f"{route} {key}".encode()).digest()


@dataclass
class Record:
    key: bytes | None
    value: bytes | None
    proof: str = ""


class LogSim:
    """One partition's log as bytes, and what stands at each offset."""

    def __init__(self, topic: str, partition: int, file: Path | None = None) -> None:
        self.topic, self.partition = topic, partition
        self.chunks: list[bytes] = []
        self.file = file.open("wb") if file is not None else None
        self.path = file
        self.kinds: list[bytes] = []
        self.records: list[Record | None] = []
        self.open: dict[int, list[int]] = {}
        self.stable = 0
        self.keeps = topic in READ or topic in (REQUESTS, "orders")

    def __str__(self) -> str:
        return f"{self.topic}-{self.partition}"

    @property
    def end(self) -> int:
        return len(self.kinds)

    def append(
        self,
        records: list[Record],
        producer: int = -1,
        epoch: int = -1,
        sequence: int = -1,
        *,
        transactional: bool = False,
    ) -> int:
        base = self.end
        builder = BatchBuilder()
        for record in records:
            headers = (("semel-proof", record.proof.encode()),) if record.proof else ()
            builder.append(record.key, record.value, TIMESTAMP, headers)
        self._write(
            builder.build(
                producer_id=producer,
                producer_epoch=epoch,
                base_sequence=sequence,
                transactional=transactional,
                base_offset=base,
            )
        )
        kind = OPEN if transactional else VISIBLE
        self.kinds += [kind] * len(records)
        self.records += records if self.keeps else [None] * len(records)
        if transactional:
            self.open.setdefault(producer, []).extend(range(base, base + len(records)))
        self._settle()
        return base

    def mark(self, producer: int, epoch: int, *, commit: bool) -> int:
        base = self.end
        self._write(
            control_batch(
                producer_id=producer,
                producer_epoch=epoch,
                commit=commit,
                coordinator_epoch=0,
                timestamp_ms=TIMESTAMP,
                base_offset=base,
            )
        )
        self.kinds.append(CONTROL)
        self.records.append(None)
        for offset in self.open.pop(producer, ()):
            self.kinds[offset] = VISIBLE if commit else GONE
        self._settle()
        return base

    def _write(self, data: bytes) -> None:
        if self.file is not None:
            self.file.write(data)
        else:
            self.chunks.append(data)

    def _settle(self) -> None:
        self.stable = min((offsets[0] for offsets in self.open.values()), default=self.end)

    def log(self) -> Log:
        if self.path is not None:
            from semel.prove.check.evidence import file_chunks

            assert self.file is not None
            self.file.flush()
            path = self.path
            return Log(self.topic, self.partition, 0, self.stable, self.end, lambda: file_chunks(path))
        return Log(self.topic, self.partition, 0, self.stable, self.end, lambda: self.chunks)


@dataclass
class Producer:
    id: int
    epoch: int = 0
    sequences: dict[tuple[str, int], int] = field(default_factory=dict)


@dataclass
class UnitSim:
    """A transaction that was begun."""

    attempt: str
    component: str
    partition: int
    producer: Producer
    position: int
    touched: list[LogSim]
    event: Unit
    inputs: list[int]


class World:
    """Everything at once, decided by one seed. `note` takes events, `ledger` grows in commit order."""

    def __init__(
        self,
        seed: int | str,
        *,
        version: int = 2,
        unit_records: int = 4,
        folder: Path | None = None,
        note: Callable[[Event], None] | None = None,
        ledger: Callable[[LedgerRow], None] | None = None,
    ) -> None:
        self.rng = random.Random(seed)
        self.version = version
        self.unit_records = unit_records
        self.t = 1_000
        self.events: list[Any] = []
        self.rows: list[LedgerRow] = []
        self._note = note or self.events.append
        self._ledger = ledger or self.rows.append
        self.logs = {
            (topic, number): LogSim(topic, number, folder / f"{topic}-{number}.batches" if folder else None)
            for topic, count in TOPICS.items()
            for number in range(count)
        }
        self.producers = {name: Producer(1_000 + number) for number, name in enumerate(INPUTS)}
        self.outside = Producer(1)
        self.positions: dict[tuple[str, int], int] = {}
        self.sinks: dict[tuple[str, int], int] = {}
        self.epochs: dict[tuple[str, int], int] = {}
        self.newest_epoch: dict[tuple[str, int], int] = {}
        self.parked: list[ParkedRow] = []
        self.readers: dict[tuple[str, int], int] = {}
        self.open: dict[str, UnitSim] = {}
        self.late: deque[str] = deque()
        self.done_keys: set[bytes] = set()
        self.waiting: list[tuple[str, str, str, int, int]] = []
        self.in_doubt: list[InDoubt] = []
        self.stored: dict[str, str] = {}
        """What is committed of the stored outcomes, as digests."""
        self.numbers = 0
        self.keys = 0
        self.count = 0
        self.spoil: Callable[[], bool] | None = None
        self.plans: dict[str, list[tuple[str, int]]] = {}

    # --- What happens ---

    def run(self, steps: int) -> World:
        """So many steps, and then until everything is done."""
        actions = self.actions()
        when = self.rng.randrange(steps // 4, steps) if self.spoil else steps
        for step in range(steps):
            if step >= when and self.spoil is not None and self.spoil():
                self.spoil = None
            self.rng.choice(actions)()
        self.drain()
        return self

    def actions(self) -> list[Callable[[], Any]]:
        inside = [*[self.begin_unit] * 3, *[self.end_unit] * 4, *[self.apply] * 3, *[self.read] * 2, self.answer]
        return [*[self.post] * 3, *[self.send] * 2, *inside]

    def run_until(self, events: int) -> None:
        """A long run, in rounds of as many requests as fill the units of work."""
        choose, actions = self.rng.choice, self.actions()[5:]
        while self.count < events:
            for _ in range(self.unit_records):
                self.post()
                self.send()
            for _ in range(30):
                choose(actions)()
        self.drain()

    def drain(self) -> None:
        for _ in range(10_000):
            before = self.count
            for component in list(self.open):
                self.end_unit(component, "ok")
            for component, topic in INPUTS.items():
                for number in range(TOPICS[topic]):
                    self.begin_unit(component, number)
                    self.end_unit(component, "ok")
            for sink in SINKS:
                self.apply(sink, "ok")
            for at in [key for key in self.logs if key[0] in READ]:
                self.read(at)
            self.answer(True)
            if self.spoil is not None and self.spoil():
                self.spoil = None
                continue
            if self.count == before and not self.open:
                break
        while self.late:
            self.end_late()

    def note(self, event: Event) -> None:
        self.t += self.rng.randrange(1, 200_000)
        event.t = self.t
        self.count += 1
        self._note(event)

    def attempt(self, role: str) -> str:
        self.numbers += 1
        return f"{role}-0-4711-{self.numbers}"

    # --- Into the app ---

    def post(self) -> None:
        """A request of a new key or an old one, once more or with another body."""
        rng = self.rng
        if self.keys and rng.random() < 0.15:
            number = rng.randrange(max(1, self.keys - 50), self.keys + 1)
        else:
            self.keys += 1
            number = self.keys
        key = f"key-{number}"
        attempt = self.attempt("load")
        other = rng.random() < 0.1 and scope("POST /orders", key) in self.done_keys
        body = digest(f"{'other' if other else 'body'} of {key}".encode())
        self.note(Http(type="invoke", a=attempt, key=key, route="POST /orders", body=body))
        if rng.random() < 0.05:
            self.note(Http(type="fail", a=attempt, status=503))
            return
        name = scope("POST /orders", key)
        log = self.logs[REQUESTS, name[0] % TOPICS[REQUESTS]]
        offset = log.append([Record(name, b"other" if other else b"request")])
        self.count += 1
        if rng.random() < 0.1:
            self.note(Http(type="info", a=attempt))
        elif rng.random() < 0.95:
            self.waiting.append((attempt, key, "other" if other else "", log.partition, offset))

    def answer(self, everything: bool = False) -> None:
        left = []
        for item in self.waiting:
            attempt, key, other, partition, offset = item
            if self.positions.get(("requests", partition), 0) <= offset:
                left.append(item)
            elif other:
                self.note(Http(type="fail", a=attempt, status=422, reply="00000000000000aa"))
            else:
                self.note(Http(type="ok", a=attempt, status=201, reply=digest(f"reply {key}".encode())))
        self.waiting = left

    def send(self) -> None:
        attempt = self.attempt("load")
        number = self.rng.randrange(TOPICS["feed"])
        log = self.logs["feed", number]
        self.note(Send(type="invoke", a=attempt, id=f"id-{self.numbers}", topic="feed"))
        fate = self.rng.choices(["ok", "info", "lost", "fail", "killed"], [90, 3, 2, 3, 2])[0]
        offset = -1
        if fate in ("ok", "info", "killed"):
            sequence = self.outside.sequences.get(("feed", number), 0)
            record = Record(b"k%d" % (self.numbers % 17), b"v" * 20, attempt)
            offset = log.append([record], self.outside.id, self.outside.epoch, sequence)
            self.outside.sequences["feed", number] = sequence + 1
            self.count += 1
        if fate == "ok":
            self.note(Send(type="ok", a=attempt, topic="feed", partition=number, offset=offset))
        elif fate in ("info", "lost"):
            self.note(Send(type="info", a=attempt))
        elif fate == "fail":
            self.note(Send(type="fail", a=attempt))

    # --- Units of work ---

    def next_inputs(self, component: str, number: int, most: int) -> tuple[list[int], int]:
        log = self.logs[INPUTS[component], number]
        at = self.positions.get((component, number), 0)
        found: list[int] = []
        while at < log.stable and len(found) < most:
            if log.kinds[at] is VISIBLE:
                found.append(at)
            at += 1
        return found, at

    def begin_unit(self, component: str | None = None, number: int | None = None) -> UnitSim | None:
        component = component or self.rng.choice(list(INPUTS))
        if component in self.open:
            return None
        number = self.rng.randrange(TOPICS[INPUTS[component]]) if number is None else number
        inputs, position = self.next_inputs(component, number, self.rng.randint(1, self.unit_records))
        if not inputs:
            return None
        unit = self.make_unit(component, number, inputs, position)
        self.produce(unit)
        self.open[component] = unit
        return unit

    def make_unit(self, component: str, number: int, inputs: list[int], position: int) -> UnitSim:
        """The transaction's invoke; its outputs are decided by the input alone, as a handler's are."""
        attempt = self.attempt(f"worker{number}")
        topic = INPUTS[component]
        counts, parked = [], []
        worked = []
        for offset in inputs:
            outputs = self.outputs(component, number, offset)
            if outputs is None:
                parked.append(UnitParked(topic, number, offset))
            else:
                worked.append(offset)
                counts.append(len(outputs))
        event = Unit(
            type="invoke",
            a=attempt,
            component=component,
            transactional_id=f"app.{component}.0",
            inputs=[UnitInput(topic, number, worked, counts)] if worked else [],
            parked=parked,
            changes=self.changes(component, number, inputs),
        )
        self.note(event)
        return UnitSim(attempt, component, number, self.producers[component], position, [], event, inputs)

    def changes(self, component: str, number: int, inputs: list[int]) -> list[UnitChange]:
        """Every request leaves an outcome under its key, in the place of the one before."""
        found: dict[str, UnitChange] = {}
        for offset in inputs if component == "requests" else ():
            key = self.key_of(number, offset).decode("latin-1")
            before = found[key].before if key in found else self.stored.get(key, "")
            found[key] = UnitChange("idempotency", number, key, before, digest(b"stored %d" % offset))
        return list(found.values())

    def key_of(self, number: int, offset: int) -> bytes:
        record = self.logs[REQUESTS, number].records[offset]
        assert record is not None
        assert record.key is not None
        return record.key

    def outputs(self, component: str, number: int, offset: int) -> list[tuple[str, int, bytes]] | None:
        """(topic, partition, value) of each output; None for an input that is parked."""
        luck = (number * 7_919 + offset * 104_729) % 1_000
        if component == "requests":
            record = self.logs[REQUESTS, number].records[offset]
            assert record is not None
            assert record.key is not None
            reply = (RESPONSES, 0, b"reply")
            if record.value == b"other" or self.is_known(record.key, number, offset):
                return [reply]
            return [*[("orders", luck % TOPICS["orders"], b"order")] * (1 + luck % 2), reply]
        if component == "reserve":
            return [("inventory", (luck + j) % TOPICS["inventory"], b"item %d" % j) for j in range(luck % 4)]
        if luck % 23 == 5:
            return None
        if luck % 211 == 3:
            return [("enriched", j % 2, b"many") for j in range(70)]
        return [("enriched", (luck + j) % 2, b"rich %d" % luck) for j in range(luck % 3)]

    def is_known(self, key: bytes, number: int, offset: int) -> bool:
        """Whether an earlier request has this key: then it only gets the reply once more."""
        first = self.firsts.setdefault(key, (number, offset))
        return first != (number, offset)

    @property
    def firsts(self) -> dict[bytes, tuple[int, int]]:
        return self.__dict__.setdefault("_firsts", {})  # type: ignore[no-any-return]

    def records_of(self, unit: UnitSim) -> dict[tuple[str, int], list[Record]]:
        """Every record of the transaction by partition, in the order in which its inputs came."""
        found: dict[tuple[str, int], list[Record]] = {}
        topic = INPUTS[unit.component]
        for offset in unit.inputs:
            outputs = self.outputs(unit.component, unit.partition, offset)
            front = f"{unit.attempt}|{topic}|{unit.partition}|{offset}"
            if outputs is None:
                found.setdefault(("app.enrich.parked", unit.partition), []).append(
                    Record(b"k", b"v", f"{front}|0|1|parked")
                )
                continue
            for j, (to, partition, value) in enumerate(outputs):
                found.setdefault((to, partition), []).append(Record(b"k", value, f"{front}|{j}|{len(outputs)}"))
            if unit.component == "requests":
                key = self.logs[REQUESTS, unit.partition].records[offset].key  # type: ignore[union-attr]
                found.setdefault((OUTCOMES, unit.partition), []).append(Record(key, b"stored %d" % offset))
        return found

    def produce(self, unit: UnitSim, records: dict[tuple[str, int], list[Record]] | None = None) -> None:
        for at, batch in (self.records_of(unit) if records is None else records).items():
            log, rest = self.logs[at], batch
            while rest:
                size = self.rng.randint(1, len(rest)) if self.rng.random() < 0.3 else len(rest)
                self.append(unit.producer, log, rest[:size])
                rest = rest[size:]
            if log not in unit.touched:
                unit.touched.append(log)

    def append(self, producer: Producer, log: LogSim, records: list[Record]) -> int:
        at = (log.topic, log.partition)
        sequence = producer.sequences.get(at, 0)
        base = log.append(records, producer.id, producer.epoch, sequence, transactional=True)
        producer.sequences[at] = sequence + len(records)
        self.count += len(records)
        return base

    def end_markers(self, unit: UnitSim, *, commit: bool, fenced: bool = False) -> None:
        """Markers in every partition, and the producer's next epoch."""
        producer = unit.producer
        bump = self.version == 2 or fenced
        epoch = producer.epoch + 1 if bump else producer.epoch
        for log in unit.touched:
            log.mark(producer.id, epoch, commit=commit)
        if bump:
            producer.epoch = epoch
            producer.sequences.clear()

    def end_unit(self, component: str | None = None, fate: str = "") -> None:
        if not self.open:
            return
        component = component or self.rng.choice(list(self.open))
        unit = self.open.pop(component, None)
        if unit is None:
            return
        fates = ["ok", "abort", "info-commit", "info-abort", "killed-commit", "killed-abort", "zombie"]
        fate = fate or self.rng.choices(fates, [80, 5, 3, 3, 3, 3, 3])[0]
        commit = fate in ("ok", "info-commit", "killed-commit")
        self.end_markers(unit, commit=commit, fenced=fate in ("killed-abort", "zombie"))
        if commit:
            self.advance(unit)
        if fate == "ok":
            self.note(Unit(type="ok", a=unit.attempt))
        elif fate == "abort":
            self.note(Unit(type="fail", a=unit.attempt))
        elif fate.startswith("info"):
            self.note(Unit(type="info", a=unit.attempt))
        elif fate == "zombie":
            self.late.append(unit.attempt)
        if self.late and self.rng.random() < 0.3:
            self.end_late()

    def advance(self, unit: UnitSim) -> None:
        at = (unit.component, unit.partition)
        self.positions[at] = max(self.positions.get(at, 0), unit.position)
        if unit.component == "requests":
            self.done_keys.update(self.key_of(unit.partition, offset) for offset in unit.inputs)
            self.stored.update((change.key, change.after) for change in unit.event.changes)

    def end_late(self) -> None:
        """A zombie wakes up and is told that it was fenced."""
        self.note(Unit(type="fail", a=self.late.popleft()))

    # --- Sinks ---

    def apply(self, sink: str | None = None, fate: str = "") -> None:
        sink = sink or self.rng.choice(list(SINKS))
        parts, rows, parked = [], [], []
        attempt = self.attempt("sink")
        for number in range(TOPICS[SINKS[sink]]):
            part = self.next_part(sink, number)
            if part is not None and (not parts or self.rng.random() < 0.6):
                parts.append(part)
        if not parts:
            return
        for part in parts:
            calls = [part.handed] if self.rng.random() < 0.8 else [[offset] for offset in part.handed]
            rows += [
                LedgerRow(sink, part.topic, part.partition, part.owner_epoch, attempt, call) for call in calls if call
            ]
            parked += [ParkedRow(sink, part.topic, part.partition, offset) for offset in part.parked]
        self.note(Batch(type="invoke", a=attempt, component=sink, parts=parts))
        fates = ["ok", "fail", "info-commit", "info-abort", "killed-commit", "killed-abort"]
        fate = fate or self.rng.choices(fates, [80, 5, 4, 4, 3, 4])[0]
        if fate in ("ok", "info-commit", "killed-commit"):
            self.commit_batch(sink, parts, rows, parked)
        if fate in ("ok", "fail"):
            self.note(Batch(type="ok" if fate == "ok" else "fail", a=attempt))
        elif fate.startswith("info"):
            self.note(Batch(type="info", a=attempt))
            if self.rng.random() < 0.7:
                self.note(Batch(type="ok" if fate == "info-commit" else "fail", a=attempt))
        if fate.startswith("killed"):
            for number in range(TOPICS[SINKS[sink]]):
                self.epochs[sink, number] = self.epochs.get((sink, number), 1) + 1

    def commit_batch(
        self, sink: str, parts: Iterable[BatchPart], rows: Iterable[LedgerRow], parked: Iterable[ParkedRow]
    ) -> None:
        for part in parts:
            self.sinks[sink, part.partition] = part.to_offset
        for row in rows:
            self.count += 1
            self._ledger(row)
        self.parked += parked

    def next_part(self, sink: str, number: int) -> BatchPart | None:
        topic = SINKS[sink]
        log = self.logs[topic, number]
        begin = at = self.sinks.get((sink, number), 0)
        handed: list[int] = []
        parked: list[int] = []
        while at < log.stable and len(handed) < self.unit_records:
            if log.kinds[at] is VISIBLE:
                (parked if (at * 31 + number) % 97 == 0 else handed).append(at)
            at += 1
        if at == begin:
            return None
        return BatchPart(topic, number, self.epochs.setdefault((sink, number), 1), begin, at, handed, parked)

    # --- Readers ---

    def read(self, at: tuple[str, int] | None = None) -> None:
        at = at or self.rng.choice([key for key in self.logs if key[0] in READ])
        log = self.logs[at]
        position = self.readers.get(at, 0)
        found = [offset for offset in range(position, min(log.stable, position + 50)) if log.kinds[offset] is VISIBLE]
        self.readers[at] = min(log.stable, position + 50)
        if found:
            self.note_read(at, found)

    def note_read(self, at: tuple[str, int], offsets: list[int]) -> Read:
        log = self.logs[at]
        values = [log.records[offset] if offset < log.end else None for offset in offsets]
        event = Read(
            type="ok",
            a="reader-0-4711",
            topic=at[0],
            partition=at[1],
            offsets=offsets,
            digests=[digest(record.value if record else b"?") for record in values],
        )
        self.note(event)
        return event

    # --- What is left ---

    def evidence(self, **changes: Any) -> Evidence:
        positions = [
            Position(component, topic, number, self.positions.get((component, number), 0))
            for component, topic in INPUTS.items()
            for number in range(TOPICS[topic])
        ]
        positions += [
            Position(sink, topic, number, self.sinks.get((sink, number), 0), 0, True)
            for sink, topic in SINKS.items()
            for number in range(TOPICS[topic])
        ]
        given: dict[str, Any] = {
            "events": lambda: self.events,
            "logs": [log.log() for log in self.logs.values()],
            "positions": positions,
            "ledger": lambda: self.rows,
            "parked": self.parked,
            "in_doubt": self.in_doubt,
            "ingress": Ingress(REQUESTS, RESPONSES, OUTCOMES, scope),
            "changelogs": frozenset((OUTCOMES,)),
        }
        return Evidence(**{**given, **changes})
