"""The whole enumeration: `python -m tests.failpoints.run --jobs 2 --results FOLDER`.

Results are lines of JSON, written as cases end; a second run with the same folder leaves out what was clean. `--only`
takes a regular expression over case names such as `unit.before_produce:kill:second`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Any

from tests.failpoints.chain import Chain, Result
from tests.failpoints.plan import PARKING, POINTS, Case, Scene, cases, scene_of

_FINE = ("clean", "unreached")
WARM_UP_CASES = 9
"""Before passes are counted: an empty log is not rolled, and it takes some compacted segments to merge two."""
TOGETHER = 18
"""Cases of one chain: under one load, or one after the other. What it holds is compared whole at the end."""


async def count(folder: Path) -> dict[str, int]:
    """How often a process comes by each point in its scene."""
    scenes: dict[str, list[str]] = {}
    for name, point in POINTS.items():
        scenes.setdefault(f"{point.role} {scene_of(name)}", []).append(name)
    passes: dict[str, int] = {}
    async with Chain(folder / "counting") as chain:
        for _ in range(WARM_UP_CASES):
            await chain.count("unit.before_produce")
        for names in scenes.values():
            found = await chain.count(names[0])
            passes |= {name: found.get(name, 0) for name in names}
            print(f"counted {len(passes)} of {len(POINTS)}", flush=True)
    return passes


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The result of every case: the clean one, if there is one, for what was clean is not run again."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("results-*.jsonl")):
        for line in path.read_text().splitlines():
            item = json.loads(line)
            if item["case"] not in found or found[item["case"]]["outcome"] != "clean":
                found[item["case"]] = item
    return found


async def work(folder: Path, todo: list[Case], job: int) -> None:
    """Run cases: those without a scene many at a time, the others and what was not clean one after the other."""
    together = [
        case
        for case in todo
        if scene_of(case.point) == Scene()
        and POINTS[case.point].role != "app"
        and not (case.action == "raise" and case.point in PARKING)
    ]
    dual = [case for case in todo if scene_of(case.point).dual]
    alone = [case for case in todo if case not in together and case not in dual]
    rows = [[case for case in together if POINTS[case.point].role == role] for role in ("broker", "worker", "http")]
    ordered = [case for cases_ in zip_longest(*rows) for case in cases_ if case is not None]
    number = 0
    with (folder / f"results-{job}.jsonl").open("a") as out:

        def write(result: Result) -> None:
            out.write(json.dumps(asdict(result)) + "\n")
            out.flush()
            print(f"{result.outcome:9} {result.seconds:6.2f} s {result.case} {result.detail}", flush=True)

        while ordered or dual or alone:
            number += 1
            rows_left = [row for row in (dual, ordered, alone) if row]
            row = rows_left[number % len(rows_left)]
            here = row[:TOGETHER]
            del row[:TOGETHER]
            place = folder / f"job-{job}" / f"chain-{number}"
            async with Chain(place, dual=row is dual) as chain:
                if row is alone:
                    results: list[Result] = []
                    while here and all(result.outcome in _FINE for result in results):
                        results.append(await run_alone(chain, here.pop(0)))
                    alone += here
                    if not chain.check().clean:
                        results.append(Result(f"chain {job}-{number} as a whole", "anomaly", chain.check().summary()))
                else:
                    results = await chain.stream(here)
                    alone += [case for case in here if _of(case, results).outcome != "clean"]
                for result in results:
                    write(result)
            if all(result.outcome in _FINE for result in results):
                shutil.rmtree(place)


def _of(case: Case, results: list[Result]) -> Result:
    return next(result for result in results if result.case == str(case))


async def run_alone(chain: Chain, case: Case) -> Result:
    """One case. How often a process comes by is not the same in every run: the last pass of this one counts."""
    result = await chain.run(case)
    for share in (1, 2, 4):
        if result.outcome != "unreached" or case.which != "last":
            break
        result = await chain.run(case._replace(hit=max(2, result.passed // share)))
    return result


def report(folder: Path, passes: dict[str, int]) -> str:
    """Figures in a few lines."""
    wanted = {str(case): case for case in cases(passes)}
    found = {name: item for name, item in read(folder).items() if name in wanted}
    outcomes = Counter(item["outcome"] for item in found.values())
    covered = {name.split(":")[0] for name, item in found.items() if item["outcome"] == "clean"}
    restarted = sorted(name for name, item in found.items() if item["restarted"])
    lines = [
        f"{len(POINTS)} points, {len(wanted)} cases, {len(found)} run: "
        + ", ".join(f"{n} {name}" for name, n in sorted(outcomes.items())),
        f"points with a clean case: {len(covered)} ({100 * len(covered) / len(POINTS):.1f} %); "
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
    never = sorted(name for name in POINTS if not passes.get(name))
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
