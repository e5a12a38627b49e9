"""Answers of a Kafka broker that name brokers, with other addresses in them: clients stay behind the proxy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from io import BytesIO
from typing import Any

from kio.serial import entity_writer

from semel.prove.faults.pipe import HERE
from semel.wire.messages import decode_response, is_flexible, response_entity

__all__ = ["names_brokers", "readdressed"]

PRODUCE, FETCH, METADATA, FIND_COORDINATOR, DESCRIBE_CLUSTER = 0, 1, 3, 10, 60
_LEADER_IN_PRODUCE, _LEADER_IN_FETCH = 10, 16
"""Since these versions an answer to the wrong broker brings the right one's address (KIP-951)."""


@cache
def _writer(api_key: int, version: int) -> Callable[[BytesIO, Any], None]:
    return entity_writer(response_entity(api_key, version))


def names_brokers(api_key: int, version: int, *, several: bool) -> bool:
    """Whether the answer may hold an address. A cluster of one broker has no other one to send clients to."""
    if api_key in (METADATA, FIND_COORDINATOR, DESCRIBE_CLUSTER):
        return True
    newer = (api_key == PRODUCE and version >= _LEADER_IN_PRODUCE) or (api_key == FETCH and version >= _LEADER_IN_FETCH)
    return newer and several


def readdressed(api_key: int, version: int, frame: bytes, port_for: Callable[[str, int], int]) -> bytes:
    """The answer (with its length prefix) with our address in place of each one; `port_for` gives our port for it.

    Raises `ProtocolError` for an answer that cannot be read.
    """

    def moved(item: Any) -> Any:
        # "There is none" is an empty host and port -1, and stays so.
        return replace(item, host=HERE, port=port_for(item.host, item.port)) if item.host and item.port > 0 else item

    answer = decode_response(api_key, version, frame[4:])
    for name in ("brokers", "coordinators", "node_endpoints"):
        if hasattr(answer, name):
            answer = replace(answer, **{name: tuple(moved(item) for item in getattr(answer, name))})
    if hasattr(answer, "host"):
        answer = moved(answer)
    buffer = BytesIO()
    buffer.write(b"\0\0\0\0" + frame[4:8] + (b"\0" if is_flexible(api_key, version) else b""))
    _writer(api_key, version)(buffer, answer)
    buffer.seek(0)
    buffer.write((len(buffer.getbuffer()) - 4).to_bytes(4, "big"))
    return buffer.getvalue()
