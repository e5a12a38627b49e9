"""One target in this process, guided by coverage: `python -m tests.fuzz.guided TARGET EXECUTIONS SEED`."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from random import Random

import atheris

with atheris.instrument_imports(include=["semel"]):
    from tests.fuzz.harness import Harness
    from tests.fuzz.mutate import mutated
    from tests.fuzz.targets import TARGETS

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "fuzz"
HANG_SECONDS = 60
"""Without any answer libFuzzer ends the process; what only takes more than a second is found by its own clock."""


def main(name: str, executions: int, seed: int) -> None:
    """Fuzz one target in this process; prints one line of JSON at its end."""
    target = TARGETS[name]
    harness = Harness(target)
    seeds = target.seeds()
    began = time.process_time()

    def report(found: str | None) -> None:
        figures = {
            "target": name,
            "executions": harness.executions,
            "refused": harness.refused,
            "slowest_ms": round(harness.slowest * 1000, 1),
            "grown_mib": harness.grown_bytes >> 20,
            "cpu_s": round(time.process_time() - began),
            "found": found,
        }
        print(json.dumps(figures), flush=True)

    def execute(data: bytes) -> None:
        try:
            harness(data)
        except AssertionError as problem:
            folder = CACHE / name
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"found-{seed}"
            path.write_bytes(data)
            report(f"{problem} ({path})")
            os._exit(1)
        if harness.executions >= executions:
            report(None)
            os._exit(0)

    def mutate(data: bytes, max_size: int, number: int) -> bytes:
        if number % 3 == 0:
            return bytes(atheris.Mutate(data, max_size))
        rng = Random(number)
        return mutated(data or rng.choice(seeds), seeds, rng)[:max_size]

    corpus = CACHE / name / f"corpus-{seed}"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(seeds):
        (corpus / f"seed-{number}").write_bytes(data)
    options = [
        "-max_len=65536",
        f"-timeout={HANG_SECONDS}",
        "-rss_limit_mb=1024",
        f"-seed={seed}",
        "-print_final_stats=0",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], execute, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
