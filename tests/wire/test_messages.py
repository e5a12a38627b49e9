"""Requests and responses: plain values in, the same values out, at every version that both sides may choose."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from datetime import datetime, timedelta
from enum import IntEnum
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kio.schema.index import api_key_map, schema_name_map

from semel.errors import ProtocolError
from semel.wire.messages import (
    RequestHeader,
    api_name,
    decode_request,
    decode_request_header,
    decode_response,
    encode_request,
    encode_response,
    is_flexible,
    latest_version,
    to_ms,
)

TOPIC_ID = UUID("01234567-89ab-cdef-0123-456789abcdef")
NOW = 1_780_000_000_123
ERROR = {"error_code": 47, "error_message": "fenced"}
API_VERSIONS, PRODUCE, METADATA, FIND_COORDINATOR, INIT_PRODUCER_ID, END_TXN, TXN_OFFSET_COMMIT = (
    18,
    0,
    3,
    10,
    22,
    26,
    28,
)

REQUESTS: dict[int, dict[str, Any]] = {
    API_VERSIONS: {"client_software_name": "semel", "client_software_version": "0.1"},
    METADATA: {
        "topics": [{"name": "orders", "topic_id": TOPIC_ID}, {"name": "ключ", "topic_id": TOPIC_ID}],
        "allow_auto_topic_creation": False,
        "include_topic_authorized_operations": True,
        "include_cluster_authorized_operations": True,
    },
    PRODUCE: {
        "transactional_id": "app.worker.host.0",
        "acks": -1,
        "timeout": 30_000,
        "topic_data": [
            {
                "name": "orders",
                "topic_id": TOPIC_ID,
                "partition_data": [{"index": 0, "records": b"\0\xffbatch"}, {"index": 3, "records": b""}],
            }
        ],
    },
    FIND_COORDINATOR: {"key": "group", "key_type": 1, "coordinator_keys": ["group", "other"]},
    INIT_PRODUCER_ID: {
        "transactional_id": "app.worker.host.0",
        "transaction_timeout": 10_000,
        "producer_id": 2**40,
        "producer_epoch": 32766,
        "enable2_pc": True,
        "keep_prepared_txn": True,
    },
    END_TXN: {"transactional_id": "t", "producer_id": 9, "producer_epoch": 4, "committed": True},
    TXN_OFFSET_COMMIT: {
        "transactional_id": "t",
        "group_id": "g",
        "producer_id": 9,
        "producer_epoch": 4,
        "generation_id": 7,
        "member_id": "member",
        "group_instance_id": "worker-1",
        "topics": [
            {
                "name": "orders",
                "partitions": [
                    {
                        "partition_index": 2,
                        "committed_offset": 2**33,
                        "committed_leader_epoch": 5,
                        "committed_metadata": "note",
                    }
                ],
            }
        ],
    },
}
RESPONSES: dict[int, dict[str, Any]] = {
    API_VERSIONS: {
        "error_code": 0,
        "api_keys": [{"api_key": 0, "min_version": 3, "max_version": 13}],
        "supported_features": [{"name": "transaction.version", "min_version": 0, "max_version": 2}],
        "finalized_features_epoch": 7,
        "finalized_features": [{"name": "transaction.version", "max_version_level": 2, "min_version_level": 2}],
    },
    METADATA: {
        "throttle_time": 5,
        "error_code": 0,
        "brokers": [{"node_id": 1, "host": "127.0.0.1", "port": 9092, "rack": None}],
        "cluster_id": "cluster",
        "controller_id": 1,
        "topics": [
            {
                "error_code": 0,
                "name": "orders",
                "topic_id": TOPIC_ID,
                "is_internal": False,
                "partitions": [
                    {
                        "error_code": 5,
                        "partition_index": 3,
                        "leader_id": 1,
                        "leader_epoch": 2,
                        "replica_nodes": [1, 2],
                        "isr_nodes": [1],
                        "offline_replicas": [2],
                    }
                ],
            }
        ],
    },
    PRODUCE: {
        "responses": [
            {
                "name": "orders",
                "topic_id": TOPIC_ID,
                "partition_responses": [
                    {
                        "index": 1,
                        "error_code": 45,
                        "base_offset": 17,
                        "log_append_time": NOW,
                        "log_start_offset": 4,
                        "record_errors": [{"batch_index": 2, "batch_index_error_message": "no key"}],
                        "error_message": "out of order",
                    }
                ],
            }
        ],
        "throttle_time": 250,
        "node_endpoints": [],
    },
    FIND_COORDINATOR: {
        **ERROR,
        "node_id": 1,
        "host": "h",
        "port": 9,
        "coordinators": [{"key": "group", "node_id": 1, "host": "h", "port": 9, **ERROR}],
    },
    INIT_PRODUCER_ID: {
        "throttle_time": 1,
        "error_code": 51,
        "producer_id": 9,
        "producer_epoch": 3,
        "ongoing_txn_producer_id": 9,
        "ongoing_txn_producer_epoch": 2,
    },
    END_TXN: {"error_code": 90, "producer_id": 9, "producer_epoch": 5},
    TXN_OFFSET_COMMIT: {"topics": [{"name": "o", "partitions": [{"partition_index": 0, "error_code": 22}]}]},
}
EVERY_VERSION = [(key, version) for key in REQUESTS for version in sorted(schema_name_map[api_name(key)])]
NAMED = [pytest.param(key, version, id=f"{api_name(key)}-{version}") for key, version in EVERY_VERSION]


def plain(value: Any) -> Any:
    """A decoded value as it was given to the encoder."""
    if isinstance(value, timedelta):
        return to_ms(value)
    if isinstance(value, datetime):
        return round(value.timestamp() * 1000)
    return int(value) if isinstance(value, IntEnum) else value


def matched(entity: Any, given: Mapping[str, Any]) -> set[str]:
    """Assert that every given field that this version has came back; the names of those fields, as paths."""
    found: set[str] = set()
    for name, value in given.items():
        if not hasattr(entity, name):
            continue
        got = getattr(entity, name)
        found.add(name)
        if isinstance(value, list):
            assert len(got) == len(value), name
            for item, wanted in zip(got, value, strict=True):
                if isinstance(wanted, Mapping):
                    found |= {f"{name}.{path}" for path in matched(item, wanted)}
                else:
                    assert plain(item) == wanted, name
        else:
            assert plain(got) == value, name
    return found


@pytest.mark.parametrize(("key", "version"), NAMED)
def test_requests_come_back(key: int, version: int) -> None:
    frame = encode_request(key, version, -5, "semel-ü", **REQUESTS[key])
    assert int.from_bytes(frame[:4], "big") == len(frame) - 4
    for buffer in (frame[4:], bytearray(frame[4:]), memoryview(frame)[4:]):
        header = decode_request_header(buffer)
        assert header[:4] == (key, version, -5, "semel-ü")
        matched(decode_request(header, buffer), REQUESTS[key])


@pytest.mark.parametrize(("key", "version"), NAMED)
def test_responses_come_back(key: int, version: int) -> None:
    frame = encode_response(key, version, 77, **RESPONSES[key])
    assert int.from_bytes(frame[:4], "big") == len(frame) - 4
    assert int.from_bytes(frame[4:8], "big") == 77
    for buffer in (frame[4:], bytearray(frame[4:]), memoryview(frame)[4:]):
        matched(decode_response(key, version, buffer), RESPONSES[key])


@pytest.mark.parametrize("key", REQUESTS, ids=api_name)
def test_no_given_field_is_lost_in_all_versions(key: int) -> None:
    def paths(values: Mapping[str, Any]) -> set[str]:
        nested = {
            f"{name}.{path}"
            for name, value in values.items()
            if isinstance(value, list)
            for item in value
            if isinstance(item, Mapping)
            for path in paths(item)
        }
        return set(values) | nested

    asked: set[str] = set()
    answered: set[str] = set()
    for version in schema_name_map[api_name(key)]:
        frame = encode_request(key, version, 1, "c", **REQUESTS[key])[4:]
        asked |= matched(decode_request(decode_request_header(frame), frame), REQUESTS[key])
        frame = encode_response(key, version, 1, **RESPONSES[key])[4:]
        answered |= matched(decode_response(key, version, frame), RESPONSES[key])
    assert asked == paths(REQUESTS[key])
    assert answered == paths(RESPONSES[key])


def test_the_bytes_of_end_txn_are_kafkas() -> None:
    # Written out by hand from the protocol: a flexible version, so compact strings and tags.
    frame = encode_request(
        END_TXN, 5, 258, "me", transactional_id="tx", producer_id=9, producer_epoch=4, committed=True
    )
    assert frame.hex(" ") == (
        "00 00 00 1c 00 1a 00 05 00 00 01 02 00 02 6d 65 00 "  # size; api key, version, correlation id, client id, tags
        "03 74 78 00 00 00 00 00 00 00 09 00 04 01 00"  # transactional id, producer id, epoch, committed, tags
    )


def test_durations_and_times_are_milliseconds_and_minus_one_is_none() -> None:
    partition = {"index": 0, "error_code": 0, "base_offset": 0, "log_append_time": -1, "record_errors": []}
    frame = encode_response(PRODUCE, 8, 1, responses=[{"name": "t", "partition_responses": [partition]}])[4:]
    answer = decode_response(PRODUCE, 8, frame)
    assert answer.responses[0].partition_responses[0].log_append_time is None
    assert to_ms(answer.throttle_time) == 0


def test_the_answer_to_api_versions_has_the_old_header_at_every_version() -> None:
    for version in schema_name_map["api_versions"]:
        frame = encode_response(API_VERSIONS, version, 1, error_code=35, api_keys=[])
        assert frame[8:10] == b"\0\x23"  # The error code follows the correlation id at once.
    assert is_flexible(END_TXN, 3)
    assert not is_flexible(END_TXN, 2)


def test_a_slip_in_a_field_name_is_found() -> None:
    with pytest.raises(TypeError, match=r"EndTxnRequest has no field 'commited' in any version"):
        encode_request(END_TXN, 5, 1, "c", transactional_id="t", producer_id=1, producer_epoch=1, commited=True)


def test_unknown_apis_and_versions() -> None:
    header = decode_request_header(bytes.fromhex("7fff 0001 00000001 ffff"))
    assert header == RequestHeader(0x7FFF, 1, 1, None, 10)
    assert api_name(0x7FFF) == "api_32767"
    for key, version in ((0x7FFF, 1), (END_TXN, latest_version(END_TXN) + 1), (END_TXN, -1)):
        with pytest.raises(ProtocolError, match="no schema"):
            decode_request(RequestHeader(key, version, 1, None, 0), b"")
        with pytest.raises(ProtocolError, match="no schema"):
            decode_response(key, version, bytes(20))


# --- Hostile bytes ---


@pytest.mark.parametrize(("key", "version"), NAMED)
def test_every_truncation_is_refused(key: int, version: int) -> None:
    frame = encode_request(key, version, 1, "c", **REQUESTS[key])[4:]
    for size in range(len(frame)):
        with pytest.raises(ProtocolError):
            decode_request(decode_request_header(frame[:size]), frame[:size])
    frame = encode_response(key, version, 1, **RESPONSES[key])[4:]
    for size in range(4, len(frame)):
        with pytest.raises(ProtocolError):
            decode_response(key, version, frame[:size])


@given(st.binary(max_size=60))
def test_any_bytes_are_a_header_or_a_protocol_error(data: bytes) -> None:
    try:
        header = decode_request_header(data)
    except ProtocolError:
        return
    assert 10 <= header.body <= len(data)


@given(st.sampled_from(sorted(api_key_map)), st.data(), st.binary(max_size=200))
@settings(max_examples=500, deadline=None)
def test_any_bytes_are_a_message_or_a_protocol_error(key: int, data, body: bytes) -> None:
    version = data.draw(st.sampled_from(sorted(schema_name_map[api_name(key)])))
    head = key.to_bytes(2, "big") + version.to_bytes(2, "big") + bytes(4)
    for frame in (head + b"\0\0" + body, head + body):
        with contextlib.suppress(ProtocolError):
            decode_request(decode_request_header(frame), frame)
    with contextlib.suppress(ProtocolError):
        decode_response(key, version, bytes(4) + body)


@given(st.sampled_from(EVERY_VERSION), st.data())
@settings(max_examples=500, deadline=None)
def test_changed_bytes_are_a_message_or_a_protocol_error(api: tuple[int, int], data) -> None:
    key, version = api
    request = bytearray(encode_request(key, version, 1, "c", **REQUESTS[key])[4:])
    response = bytearray(encode_response(key, version, 1, **RESPONSES[key])[4:])
    for frame in (request, response):
        frame[data.draw(st.integers(4, len(frame) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ProtocolError):
        decode_request(decode_request_header(request), request)
    with contextlib.suppress(ProtocolError):
        decode_response(key, version, response)
