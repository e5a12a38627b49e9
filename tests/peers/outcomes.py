"""What a suite of others found: a file in `results` made by `make peers`, and the table of them in docs/broker.md.

Every test of a suite ends as one of three: it passed; it failed, and `reasons.toml` says why; it does not apply, and
`reasons.toml` says why. A failure without a reason fails `make peers`, and so does a reason that is no longer needed.
"""

from __future__ import annotations

import fnmatch
import json
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

__all__ = ["RESULTS", "TITLES", "Verdict", "does_not_apply", "rendered", "settle"]

HERE = Path(__file__).parent
RESULTS = HERE / "results"
REASONS = HERE / "reasons.toml"

TITLES = {
    "librdkafka": "librdkafka's test-runner",
    "kafka-python": "kafka-python's integration tests",
    "java-tools": "Apache Kafka's own tools",
    "streams": "Kafka Streams, exactly_once_v2",
    "copier": "TransactionalMessageCopier with kill -9",
    "aiokafka": "aiokafka's documented examples",
    "kcat": "kcat",
    "franz-go": "franz-go's kgo tests",
}
"""Every suite, in the order of the table."""

State = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True)
class Verdict:
    """How one test ended; `detail` is the suite's own word for a failure or a skip."""

    state: State
    detail: str = ""


@dataclass(frozen=True)
class _Reasons:
    fails: Mapping[str, str] = field(default_factory=dict)
    does_not_apply: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, suite: str) -> _Reasons:
        table = tomllib.loads(REASONS.read_text()).get(suite, {})
        return cls(table.get("fails", {}), table.get("does-not-apply", {}))


def _reason(test: str, patterns: Mapping[str, str]) -> str | None:
    # Brackets stand in the names of parametrized tests, so they are no pattern here.
    for pattern, why in patterns.items():
        if fnmatch.fnmatchcase(test, pattern.replace("[", "[[]")):
            return why
    return None


def does_not_apply(suite: str, test: str) -> bool:
    """Whether `reasons.toml` says that there is no use in running this test."""
    return _reason(test, _Reasons.of(suite).does_not_apply) is not None


def settle(
    suite: str,
    source: str,
    verdicts: Mapping[str, Verdict],
    *,
    retried: Mapping[str, str] | None = None,
    on_kafka: Callable[[str], State] | None = None,
) -> None:
    """Write the result of a suite and assert that everything that did not pass is explained.

    `retried` names tests that passed only when they were run again, with what had failed. `on_kafka` runs one test on
    Apache Kafka 4.3.1: asked for every failure, so that "there too" is seen and not said.
    """
    reasons = _Reasons.of(suite)
    passed = sorted(test for test, verdict in verdicts.items() if verdict.state == "passed")
    failed: dict[str, str] = {}
    beside: dict[str, str] = {}
    unexplained = []
    for test, verdict in sorted(verdicts.items()):
        if verdict.state == "passed":
            continue
        why = _reason(test, reasons.does_not_apply)
        if why is not None:
            beside[test] = why
            continue
        why = _reason(test, reasons.fails)
        if why is None:
            unexplained.append(f"{test} {verdict.state}: {verdict.detail[:500]}")
        else:
            failed[test] = why
    assert verdicts, f"{suite} ran no test"
    assert not unexplained, "not passed and not explained in reasons.toml:\n" + "\n".join(unexplained)
    there = {test: on_kafka(test) for test in failed} if on_kafka is not None else {}
    RESULTS.mkdir(exist_ok=True)
    found = {
        "suite": suite,
        "from": source,
        "passed": passed,
        "failed": failed,
        "does not apply": beside,
        "passed when run again": dict(retried or {}),
        "on Apache Kafka 4.3.1": there,
    }
    (RESULTS / f"{suite}.json").write_text(json.dumps(found, indent=1) + "\n")
    needless = [pattern for pattern in reasons.fails if not any(_reason(test, {pattern: ""}) == "" for test in failed)]
    assert not needless, f"reasons.toml explains failures that are none: {needless}"


# --- The table ---


def _grouped(tests: Mapping[str, str]) -> dict[str, list[str]]:
    """Reasons, each with the tests it holds for."""
    found: dict[str, list[str]] = {}
    for test, why in tests.items():
        found.setdefault(why, []).append(test)
    return found


def _named(tests: list[str]) -> str:
    if len(tests) > 4:
        return f"{len(tests)} tests, `{tests[0]}` to `{tests[-1]}`"
    return ", ".join(f"`{test}`" for test in tests)


def rendered() -> str:
    """The section of docs/broker.md: a row for each suite, then every failure and everything that does not apply."""
    lines = ["| suite | from | passed | of those that apply | do not apply |", "|---|---|---|---|---|"]
    notes: list[str] = []
    total_passed = total = 0
    for suite, title in TITLES.items():
        path = RESULTS / f"{suite}.json"
        if not path.exists():
            continue
        found = json.loads(path.read_text())
        passed, failed, beside = len(found["passed"]), found["failed"], found["does not apply"]
        applies = passed + len(failed)
        total_passed += passed
        total += applies
        share = f"{passed / applies:.1%}" if applies else "-"
        lines.append(f"| {title} | {found['from']} | {passed} | {applies} ({share}) | {len(beside)} |")
        there = found["on Apache Kafka 4.3.1"]
        for why, tests in _grouped(failed).items():
            same = all(there.get(test) == "failed" for test in tests)
            notes.append(f"- {title}, fails{' (on Apache Kafka too)' if same else ''}: {_named(tests)}. {why}")
        for why, tests in _grouped(beside).items():
            notes.append(f"- {title}, does not apply: {_named(tests)}. {why}")
        if found["passed when run again"]:
            notes.append(f"- {title}, passed when run again, alone: {_named(sorted(found['passed when run again']))}.")
    lines.append(f"| all | | {total_passed} | {total} ({total_passed / max(total, 1):.1%}) | |")
    return "\n".join([*lines, "", *notes])
