"""What is a shortage that may pass, and what comes of one while a process starts: it ends, and can be started again."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from semel.processing.shortage import PATIENCE_SECONDS, Shortages, is_shortage

LOADER = "_ctypes.cpython-311-x86_64-linux-gnu.so: failed to map segment from shared object"


@pytest.mark.parametrize(
    ("error", "short"),
    [
        (MemoryError(), True),
        (OSError(errno.EMFILE, "Too many open files"), True),
        (OSError(errno.ENOENT, "No such file"), False),
        (ImportError(LOADER), True),
        (ModuleNotFoundError("No module named 'psycopg'"), False),
        (RuntimeError("can't start new thread"), True),
        (ValueError("memory"), False),
    ],
)
def test_what_a_shortage_is(error: Exception, short: bool) -> None:
    assert is_shortage(error) is short


def test_patience_ends_and_is_each_record_s_own() -> None:
    now = 100.0
    shortages = Shortages(lambda: now)
    assert shortages.may_pass(("in", 0, 7), MemoryError())
    now += PATIENCE_SECONDS - 1
    assert shortages.may_pass(("in", 0, 7), MemoryError())
    assert shortages.may_pass(("in", 1, 7), MemoryError())
    now += 2
    assert not shortages.may_pass(("in", 0, 7), MemoryError())
    assert shortages.may_pass(("in", 1, 7), MemoryError())
    assert not shortages.may_pass(("in", 1, 7), ValueError("its own fault"))


@pytest.mark.parametrize("module", ["psycopg", "shop"])
def test_a_process_that_starts_without_memory_is_not_taken_for_set_up_wrongly(tmp_path: Path, module: str) -> None:
    """Exit code 2 would stop the whole deployment; any other one is a restart."""
    (tmp_path / f"{module}.py").write_text(f"raise ImportError({LOADER!r})")
    code = (
        "from semel.ops.loading import load_app; load_app('shop:app')"
        if module == "shop"
        else "import semel.databases.postgres"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"ImportError: {LOADER}"
