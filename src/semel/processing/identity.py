"""Who a process is, the same after every restart: so that a restart fences and replaces its dead predecessor.

A random id would leave the predecessor's open transaction to its time-out, and readers waiting for it.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress

from semel.env import Env
from semel.errors import ConfigurationError
from semel.settings import Settings

__all__ = ["instance_id", "transactional_id"]

_INSTANCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def instance_id(settings: Settings, env: Env) -> str:
    """The identity of this host in this deployment: `SEMEL_INSTANCE`, else one made once and kept in the data folder.

    Raises `ConfigurationError` when it is no fit name or the folder cannot be written.
    """
    if settings.instance:
        return _checked(settings.instance, "SEMEL_INSTANCE")
    path = settings.data / "instance"
    try:
        settings.data.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            # Written beside and linked in place, so that two first starts agree on one of the two ids.
            fresh = settings.data / f"instance.{os.getpid()}.{env.new_id().hex}"
            fresh.write_text(env.new_id().hex[:8] + "\n")
            with suppress(FileExistsError):
                os.link(fresh, path)
            fresh.unlink()
        return _checked(path.read_text().strip(), str(path))
    except OSError as error:
        raise ConfigurationError(
            f"the instance id cannot be kept in {path}: {error.strerror or error}. "
            "Give SEMEL_DATA a folder that this user can write, or set SEMEL_INSTANCE."
        ) from error


def transactional_id(app: str, component: str, instance: str, slot: int) -> str:
    """The transactional id, and the group instance id, of one component in one worker slot."""
    return f"{app}.{component}.{instance}.{slot}"


def _checked(name: str, source: str) -> str:
    if not _INSTANCE.fullmatch(name):
        raise ConfigurationError(
            f"{source} says {name!r}: an instance id has 1 to 64 letters, digits, '_' and '-', no dots."
        )
    return name
