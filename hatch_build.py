"""Builds what is there in C beside Python, where there is a C compiler: see docs/decisions/0008-codec-in-c.md.

An installation never fails because of it: `semel.wire.codec` and `semel.processing.quick` do without.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import sys_tags

ROOT = Path(__file__).parent / "src"
EXTENSIONS = ("semel/wire/_codec", "semel/processing/_quick")
SUFFIX = ".abi3.so"
COMPILE_SECONDS = 300


class CannotBuild(Exception):
    """There is no extension on this machine; the message says why."""


def build(extension: str, target: Path, *options: str, root: Path = ROOT) -> Path:
    """Compile one of EXTENSIONS, whose source is under `root`, to `target`. CC and CFLAGS say with what, as everywhere.

    Raises `CannotBuild`.
    """
    if sys.implementation.name != "cpython" or sysconfig.get_config_var("Py_GIL_DISABLED") or os.name != "posix":
        raise CannotBuild("the extensions are for CPython with its lock, on Linux and macOS")
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared", "-fPIC"]
    include = [f"-I{sysconfig.get_path(name)}" for name in ("include", "platinclude")]
    argv = [*compiler, *shared, "-std=c11", "-O3", "-fvisibility=hidden", *include]
    argv += [*shlex.split(os.environ.get("CFLAGS", "")), *options, str(root / f"{extension}.c"), "-o", str(target)]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotBuild(str(error)) from error
    if done.returncode or not target.exists():
        raise CannotBuild(f"{compiler[0]} ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    return target


class InC(BuildHookInterface[Any]):
    """The hook of pyproject.toml: puts the extensions into a wheel, or beside their sources for an editable one."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="semel-build-")  # Lives as long as the hook.
        for extension in EXTENSIONS:
            name = f"{extension}{SUFFIX}"
            target = ROOT / name if version == "editable" else Path(self._folder.name, Path(name).name)
            target.unlink(missing_ok=True)
            try:
                build(extension, target)
            except CannotBuild as why:
                self.app.display_warning(f"semel is installed without {Path(name).stem} in C, and is slower: {why}")
                return
            if version != "editable":
                build_data["force_include"][str(target)] = name
        platform = next(tag.platform for tag in sys_tags() if not tag.platform.startswith(("manylinux", "musllinux")))
        build_data["pure_python"] = False
        build_data["tag"] = f"cp311-abi3-{platform}"
