"""The proof's instruments find what is missing: see `mutants.py`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hatch_build import CannotBuild, build

from tests.conftest import unavailable
from tests.prove.mutants import MUTANTS, ROOT, Mutant, apply, kill


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_protection_is_still_where_the_mutant_takes_it_away(mutant: Mutant, tmp_path: Path) -> None:
    for name, _, _ in mutant.edits:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "src" / "semel" / name, tmp_path / name)
    apply(mutant, tmp_path)
    for name, _, _ in mutant.edits:
        if name.endswith(".c"):
            try:
                build(name.removesuffix(".c"), tmp_path / "built", root=tmp_path)
            except CannotBuild as why:
                unavailable(name, str(why))
        else:
            compile((tmp_path / name).read_text(encoding="utf-8"), name, "exec")


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_missing_protection_is_missed(mutant: Mutant) -> None:
    trial = kill(mutant)
    print(f"{trial.found} ({trial.tries} runs, {trial.seconds:.0f} s)")
    assert trial.found, f"alive after {trial.tries} runs in {trial.seconds:.0f} s"
