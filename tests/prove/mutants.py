"""Semel with one protection taken away, many times over: the proof's instruments must notice each within minutes.

A mutant is a change of the source, as text. The tree under `src` is copied, the change is made there, and an
instrument runs from the copy, processes and all: `semel prove` on the shop, or rows of the failpoint enumeration
(tests/failpoints/run.py), which bring about at once what a campaign meets by luck. What these two do not see, because
it takes the loss of power or a message that is late by seconds, is the simulation's: tests/simulation/mutants.py.

    python -m tests.prove.mutants                 every mutant, one after the other
    python -m tests.prove.mutants --list
    python -m tests.prove.mutants "offsets outside the transaction"

A text that is not found exactly once is an error: a protection that was moved must be found again by hand.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from hatch_build import EXTENSIONS, SUFFIX, build

__all__ = ["MUTANTS", "Mutant", "Trial", "apply", "kill"]

ROOT = Path(__file__).resolve().parents[2]
LIMIT_SECONDS = 300.0
"""A mutant has to be found within this time, all tries together."""
MINUTES = 0.3
"""How long one campaign sends and breaks."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """`edits` are (file under src/semel, text as it is, text instead)."""

    name: str
    edits: tuple[tuple[str, str, str], ...]
    cases: str = ""
    """A regular expression over failpoint cases that must find it; empty: a campaign must."""
    faults: str = "kill,pause"
    """What `semel prove` is to do to it."""


def _mutant(name: str, file: str, old: str, new: str, cases: str = "", faults: str = "kill,pause") -> Mutant:
    return Mutant(name, ((file, old, new),), cases, faults)


MUTANTS: tuple[Mutant, ...] = (
    # The engine.
    _mutant(
        "no way back after an abort",
        "processing/engine.py",
        "            if offsets and not await self._steer(self._consumer.seek(offsets)):\n                return\n",
        "",
        "^unit.before_end_transaction:raise:second",
    ),
    _mutant(
        "the inner loop stands one record behind",
        "processing/_quick.c",
        "    run->position = offset + 1;\n",
        "    run->position = offset;\n",
    ),
    _mutant(
        "offsets outside the transaction",
        "processing/engine.py",
        "                await self._producer.send_offsets(offsets, group)\n"
        '                failpoint("unit.before_end_transaction")\n'
        "                unit.is_ending = True\n"
        "                await self._producer.end_transaction(True)\n",
        "                await self._producer.end_transaction(True)\n"
        "                self._producer.begin()\n"
        "                await self._producer.send_offsets(offsets, group)\n"
        '                failpoint("unit.before_end_transaction")\n'
        "                unit.is_ending = True\n"
        "                await self._producer.end_transaction(True)\n",
        "^unit.before_end_transaction:kill",
    ),
    _mutant(
        "offsets before the outputs, in a transaction of their own",
        "processing/engine.py",
        "            self._measures.transaction_began(self._env.monotonic)\n            try:\n",
        "            self._measures.transaction_began(self._env.monotonic)\n            try:\n"
        "                await self._producer.send_offsets(offsets, group)\n"
        "                await self._producer.end_transaction(True)\n"
        "                self._producer.begin()\n",
        "^unit.after_produce:kill:second",
    ),
    _mutant(
        "state is not brought up to date",
        "processing/restore.py",
        "                store.restored(record.key, None if value is None else Entry(value, record.timestamp_ms))\n",
        "                store.restored\n",
        "^unit.before_produce:kill",
    ),
    _mutant(
        "where to go on is asked while a transaction of the last owner is open",
        "processing/restore.py",
        "require_stable=True",
        "require_stable=False",
    ),
    _mutant(
        "a record that cannot be processed is passed over",
        "processing/handling.py",
        "        topic = self._component.parks.get(record.topic)\n",
        "        return True\n        topic = self._component.parks.get(record.topic)\n",
        "^handler.before:kill",
    ),
    # The client.
    _mutant(
        "offsets are committed for whoever says so (no member, no generation)",
        "client/producer.py",
        "            generation_id=group.generation_id,\n            member_id=group.member_id,\n"
        "            group_instance_id=group.group_instance_id,\n",
        '            generation_id=-1,\n            member_id="",\n            group_instance_id=None,\n',
    ),
    _mutant(
        "an EndTxn without an answer counts as done",
        "client/transaction.py",
        "        if request.kind is Kind.EndTxn:\n            self._end_in_doubt = True\n",
        "        if request.kind is Kind.EndTxn:\n            self._end_in_doubt = True\n"
        "            self._ended(self.identity)\n",
        "^broker.(before|after)_prepare:kill",
    ),
    _mutant(
        "readers see uncommitted records",
        "client/fetcher.py",
        '            "isolation_level": _READ_COMMITTED,\n',
        '            "isolation_level": 0,\n',
        "^unit.after_produce:(kill|raise)",
    ),
    # The ingress.
    _mutant(
        "an outcome is not kept",
        "ingress/owner.py",
        "        return [*effects, self._keep(record, scope, seen, answer, is_failed), self._reply(request, answer)]\n",
        "        return [*effects, self._reply(request, answer)]\n",
        "^ingress.after_append:kill",
    ),
    _mutant(
        "a key is good for any request",
        "ingress/owner.py",
        "        elif verdict is Verdict.REUSED:\n",
        "        elif False:\n",
    ),
    _mutant(
        "replies go to whoever waits",
        "ingress/gateway.py",
        "            future = waiting.get(reply.number)\n",
        "            future = next(iter(waiting.values()), None)\n",
    ),
    _mutant(
        "a request that was not taken is answered as accepted",
        "ingress/gateway.py",
        "            self._append_failed = True\n            raise NotTaken(str(error)) from error\n",
        "            self._append_failed = True\n            return None\n",
    ),
    # The sink.
    _mutant(
        "a sink's position moves whoever owns it",
        "sinks/sql/positions.py",
        "WHERE {_ROW} AND owner_epoch = ? AND next_offset = ?\n",
        "WHERE {_ROW} AND (owner_epoch = ? AND next_offset = ? OR 1 = 1)\n",
    ),
    _mutant(
        "the position before the effects, in a transaction of its own",
        "sinks/sql/sink.py",
        '            failpoint("sink.before_effects")\n',
        '            database.commit()\n            database.begin()\n            failpoint("sink.before_effects")\n',
        "^sink.before_effects:kill:first",
    ),
    _mutant(
        "a sink's bad records are passed over",
        "sinks/sql/sink.py",
        "            parking.write(self._database, "
        "{move.partition: move.key for move in moves}, self._env.wall_ms())\n",
        "",
        "^sink.before_park:kill",
    ),
    # The broker.
    _mutant(
        "a batch that is there already is appended again",
        "log/producer_state.py",
        "                        return batch\n",
        "                        return None\n",
        "^broker.after_append:(kill|stop)",
    ),
    _mutant(
        "one partition gets no marker",
        "broker/transactions.py",
        "            if partition is not None:  # Deleted meanwhile: there is nothing to end.\n",
        "            if partition is not None and item.partition != 1:\n",
        "^unit.after_produce:kill",
    ),
    _mutant(
        "a decision is not written before its markers",
        "broker/transactions.py",
        "        self._settle(prepared)\n        self._persist(prepared, now_ms)\n",
        "        self._settle(prepared)\n        self.coordinator.complete(prepared)\n",
        "^broker.between_markers:kill",
    ),
    _mutant(
        "read_committed reads to the end",
        "broker/apis/fetch.py",
        "        upper = source.last_stable_offset if self._committed_only else source.high_watermark\n",
        "        upper = source.high_watermark\n",
        "^unit.after_produce:kill",
    ),
    _mutant(
        "nobody learns which transactions were aborted",
        "broker/apis/fetch.py",
        "                    aborted = source.aborted_transactions(entry.offset, end)\n",
        "                    aborted = []\n",
        "^unit.after_produce:(kill|raise)",
    ),
    _mutant(
        "offsets count whatever becomes of their transaction",
        "broker/groups.py",
        "        records = self.coordinator.end_transaction(producer_id, commit)\n",
        "        records = self.coordinator.end_transaction(producer_id, True)\n",
        "^unit.before_end_transaction:(kill|raise)",
    ),
    _mutant(
        "a restarted broker has forgotten the committed offsets",
        "broker/groups.py",
        "            self.coordinator.replay(key, value, now_ms)\n",
        "            continue\n",
        "^broker.after_append:kill",
    ),
    _mutant(
        "a new owner of a transactional id does not fence the old one",
        "coordinator/transaction.py",
        "        return (self._new_producer_id(), 0) if epoch >= EPOCH_MAX else (producer_id, epoch + 1)\n",
        "        return producer_id, epoch\n",
    ),
)


def apply(mutant: Mutant, source: Path) -> None:
    """Change the tree at `source` (a copy of src/semel). Raises `ValueError` for a text that is not there once."""
    for name, old, new in mutant.edits:
        path = source / name
        text = path.read_text(encoding="utf-8")
        if text.count(old) != 1:
            raise ValueError(f"{mutant.name}: the text is {text.count(old)} times in {name}: {old!r}")
        path.write_text(text.replace(old, new), encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Trial:
    """What became of one mutant. `found` holds the anomalies by class, or what else gave it away; empty: it lives."""

    mutant: Mutant
    found: str
    tries: int
    seconds: float


def kill(mutant: Mutant, seed: int = 1) -> Trial:
    """Run the mutant's instrument until it notices, or until the time is over."""
    began = time.monotonic()
    tries, found = 0, ""
    with tempfile.TemporaryDirectory(prefix="semel-mutant-") as folder:
        shutil.copytree(ROOT / "src", folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        apply(mutant, Path(folder) / "semel")
        if any(name.endswith(".c") for name, _, _ in mutant.edits):
            for extension in EXTENSIONS:
                build(extension, Path(folder) / f"{extension}{SUFFIX}", root=Path(folder))
        while not found and (left := began + LIMIT_SECONDS - time.monotonic()) > 0:
            run = _cases if mutant.cases else _campaign
            found = run(mutant, Path(folder), seed + tries, left)
            tries += 1
    return Trial(mutant, found, tries, time.monotonic() - began)


def _start(folder: Path, *command: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        env=environment,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def _end(process: subprocess.Popen[str]) -> None:
    """Interrupt it, so that it ends what it started, some of which is in sessions of its own."""
    for number, seconds in ((signal.SIGINT, 20.0), (signal.SIGKILL, 5.0)):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, number)
            process.wait(seconds)


def _cases(mutant: Mutant, folder: Path, seed: int, seconds: float) -> str:
    """The first failpoint case that does not come out clean."""
    results = folder / f"cases-{seed}"
    results.mkdir()
    shutil.copy(ROOT / "tests/failpoints/passes.json", results)  # Counting again would take a minute.
    process = _start(folder, "tests.failpoints.run", "--results", str(results), "--jobs", "1", "--only", mutant.cases)
    timer = threading.Timer(seconds, _end, [process])
    timer.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.split(" ", 1)[0] in ("anomaly", "stuck", "broken"):
                return " ".join(line.split())[:300]
            for path in results.glob("results-*.jsonl"):
                if '"restarted": true' in path.read_text():
                    return f"stood still until it was started anew: {' '.join(line.split())}"
        return ""
    finally:
        timer.cancel()
        _end(process)


def _campaign(mutant: Mutant, folder: Path, seed: int, seconds: float) -> str:
    """What gave the mutant away to `semel prove`: anomalies by class, or that there was no verdict."""
    process = _start(
        folder,
        *("semel", "prove", "semel.examples.shop:app", "--seed", str(seed), "--faults", mutant.faults),
        *("--minutes", str(MINUTES), "--every", "0.8", "--keep", str(folder / f"run-{seed}")),
        *("--format", "json", "--report", str(folder / f"report-{seed}.html")),
    )
    try:
        said, _ = process.communicate(timeout=seconds)
        outcome = json.loads((said.strip().splitlines() or [""])[-1])
    except subprocess.TimeoutExpired:
        return ""
    except json.JSONDecodeError:
        return f"no verdict, exit code {process.returncode}"
    finally:
        _end(process)
    return ", ".join(f"{kind} {number}" for kind, number in sorted(outcome["anomalies"].items()))


def main() -> int:
    """Run them; the exit code is 1 when one lives."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of names; default: every mutant")
    parser.add_argument("--list", action="store_true", help="only tell the names")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if not options.names or any(part in mutant.name for part in options.names)]
    if options.list:
        print("\n".join(mutant.name for mutant in chosen))
        return 0
    alive = 0
    for mutant in chosen:
        trial = kill(mutant, options.seed)
        alive += not trial.found
        print(f"{mutant.name}: {trial.found or 'LIVES'} ({trial.tries} runs, {trial.seconds:.0f} s)", flush=True)
    print(f"{len(chosen) - alive} of {len(chosen)} found")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
