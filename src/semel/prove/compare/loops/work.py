"""What every loop does with an order, and the settings that all of them share.

An order {"id": 17, "items": 3} becomes three records {"order": 17, "position": 0 to 2}. The keys spread them over the
partitions of the output, so that a transaction covers several.

The two time-outs are shorter than most defaults, the same for every loop, so that a pause that outlasts a session takes
seconds. Every other setting is the library's default, unless the script gives a reason.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path

BOOTSTRAP = os.environ.get("BOOTSTRAP", "127.0.0.1:9092")
ORDERS = os.environ.get("ORDERS", "orders")
ITEMS = os.environ.get("ITEMS", "items")
GROUP = os.environ.get("GROUP", "compare")
INSTANCE = os.environ.get("INSTANCE", "0")
"""The number of this process: the same after every restart, another one for every process beside it."""
FLAKY = os.environ.get("FLAKY", "")
"""A folder: some orders fail at their first attempt, and it is noted there that it was made."""
ORDER_PARTITIONS, ITEM_PARTITIONS = 4, 12
SESSION_TIMEOUT_MS = 6_000
TRANSACTION_TIMEOUT_MS = 10_000
LIBRDKAFKA_RECOVERY = "none"
"""With its default, `rebootstrap`, librdkafka throws its only broker away when that connection breaks, and then waits
for ever in send_offsets_to_transaction. A cluster of several brokers does not show that, so neither does this one."""
COMMIT_SECONDS = 0.1
STEP_SECONDS = 0.002
"""How long the work on one order takes."""


class StockUnreachableError(ConnectionError):
    """The stock service did not answer; the next attempt will work."""


def items_of(order: dict[str, int]) -> list[tuple[str, dict[str, int]]]:
    """The key and the value of each record that an order becomes. With `FLAKY` some orders fail at first."""
    number = order["id"]
    if FLAKY and number % 100 == 7:
        with suppress(FileExistsError):
            Path(FLAKY, f"refused-{number}").touch(exist_ok=False)
            raise StockUnreachableError(f"no answer for order {number}")
    return [(f"sku-{(number * 7 + at * 13) % 100}", {"order": number, "position": at}) for at in range(order["items"])]


def encoded(order: bytes) -> list[tuple[bytes, bytes]]:
    """`items_of` in bytes, after the time that the work takes."""
    time.sleep(STEP_SECONDS)
    return [(key.encode(), json.dumps(value).encode()) for key, value in items_of(json.loads(order))]
