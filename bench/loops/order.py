"""What the loops read and write, and where."""

from __future__ import annotations

import os
import signal
import threading

import msgspec

BOOTSTRAP = os.environ.get("BOOTSTRAP", "")
SOURCE = os.environ.get("SOURCE", "")
TARGET = os.environ.get("TARGET", "")
GROUP = os.environ.get("GROUP", "")
INTERVAL_MS = int(os.environ.get("INTERVAL_MS", "100"))
EXACTLY_ONCE = os.environ.get("DELIVERY", "exactly-once") == "exactly-once"


class Order(msgspec.Struct):
    """As it is read."""

    id: int
    amount: int
    pad: str


class Seen(msgspec.Struct):
    """As it is written."""

    id: int
    amount: int
    pad: str
    seen: bool


decode = msgspec.json.Decoder(Order).decode
encode = msgspec.json.Encoder().encode


def work(order: Order) -> Seen:
    """What the user's code does."""
    return Seen(order.id, order.amount, order.pad, True)


def stopping() -> threading.Event:
    """Set by SIGTERM."""
    event = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: event.set())
    return event
