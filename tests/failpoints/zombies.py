"""Zombies: `python -m tests.failpoints.zombies --runs 50 --results FOLDER`.

A worker is stopped at a failpoint between two durable steps for longer than every time-out. Somebody takes over, does
all the work, and the worker is continued: nothing may be doubled or torn, and it has to say that it was fenced and by
whom. Half of the runs have a successor in the zombie's place, half have another worker that waits for its session.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from tests.failpoints.chain import Chain
from tests.failpoints.children import SHORT_MS
from tests.failpoints.plan import POINTS, Case, Scene, scene_of

PAUSE_SECONDS = SHORT_MS / 1000 + 1
"""Longer than the session, the transaction's time-out and the broker's look at both."""
RUNS_A_CHAIN = 25
_FIRST_ROOMS = ("consume.after", "handler.", "owner.", "unit.", "producer.", "sink.")


def points() -> list[str]:
    """Where a worker stands between two durable steps of its work, in ordinary load."""
    return [
        name
        for name, point in POINTS.items()
        if point.role == "worker" and name.startswith(_FIRST_ROOMS) and scene_of(name) == Scene()
    ]


async def work(folder: Path, runs: int, job: int, jobs: int, seed: int) -> None:
    """Runs of this job, round by round over all points, so that an early end has seen each of them."""
    todo = [(run, name) for run in range(runs) for name in points()][job::jobs]
    rng = random.Random(f"{seed}:{job}")
    with (folder / f"zombies-{job}.jsonl").open("a") as out:
        while todo:
            async with Chain(folder / f"zombies-{job}") as chain:
                here, todo = todo[:RUNS_A_CHAIN], todo[RUNS_A_CHAIN:]
                while here:
                    run, name = here.pop(0)
                    elsewhere = run % 2 == 1
                    case = Case(name, "stop", str(run), rng.randint(1, 4))
                    result = await chain.run(case, pause=PAUSE_SECONDS, elsewhere=elsewhere)
                    line = asdict(result) | {"point": name, "elsewhere": elsewhere}
                    out.write(json.dumps(line) + "\n")
                    out.flush()
                    print(
                        f"{result.outcome:9} {result.seconds:5.1f} s {case} {result.zombie} {result.detail}", flush=True
                    )
                    if result.outcome not in ("clean", "unreached"):
                        todo = here + todo
                        (folder / f"zombies-{job}").rename(folder / f"zombies-{job}-{name}-{run}")
                        break


def report(folder: Path) -> str:
    """Figures in a few lines."""
    lines = [json.loads(text) for path in folder.glob("zombies-*.jsonl") for text in path.read_text().splitlines()]
    struck = [line for line in lines if line["outcome"] != "unreached"]
    by_point = Counter(line["point"] for line in struck)
    outcomes = Counter(line["outcome"] for line in struck)
    fenced = Counter(
        "it said that it was fenced, and by whom"
        if "FENCED" in line["zombie"] or "taken over by" in line["zombie"]
        else "it said that its partitions or transaction were lost"
        if "silent" not in line["zombie"]
        else "it said nothing"
        for line in struck
    )
    least, most = min(by_point.values(), default=0), max(by_point.values(), default=0)
    return "\n".join(
        [
            f"{len(struck)} zombies at {len(by_point)} of {len(points())} points, {least} to {most} a point: "
            + ", ".join(f"{n} {name}" for name, n in outcomes.items()),
            *(f"  {n} x {what}" for what, n in fenced.items()),
        ]
    )


def main() -> int:
    """Share the runs out to jobs, wait, report; the exit code is 1 when a run is not clean."""
    parser = argparse.ArgumentParser(prog="python -m tests.failpoints.zombies")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=50, help="runs a point")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--job", type=int, default=-1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    if options.job >= 0:
        asyncio.run(work(options.results, options.runs, options.job, options.jobs, options.seed))
        return 0
    jobs = [
        subprocess.Popen([sys.executable, "-m", "tests.failpoints.zombies", *sys.argv[1:], "--job", str(number)])
        for number in range(options.jobs)
    ]
    codes = [job.wait() for job in jobs]
    print(report(options.results))
    return int(any(codes) or "anomaly" in report(options.results))


if __name__ == "__main__":
    raise SystemExit(main())
