"""The extensions in C, compiled from the source as it is now, whatever was installed."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from hatch_build import CannotBuild, build

from tests.conftest import unavailable

__all__ = ["compiled"]


def compiled(extension: str, folder: Path) -> Any:
    """The module of `semel/wire/_codec` and its like; every warning of the compiler is an error."""
    target = folder / f"{Path(extension).name}.abi3.so"
    try:
        build(extension, target, "-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Werror")
    except CannotBuild as why:
        unavailable(f"{extension}.c", str(why))
    spec = spec_from_file_location(extension.replace("/", "."), target)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
