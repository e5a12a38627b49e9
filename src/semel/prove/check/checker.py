"""The checker: everything a run left behind, compared with everything the processes said.

One pass over the history, one over each log, one over the ledgers; then the columns that these filled are compared.
Linear in the number of events. It reads no clock, no file and no database: what it is given are values and things to
read again (`evidence`). The classes are in `findings.CLASSES`, their definitions in `rules` and beside the passes.
"""

from __future__ import annotations

from collections.abc import Iterable

from semel.history import Send
from semel.prove.check.cycles import judge_flow
from semel.prove.check.effects import Facts, judge_positions, judge_units, take_ledger
from semel.prove.check.evidence import Evidence, InDoubt, Ingress
from semel.prove.check.findings import Findings
from semel.prove.check.logs import CONTROL, GONE, HOLE, VISIBLE, LogFacts, LogPass
from semel.prove.check.model import Model
from semel.prove.check.states import judge_states

__all__ = ["check"]


def check(evidence: Evidence) -> Findings:
    """Judge a run. Costs 2 to 3 microseconds an event, and memory as `model` says."""
    findings = Findings(notes=[f"{what}: {why}" for what, why in evidence.limits.items()])
    model = Model(findings)
    model.take_in(evidence.events())
    ingress = evidence.ingress
    keyed = frozenset((ingress.requests, ingress.outcomes)) if ingress else frozenset[str]()
    logs = LogPass(model, findings, keyed, evidence.changelogs | {ingress.requests} if ingress else evidence.changelogs)
    if ingress is not None:
        logs.answers = ingress.responses
        for lane in model.units.lanes:
            if lane.topic == ingress.requests:
                logs.effect_lane[lane.number] = bytearray(len(lane.mask))
    facts: dict[tuple[str, int], LogFacts] = {}
    for log in evidence.logs:
        facts[log.topic, log.partition] = logs.read(log)
    judge_units(model, logs, facts, findings)
    sinks = take_ledger(model, evidence.ledger(), facts, findings)
    judge_positions(evidence, model, logs, facts, sinks, findings)
    judge_states(evidence, model, facts, findings)
    judge_flow(model.units, facts, findings)
    _judge_strangers(evidence, model, logs, findings)
    _judge_sends(model, facts, findings)
    _judge_reads(model, facts, findings)
    if ingress is not None:
        _judge_requests(ingress, model, logs, facts, findings)
    _judge_doubts(evidence.in_doubt, findings)
    return findings


def _judge_strangers(evidence: Evidence, model: Model, logs: LogPass, findings: Findings) -> None:
    """E3: a visible record that nobody says to have made. L2: one from outside that stands twice."""
    for attempt, places in logs.strays.items():
        for place in places:
            name = model.units.names[attempt]
            findings.add("E3", place, f"it names attempt {name}, which had no such input", (name,))
    if not model.lost_lines:
        for name, places in logs.unknown.items():
            findings.add("E3", tuple(places), f"records of attempt {name}, which the history does not name")
    told = {name: "" for name in logs.misplaced if name not in model.unsettled}
    for event in evidence.events() if told else ():
        if type(event) is Send and event.type == "ok" and event.a in told:
            told[event.a] = f"{event.topic}-{event.partition}@{event.offset}"
    for name, places in logs.misplaced.items():
        if name in model.unsettled:
            places = places[1:]  # Its sender does not know, so it may be there once.
        elif not told[name]:
            if not model.lost_lines:
                findings.add("E3", tuple(places), f"attempt {name} sent it, which the history does not name")
            continue
        for place in places:
            also = f"at {told[name]}" if told.get(name) else "in another place"
            findings.add("L2", place, f"the record that was sent as {name} also stands {also}")


def _judge_sends(model: Model, facts: Facts, findings: Findings) -> None:
    """L3, L16, L1: a send that was acknowledged, and its record is not where it was said to stand. [Jepsen]"""
    for (topic, partition), told in model.sent.items():
        log = facts.get((topic, partition))
        if log is None or not any(told):
            if log is None:
                findings.notes.append(f"{topic}-{partition} was not read: what was sent there is not judged.")
            continue
        for offset, left in enumerate(told):
            at = offset - log.start
            if not left or at < 0:
                continue
            place = f"{topic}-{partition}@{offset}"
            kind = log.state[at] if at < len(log.state) else HOLE
            if kind == HOLE:
                if not log.log.is_compacted:
                    findings.add("L16", place, "a record was acknowledged there, and the log does not have it")
            elif kind in (VISIBLE, CONTROL):
                findings.add("L1", place, "a record was acknowledged there, and another one stands there")
            else:
                findings.add("L3", place, "a record was acknowledged there, and its transaction was not committed")


def _judge_reads(model: Model, facts: Facts, findings: Findings) -> None:
    """What concurrent readers were given, against the final log."""
    begun = model.units.begun
    for (topic, partition), lane in model.reads.items():
        log = facts.get((topic, partition))
        if log is None:
            findings.notes.append(f"{topic}-{partition} was not read: what its readers saw is not judged.")
            continue
        for reader, flat in lane.runs.items():
            before = None
            for k in range(0, len(flat), 3):
                low, high, t = flat[k : k + 3]
                if before is not None:
                    _judge_step(log, reader, before, low, findings)
                before = high
                a, b = low - log.start, high - log.start + 1
                if b <= 0:
                    continue
                a = max(a, 0)
                if log.state.count(VISIBLE, a, b) != b - a:
                    _judge_given(log, reader, a, b, findings)
                for writer in set(log.writer[a:b]):
                    if begun[writer] > t:
                        _judge_early(model, log, reader, writer, a, b, findings)


def _judge_step(log: LogFacts, reader: str, before: int, low: int, findings: Findings) -> None:
    """L11: within one reader, each visible offset once and in order. [Jepsen: poll skip, nonmonotonic poll]"""
    if low <= before:
        findings.add("L11", f"{log.log}@{low}", f"reader {reader} was given it after {before}")
        return
    skipped = log.state.find(VISIBLE, max(0, before + 1 - log.start), max(0, low - log.start))
    if skipped >= 0:
        findings.add("L11", f"{log.log}@{log.start + skipped}", f"reader {reader} went from {before} to {low}")


def _judge_given(log: LogFacts, reader: str, a: int, b: int, findings: Findings) -> None:
    """L4, L14, L17: a reader was given what is no visible record of the final log. [Jepsen, Kafka]"""
    for at in range(a, b):
        place = f"{log.log}@{log.start + at}"
        kind = log.state[at] if at < len(log.state) else HOLE
        if kind == GONE:
            findings.add("L4", place, f"reader {reader} was given it, and its transaction was aborted")
        elif kind == HOLE:
            if at >= len(log.state) or not log.log.is_compacted:
                findings.add("L17", place, f"reader {reader} was given it, and the log does not have it")
        elif kind != VISIBLE:
            what = "a marker stands there" if kind == CONTROL else "its transaction is open"
            findings.add("L14", place, f"reader {reader} was given it, and {what}")


def _judge_early(model: Model, log: LogFacts, reader: str, writer: int, a: int, b: int, findings: Findings) -> None:
    """L5: read before the attempt that wrote it had begun, by the machine's monotonic clock. [Jepsen]"""
    at = log.writer.index(writer, a, b)
    name = model.units.names[writer]
    findings.add("L5", f"{log.log}@{log.start + at}", f"reader {reader} had it before attempt {name} began", (name,))


def _judge_requests(ingress: Ingress, model: Model, logs: LogPass, facts: Facts, findings: Findings) -> None:
    """E14, E1, E17 at the way in: one key, one set of effects, and a success has a stored outcome. [IETF draft 07]"""
    effects: dict[int, str] = {}
    for number, flags in logs.effect_lane.items():
        lane = model.units.lanes[number]
        log = facts.get(lane.place)
        if log is None or log.keys is None:
            continue
        for i, has_effects in enumerate(flags):
            at = lane.low + i - log.start
            if not has_effects or not 0 <= at < len(log.keys) or not log.keys[at]:
                continue
            place = f"{lane.topic}-{lane.partition}@{lane.low + i}"
            first = effects.setdefault(log.keys[at], place)
            if first != place:
                findings.add("E14", (first, place), "two requests with one key both have effects")
    stored = {
        key for place, log in facts.items() if place[0] == ingress.outcomes and log.keys for key in log.keys if key
    }
    has_outcomes = any(place[0] == ingress.outcomes for place in facts)
    for key, request in model.requests.items():
        scope = hash(ingress.scope(request.route, key)) | 1
        if request.answered and has_outcomes and scope not in stored:
            findings.add("E1", key, f"answered {request.status}, and no outcome is stored for it")
        if request.failed == request.asked and scope in effects:
            findings.add("E17", key, f"every answer was a definite refusal, and {effects[scope]} has effects")
    findings.checked["keys"] += len(model.requests)


def _judge_doubts(found: Iterable[InDoubt], findings: Findings) -> None:
    """E13: a prepared transaction is left. L15: another one is open. [KIP-939, KIP-664]"""
    for item in found:
        if item.is_prepared:
            findings.add("E13", (item.system, item.name), f"it is {item.state}, and no time-out will end it")
        else:
            findings.add("L15", (item.system, item.name), f"it is still {item.state}")
