"""A TCP proxy before a database that cuts the connection at a word: before the server has it, or before it answers."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Literal

from semel.databases import Database

When = Literal["never", "before", "at", "after"]


class CuttingProxy:
    """`when`: `before` COMMIT reaches the server; `at`: it is on its way; `after` the answer, which is swallowed.

    The cut happens once; `refuse` keeps new connections out.
    """

    def __init__(self, port: int, word: bytes = b"COMMIT") -> None:
        self._word = word
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.when: When = "never"
        self.refuse = False
        self.cuts = 0
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def close(self) -> None:
        self._listener.close()

    def cut_again(self, database: Database, when: When) -> None:
        """Cut at the first word on the next connection that `database` opens: at the COMMIT that settles one."""
        connect = database.connect

        def connect_and_arm() -> None:
            connect()
            database.connect = connect  # type: ignore[method-assign]
            self.when = when

        database.connect = connect_and_arm  # type: ignore[method-assign]

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.refuse:
                client.close()
                continue
            server = socket.create_connection(("127.0.0.1", self._target))
            threading.Thread(target=self._serve, args=(client, server), daemon=True).start()

    def _serve(self, client: socket.socket, server: socket.socket) -> None:
        swallow = threading.Event()
        back = threading.Thread(target=self._back, args=(client, server, swallow), daemon=True)
        back.start()
        with contextlib.suppress(OSError):
            while data := client.recv(65536):
                if self._word in data and self.when != "never":
                    when, self.when = self.when, "never"
                    self.cuts += 1
                    if when == "after":
                        swallow.set()
                        server.sendall(data)
                        back.join()  # It ends with the answer.
                    elif when == "at":
                        swallow.set()  # A quick answer would be there before the end.
                        server.sendall(data)
                    break
                server.sendall(data)
        for end in (client, server):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _back(self, client: socket.socket, server: socket.socket, swallow: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(65536):
                if swallow.is_set():
                    return
                client.sendall(data)
        if not swallow.is_set():
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)  # The server hung up.
