"""A whole app in the test's own process: the real engine, ingress and sinks over a broker of the test's own.

Everything runs in one event loop whose clock does not wait (`semel.testing.loop`), and only while a method of the
`TestApp` is called; when that returns, everything that was caused is done. A test needs no sleep and no poll.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import msgspec

from semel.app import App
from semel.databases.database import connect
from semel.env import wall_ms
from semel.errors import ConfigurationError
from semel.ingress.requests import requests_topic
from semel.processing import parking
from semel.processing.component import park_topic, state_topic
from semel.processing.faults import Fault
from semel.processing.parklog import ParkLog, Waiting
from semel.processing.serdes.prepare import attach_all
from semel.processing.topics import InputRecord, State, Topic
from semel.sinks.sql.parking import ParkedRow, list_parked
from semel.testing.loop import VirtualLoop
from semel.testing.reading import read_topic, topic_names
from semel.testing.registry import MemoryRegistry
from semel.testing.rig import Rig, prepared
from semel.testing.values import ANY, Answer, Parked, show_records
from semel.types import Header, Record
from semel.wire.partitioner import partition_for

__all__ = ["AsyncTestApp", "TestApp", "UnexpectedlyParked"]

T = TypeVar("T")
K = TypeVar("K")
V = TypeVar("V")


class UnexpectedlyParked(AssertionError):
    """A record could not be processed, and the test did not say that it expects that."""


class _Looks:
    """What a test asks about an app; nothing of it changes anything."""

    _rig: Rig
    _urls: dict[str, str]

    def sent(self, topic: Topic[K, V]) -> list[InputRecord[K, V]]:
        """Every committed record of a topic, by partition and offset."""
        return [topic.decode(record) for record in read_topic(self._rig.node, topic.name)]

    def assert_sent(
        self, topic: Topic[K, V], key: Any = ANY, value: Any = ANY, *, times: int | None = None
    ) -> list[InputRecord[K, V]]:
        """That records with this key and value were committed, at least one or exactly `times`; returns them."""
        everything = self.sent(topic)
        found = [item for item in everything if key in (ANY, item.key) and value in (ANY, item.value)]
        if (times is None and not found) or (times is not None and len(found) != times):
            wanted = ", ".join(f"{name}={item!r}" for name, item in (("key", key), ("value", value)) if item is not ANY)
            due = "at least one record" if times is None else f"{times} records"
            raise AssertionError(
                f"topic {topic.name} has {len(found)} records with {wanted or 'any key and value'}, and {due} were "
                f"expected.{self._why()}\n{show_records(topic.name, everything)}"
            )
        return found

    def state(self, state: State[K, V]) -> dict[K, V]:
        """The committed values of a store by key, of all partitions together."""
        topic = state_topic(self._rig.app.name, state.name)
        if topic not in topic_names(self._rig.node):
            return {}  # No processor has it.
        found: dict[bytes, bytes] = {}
        for record in read_topic(self._rig.node, topic):
            if record.key is not None:
                found.pop(record.key, None)
                if record.value is not None:
                    found[record.key] = record.value
        return {state.key_serde.decode(key): state.value_serde.decode(value) for key, value in found.items()}

    def parked(self) -> list[Parked]:
        """Every parked record: of processors and endpoints by topic, partition and offset, then of sinks."""
        there = set(topic_names(self._rig.node))
        app = self._rig.app
        inputs = sorted({spec.topic.name for spec in app.processors.values()} | {requests_topic(app.name)})
        topics = [name for name in (park_topic(app.name, topic) for topic in inputs) if name in there]
        found = [item for name in topics for item in _waiting(read_topic(self._rig.node, name))]
        if self._rig.parked_in_databases:
            for url in sorted({spec.database.url for spec in app.sinks.values()}):
                connection = connect(url)
                try:
                    found += [_parked_in_database(row) for row in list_parked(connection)]
                finally:
                    connection.close()
        return found

    def query(self, sql: str, parameters: Sequence[Any] = (), *, database: str = "database") -> list[tuple[Any, ...]]:
        """The rows of a SELECT in a database of the app."""
        if database not in self._urls:
            raise ConfigurationError(f"app {self._rig.app.name} has no database {database!r}: {sorted(self._urls)}")
        connection = connect(self._urls[database])
        try:
            return connection.query(sql, parameters)
        finally:
            connection.close()

    def _why(self) -> str:
        waiting = self.parked()
        return "".join(f"\n  parked: {item}" for item in waiting[:5])


class TestApp(_Looks):
    """Runs `app` from `with` to its end; the app itself is not changed.

    What a handler raises is raised where the test caused it, unless `raise_errors=False`: then it is in `parked()`.
    `replay` runs every handler twice and raises `NotDeterministic` where the two runs differ. Databases are SQLite
    files of the test; `databases` gives URLs by name to those that shall not be (one without a name is "database").
    `now` is what the app's clock says at the start.
    """

    __test__ = False  # A class for tests, not one of them.

    def __init__(
        self,
        app: App,
        *,
        replay: bool = False,
        raise_errors: bool = True,
        databases: Mapping[str, str] | None = None,
        now: datetime | None = None,
    ) -> None:
        if app.caches:
            raise ConfigurationError(
                f"app {app.name} has a cache, and tests have no Valkey in memory. Test the cache's handlers by calling "
                "them with semel.databases.valkey.effects.CacheEffects(): its `commands` are what they would do."
            )
        if app.document_stores:
            raise ConfigurationError(
                f"app {app.name} has a document store, and tests have none in memory: transactions on it need the real "
                "one."
            )
        if app.searches:
            raise ConfigurationError(
                f"app {app.name} has a search, and tests have no OpenSearch in memory. Test its handlers by calling "
                "them with semel.sinks.search.effects.SearchEffects(records): its `notes` are what they would write."
            )
        unknown = sorted((databases or {}).keys() - app.databases.keys())
        if unknown:
            raise ConfigurationError(f"databases={unknown}, but app {app.name} has {sorted(app.databases) or 'none'}.")
        self._app = app
        self._replay = replay
        self._raise_errors = raise_errors
        self._given = dict(databases or {})
        self._start_ms = wall_ms() if now is None else int(now.timestamp() * 1000)
        self._errors: list[BaseException] = []
        self._known_parked = 0
        self._keys = 0
        self._loop: VirtualLoop | None = None
        self._shell: AsyncTestApp | None = None

    def __repr__(self) -> str:
        return f"<TestApp {self._app.name} [{'not running' if self._loop is None else self.now}]>"

    # --- Life ---

    def __enter__(self) -> Self:
        assert self._loop is None, "this TestApp runs already"
        self._folder = tempfile.TemporaryDirectory(prefix="semel-test-")
        folder = Path(self._folder.name)
        self._urls = {name: self._given.get(name, f"sqlite:///{folder}/{name}.db") for name in self._app.databases}
        self._loop = VirtualLoop()
        attach_all(self._app.topics.values(), MemoryRegistry())
        self._app.transact_at(self._urls)
        shadow = prepared(self._app, self._urls, self._errors.append, replay=self._replay)
        self._rig = Rig(shadow, folder, self._loop, self._now_ms)
        try:
            self._do(lambda rig: rig.start())
            self.settle()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    async def __aenter__(self) -> AsyncTestApp:
        self._shell = AsyncTestApp(self)
        return await self._shell.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._shell is not None
        await self._shell.stop()

    def _end(self) -> None:
        loop, self._loop = self._loop, None
        assert loop is not None
        try:
            loop.run_until_complete(self._rig.stop())
        finally:
            for task in asyncio.all_tasks(loop):
                task.cancel()
                with_errors = asyncio.gather(task, return_exceptions=True)
                loop.run_until_complete(with_errors)
            loop.close()
            self._app.transact_at({})
            self._folder.cleanup()

    def _do(self, work: Callable[[Rig], Coroutine[Any, Any, T]]) -> T:
        if self._loop is None:
            raise ConfigurationError("this TestApp does not run: use it inside of `with TestApp(app) as t:`.")
        return self._loop.run_until_complete(work(self._rig))

    def _now_ms(self) -> int:
        return self._start_ms + (0 if self._loop is None else round(self._loop.time() * 1000))

    # --- What a test does ---

    @property
    def now(self) -> datetime:
        """What the app's clock says, in UTC."""
        return datetime.fromtimestamp(self._now_ms() / 1000, UTC)

    def post(
        self, path: str, json: Any = None, *, key: str | None = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """POST a JSON body; `key` is the Idempotency-Key, by default a new one. Returns when all it caused is done.

        `json` is anything that msgspec writes as JSON; bytes go as they are.
        """
        if key is None:
            self._keys += 1
            key = f"test-{self._keys}"
        body = json if isinstance(json, bytes) else b"" if json is None else msgspec.json.encode(json)
        named = {"content-type": "application/json", "idempotency-key": f'"{key}"'}
        named |= {name.lower(): text for name, text in (headers or {}).items()}
        return self.request("POST", path, body, named)

    def get(self, path: str) -> Answer:
        """GET a path of the ingress, such as /operations/{id}."""
        return self.request("GET", path, b"", {})

    def request(self, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        """Any request to the ingress, with these headers and no others."""
        answer = self._do(lambda rig: rig.ask(method, path, body, headers))
        self.settle()
        return answer

    def send(self, topic: Topic[K, V], key: K | None, value: V | None, *, headers: Sequence[Header] = ()) -> None:
        """Write a record as another service would. Returns when everything that it caused is done."""
        self.send_many(topic, [(key, value)], headers=headers)

    def send_many(
        self, topic: Topic[K, V], records: Iterable[tuple[K | None, V | None]], *, headers: Sequence[Header] = ()
    ) -> None:
        """Write records in this order; all are there before the app works on the first of them comes to rest."""
        self._append(topic.name, [(topic.encode_key(key), *topic.write(value, headers)) for key, value in records])

    def send_bytes(
        self, topic: Topic[Any, Any], key: bytes | None, value: bytes | None, *, headers: Sequence[Header] = ()
    ) -> None:
        """Write what may not be of the topic's types."""
        self._append(topic.name, [(key, value, headers)])

    def _append(self, topic: str, records: Sequence[tuple[bytes | None, bytes | None, Sequence[Header]]]) -> None:
        async def append(rig: Rig) -> None:
            count = rig.partitions(topic)
            for key, value, headers in records:
                partition = 0 if key is None else partition_for(key, count)
                await rig.append(topic, partition, key, value, headers)

        self._do(append)
        self.settle()

    def advance(self, seconds: float) -> None:
        """Put the app's clock forward. Returns when everything that is due by then is done."""
        if seconds < 0:
            raise ConfigurationError(f"advance({seconds:g}): the app's clock does not go back.")
        assert self._loop is not None, "this TestApp does not run"
        self._loop.leap(seconds)
        self.settle()

    def restart(self) -> None:
        """Stop the engines and start new ones: they have what is committed, and nothing else."""
        self._do(lambda rig: rig.stop_worker())
        self._do(lambda rig: rig.start_worker())
        self.settle()

    def settle(self) -> None:
        """Wait until everything is done that was caused; every other method does so by itself.

        Raises what a handler raised, `NotSettled`, and `UnexpectedlyParked`.
        """
        try:
            self._do(lambda rig: rig.settle())
        except AssertionError as error:
            self._raise_first(error)
            raise
        self._raise_first(None)

    def _raise_first(self, cause: BaseException | None) -> None:
        errors, self._errors[:] = list(self._errors), []
        if not self._raise_errors:
            return
        waiting = self.parked()
        fresh, self._known_parked = waiting[self._known_parked :], len(waiting)
        if errors:
            raise errors[0] from cause
        failed = [item for item in fresh if item.error]
        if failed:
            raise UnexpectedlyParked(
                f"{len(failed)} records could not be processed; TestApp(app, raise_errors=False) leaves them to "
                "parked().\n" + "\n".join(map(str, failed))
            )


class AsyncTestApp(_Looks):
    """A `TestApp` for async tests: made by `async with TestApp(app) as t`.

    The app runs in a thread with a loop of its own, because its clock is not the test's. So a handler must not use
    what belongs to the test's loop, such as a connection that was opened there.
    """

    __test__ = False

    def __init__(self, app: TestApp) -> None:
        self._sync = app
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="semel-test-app")

    def __repr__(self) -> str:
        return f"<Async{repr(self._sync)[1:]}"

    async def start(self) -> Self:
        """Start the app; `async with` does it."""
        try:
            await self._call(self._sync.__enter__)
        except BaseException:
            self._thread.shutdown()
            raise
        self._rig, self._urls = self._sync._rig, self._sync._urls
        return self

    async def stop(self) -> None:
        """Stop the app; the end of `async with` does it."""
        try:
            await self._call(self._sync._end)
        finally:
            self._thread.shutdown()

    async def _call(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    @property
    def now(self) -> datetime:
        """See `TestApp.now`."""
        return self._sync.now

    async def post(
        self, path: str, json: Any = None, *, key: str | None = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """See `TestApp.post`."""
        return await self._call(lambda: self._sync.post(path, json, key=key, headers=headers))

    async def get(self, path: str) -> Answer:
        """See `TestApp.get`."""
        return await self._call(lambda: self._sync.get(path))

    async def request(self, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        """See `TestApp.request`."""
        return await self._call(lambda: self._sync.request(method, path, body, headers))

    async def send(self, topic: Topic[K, V], key: K | None, value: V | None, *, headers: Sequence[Header] = ()) -> None:
        """See `TestApp.send`."""
        await self._call(lambda: self._sync.send(topic, key, value, headers=headers))

    async def send_many(
        self, topic: Topic[K, V], records: Iterable[tuple[K | None, V | None]], *, headers: Sequence[Header] = ()
    ) -> None:
        """See `TestApp.send_many`."""
        await self._call(lambda: self._sync.send_many(topic, records, headers=headers))

    async def send_bytes(
        self, topic: Topic[Any, Any], key: bytes | None, value: bytes | None, *, headers: Sequence[Header] = ()
    ) -> None:
        """See `TestApp.send_bytes`."""
        await self._call(lambda: self._sync.send_bytes(topic, key, value, headers=headers))

    async def advance(self, seconds: float) -> None:
        """See `TestApp.advance`."""
        await self._call(lambda: self._sync.advance(seconds))

    async def restart(self) -> None:
        """See `TestApp.restart`."""
        await self._call(self._sync.restart)

    async def settle(self) -> None:
        """See `TestApp.settle`."""
        await self._call(self._sync.settle)


def _waiting(records: Iterable[Record]) -> list[Parked]:
    """What waits in a park topic, by partition and offset; what was released or discarded does not."""
    logs: dict[tuple[str, int], ParkLog] = {}
    found: dict[tuple[str, int, int], Parked] = {}
    for record in records:
        component = (dict(record.headers).get(parking.COMPONENT) or b"").decode(errors="replace")
        log = logs.setdefault((component, record.partition), ParkLog(component))
        waiting = log.take(record)
        if isinstance(waiting, Waiting):
            fault = waiting.fault or Fault()
            topic = record.topic.partition(".semel.park.")[2]
            place = (component, record.partition, waiting.offset)
            found[place] = Parked(
                component, topic, record.partition, waiting.offset, record.key, fault.error, fault.message
            )
    return [item for (component, number, offset), item in found.items() if offset in logs[component, number].waiting]


def _parked_in_database(row: ParkedRow) -> Parked:
    fault = row.fault or Fault()
    return Parked(row.key.sink, row.topic, row.key.part, row.offset, row.record_key, fault.error, fault.message)
