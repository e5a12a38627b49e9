"""`app.transaction`: rows and records, both or neither, in both colours and on every database."""

from __future__ import annotations

import asyncio
import threading
import uuid
from typing import Any

import msgspec
import pytest

from semel import App
from semel.databases import Database
from semel.databases.statements import StatementRefused
from semel.errors import ConfigurationError, Fatal, Retriable
from semel.outbox.rows import decode_headers, shard_of
from semel.outbox.transaction import AsyncTransaction, Transaction
from semel.processing.topics import DataError
from tests.outbox.bank import INSERT, Bank, Paid


def test_rows_and_records_are_written_together(bank: Bank) -> None:
    with bank.app.transaction(bank.database) as tx:
        assert tx.execute(INSERT, ("ann", 10)) == 1
        assert tx.executemany(INSERT, [("bob", 20), ("eve", 30)]) == 2
        tx.send(bank.paid.record("ann", Paid(10)))
        tx.send(bank.raw.record(None, b"x"))
        assert tx.query("SELECT balance FROM account WHERE id = ?", ("eve",)) == [(30,)]
        assert bank.woken == 0
    assert bank.balances() == {"ann": 10, "bob": 20, "eve": 30}
    assert bank.rows() == [("paid", b"ann", b'{"cents":10}'), ("raw", b"", b"x")]
    assert bank.woken == 1


def test_the_same_in_a_coroutine(bank: Bank) -> None:
    async def work(tx: AsyncTransaction) -> None:
        assert await tx.execute(INSERT, ("ann", 10)) == 1
        assert await tx.executemany(INSERT, [("bob", 20)]) == 1
        tx.send(bank.paid.record("ann", Paid(10)))
        assert await tx.query("SELECT balance FROM account WHERE id = ?", ("ann",)) == [(10,)]
        named = await tx.run(lambda connection, name: (type(connection).__name__, name), "ann")
        assert named == ("Connection", "ann")

    bank.run(work)
    assert bank.balances() == {"ann": 10, "bob": 20}
    assert bank.rows() == [("paid", b"ann", b'{"cents":10}')]
    assert bank.woken == 1


def test_a_row_says_all_that_the_relay_needs(bank: Bank, database: Database) -> None:
    event = uuid.uuid5(uuid.NAMESPACE_URL, "payment 17")
    with bank.app.transaction(bank.database) as tx:
        assert tx.send(bank.paid.record("ann", Paid(1), headers=(("a", b"\x00\xff"), ("b", None))), id=event) == event
        other = tx.send(bank.paid.record("bob", None))
    rows = database.query("SELECT shard, msg_id, record_value, headers, held FROM semel_outbox ORDER BY seq")
    assert rows[0][0] == shard_of(b"ann", str(event))
    assert rows[0][1] == str(event)
    assert decode_headers(rows[0][3]) == (("a", b"\x00\xff"), ("b", None))
    assert rows[1][:3] == (shard_of(b"bob", str(other)), str(other), None)
    assert [row[4] for row in rows] == [None, None]
    assert other.version == 7  # Its time lets an inbox keep ids by day.


@pytest.mark.parametrize("colour", ["sync", "async"])
def test_an_exception_leaves_nothing(bank: Bank, colour: str) -> None:
    async def work(tx: AsyncTransaction) -> None:
        await tx.execute(INSERT, ("ann", 10))
        tx.send(bank.paid.record("ann", Paid(10)))
        raise RuntimeError("no")

    def sync() -> None:
        with bank.app.transaction(bank.database) as tx:
            tx.execute(INSERT, ("ann", 10))
            tx.send(bank.paid.record("ann", Paid(10)))
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        bank.run(work) if colour == "async" else sync()
    assert (bank.balances(), bank.rows(), bank.woken) == ({}, [], 0)
    with bank.app.transaction(bank.database) as tx:  # The connection is as good as new.
        tx.execute(INSERT, ("ann", 1))
    assert bank.balances() == {"ann": 1}


def test_a_statement_that_fails_and_is_caught_does_not_commit_half(bank: Bank) -> None:
    def both(tx: Transaction) -> None:
        tx.execute(INSERT, ("ann", 10))
        tx.send(bank.paid.record("ann", Paid(10)))
        with pytest.raises(Exception, match=r"(?i)unique|duplicate"):
            tx.execute(INSERT, ("ann", 11))

    try:
        with bank.app.transaction(bank.database) as tx:
            both(tx)
    except Exception as error:  # PostgreSQL ends the transaction at the first error.
        assert "transaction" in str(error)  # noqa: PT017
        assert (bank.balances(), bank.rows()) == ({}, [])
    else:
        assert (bank.balances(), len(bank.rows())) == ({"ann": 10}, 1)


@pytest.mark.parametrize("turns", [0, 1, 3])
def test_a_cancelled_task_leaves_nothing_and_frees_the_connection(bank: Bank, url: str, turns: int) -> None:
    """It is cancelled before its statement has reached the database, and later."""
    slow = {
        "sqlite": "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n",
        "postgresql": "SELECT pg_sleep(60)",
        "mariadb": "SELECT SLEEP(60)",
    }[url.partition(":")[0]]

    async def whole() -> None:
        begun = asyncio.Event()

        async def work() -> None:
            async with bank.app.transaction(bank.database) as tx:
                await tx.execute(INSERT, ("ann", 10))
                tx.send(bank.paid.record("ann", Paid(10)))
                begun.set()
                await tx.query(slow)

        task = asyncio.create_task(work())
        await begun.wait()
        for _ in range(turns):
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 30)
        async with bank.app.transaction(bank.database) as tx:  # What ended the statement does not hit this one.
            assert await tx.execute(INSERT, ("bob", 1)) == 1

    asyncio.run(whole())
    assert (bank.balances(), bank.rows()) == ({"bob": 1}, [])


class TestWhatIsRefused:
    """Each of these tells what is wrong, and the transaction goes on as if it had not been tried."""

    def check(self, bank: Bank, record: Any, error: type[Exception], match: str, **given: Any) -> None:
        with bank.app.transaction(bank.database) as tx:
            tx.execute(INSERT, ("ann", 10))
            with pytest.raises(error, match=match):
                tx.send(record, **given)
            tx.send(bank.paid.record("ann", Paid(10)))
        assert bank.balances() == {"ann": 10}
        assert bank.rows() == [("paid", b"ann", b'{"cents":10}')]

    def test_a_value_of_another_type(self, bank: Bank) -> None:
        self.check(bank, bank.paid.record("ann", "ten"), DataError, "declared as Paid")  # type: ignore[arg-type]

    def test_a_record_that_is_too_large_for_kafka(self, bank: Bank) -> None:
        self.check(bank, bank.raw.record(b"k", bytes(1_048_000)), DataError, "Kafka takes 1047564")

    def test_a_topic_of_another_app(self, bank: Bank) -> None:
        topic = App("shop").topic("paid", key=str, value=Paid)
        self.check(bank, topic.record("ann", Paid(1)), ConfigurationError, "topic paid is not of app bank")

    def test_what_is_no_record(self, bank: Bank) -> None:
        self.check(bank, Paid(1), ConfigurationError, "is not a record")

    def test_a_header_of_semels_own(self, bank: Bank) -> None:
        record = bank.paid.record("ann", Paid(1), headers=(("semel-id", b"1"),))
        self.check(bank, record, DataError, "names with 'semel-'")

    def test_a_header_that_is_none(self, bank: Bank) -> None:
        record = bank.paid.record("ann", Paid(1), headers=(("a", "text"),))  # type: ignore[arg-type]
        self.check(bank, record, DataError, "not a pair")

    def test_an_id_that_is_no_uuid(self, bank: Bank) -> None:
        self.check(bank, bank.paid.record("ann", Paid(1)), ConfigurationError, "it is a UUID", id="payment 17")

    def test_more_records_than_a_transaction_takes(self, bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("semel.outbox.records.RECORDS_MAX", 2)
        with bank.app.transaction(bank.database) as tx:
            for _ in range(2):
                tx.send(bank.paid.record("ann", Paid(1)))
            with pytest.raises(DataError, match="at most 2 records"):
                tx.send(bank.paid.record("ann", Paid(1)))
        assert len(bank.rows()) == 2

    def test_a_transaction_that_has_ended(self, bank: Bank) -> None:
        with bank.app.transaction(bank.database) as tx:
            pass
        with pytest.raises(Fatal, match="sends a record of a transaction that has ended: nothing was done"):
            tx.send(bank.paid.record("ann", Paid(1)))
        with pytest.raises(Fatal, match="runs a statement of a transaction that has ended"):
            tx.execute(INSERT, ("ann", 1))
        with pytest.raises(Fatal, match="uses its connection"):
            _ = tx.connection
        assert (bank.rows(), bank.balances()) == ([], {})

    def test_a_second_transaction_inside_of_one(self, bank: Bank) -> None:
        def sync() -> None:
            with bank.app.transaction(bank.database) as tx:
                tx.execute(INSERT, ("ann", 1))
                with bank.app.transaction(bank.database):
                    pass

        with pytest.raises(ConfigurationError, match="open here already"):
            sync()
        assert bank.balances() == {}

        async def work(tx: AsyncTransaction) -> None:
            await tx.execute(INSERT, ("ann", 1))
            async with bank.app.transaction(bank.database):
                pass

        with pytest.raises(ConfigurationError, match="open here already"):
            bank.run(work)
        assert bank.balances() == {}

    def test_a_block_that_would_stop_the_loop(self, bank: Bank) -> None:
        async def wrong() -> None:
            with bank.app.transaction(bank.database):
                pass

        with pytest.raises(ConfigurationError, match="write 'async with"):
            asyncio.run(wrong())

    @pytest.mark.parametrize("statement", ["COMMIT", "ROLLBACK", "BEGIN", "SELECT 1; SELECT 2"])
    def test_a_statement_that_leaves_the_transaction(self, bank: Bank, statement: str) -> None:
        with bank.app.transaction(bank.database) as tx:
            tx.execute(INSERT, ("ann", 1))
            with pytest.raises(StatementRefused):
                tx.execute(statement)
        assert bank.balances() == {"ann": 1}

    def test_the_drivers_placeholders(self, bank: Bank) -> None:
        with bank.app.transaction(bank.database) as tx, pytest.raises(StatementRefused, match=r"placeholders are \?"):
            tx.execute("UPDATE account SET balance = %s", (1,))

    def test_a_commit_behind_the_blocks_back(self, bank: Bank) -> None:
        def ended() -> None:
            with bank.app.transaction(bank.database) as tx:
                tx.send(bank.paid.record("ann", Paid(1)))
                run = getattr(tx.connection, "execute", None) or tx.connection.query  # PyMySQL has no short cut.
                run("ROLLBACK")

        with pytest.raises(Fatal, match="so 1 records were not sent"):
            ended()
        assert bank.rows() == []

    def test_a_database_without_an_outbox(self, bank: Bank, url: str) -> None:
        other = bank.app.database(url, name="other")
        with pytest.raises(ConfigurationError, match=r"outbox=True.*semel migrate"):
            bank.app.transaction(other)
        with pytest.raises(ConfigurationError, match="is no database of app bank"):
            bank.app.transaction(App("x").database(url, name="elsewhere", outbox=True))


def test_connections_are_bounded_and_waited_for(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = bank.app.writer("database").pool
    monkeypatch.setattr(pool, "wait_seconds", 0.1)
    held = [pool.borrow() for _ in range(pool.size)]
    with pytest.raises(Retriable, match=rf"none of the {pool.size} connections.*nothing happened"):  # noqa: SIM117
        with bank.app.transaction(bank.database):
            pass

    async def busy() -> None:
        async with bank.app.transaction(bank.database):
            pass

    with pytest.raises(Retriable, match="none of the"):
        asyncio.run(busy())
    monkeypatch.setattr(pool, "wait_seconds", 30)
    waiting = threading.Thread(target=lambda: asyncio.run(busy()))
    waiting.start()
    pool.give_back(held.pop())
    waiting.join(30)
    assert not waiting.is_alive()
    for session in held:
        pool.give_back(session)


def test_many_at_once_lose_nothing(bank: Bank) -> None:
    """Threads and coroutines on one row: each waits for the row's lock, and the records are in the order of it."""
    with bank.app.transaction(bank.database) as tx:
        tx.execute(INSERT, ("ann", 0))

    def pay(tx: Transaction) -> None:
        tx.execute("UPDATE account SET balance = balance + 1 WHERE id = ?", ("ann",))
        tx.send(bank.paid.record("ann", Paid(tx.query("SELECT balance FROM account WHERE id = ?", ("ann",))[0][0])))

    def in_a_thread() -> None:
        for _ in range(10):
            with bank.app.transaction(bank.database) as tx:
                pay(tx)

    async def one() -> None:
        async with bank.app.transaction(bank.database) as tx:
            await tx.execute("UPDATE account SET balance = balance + 1 WHERE id = ?", ("ann",))
            found = await tx.query("SELECT balance FROM account WHERE id = ?", ("ann",))
            tx.send(bank.paid.record("ann", Paid(found[0][0])))

    async def many() -> None:
        await asyncio.gather(*(one() for _ in range(20)))

    threads = [threading.Thread(target=in_a_thread) for _ in range(3)]
    threads.append(threading.Thread(target=lambda: asyncio.run(many())))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bank.balances() == {"ann": 50}
    assert [msgspec.json.decode(value)["cents"] for _, _, value in bank.rows()] == list(range(1, 51))
    assert bank.woken == 50
