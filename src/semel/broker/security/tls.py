"""TLS under a connection: the handshake, bounded in time and number, and a socket that a `Connection` can use.

OpenSSL works on the non-blocking socket itself, so a TLS connection follows the same rules as a plain one: nothing is
read while output waits, and no task or buffer stands between the two.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Callable
from typing import Any

from semel.broker.connection import Connection
from semel.broker.exchange import ANONYMOUS
from semel.broker.security.settings import TlsFiles
from semel.errors import ConfigurationError

__all__ = [
    "HANDSHAKES_MAX",
    "Certificates",
    "Handshake",
    "Handshakes",
    "TlsConnection",
    "TlsSocket",
    "principal_of",
    "server_context",
]

log = logging.getLogger("semel.broker.security")

HANDSHAKE_SECONDS = 10.0
"""A handshake that takes longer is given up; a slow one across the world takes one second."""
HANDSHAKES_MAX = 1_024
"""Handshakes at the same time; each holds OpenSSL's buffers, about 50 KB."""
SILENT_SECONDS = 1.0
"""When all places are taken, the oldest handshake goes if it has been silent for so long: half-open ones lock nobody
out, and a storm of real clients does not push itself out."""
_NAMES = {
    "commonName": "CN",
    "countryName": "C",
    "organizationName": "O",
    "organizationalUnitName": "OU",
    "localityName": "L",
    "stateOrProvinceName": "ST",
    "streetAddress": "STREET",
    "domainComponent": "DC",
    "userId": "UID",
}
"""OpenSSL's names of the attributes that RFC 2253 has keywords for; others keep OpenSSL's."""


def server_context(files: TlsFiles) -> ssl.SSLContext:
    """The context of a TLS listener. Raises `ConfigurationError`, which shows paths and never what is in them."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    try:
        # A function, because OpenSSL asks on the terminal where it is given no password.
        context.load_cert_chain(files.keystore, files.key, lambda: files.key_password)
    except (OSError, ValueError) as error:
        where = f"{files.keystore}" + (f" and {files.key}" if files.key else "")
        raise ConfigurationError(
            f"ssl.keystore: no certificate with its key could be read from {where}: {_why(error)}. "
            "Both must be PEM; ssl.key.password is needed for an encrypted key."
        ) from None
    if files.client_auth != "none":
        assert files.truststore is not None
        context.verify_mode = ssl.CERT_REQUIRED if files.client_auth == "required" else ssl.CERT_OPTIONAL
        try:
            context.load_verify_locations(files.truststore)
        except (OSError, ValueError) as error:
            raise ConfigurationError(
                f"ssl.truststore.location: no certificate could be read from {files.truststore}: {_why(error)}."
            ) from None
    return context


class Certificates:
    """The context of the TLS listeners, and its files: what they hold is renewed while the broker runs."""

    def __init__(self, files: TlsFiles) -> None:
        """Raises `ConfigurationError`."""
        self._files = files
        self.context = server_context(files)
        self._seen = self._changed_at()

    def __repr__(self) -> str:
        return f"<Certificates {self._files.keystore}>"

    def refresh(self) -> None:
        """Take a new certificate for new connections; a pair of files that do not fit keeps the old one."""
        now = self._changed_at()
        if now == self._seen:
            return
        self._seen = now
        try:
            server_context(self._files)  # A half-written pair must not reach the context in use.
            self.context.load_cert_chain(self._files.keystore, self._files.key, lambda: self._files.key_password)
        except (ConfigurationError, OSError) as error:
            log.error("the changed TLS certificate is not taken, the old one stays: %s", error)
        else:
            log.info("the TLS certificate was read anew from %s", self._files.keystore)

    def _changed_at(self) -> list[int]:
        found = []
        for path in (self._files.keystore, self._files.key):
            with contextlib.suppress(OSError):
                found.append(path.stat().st_mtime_ns if path is not None else 0)
        return found


def _why(error: Exception) -> str:
    return getattr(error, "reason", None) or getattr(error, "strerror", None) or type(error).__name__


def principal_of(certificate: dict[str, Any] | None) -> str:
    """`User:CN=...,O=...` of a client's certificate, most specific part first (RFC 2253), as Kafka names it."""
    if not certificate:
        return ANONYMOUS
    parts = [
        "+".join(f"{_NAMES.get(name, name)}={_quoted(value)}" for name, value in relative)
        for relative in reversed(certificate.get("subject", ()))
    ]
    return f"User:{','.join(parts)}" if parts else ANONYMOUS


def _quoted(value: str) -> str:
    text = "".join(f"\\{character}" if character in ',+"\\<>;' else character for character in value)
    if text.startswith(("#", " ")):
        text = f"\\{text}"
    if text.endswith(" ") and len(text) > 1:
        text = f"{text[:-1]}\\ "
    return text


class TlsSocket:
    """An established TLS connection with the few methods of a non-blocking socket that `Connection` needs."""

    def __init__(self, sock: ssl.SSLSocket) -> None:
        self._sock = sock
        self.setblocking = sock.setblocking
        self.setsockopt = sock.setsockopt
        self.fileno = sock.fileno
        self._broken: OSError | None = None

    def __repr__(self) -> str:
        return f"<TlsSocket {self._sock.version()}>"

    def recv_into(self, into: memoryview) -> int:
        """What is there, as far as there is room; raises `BlockingIOError` where nothing is, as a socket does.

        OpenSSL gives one TLS record of 16 KiB at a time: a turn of the event loop for each would cost as much again.
        """
        if self._broken is not None:
            raise self._broken
        try:
            count = self._sock.recv_into(into)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None
        try:
            while count < len(into) and (more := self._sock.recv_into(into[count:]) if count else 0):
                count += more
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            pass
        except OSError as error:
            self._broken = error  # What came before it counts.
        return count

    def pending(self) -> bool:
        """Whether there is something to read that no readiness event will tell of."""
        return self._broken is not None or self._sock.pending() > 0

    def send(self, data: bytes | memoryview, _flags: int = 0) -> int:
        """Send as many whole TLS records as the socket takes. What is left must be offered again, unchanged."""
        view = memoryview(data)
        sent = 0
        while sent < len(view):
            try:
                sent += self._sock.send(view[sent:])
            except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
                if sent == 0:
                    raise BlockingIOError from None
                break
        return sent

    def close(self) -> None:
        """Say goodbye if there is room for it, and close."""
        with contextlib.suppress(OSError, ValueError):
            self._sock.unwrap()
        self._sock.close()


class TlsConnection(Connection):
    """A connection whose bytes are encrypted."""

    _socket: TlsSocket
    _again: asyncio.Handle | None = None

    def _settle(self) -> None:
        super()._settle()
        if self._again is None and not self.closed and self._reading and self._socket.pending():
            self._again = self._loop.call_soon(self._read_decrypted)

    def _read_decrypted(self) -> None:
        self._again = None
        if not self.closed and self._reading:
            self._on_readable()


class Handshake:
    """One TLS handshake; ends with `on_done(self)` or by itself, closed."""

    def __init__(
        self,
        sock: ssl.SSLSocket,
        host: str,
        loop: asyncio.AbstractEventLoop,
        on_done: Callable[[Handshake], None],
        on_end: Callable[[Handshake], None],
    ) -> None:
        self.sock = sock
        self.host = host
        self.last_heard = loop.time()
        self._loop = loop
        self._fd = sock.fileno()
        self._on_done = on_done
        self._on_end = on_end
        self._writing = False
        self._timer = loop.call_later(HANDSHAKE_SECONDS, self.give_up, f"not done after {HANDSHAKE_SECONDS:g} s")
        loop.add_reader(self._fd, self._step)

    def __repr__(self) -> str:
        return f"<Handshake with {self.host}>"

    def _step(self) -> None:
        self.last_heard = self._loop.time()
        writing = False
        try:
            self.sock.do_handshake()
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLWantWriteError:
            writing = True
        except (OSError, ValueError) as error:
            self.give_up(_why(error))
            return
        else:
            self._leave()
            self._on_done(self)
            return
        if writing and not self._writing:
            self._loop.add_writer(self._fd, self._step)
        elif self._writing and not writing:
            self._loop.remove_writer(self._fd)
        self._writing = writing

    def give_up(self, why: str) -> None:
        """Close the connection."""
        log.info("no TLS connection with %s: %s", self.host, why)
        self._leave()
        self.sock.close()

    def _leave(self) -> None:
        self._timer.cancel()
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)
        self._on_end(self)


class Handshakes:
    """The handshakes in progress, oldest first."""

    def __init__(self, loop: asyncio.AbstractEventLoop, limit: int = HANDSHAKES_MAX) -> None:
        self._loop = loop
        self._limit = limit
        self._open: dict[Handshake, None] = {}

    def __repr__(self) -> str:
        return f"<Handshakes, {len(self._open)} in progress>"

    def __len__(self) -> int:
        return len(self._open)

    def begin(
        self, context: ssl.SSLContext, sock: socket.socket, host: str, on_done: Callable[[Handshake], None]
    ) -> bool:
        """Begin one. False when there is no place for it; the socket is the caller's then."""
        if len(self._open) >= self._limit:
            oldest = next(iter(self._open))
            if self._loop.time() - oldest.last_heard < SILENT_SECONDS:
                return False
            oldest.give_up("silent, and others wait")
        sock.setblocking(False)
        wrapped = context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        handshake = Handshake(wrapped, host, self._loop, on_done, self._forget)
        self._open[handshake] = None
        return True

    def close(self) -> None:
        """Close all of them."""
        for handshake in list(self._open):
            handshake.give_up("the broker stops")

    def _forget(self, handshake: Handshake) -> None:
        self._open.pop(handshake, None)
