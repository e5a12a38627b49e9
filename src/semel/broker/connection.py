"""One client connection on a non-blocking socket.

The rules, each with its reason:
one `recv_into` per readiness event, so that no fast sender starves the others; one request in processing, so that
responses keep the order of requests; nothing more is read while output waits, so that a slow reader costs no memory;
a frame's length is checked before anything is allocated for it, and memory is taken as its bytes come.
Idle connections own no buffer.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from collections import deque
from collections.abc import Callable
from typing import Protocol

from semel.broker.exchange import Answer, Later, Part, Parts, Peer
from semel.disk import disk
from semel.errors import ProtocolError
from semel.log.log import Slice

__all__ = ["Connection", "Core"]

log = logging.getLogger("semel.broker")

RECEIVE_BYTES = 256 * 1024
"""Scratch buffer that all connections of a thread share; small requests are read in place."""
SEND_BYTES = 128 * 1024
"""Step of copying a log slice to a socket; more does not get faster (bench/BROKER_CEILING.md)."""
SEND_BUFFER_BYTES = 256 * 1024
SENDFILE_BUFFER_BYTES = 100 * 1024
"""SO_SNDBUF by copying and by sendfile: the kernel's auto-tuned buffer of several MB doubles the CPU per byte."""
FIRST_ALLOCATION = 2 * 1024 * 1024
"""A larger frame gets its memory in doubling steps as it arrives: announcing 100 MB costs the sender 100 MB."""
POOLED_BUFFERS = 16
PENDING_LIMIT = 1024 * 1024
"""Bytes that are read ahead of a request in processing before reading stops."""
FAREWELL_SECONDS = 0.5
"""After a refusal the client has so long to close the connection itself."""
WRITE_BUDGET = 4 * 1024 * 1024
"""Bytes sent to one connection before the others have their turn."""
_HAS_SENDFILE = sys.platform == "linux"
SENDFILE_BYTES = 1024 * 1024
"""Step of sending a log slice by the kernel."""
_MORE = getattr(socket, "MSG_MORE", 0)


class ByteSocket(Protocol):
    """What a connection does with its socket, which does not block: `BlockingIOError` says that it would."""

    def setblocking(self, flag: bool, /) -> None: ...
    def setsockopt(self, level: int, option: int, value: int, /) -> None: ...
    def fileno(self) -> int: ...
    def recv_into(self, into: memoryview, /) -> int: ...
    def send(self, data: bytes | memoryview, flags: int, /) -> int: ...
    def close(self) -> None: ...


class Core(Protocol):
    """What a connection needs from the broker behind it."""

    def handle(self, frame: memoryview, peer: Peer) -> Parts | Later | None:
        """Answer one request frame. Raises `ProtocolError` when the connection is to be closed."""

    def encode(self, later: Later, answer: Answer) -> Parts | None:
        """The bytes of an answer that came later."""


class Buffers:
    """Memory that the connections of one event loop share: scratch, never kept over a call, and a pool for frames."""

    def __init__(self) -> None:
        self.receive = memoryview(bytearray(RECEIVE_BYTES))
        self.send = memoryview(bytearray(SEND_BYTES))
        self._free: list[bytearray] = []

    def take(self, size: int) -> bytearray:
        """A buffer of at least `size` bytes with any content, for one frame. Fresh memory costs more than a copy."""
        for number, buffer in enumerate(self._free):
            if size <= len(buffer) <= 4 * size:
                return self._free.pop(number)
        return bytearray(size)

    def give_back(self, buffer: bytearray) -> None:
        """The frame was processed."""
        if len(buffer) <= FIRST_ALLOCATION and len(self._free) < POOLED_BUFFERS:
            self._free.append(buffer)


class Connection:
    """Bytes in, frames to the core, answers out."""

    def __init__(
        self,
        sock: ByteSocket,
        peer: Peer,
        core: Core,
        loop: asyncio.AbstractEventLoop,
        buffers: Buffers,
        on_close: Callable[[Connection], None],
    ) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        is_kernel_socket = _HAS_SENDFILE and isinstance(sock, socket.socket)
        buffer_bytes = SENDFILE_BUFFER_BYTES if is_kernel_socket else SEND_BUFFER_BYTES
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
        self.peer = peer
        self.last_active = loop.time()
        self.closed = False
        self._socket = sock
        self._fd = sock.fileno()
        self._is_kernel_socket = is_kernel_socket
        self._core = core
        self._loop = loop
        self._buffers = buffers
        self._on_close = on_close
        self._frame: bytearray | None = None  # A frame of which only `_filled` bytes are here; its size is `_size`.
        self._filled = 0
        self._size = 0
        self._pending = bytearray()  # Bytes behind a request in processing, or less than a length prefix.
        self._output: deque[Part] = deque()
        self._later: Later | None = None
        self._farewell: asyncio.TimerHandle | None = None
        self._reading = True
        self._writing = False
        loop.add_reader(self._fd, self._on_readable)

    def __repr__(self) -> str:
        state = "closed" if self.closed else "waiting" if self._later else "sending" if self._output else "idle"
        return f"<Connection {self.peer.client_host} {state}>"

    @property
    def idle(self) -> bool:
        """Whether nothing is in processing and nothing waits to be sent."""
        return self._later is None and not self._output

    @property
    def waits_for_us(self) -> bool:
        """Whether a request is in processing: a silence that is not the client's."""
        return self._later is not None

    def close(self) -> None:
        """Forget the connection; a request in processing is abandoned."""
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)
        self._socket.close()
        self._output.clear()
        self._pending.clear()
        self._frame = None
        if self._later is not None:
            self._later.close()
            self._later = None
        self._on_close(self)

    # --- Receiving ---

    def _on_readable(self) -> None:
        if self._frame is not None:
            into = memoryview(self._frame)[self._filled : self._size]
        else:
            into = self._buffers.receive
        try:
            count = self._socket.recv_into(into)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            count = 0
        if count == 0:
            self.close()
            return
        self.last_active = self._loop.time()
        if self._frame is not None:
            into.release()
            self._filled += count
            self._grow_or_finish(self._frame)
        elif self._pending or not self.idle:
            self._pending += self._buffers.receive[:count]
            self._consume_pending()
        else:
            self._consume(self._buffers.receive[:count])
        self._settle()

    def _grow_or_finish(self, frame: bytearray) -> None:
        if self._filled == self._size:
            self._frame = None
            self._process(memoryview(frame)[: self._size])
            self._buffers.give_back(frame)
        elif self._filled == len(frame):
            larger = bytearray(min(self._size, 2 * len(frame)))
            larger[: self._filled] = frame
            self._frame = larger

    def _consume_pending(self) -> None:
        """Go on with what was read ahead, as far as the connection is free for it."""
        if self._pending and self.idle and self._frame is None:
            data, self._pending = self._pending, bytearray()
            self._consume(memoryview(data))

    def _consume(self, data: memoryview) -> None:
        """Cut frames out of `data` and process them; keep what is left over."""
        at, end = 0, len(data)
        while end - at >= 4 and not self.closed:
            if self._later is not None or self._has_much_output():
                break
            size = int.from_bytes(data[at : at + 4], "big", signed=True)
            if not 0 <= size <= self.peer.max_frame_bytes:
                log.info("closing %r: it announced a frame of %d bytes", self, size)
                self.close()
                return
            at += 4
            if end - at < size:
                self._start_frame(size, data[at:])
                return
            self._process(data[at : at + size])
            at += size
        if not self.closed and at < end:
            self._pending += data[at:]

    def _has_much_output(self) -> bool:
        """Whether output must go first: file slices, or replies that a socket may not take at once."""
        return len(self._output) > 64 or (bool(self._output) and isinstance(self._output[-1], Slice))

    def _start_frame(self, size: int, head: memoryview) -> None:
        frame = self._buffers.take(max(min(size, FIRST_ALLOCATION), len(head)))
        frame[: len(head)] = head
        self._frame, self._filled, self._size = frame, len(head), size

    def _process(self, frame: memoryview) -> None:
        try:
            reply = self._core.handle(frame, self.peer)
        except ProtocolError as error:
            log.info("closing %r: %s", self, error)
            self._flush()
            self.close()
        except MemoryError:
            # What is in the files and what is in memory may differ now. The process' own handler ends it.
            self.close()
            raise
        except Exception:
            # The request may have taken effect or not: an answer would be a guess, so the client gets none.
            log.exception("closing %r: its request failed", self)
            self.close()
        else:
            if isinstance(reply, Later):
                self._later = reply
                reply.deliver = self._deliver
            elif reply:
                self._output.extend(reply)

    # --- Answering ---

    def _deliver(self, answer: Answer) -> None:
        """A later answer has come: send it, then go on with the requests behind it."""
        later, self._later = self._later, None
        if self.closed or later is None:
            return
        try:
            reply = self._core.encode(later, answer)
        except Exception:
            log.exception("closing %r: its answer cannot be encoded", self)
            self.close()
            return
        if reply:
            self._output.extend(reply)
        self._settle()

    def _settle(self) -> None:
        """After anything happened: send, go on with pending frames while that is possible, read if there is room."""
        while not self.closed:
            if self._output and not self._writing:
                self._flush()
            before = len(self._pending)
            self._consume_pending()
            if len(self._pending) == before and (not self._output or self._writing):
                break
        if self.closed:
            return
        if self.peer.leaving and self.idle and self._farewell is None:
            # Some clients that see the end of the connection together with the last answer do not read the answer.
            self._farewell = self._loop.call_later(FAREWELL_SECONDS, self.close)
        wanted = not self._writing and len(self._pending) < PENDING_LIMIT
        if wanted and not self._reading:
            self._loop.add_reader(self._fd, self._on_readable)
        elif not wanted and self._reading:
            self._loop.remove_reader(self._fd)
        self._reading = wanted

    def _flush(self) -> None:
        """Send output until it is gone, the socket is full, or the turn is over."""
        budget = WRITE_BUDGET
        output = self._output
        try:
            while output and budget > 0:
                sent, complete = self._send_slice() if isinstance(output[0], Slice) else self._send_bytes()
                budget -= sent
                if not complete:
                    break
        except (BlockingIOError, InterruptedError):
            budget = 0
        except OSError:
            self.close()
            return
        waiting = bool(output)
        if waiting and not self._writing:
            self._loop.add_writer(self._fd, self._on_writable)
        elif not waiting and self._writing:
            self._loop.remove_writer(self._fd)
        self._writing = waiting

    def _on_writable(self) -> None:
        self.last_active = self._loop.time()
        self._flush()
        self._settle()

    def _send_bytes(self) -> tuple[int, bool]:
        """Send the leading bytes parts in one call. Returns what was sent and whether that was all of them."""
        output = self._output
        parts = [output.popleft()]
        while output and isinstance(output[0], bytes):
            parts.append(output.popleft())
        data = parts[0] if len(parts) == 1 else b"".join(parts)  # type: ignore[arg-type]
        assert isinstance(data, bytes)
        try:
            sent = self._socket.send(data, _MORE if output else 0)
        except OSError:
            output.appendleft(data)
            raise
        if sent < len(data):
            output.appendleft(data[sent:])
        return sent, sent == len(data)

    def _send_slice(self) -> tuple[int, bool]:
        """Send one step of the leading slice; by the kernel alone where it can. Gives what `_send_bytes` gives."""
        output = self._output
        part = output[0]
        assert isinstance(part, Slice)
        sent, count = self._send_by_kernel(part) if self._is_kernel_socket else self._send_by_copy(part)
        if count <= 0:
            raise OSError(f"the log ends before byte {part.position} of file {part.file}")
        if sent == part.length:
            output.popleft()
        else:
            output[0] = Slice(part.file, part.position + sent, part.length - sent)
        return sent, sent == count

    def _send_by_kernel(self, part: Slice) -> tuple[int, int]:
        """(bytes sent, bytes that were to be sent, 0 at the end of the file)"""
        count = min(part.length, SENDFILE_BYTES)
        sent = disk.sendfile(self._fd, part.file, part.position, count)
        return sent, count if sent else 0

    def _send_by_copy(self, part: Slice) -> tuple[int, int]:
        """The same through our memory."""
        step = self._buffers.send[: min(part.length, SEND_BYTES)]
        count = disk.preadv(part.file, [step], part.position)
        if count <= 0:
            return 0, 0
        more = count < part.length or len(self._output) > 1
        return self._socket.send(step[:count], _MORE if more else 0), count
