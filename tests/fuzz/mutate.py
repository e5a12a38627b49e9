"""Mutations of real messages: of their bytes, and of the lengths, counts and varints that stand in them."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

__all__ = ["mutated"]

_NUMBERS = (0, 1, -1, 2, 127, 128, 255, 256, 32767, -32768, 65535, 2**31 - 1, -(2**31), 2**63 - 1, -(2**63))
_VARINTS = (
    b"\x00",
    b"\x01",
    b"\x7f",
    b"\xff\x01",
    b"\xff\xff\xff\xff\x07",
    b"\xff\xff\xff\xff\x0f",
    b"\xff" * 9 + b"\x01",
)
MAX_BYTES = 1 << 16
"""Longer inputs find nothing that these do not, and take longer."""


def mutated(data: bytes, others: Sequence[bytes], rng: Random) -> bytes:
    """One to four changes of `data`."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        _change(changed, others, rng)
    return bytes(changed[:MAX_BYTES])


def _change(data: bytearray, others: Sequence[bytes], rng: Random) -> None:
    at = rng.randrange(len(data) + 1)
    match rng.randrange(9):
        case 0 if data:  # A bit.
            data[at % len(data)] ^= 1 << rng.randrange(8)
        case 1 if data:  # A byte.
            data[at % len(data)] = rng.randrange(256)
        case 2 | 3:  # A number of the widths that the protocol has.
            width = rng.choice((1, 2, 4, 4, 8))
            number = rng.choice(_NUMBERS) + rng.choice((0, 0, 1, -1))
            data[at : at + width] = (number & (1 << width * 8) - 1).to_bytes(width, "big")
        case 4:  # A varint.
            data[at : at + 1] = rng.choice(_VARINTS)
        case 5:  # Cut.
            del data[at:]
        case 6:  # Something missing in the middle.
            del data[at : at + rng.choice((1, 2, 4, 16))]
        case 7:  # Something twice.
            data[at:at] = data[at : at + rng.choice((1, 4, 64))]
        case _:  # The rest of another message.
            other = rng.choice(others) if others else b""
            data[at:] = other[rng.randrange(len(other) + 1) :]
