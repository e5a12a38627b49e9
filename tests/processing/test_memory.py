"""A worker's process keeps the memory of one unit of work for the next."""

from __future__ import annotations

import subprocess
import sys

from tests.conftest import unavailable

UNITS = """
import resource, sys
from semel.processing.memory import prepare_memory
if not prepare_memory():
    sys.exit(3)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def unit():
    before = faults()
    records = [bytes(1_000) for _ in range(10_000)]
    batches = [b"".join(records[at : at + 500]) for at in range(0, len(records), 500)]
    del records, batches
    return faults() - before
print([unit() for _ in range(5)])
"""


def test_the_next_unit_gets_the_memory_of_the_last_and_no_page_of_the_kernel() -> None:
    done = subprocess.run([sys.executable, "-c", UNITS], capture_output=True, text=True, timeout=120)
    if done.returncode == 3:
        unavailable("mallopt", "the C library is not glibc")
    assert done.returncode == 0, done.stderr
    first, *others = eval(done.stdout)
    assert first > 4_000, "20 MB in pages of 4 KB"
    assert sorted(others)[len(others) // 2] < first / 10
