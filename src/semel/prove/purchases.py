"""The demo's input: the CDNOW purchase history, 69,659 real purchases by 23,570 customers.

Source: P. S. Fader and B. G. S. Hardie, "Forecasting Repeat Sales at CDNOW", Interfaces 31(3), 2001. One line is one
purchase: customer, date, number of CDs, dollars. 255 lines repeat an earlier line word for word: they are two real
purchases of one customer on one day, so a purchase's identity is its line number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import NamedTuple

__all__ = ["Expected", "Purchase", "expect", "load_purchases"]


class Purchase(NamedTuple):
    """One line of the file; `line` counts from 1 and is the order's id, money is in cents."""

    line: int
    customer_id: str
    cds: int
    cents: int


def load_purchases(limit: int | None = None) -> list[Purchase]:
    """The first `limit` purchases of the file, or all of them."""
    text = files("semel.prove").joinpath("cdnow_purchases.txt").read_text(encoding="ascii")
    purchases: list[Purchase] = []
    for number, line in enumerate(text.splitlines()[1:], start=1):
        if limit is not None and number > limit:
            break
        customer, _date, cds, dollars = line.split()
        whole, _, fraction = dollars.partition(".")
        purchases.append(Purchase(number, customer, int(cds), int(whole) * 100 + int(fraction.ljust(2, "0"))))
    return purchases


@dataclass(frozen=True, slots=True)
class Expected:
    """What the databases must hold after these purchases, counted from the input alone."""

    orders: int
    cds: int
    cents: int
    customers: dict[str, tuple[int, int, int]]
    """Customer id to (orders, cds, cents)."""
    stock: dict[str, int]
    """Title to items taken."""


def expect(purchases: Sequence[Purchase], sku: Callable[[int, int], str]) -> Expected:
    """Count the outcome of these purchases; `sku(line, position)` names the title of an item."""
    customers: dict[str, tuple[int, int, int]] = {}
    stock: Counter[str] = Counter()
    for line, customer, cds, cents in purchases:
        orders, had, paid = customers.get(customer, (0, 0, 0))
        customers[customer] = (orders + 1, had + cds, paid + cents)
        stock.update(sku(line, position) for position in range(cds))
    return Expected(
        len(purchases),
        sum(purchase.cds for purchase in purchases),
        sum(purchase.cents for purchase in purchases),
        customers,
        dict(stock),
    )
