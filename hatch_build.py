"""Builds the record codec in C beside the pure-Python one, where there is a C compiler; see docs/decisions/0008.

An installation never fails because of it: without the extension `semel.wire.codec` takes `semel.wire.pycodec`.
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

SOURCE = Path(__file__).parent / "src" / "semel" / "wire" / "_codec.c"
NAME = "_codec.abi3.so"
COMPILE_SECONDS = 300


class CannotBuild(Exception):
    """There is no extension on this machine; the message says why."""


def build(folder: Path, *options: str) -> Path:
    """Compile the extension into `folder`; raises `CannotBuild`. CC and CFLAGS say with what, as everywhere."""
    if sys.implementation.name != "cpython" or sysconfig.get_config_var("Py_GIL_DISABLED") or os.name != "posix":
        raise CannotBuild("the extension is for CPython with its lock, on Linux and macOS")
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared", "-fPIC"]
    include = [f"-I{sysconfig.get_path(name)}" for name in ("include", "platinclude")]
    target = folder / NAME
    argv = [*compiler, *shared, "-std=c11", "-O3", "-fvisibility=hidden", *include]
    argv += [*shlex.split(os.environ.get("CFLAGS", "")), *options, str(SOURCE), "-o", str(target)]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotBuild(str(error)) from error
    if done.returncode or not target.exists():
        raise CannotBuild(f"{compiler[0]} ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    return target


class RecordCodec(BuildHookInterface[Any]):
    """The hook of pyproject.toml: puts the extension into a wheel, or beside its source for an editable one."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            folder = SOURCE.parent
        else:
            self._folder = tempfile.TemporaryDirectory(prefix="semel-codec-")  # Lives as long as the hook.
            folder = Path(self._folder.name)
        (folder / NAME).unlink(missing_ok=True)
        try:
            built = build(folder)
        except CannotBuild as why:
            self.app.display_warning(f"semel is installed without its codec in C, and is slower: {why}")
            return
        if version != "editable":
            build_data["force_include"][str(built)] = f"semel/wire/{NAME}"
        platform = next(tag.platform for tag in sys_tags() if not tag.platform.startswith(("manylinux", "musllinux")))
        build_data["pure_python"] = False
        build_data["tag"] = f"cp311-abi3-{platform}"
