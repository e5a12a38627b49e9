"""Inputs that once did what none may, by target, as bytes; each with what it was."""

from __future__ import annotations

import zlib

__all__ = ["FINDINGS"]


def _line(body: bytes) -> bytes:
    return b"%08x %b\n" % (zlib.crc32(body), body)


FINDINGS: list[tuple[str, bytes]] = [
    # Metadata v10 with a topic that has neither name nor id.
    ("node", bytes.fromhex("0003000a00000007000466757a7a000200000000000000000000000000000000000001010100")),
    # Null where the schema has an array: DescribeTransactions, FindCoordinator, AddPartitionsToTxn, DeleteTopics.
    ("node", bytes.fromhex("004100000000006b0000000000007fff")),
    ("node", bytes.fromhex("000a00050000000700000000000000010000")),
    (
        "node",
        bytes.fromhex(
            "0018000300000007000466757a7a0007c3a9c3a9c3a9ad00e1e30c6a50c79bc20303c3a9010007c3a9c3a9000000000000000200"
        ),
    ),
    ("node", bytes.fromhex("0014000400000007980000000100000000000180000001")),
    # A tag of DescribeTransactions with a size of hundreds of bits.
    ("responses", bytes.fromhex("0041000000000007 01 16 94" + "c3a9" * 30 + "a9c3a9c3a90000000000")),
    # Lines of the metadata log with a right checksum that no version writes.
    ("metadata", _line(b'{"topic":"orders"}')),
    ("metadata", _line(b'{"cluster_id"')),
    ("metadata", _line(b'{"clu\xffster_id":"c"}')),
    ("metadata", _line(b'["topic"]')),
    ("metadata", _line(b'{"delete":"none"}')),
]
