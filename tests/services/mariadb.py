"""A real MariaDB for tests, from Debian's mariadb-server-core and mariadb-client-core.

It runs as a direct child of the test process, so that a kill is over when `kill` returns. As root it runs under a
system user, because the server refuses root.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from semel.processing.ports import free_ports
from tests.services.postgres import system_user
from tests.services.server import Server

__all__ = ["MariadbServer", "missing_mariadb"]

_SETTINGS = [
    "--bind-address=127.0.0.1",
    "--skip-name-resolve",
    "--character-set-server=utf8mb4",
    "--innodb-flush-log-at-trx-commit=1",
    "--innodb-buffer-pool-size=32M",
    "--innodb-log-file-size=16M",
    "--performance-schema=OFF",
    "--max-connections=200",
]


def missing_mariadb() -> str:
    """Why there is no MariaDB to be had here; empty when there is."""
    if importlib.util.find_spec("pymysql") is None:
        return "pymysql is not installed"
    programs = [name for name in ("mariadbd", "mariadb-install-db") if _program(name) is None]
    return f"{' and '.join(programs)} not found (Debian: mariadb-server-core mariadb-client-core)" if programs else ""


def _program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/bin")


class MariadbServer(Server):
    """A server with its own folder and port; both stay the same over `kill` and `start`."""

    title = "MariaDB"

    def __init__(self) -> None:
        super().__init__(Path(tempfile.mkdtemp(prefix="semel-my-", dir="/tmp")))
        self.port = free_ports(1)[0]
        self.folder.chmod(0o755)
        self._as: list[str] = []
        if os.getuid() == 0:
            user = system_user()
            os.chown(self.folder, user.pw_uid, user.pw_gid)
            self._as = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
        self._databases = 0
        program = _program("mariadb-install-db")
        assert program is not None
        command = [*self._as, program, "--no-defaults", f"--datadir={self.folder}/data", "--skip-test-db"]
        command += ["--auth-root-authentication-method=normal", "--innodb-log-file-size=16M"]
        done = subprocess.run(command, capture_output=True, text=True, cwd="/", env=self._environment(), check=False)
        if done.returncode:
            raise RuntimeError(f"mariadb-install-db failed:\n{done.stdout}\n{done.stderr}")

    def url(self, database: str = "mysql") -> str:
        """The URL of one of its databases."""
        return f"mariadb://root@127.0.0.1:{self.port}/{database}"

    def new_database(self) -> str:
        """Make an empty database; its URL."""
        self._databases += 1
        name = f"test_{self._databases}"
        self.run(f"CREATE DATABASE {name}")
        return self.url(name)

    def run(self, *statements: str) -> list[tuple[object, ...]]:
        """Statements as an administrator would run them; the rows of the last one."""
        import pymysql

        connection = pymysql.connect(host="127.0.0.1", port=self.port, user="root", autocommit=True)
        with connection, connection.cursor() as cursor:
            for statement in statements:
                cursor.execute(statement)
            return list(cursor.fetchall())

    def start(self) -> MariadbServer:
        """Start the server, and return once it takes connections."""
        program = _program("mariadbd")
        assert program is not None
        command = [*self._as, program, "--no-defaults", f"--datadir={self.folder}/data", f"--port={self.port}"]
        command += [f"--socket={self.folder}/s.sock", f"--pid-file={self.folder}/mariadbd.pid", *_SETTINGS]
        self._launch(command, self._takes_connections)
        return self

    def _environment(self) -> dict[str, str]:
        return os.environ | {"LC_ALL": "C"}

    def _takes_connections(self) -> bool:
        import pymysql

        with contextlib.suppress(pymysql.Error):
            pymysql.connect(host="127.0.0.1", port=self.port, user="root", connect_timeout=2).close()
            return True
        return False

    def stop(self) -> None:
        """Kill the server and remove its folder."""
        if self._process is not None and self._process.poll() is None:
            self.kill()
        subprocess.Popen(["rm", "-rf", str(self.folder)], start_new_session=True)  # No test waits for it.
