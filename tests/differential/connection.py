"""A raw connection: frames out, frames in, nothing behind the caller's back."""

from __future__ import annotations

import select
import socket
from typing import Any

from semel.client.describe import DescribedTransaction, decode_described
from semel.wire.messages import decode_response, encode_request

__all__ = ["Closed", "Connection"]

ANSWER_SECONDS = 30


class Closed(Exception):
    """The broker closed the connection."""


def _described(item: DescribedTransaction) -> dict[str, Any]:
    """As kio would give it."""
    return {
        "error_code": int(item.error),
        "transactional_id": item.transactional_id,
        "transaction_state": item.state,
        "transaction_timeout": item.timeout_ms,
        "transaction_start_time": item.start_ms,
        "producer_id": item.producer_id,
        "producer_epoch": item.producer_epoch,
        "partitions": [[found.topic, found.partition] for found in item.partitions],
    }


class Connection:
    """One connection; requests and answers strictly in turn."""

    def __init__(self, bootstrap: str, client_id: str) -> None:
        host, _, port = bootstrap.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), ANSWER_SECONDS)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._client_id = client_id
        self._expected: tuple[int, int] | None = None

    def close(self) -> None:
        self._socket.close()

    @property
    def waits(self) -> bool:
        """Whether an answer is to come."""
        return self._expected is not None

    def _exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            try:
                got = self._socket.recv(size - len(data))
            except ConnectionResetError:
                raise Closed from None
            if not got:
                raise Closed
            data += got
        return bytes(data)

    def send(self, key: int, version: int, /, *, answered: bool = True, **fields: Any) -> None:
        assert self._expected is None
        try:
            self._socket.sendall(encode_request(key, version, 1, self._client_id, **fields))
        except (BrokenPipeError, ConnectionResetError):
            raise Closed from None
        if answered:
            self._expected = (key, version)

    def ready(self, seconds: float) -> bool:
        """Whether something came, or comes within this time."""
        return bool(select.select([self._socket], [], [], seconds)[0])

    def receive(self) -> Any:
        assert self._expected is not None
        key, version = self._expected
        self._expected = None
        frame = self._exactly(int.from_bytes(self._exactly(4), "big"))
        if key == 65:  # kio reads no start time of -1.
            return {"transaction_states": [_described(item) for item in decode_described(frame)]}
        return decode_response(key, version, frame)

    def ask(self, key: int, version: int, /, **fields: Any) -> Any:
        self.send(key, version, **fields)
        return self.receive()
