"""The records that every client was given; `make.py` beside this file says how the golden batches were made.

Timestamps are positive: the Java client refuses negative ones and librdkafka takes 0 as "now".
"""

from __future__ import annotations

from random import Random

from semel.types import Header

Case = list[tuple[bytes | None, bytes | None, int, tuple[Header, ...]]]
"""Key, value, timestamp in milliseconds, headers."""

NOW = 1_780_000_000_000
PRODUCER_ID, PRODUCER_EPOCH, BASE_SEQUENCE = 4242, 3, 0


def _large() -> bytes:
    """70,000 bytes: a length beyond the table of varints, and more than one block of snappy and lz4."""
    rng = Random(7)
    words = [rng.randbytes(5).hex().encode() for _ in range(8)]
    return b" ".join(rng.choice(words) for _ in range(7_000))[:70_000]


CASES: dict[str, Case] = {
    "one": [(b"key", b"value", NOW, ())],
    "nulls": [
        (None, None, NOW, ()),
        (b"", b"", NOW, ()),
        (None, b"", NOW, ()),
        (b"", None, NOW, ()),
        (b"k", None, NOW, ()),
        (None, b"v", NOW, ()),
    ],
    "headers": [
        (b"k", b"v", NOW, (("semel-id", b"1"), ("none", None), ("empty", b""), ("semel-id", b"again"))),
        (b"k", b"v", NOW, ()),
        (b"k", b"v", NOW, (("schlüssel-キー", b"\x00\xff"), ("long", b"h" * 300))),
        (None, None, NOW, tuple((f"h{n}", b"%d" % n) for n in range(100))),
    ],
    "times": [(b"k", b"v", NOW + step, ()) for step in (0, 1, -1, 63, 64, -64, -65, 10**6, -(10**9), 10**11, -NOW + 1)],
    "many": [
        (b"customer-%05d" % (n % 97), b'{"order":%d,"cents":%d}' % (n, n * 37 % 9973), NOW + n // 3, ())
        for n in range(300)
    ],
    "noise": [(Random(n).randbytes(16), Random(-n).randbytes(90), NOW, ()) for n in range(4)],
    "large": [(b"k", b"small", NOW, ()), (b"k", _large(), NOW, ()), (b"k" * 9_000, b"v", NOW, (("h", b"x" * 200),))],
}

KEYS: list[bytes] = [bytes(range(200, 200 + n)) for n in range(1, 20)] + [
    b"",
    b"21",
    b"foobar",
    b"a-little-bit-long-string",
    b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8",
    "ключ".encode(),
    *(b"%05d" % n for n in range(50)),
]
PARTITIONS = 12


def as_text(cases: dict[str, Case]) -> str:
    """Lines for a program without a JSON reader: case, timestamp, key, value, headers; bytes in hex, None as `-`."""

    def field(value: bytes | None) -> str:
        return "-" if value is None else "x" + value.hex()

    return "".join(
        f"{name} {timestamp} {field(key)} {field(value)} "
        + (",".join(f"{field(header.encode())}={field(content)}" for header, content in headers) or "-")
        + "\n"
        for name, records in cases.items()
        for key, value, timestamp, headers in records
    )
