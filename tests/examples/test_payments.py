"""The bank as its own team would test it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from random import Random
from typing import Any

import pytest

from semel import Problem
from semel.databases import connect
from semel.databases.spec import DatabaseSpec
from semel.examples import payments
from semel.examples.payments import ACCOUNTS, OPENING_CENTS, Transfer, app, ledger, order, pay, transfers
from semel.testing import TestApp

TRANSFER = Transfer("t-1", "a1", "a2", 250)


def test_a_transfer_is_ordered_under_its_source() -> None:
    [effect] = list(order(TRANSFER))
    assert (effect.topic, effect.key, effect.value) == (transfers, "a1", TRANSFER)


@pytest.mark.parametrize(
    "wrong", [Transfer("t", "a1", "a1", 1), Transfer("t", "a1", "x", 1), Transfer("t", "a1", "a2", 0)]
)
def test_a_transfer_that_cannot_be_is_refused(wrong: Transfer) -> None:
    with pytest.raises(Problem, match="at least one cent"):
        list(order(wrong))


@pytest.fixture
def bank(url: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The app on a database of this test; `pay` makes its tables."""
    monkeypatch.setenv("SEMEL_DATABASE", url)
    yield url
    app.close()


def entries(look: Any) -> list[tuple[str, int, int]]:
    """Account, cents and number of every record in the outbox, in their order."""
    found = look.query("SELECT record_value FROM semel_outbox WHERE topic = ? ORDER BY seq", (ledger.name,))
    decoded = [payments.msgspec.json.decode(bytes(value), type=payments.Entry) for (value,) in found]
    return [(entry.account, entry.cents, entry.number) for entry in decoded]


def test_a_payment_changes_both_balances_and_tells_of_both(bank: str) -> None:
    pay(TRANSFER)
    pay(Transfer("t-2", "a2", "a1", 1_000_000))  # There is not so much.
    look = connect(bank)
    assert look.query("SELECT id, balance FROM account WHERE entries > 0 ORDER BY id") == [
        ("a1", 9_750),
        ("a2", 10_250),
    ]
    assert entries(look) == [("a1", -250, 1), ("a2", 250, 1), ("a2", 0, 2), ("a1", 0, 2)]
    look.close()


def test_payments_at_the_same_time_keep_the_sum_and_the_order(bank: str) -> None:
    rng = Random(1)
    orders = []
    for number in range(60):
        source, target = rng.sample(range(1, 6), 2)
        orders.append(Transfer(f"t-{number}", f"a{source}", f"a{target}", rng.randrange(1, 5_000)))
    pay(orders[0])  # Makes the tables.
    look = connect(bank)
    with ThreadPoolExecutor(8) as threads:
        running = [threads.submit(pay, each) for each in orders[1:]]
        for each in running:
            each.result()
            [(total,)] = look.query("SELECT SUM(balance) FROM account")
            assert int(total) == ACCOUNTS * OPENING_CENTS
    told: dict[str, list[tuple[int, int]]] = {}
    for account, cents, number in entries(look):
        told.setdefault(account, []).append((cents, number))
    for account, balance, count in look.query("SELECT id, balance, entries FROM account WHERE entries > 0"):
        assert [number for _, number in told[account]] == list(range(1, count + 1))
        assert OPENING_CENTS + sum(cents for cents, _ in told[account]) == balance
    look.close()


def test_a_retry_of_an_order_moves_money_once() -> None:
    with TestApp(app) as t:
        first = t.post("/transfers", TRANSFER, key="1")
        again = t.post("/transfers", TRANSFER, key="1")
        assert (first.status, again.status, again.is_replayed) == (201, 201, True)
        assert t.query("SELECT balance, entries FROM account WHERE id = 'a1'") == [(9_750, 1)]
        t.assert_sent(ledger, times=2)
        assert t.query("SELECT * FROM booked ORDER BY account_id") == [("a1", 1, -250, 1), ("a2", 1, 250, 1)]


def test_code_of_ones_own_sends_into_the_app_under_test() -> None:
    with TestApp(app) as t:
        pay(TRANSFER)
        t.settle()
        assert t.query("SELECT * FROM booked ORDER BY account_id") == [("a1", 1, -250, 1), ("a2", 1, 250, 1)]
        assert t.query("SELECT * FROM semel_outbox") == []


def test_the_bank_declares_its_outbox() -> None:
    assert isinstance(payments.bank, DatabaseSpec)
    assert payments.bank.outbox
