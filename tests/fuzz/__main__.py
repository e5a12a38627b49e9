"""`python -m tests.fuzz [--executions N] [--target NAME]`: coverage-guided fuzzing of every target, two at a time.

Each target runs in a process of its own, because libFuzzer ends its process. What is found is written to
`.cache/fuzz/<target>`, one file an input, and ends the run with exit code 1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from random import SystemRandom
from typing import Any

from tests.fuzz.targets import TARGETS

PROCESSES = 2


def _run(name: str, executions: int, seed: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.fuzz.guided", name, str(executions), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        return {"target": name, "executions": 0, "found": f"it ended with {done.returncode}: {done.stderr[-2000:]}"}
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--executions", type=int, default=1_000_000, help="over all targets, by their shares")
    parser.add_argument("--target", choices=TARGETS, help="this one alone")
    parser.add_argument("--seed", type=int, default=SystemRandom().randrange(1, 1 << 31))
    options = parser.parse_args()
    chosen = [TARGETS[options.target]] if options.target else list(TARGETS.values())
    total = sum(target.share for target in chosen)
    print(f"seed {options.seed}")
    print(f"{'target':<14}{'executions':>12}{'refused':>10}{'slowest':>10}{'grown':>10}{'processor':>11}")
    found = []
    done = 0
    with ThreadPoolExecutor(PROCESSES) as pool:
        runs = [
            pool.submit(_run, target.name, -(-options.executions * target.share // total), options.seed)
            for target in sorted(chosen, key=lambda target: -target.share)
        ]
        for run in runs:
            item = run.result()
            done += item["executions"]
            if item["found"] is not None:
                found.append(f"{item['target']}: {item['found']}")
            if "refused" in item:
                print(
                    f"{item['target']:<14}{item['executions']:>12}{item['refused']:>10}"
                    f"{item['slowest_ms']:>7} ms{item['grown_mib']:>6} MiB{item['cpu_s']:>9} s",
                    flush=True,
                )
    print(f"{done} executions, {len(found)} findings")
    print("\n".join(found))
    return bool(found)


if __name__ == "__main__":
    raise SystemExit(main())
