"""The writing side of one database of an app: which way records go, its connections, the threads that coroutines use
them in, the wake-up of a relay."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, ParamSpec, TypeVar

from semel.databases.database import (
    Cause,
    Database,
    is_cache,
    is_documents,
    is_missing_privilege,
    is_missing_table,
    open_database,
    title_of,
    without_password,
)
from semel.databases.pool import Pool
from semel.databases.spec import DatabaseSpec
from semel.dualwrite.agreement import PlanChanged, agree, agreed, confirm
from semel.dualwrite.keeping import keeper_thread
from semel.dualwrite.plan import Choice, Plan, choose
from semel.dualwrite.session import DualSession
from semel.dualwrite.steps import StepSession
from semel.dualwrite.tables import read_meta as read_slots_meta
from semel.dualwrite.tables import schema_sql as slots_schema_sql
from semel.dualwrite.thread import KeeperThread
from semel.dualwrite.writing import Outgoing
from semel.errors import ConfigurationError, Retriable
from semel.outbox.calling import Caller
from semel.outbox.records import NewRow
from semel.outbox.rows import MSG_ID_HEADER, decode_headers
from semel.outbox.session import Session
from semel.outbox.tables import read_meta, schema_sql
from semel.processing.effects import Produce
from semel.processing.metrics import Metrics
from semel.processing.serdes.prepare import attach_with, registered
from semel.processing.topics import Topic
from semel.settings import Settings

__all__ = ["CONNECTIONS", "WAIT_SECONDS", "Writer"]

log = logging.getLogger("semel.outbox")

P = ParamSpec("P")
T = TypeVar("T")

SqlSession = Session | DualSession
AnySession = SqlSession | StepSession[Any]

CONNECTIONS = 10
"""Transactions of one process on one database at the same time: PostgreSQL allows 100 connections by default, and a
host has several processes."""
CHOOSE_AGAIN_SECONDS = 10.0
"""Until an outbox is looked into again that keeps the dual write from being used."""
WAIT_SECONDS = 10.0
"""How long a transaction waits for a connection: whoever waits longer for a page has gone."""


class Writer:
    """Made at the first transaction. `wake` is called after every COMMIT that wrote records, from any thread."""

    def __init__(self, app: str, spec: DatabaseSpec, topics: Mapping[str, Topic[Any, Any]]) -> None:
        self.app, self.name, self.pid = app, spec.name, os.getpid()
        self._spec, self._topics = spec, topics
        self._in_steps = is_cache(spec.url) or is_documents(spec.url)
        title = "" if self._in_steps else title_of(spec.url)
        # SQLite has one writer at a time. Those of this process queue here, in order, instead of polling for its lock.
        size = 1 if title == "SQLite" else spec.connections or CONNECTIONS
        self.pool: Pool[AnySession] = Pool(
            self._new_session,
            size=size,
            wait_seconds=WAIT_SECONDS,
            what=f"connections to database {spec.name}",
        )
        self._executor = ThreadPoolExecutor(size, thread_name_prefix=f"semel-{spec.name}")
        self._caller = Caller(spec.url) if title == "PostgreSQL" else None
        self._wakers: list[Callable[[], None]] = [] if self._caller is None else [self._caller.wake]
        self._documents: Any = None
        self._prepare_lock = threading.Lock()
        self._prepared = False
        self._choose_at: float | None = None
        """When to choose again."""
        self._either = bool(spec.outbox and spec.dual_write)
        self.choice: Choice | None = None if self._either else choose(spec.outbox, spec.dual_write, None)
        """How records go to Kafka. Who declares both ways is told by the broker, when it is prepared."""
        self.metrics = Metrics()
        """What the dual write of this process counts."""
        codecs = {topic.name: topic.codec for topic in topics.values()}
        self._keeper = keeper_thread(app, spec, codecs, self.metrics) if spec.dual_write else None

    def __repr__(self) -> str:
        return f"<Writer of app {self.app}, database {self.name}: {self.pool!r}>"

    def prepare(self) -> None:
        """Before the first transaction: the schemas of the app's topics are registered, where they have any, and in
        development the tables are made.

        Blocks. Raises `ConfigurationError`, and `Retriable` while the database or the registry cannot be reached.
        """
        if self.is_prepared:
            return
        with self._prepare_lock:
            if not self._prepared:
                settings = Settings.from_environment()
                waiting = [topic for topic in self._topics.values() if not _is_ready(topic)]
                if waiting:
                    attach_with(waiting, settings)
                if settings.profile == "dev" and not self._in_steps:
                    self._make_tables()
            if self._either and self._keeper is not None and not self.is_prepared:
                self._choose(self._keeper)
            self._prepared = True

    @property
    def is_prepared(self) -> bool:
        """Whether `prepare` has nothing to do."""
        return self._prepared and (self._choose_at is None or time.monotonic() < self._choose_at)

    def _choose(self, keeper: KeeperThread) -> None:
        """Which way records go, agreed with the other processes of the app. Raises `Retriable` where nobody knows."""
        self._choose_at = time.monotonic() + CHOOSE_AGAIN_SECONDS  # Who has a plan goes on with it meanwhile.
        try:
            choice = choose(self._spec.outbox, self._spec.dual_write, keeper.mode())
        except Retriable:
            plan = self._in_database(agreed)
            if plan is None:
                raise
            choice = Choice(plan, "that is what was agreed on, and Kafka does not answer now")
        else:
            plan = self._in_database(lambda database: agree(database, choice.plan))
            if plan is choice.plan:
                self._choose_at = None
            else:
                choice = Choice(plan, "records of before wait in it, and those that come now must not overtake")
        if self.choice != choice:
            log.info("transactions on %s: %s, because %s", self.name, *choice)
        self.choice = choice

    def fresh(self, session: AnySession) -> AnySession:
        """A session that was borrowed, or another one where it is of a plan that does not hold any more."""
        assert self.choice is not None
        if not self._either or isinstance(session, Session) == (self.choice.plan is Plan.OUTBOX):
            return session
        session.close()
        return self._new_session()

    def begin(self, session: AnySession) -> None:
        """Begin a transaction. Raises what the session raises; after `PlanChanged` the next one goes the other way."""
        try:
            session.begin()
        except PlanChanged:
            self._choose_at = 0.0
            raise

    def _new_session(self) -> AnySession:
        assert self.choice is not None, "no connection is lent before the plan is known"
        if is_cache(self._spec.url):
            from semel.dualwrite.valkey.session import ValkeySession  # Only who has a cache has its driver.

            assert self._keeper is not None
            return StepSession(ValkeySession(self._spec.url), self._keeper)
        if is_documents(self._spec.url):
            from semel.dualwrite.documents.connection import DocumentDatabase  # Likewise.
            from semel.dualwrite.documents.session import DocumentSession

            assert self._keeper is not None
            self._documents = self._documents or DocumentDatabase(self._spec.url)  # It has connections for everybody.
            return StepSession(DocumentSession(self._documents), self._keeper)
        database = open_database(self._spec.url)
        if self.choice.plan is Plan.OUTBOX:
            confirmed = partial(confirm, plan=Plan.OUTBOX, lock=database.lock_rows) if self._either else None
            return Session(database, self.app, confirm=confirmed)
        assert self._keeper is not None
        return DualSession(database, self._keeper)

    def _make_tables(self) -> None:
        def make(database: Database) -> None:
            if self._spec.outbox:
                try:
                    read_meta(database)
                except ConfigurationError:
                    database.migrate(schema_sql(database.title))
            if self._spec.dual_write:
                try:
                    read_slots_meta(database)
                except ConfigurationError:
                    database.migrate(slots_schema_sql(database.title))
            if self._spec.schema:
                database.migrate(self._spec.schema)

        self._in_database(make)

    def _in_database(self, work: Callable[[Database], T]) -> T:
        """Something to be done once, on a connection of its own."""
        database = open_database(self._spec.url)
        where = without_password(self._spec.url)
        try:
            database.connect()
            return work(database)
        except ConfigurationError:
            raise
        except Exception as error:
            said = " ".join(str(error).split())
            if database.cause(error) is Cause.DATA or is_missing_privilege(error):
                raise ConfigurationError(f"{where} refused the tables: {said}") from error
            if is_missing_table(error):
                raise ConfigurationError(f"a table is not in {where} ({said}): run semel migrate.") from error
            raise Retriable(f"the tables in {where} could not be made or looked at now: {said}") from error
        finally:
            database.close()

    def check_topic(self, record: Any) -> None:
        """Raise `ConfigurationError` for a record of a topic that is not the app's."""
        topic = record.topic if isinstance(record, Produce) else None
        if topic is not None and self._topics.get(topic.name) is not topic:
            raise ConfigurationError(
                f"topic {topic.name} is not of app {self.app}, which sends this record: use app.topic(...)."
            )

    def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run a call in a thread; there are as many threads as connections."""
        return self._executor.submit(function, *args, **kwargs)

    def commit(self, session: AnySession, rows: Sequence[NewRow], work: Any = None) -> None:
        """Commit the session's transaction, with the records that these rows are; `work` is what a store that does
        everything in one step is to do. Raises what the session raises."""
        if isinstance(session, Session):
            session.commit(rows)
        elif isinstance(session, DualSession):
            session.commit([_outgoing(row) for row in rows])
        else:
            session.commit(work, [_outgoing(row) for row in rows])

    def drop(self, session: AnySession) -> None:
        """Roll back what is open, and let others have the connection."""
        session.rollback()
        self.pool.give_back(session)
        if self.pool.is_closed:
            self._close_idle()

    def on_commit(self, waker: Callable[[], None]) -> None:
        """Call `waker` after every COMMIT that wrote records: it must not block, and may be called from any thread."""
        self._wakers.append(waker)

    def wake(self) -> None:
        """Tell the relay that there is something to do. A hint: it looks by itself, too."""
        if self.choice is not None and self.choice.plan is not Plan.OUTBOX:
            return
        for waker in self._wakers:
            try:
                waker()
            except Exception:
                log.exception("the relay of database %s could not be woken; it looks by itself", self.name)

    def close(self) -> None:
        """Close the connections that nobody uses now, and the others when they come back."""
        self._close_idle()
        if self._caller is not None:
            self._caller.stop()
        self._executor.shutdown(wait=False)
        if self._keeper is not None:
            self._keeper.close()
        if self._documents is not None:
            self._documents.close()

    def _close_idle(self) -> None:
        for session in self.pool.close():
            session.close()


def _outgoing(row: NewRow) -> Outgoing:
    """The record of a row, as a relay would write it."""
    own = (MSG_ID_HEADER, row.msg_id.encode())
    headers = (own,) if row.headers == "[]" else (*decode_headers(row.headers), own)
    return Outgoing(row.topic, row.msg_id, row.record_key, row.record_value, headers, row.created_at)


def _is_ready(topic: Topic[Any, Any]) -> bool:
    """Whether its values can be written: no schema registry, or one that was asked already."""
    return all(bound.is_attached for bound in registered([topic]))
