"""Which process is the owner: written into position rows, so that whoever takes over knows it for certain.

A process id alone names a stranger after a reboot or a wrap-around, so the start time, the boot and the process
namespace stand beside it. What is read here comes from Linux' /proc; elsewhere no process is ever ended by another.
"""

from __future__ import annotations

import os
import re
import signal
import socket
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

__all__ = ["ProcessIdentity", "end_stopped", "is_alive", "lock_holder"]

_TEXT = re.compile(r"host=(\S+) pid=(\d+) started=(\d+)")


class ProcessIdentity(NamedTuple):
    """`host` names machine, boot and process namespace; `started` is in clock ticks since boot."""

    host: str
    pid: int
    started: int

    def __str__(self) -> str:
        return f"host={self.host} pid={self.pid} started={self.started}"

    @classmethod
    def current(cls) -> ProcessIdentity:
        """This process."""
        pid = os.getpid()
        _, started = _state(pid) or ("", 0)
        return cls(_host(), pid, started)

    @classmethod
    def parse(cls, text: str) -> ProcessIdentity | None:
        """The identity in an owner text; None when there is none."""
        match = _TEXT.search(text)
        return cls(match[1], int(match[2]), int(match[3])) if match else None


@cache
def _host() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        boot, namespace = "", ""
    return f"{socket.gethostname()}/{boot}/{namespace}"


def _state(pid: int) -> tuple[str, int] | None:
    """State letter and start time of a process (proc_pid_stat(5), fields 3 and 22); None when it is not there."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[19])


def is_alive(identity: ProcessIdentity) -> bool:
    """Whether that process runs on this host. Where there is no /proc, its number alone decides."""
    if identity.host != _host():
        return False
    if Path("/proc/self/stat").exists():
        state = _state(identity.pid)
        return state is not None and state[1] == identity.started and state[0] not in "ZX"
    try:
        os.kill(identity.pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return True


def end_stopped(pid: int, owners: Iterable[str]) -> bool:
    """SIGKILL this process of this host if it is stopped and one of `owners` (`ProcessIdentity.parse`); whether it was.

    For one that holds a lock which nobody else gets before somebody lets it go on.
    """
    identities = map(ProcessIdentity.parse, owners)
    return any(identity is not None and identity.pid == pid and _kill_if_stopped(identity) for identity in identities)


def _kill_if_stopped(identity: ProcessIdentity) -> bool:
    """SIGKILL a process of this host that is stopped (SIGSTOP, a debugger); whether it was."""
    if identity.host != _host() or identity.pid == os.getpid() or not hasattr(os, "pidfd_open"):
        return False
    try:
        # The descriptor stands for this process even if its number is given to another one meanwhile.
        process = os.pidfd_open(identity.pid)
    except OSError:
        return False
    try:
        state = _state(identity.pid)
        if state is None or state[1] != identity.started or state[0] not in "Tt":
            return False
        signal.pidfd_send_signal(process, signal.SIGKILL)
    except OSError:
        return False
    finally:
        os.close(process)
    return True


def lock_holder(path: Path, byte: int) -> int | None:
    """The process that holds a POSIX lock on one byte of a file; None when nobody does or it cannot be known.

    Read from /proc/locks: opening and closing the file here would drop the locks that this process holds on it.
    """
    try:
        inode = path.stat().st_ino
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        # 1: POSIX  ADVISORY  WRITE 1234 fe:00:5678 120 120
        fields = line.split()
        if len(fields) < 8 or fields[1] != "POSIX" or fields[3] != "WRITE":
            continue
        last = float("inf") if fields[7] == "EOF" else int(fields[7])
        if fields[5].rpartition(":")[2] == str(inode) and int(fields[6]) <= byte <= last:
            return int(fields[4])
    return None
