"""The whole enumeration: `python -m tests.failpoints.run --jobs 2 --results FOLDER`.

Results are lines of JSON, written as cases end; a second run with the same folder leaves out what was clean. `--only`
takes a regular expression over case names such as `unit.before_produce:kill:second`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from semel.failpoints import FAILPOINTS
from tests.failpoints.chain import Chain, Result
from tests.failpoints.plan import SCENES, Case, cases

WARM_UP_CASES = 3
"""Before passes are counted: an empty log is not rolled, and there is nothing in it to recover."""
CASES_A_CHAIN = 40
"""Then a new one begins: logs grow, and what a chain holds is compared whole at its end."""


async def count(folder: Path) -> dict[str, int]:
    """How often a process comes by each point in its scene."""
    ordinary = {"broker.before_append", "unit.before_produce", "ingress.admitted", "producer.before_prepare"}
    passes: dict[str, int] = {}
    async with Chain(folder / "counting") as chain:
        for _ in range(WARM_UP_CASES):
            await chain.count("unit.before_produce")
        for point in [*sorted(ordinary), *SCENES]:
            found = await chain.count(point)
            role = FAILPOINTS[point].role
            common = {name for name in found if FAILPOINTS[name].role == role and name not in SCENES}
            passes |= {name: found[name] for name in (common if point in ordinary else {point}) if name in found}
            print(f"counted {point}: {passes.get(point, 0)}", flush=True)
    return passes


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The last result of every case."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("results-*.jsonl")):
        for line in path.read_text().splitlines():
            item = json.loads(line)
            found[item["case"]] = item
    return found


async def work(folder: Path, todo: list[Case], job: int) -> None:
    """Run cases one after the other, in chain after chain."""
    number = 0
    with (folder / f"results-{job}.jsonl").open("a") as out:

        def write(result: Result) -> None:
            out.write(json.dumps(asdict(result)) + "\n")
            out.flush()
            print(f"{result.outcome:9} {result.seconds:6.2f} s {result.case} {result.detail}", flush=True)

        while todo:
            number += 1
            here, todo = todo[:CASES_A_CHAIN], todo[CASES_A_CHAIN:]
            async with Chain(folder / f"job-{job}" / f"chain-{number}") as chain:
                while here:
                    case = here.pop(0)
                    result = await chain.run(case)
                    for share in (1, 2, 4):
                        if result.outcome != "unreached" or case.which != "last":
                            break
                        # How often a process comes by is not the same in every run: take the last pass of this one.
                        result = await chain.run(case._replace(hit=max(2, result.passed // share)))
                    write(result)
                    if result.outcome != "clean":
                        todo = here + todo
                        break
                else:
                    findings = chain.check()
                    if not findings.clean:
                        write(Result(f"chain {job}-{number} as a whole", "anomaly", findings.summary()))
                    else:
                        subprocess.run(["rm", "-rf", str(chain.folder)], check=False)


def report(folder: Path, passes: dict[str, int]) -> str:
    """Figures in a few lines."""
    wanted = {str(case): case for case in cases(passes)}
    found = {name: item for name, item in read(folder).items() if name in wanted}
    outcomes = Counter(item["outcome"] for item in found.values())
    covered = {name.split(":")[0] for name, item in found.items() if item["outcome"] == "clean"}
    restarted = sorted(name for name, item in found.items() if item["restarted"])
    lines = [
        f"{len(FAILPOINTS)} points, {len(wanted)} cases, {len(found)} run: "
        + ", ".join(f"{n} {name}" for name, n in sorted(outcomes.items())),
        f"points with a clean case: {len(covered)} ({100 * len(covered) / len(FAILPOINTS):.1f} %); "
        f"cases covered: {100 * outcomes['clean'] / max(1, len(wanted)):.1f} %",
        f"went on only after a restart: {len(restarted)}",
        *(f"  {name}" for name in restarted),
        *(
            f"  {item['outcome']} {name}: {item['detail']}"
            for name, item in found.items()
            if item["outcome"] != "clean"
        ),
    ]
    return "\n".join(lines)


def main() -> int:
    """Count, share the cases out to jobs, wait, report; the exit code is 1 when a case is not clean."""
    parser = argparse.ArgumentParser(prog="python -m tests.failpoints.run")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="regular expression over case names")
    parser.add_argument("--job", type=int, default=-1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder: Path = options.results
    folder.mkdir(parents=True, exist_ok=True)
    counted = folder / "passes.json"
    if not counted.exists():
        counted.write_text(json.dumps(asyncio.run(count(folder)), indent=1))
    passes = json.loads(counted.read_text())
    never = sorted(name for name in FAILPOINTS if not passes.get(name))
    if never:
        print("no process comes by:", ", ".join(never), flush=True)
        passes |= dict.fromkeys(never, 1)
    done = {name for name, item in read(folder).items() if item["outcome"] == "clean"}
    todo = [case for case in cases(passes) if str(case) not in done and re.search(options.only, str(case))]
    if options.job >= 0:
        asyncio.run(work(folder, todo[options.job :: options.jobs], options.job))
        return 0
    command = [sys.executable, "-m", "tests.failpoints.run", "--results", str(folder), "--jobs", str(options.jobs)]
    jobs = [
        subprocess.Popen([*command, "--only", options.only, "--job", str(number)]) for number in range(options.jobs)
    ]
    for job in jobs:
        job.wait()
    print(report(folder, passes))
    return int(any(item["outcome"] != "clean" for item in read(folder).values()))


if __name__ == "__main__":
    raise SystemExit(main())
