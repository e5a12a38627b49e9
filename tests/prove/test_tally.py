"""What a history adds up to: effects, executions and recoveries."""

from __future__ import annotations

from semel.history import Batch, BatchPart, Event, Strike, Unit, UnitInput
from semel.prove.tally import Runs, tally

SECOND = 1_000_000_000


def unit(at: float, process: str, partition: int, offsets: list[int], outcome: str = "ok") -> list[Event]:
    attempt = f"{process}-1234-{int(at * 1000)}"
    ns = int(at * SECOND)
    invoke = Unit(
        t=ns - 1,
        type="invoke",
        a=attempt,
        component="reserve",
        inputs=[UnitInput("orders", partition, offsets, [2] * len(offsets))],
    )
    return [invoke, Unit(t=ns, type=outcome, a=attempt)]  # type: ignore[arg-type]


def strike(at: float, over: float, kind: str, target: str) -> list[Event]:
    name = f"campaign-0-1-{int(at * 1000)}"
    return [
        Strike(t=int(at * SECOND), type="invoke", a=name, kind=kind, target=target),
        Strike(t=int(over * SECOND), type="ok", a=name, kind=kind, target=target, outcome="done"),
    ]


def in_order(*groups: list[Event]) -> list[Event]:
    return sorted((event for group in groups for event in group), key=lambda event: event.t)


def test_effects_are_those_that_were_committed() -> None:
    part = BatchPart("orders", 0, 1, 0, 4, [0, 1, 2], [3])
    batch: list[Event] = [
        Batch(t=5 * SECOND, type="invoke", a="worker-0-9-1", component="totals", parts=[part]),
        Batch(t=5 * SECOND + 1, type="info", a="worker-0-9-1"),
        Batch(t=5 * SECOND + 2, type="ok", a="worker-0-9-1"),
    ]
    found = tally(
        in_order(
            unit(1, "worker-0", 0, [0, 1]),
            unit(2, "worker-0", 0, [2], outcome="fail"),
            unit(3, "worker-1", 0, [2, 3]),
            unit(4, "worker-1", 0, [4], outcome="info"),
            batch,
        )
    )
    assert (found.outputs, found.applied, found.effects, found.commits) == (8, 3, 11, 3)
    assert found.runs == {"reserve": Runs(inputs=5, again=1, executions=6), "totals": Runs(3, 0, 3)}


def test_a_recovery_lasts_until_every_partition_of_the_struck_process_is_committed_to_again() -> None:
    found = tally(
        in_order(
            unit(1, "worker-0", 0, [0]),
            unit(1.1, "worker-0", 1, [0]),
            unit(1.2, "worker-1", 2, [0]),
            strike(2, 2, "kill", "worker-0"),
            unit(2.5, "worker-1", 2, [1]),  # never was worker-0's
            unit(3, "worker-1", 0, [1]),
            unit(4, "worker-0", 1, [1]),
            unit(9, "worker-0", 1, [2]),
        )
    )
    (recovery,) = found.recoveries
    assert (recovery.kind, recovery.target, recovery.seconds) == ("kill", "worker-0", 2.0)
    assert found.recovery_seconds(0.99) == 2.0


def test_a_fault_of_the_broker_is_over_when_all_partitions_go_on() -> None:
    found = tally(
        in_order(
            unit(1, "worker-0", 0, [0]),
            unit(1.2, "worker-1", 2, [0]),
            strike(2, 5, "pause", "broker-0"),
            unit(5.5, "worker-0", 0, [1]),
            unit(6, "worker-1", 2, [1]),
        )
    )
    assert [recovery.seconds for recovery in found.recoveries] == [1.0]


def test_what_was_not_seen_to_recover_has_no_time() -> None:
    found = tally(in_order(unit(1, "worker-0", 0, [0]), strike(2, 2, "kill", "worker-0")))
    assert [recovery.seconds for recovery in found.recoveries] == [None]
    assert found.recovery_seconds(0.5) is None


def test_an_http_instance_is_back_with_its_next_answer() -> None:
    events = in_order(unit(1, "worker-0", 0, [0]), strike(2, 2, "kill", "http-1"))
    found = tally(events, {"http-1": [SECOND, 3 * SECOND, 4 * SECOND], "http-0": [2 * SECOND]})
    assert [recovery.seconds for recovery in found.recoveries] == [1.0]


def test_strikes_that_did_nothing_are_no_faults() -> None:
    name = "campaign-0-1-1"
    events: list[Event] = [
        Strike(t=1, type="invoke", a=name, kind="kill", target="worker-0"),
        Strike(t=2, type="fail", a=name, kind="kill", target="worker-0"),
    ]
    assert tally(events).recoveries == []


def test_where_faults_overlap_a_recovery_begins_with_the_end_of_the_last() -> None:
    found = tally(
        in_order(
            unit(1, "worker-0", 0, [0]),
            unit(1.2, "worker-1", 1, [0]),
            strike(2, 2, "kill", "worker-0"),
            strike(3, 6, "pause", "worker-1"),
            unit(6.5, "worker-0", 0, [1]),
            unit(7, "worker-1", 1, [1]),
        )
    )
    assert [(item.kind, item.seconds) for item in found.recoveries] == [("kill", 0.5), ("pause", 1.0)]
    assert [item.back for item in found.recoveries] == [6_500_000_000, 7_000_000_000]
