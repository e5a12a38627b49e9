"""A bank: balances in a database, the ledger in Kafka, and the sum of all money never changes.

    semel run payments:app

    curl -X POST http://127.0.0.1:8000/transfers -H 'Idempotency-Key: "1"' -H 'Content-Type: application/json' \\
         -d '{"id": "t-1", "source": "a1", "target": "a2", "cents": 250}'

A transfer changes two balances and sends two entries of the ledger, in one database transaction: the entries are in
Kafka if and only if the balances have changed. Each account numbers its entries, and Kafka has them in that order.
"""

import os
import uuid

import msgspec

from semel import App, Created, Problem
from semel.outbox import enqueue_in

ACCOUNTS = 100
OPENING_CENTS = 10_000


class Transfer(msgspec.Struct, frozen=True):
    id: str
    source: str
    target: str
    cents: int


class Entry(msgspec.Struct, frozen=True):
    """One side of a transfer. `number` counts the account's entries; 0 cents: there was not enough money."""

    transfer: str
    account: str
    cents: int
    number: int


EVERY_ACCOUNT = " UNION ALL ".join(f"SELECT 'a{number}' AS id" for number in range(1, ACCOUNTS + 1))

app = App("payments")
transfers = app.topic("transfers", key=str, value=Transfer)
ledger = app.topic("ledger", key=str, value=Entry)
bank = app.database(
    os.environ.get("PAYMENTS_DATABASE", "sqlite:///payments.db"),
    outbox=True,
    schema=f"""
    CREATE TABLE IF NOT EXISTS account (id VARCHAR(40) PRIMARY KEY, balance BIGINT NOT NULL, entries BIGINT NOT NULL);
    CREATE TABLE IF NOT EXISTS booked (
        account_id VARCHAR(40) PRIMARY KEY, entries BIGINT NOT NULL, cents BIGINT NOT NULL, number BIGINT NOT NULL);
    INSERT INTO account (id, balance, entries)
        SELECT id, {OPENING_CENTS}, 0 FROM ({EVERY_ACCOUNT}) AS every
        WHERE NOT EXISTS (SELECT 1 FROM account);
    """,  # noqa: S608 - our own numbers
)


def move(db, transfer):
    """Change both balances and give the entries that tell of it. `db` is inside of a transaction."""
    for account in sorted((transfer.source, transfer.target)):  # Locks in the order of keys: no deadlock.
        db.execute("UPDATE account SET entries = entries + 1 WHERE id = ?", (account,))
    [(balance,)] = db.query("SELECT balance FROM account WHERE id = ?", (transfer.source,))
    cents = transfer.cents if balance >= transfer.cents else 0
    for account, change in ((transfer.source, -cents), (transfer.target, cents)):
        db.execute("UPDATE account SET balance = balance + ? WHERE id = ?", (change, account))
        [(number,)] = db.query("SELECT entries FROM account WHERE id = ?", (account,))
        yield ledger.record(account, Entry(transfer.id, account, change, number))


def pay(transfer):
    """A transfer from code of one's own: a script, an endpoint of any web framework."""
    with app.transaction(bank) as tx:
        for entry in move(tx, transfer):
            # The same entry has the same id, whoever sends it: that is what a reader knows it by.
            tx.send(entry, id=uuid.uuid5(uuid.NAMESPACE_URL, f"{transfer.id}/{entry.key}"))


@app.post("/transfers", request=Transfer)  # the same by HTTP: once per Idempotency-Key
def order(transfer: Transfer):
    known = {f"a{number}" for number in range(1, ACCOUNTS + 1)}
    if transfer.source == transfer.target or not {transfer.source, transfer.target} <= known or transfer.cents < 1:
        raise Problem(422, "a transfer moves at least one cent between two accounts of this bank")
    yield transfers.record(transfer.source, transfer)
    return Created({"transfer": transfer.id})


@app.sink(transfers, bank)  # one database transaction: balances, entries and the position in transfers
def settle(records, db):
    for record in records:
        for entry in move(db, record.value):
            enqueue_in(db, entry)


@app.sink(ledger, bank)  # what the ledger adds up to; `number` has no gap when the order was kept
def book(records, db):
    for entry in (record.value for record in records):
        changed = db.execute(
            "UPDATE booked SET entries = entries + 1, cents = cents + ?, number = ? "
            "WHERE account_id = ? AND number = ?",
            (entry.cents, entry.number, entry.account, entry.number - 1),
        )
        if not changed:
            # The account's first entry; a number twice or out of order meets the primary key, and its key is parked.
            db.execute("INSERT INTO booked VALUES (?, 1, ?, ?)", (entry.account, entry.cents, entry.number))
