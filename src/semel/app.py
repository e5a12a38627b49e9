"""`App`: declares topics, endpoints, processors and sinks, and knows no IO.

Everything is checked when it is declared, so that an app that imports is an app that can start.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from semel.databases.database import check_url
from semel.databases.spec import CacheSpec, DatabaseSpec, DocumentsSpec, SearchSpec, check_indexes
from semel.errors import ConfigurationError
from semel.ingress.spec import EndpointSpec
from semel.processing.component import Component, Delivery, Ordering, ProcessorSpec
from semel.processing.overdue import parse_deadline
from semel.processing.pace import parse_latency
from semel.processing.topics import Format, State, Topic, check_name, serde
from semel.settings import Settings, database_variable, store_variable
from semel.sinks.dedup import Dedup
from semel.sinks.spec import SinkSpec, handler_argument, sink_spec

if TYPE_CHECKING:
    from semel.ingress.idempotency import Idempotency
    from semel.outbox.caches import CacheBlock
    from semel.outbox.documents import DocumentBlock
    from semel.outbox.transaction import TransactionBlock
    from semel.outbox.writer import Writer

__all__ = ["App"]

K = TypeVar("K")
V = TypeVar("V")
Handler = TypeVar("Handler", bound=Callable[..., Any])
Store = TypeVar("Store", bound=DatabaseSpec)

REQUESTS = "requests"
"""The component that runs the endpoints; no handler may take its name."""


class App:
    """A transactional microservice.

    `require="exactly-once"` refuses to start where a promise cannot hold. `request_partitions` is the number of
    partitions of the topic through which the endpoints' requests go; it is fixed when the topic is made. `latency`
    is what processors have that state none of their own. With `trace` the records that a handler yields belong to the
    trace of its input (headers `traceparent` and `tracestate`).
    """

    def __init__(
        self,
        name: str,
        *,
        require: Literal["exactly-once"] | None = None,
        request_partitions: int | None = None,
        latency: str | None = None,
        trace: bool = False,
    ) -> None:
        self.name = check_name(name, "an app")
        if require not in (None, "exactly-once"):
            raise ConfigurationError(f"app {name}: require={require!r}, but only 'exactly-once' can be required.")
        if request_partitions is not None and request_partitions < 1:
            raise ConfigurationError(f"app {name}: request_partitions={request_partitions}, but at least 1 is needed.")
        self.require = require
        self.request_partitions = request_partitions
        self.latency = None if latency is None else parse_latency(latency, f"app {name}")
        self.trace = trace
        self.topics: dict[str, Topic[Any, Any]] = {}
        self.states: dict[str, State[Any, Any]] = {}
        self.databases: dict[str, DatabaseSpec] = {}
        self.caches: dict[str, CacheSpec] = {}
        self.document_stores: dict[str, DocumentsSpec] = {}
        self.searches: dict[str, SearchSpec] = {}
        self.endpoints: dict[str, EndpointSpec] = {}
        self.processors: dict[str, ProcessorSpec] = {}
        self.sinks: dict[str, SinkSpec] = {}
        self.idempotent: list[tuple[str, Idempotency]] = []
        """What `idempotency` made, each with the name of its database."""
        self._writers: dict[str, Writer] = {}
        self._urls: Mapping[str, str] = {}
        self._writing = Lock()

    def __repr__(self) -> str:
        return (
            f"<App {self.name}: {len(self.topics)} topics, {len(self.endpoints)} endpoints, "
            f"{len(self.processors)} processors, {len(self.sinks)} sinks>"
        )

    # --- What there is ---

    def topic(
        self,
        name: str,
        *,
        key: type[K] = str,  # type: ignore[assignment]
        value: type[V] | Format[V],
        partitions: int | None = None,
        compression: Literal["none", "gzip", "snappy", "lz4", "zstd"] = "none",
    ) -> Topic[K, V]:
        """Declare a topic. Its key is str, bytes or int; its value any type that msgspec reads from JSON, or a format
        of such a type: `Avro(Order)`, `Protobuf(OrderPb)`, `JsonSchema(Order)`, `CloudEvent(Order, ...)`.

        What this app writes to it is compressed with `compression`, which all but "gzip" need `semel[compression]` for.
        What it reads may be compressed in any way.
        """
        if name in self.topics:
            raise ConfigurationError(f"topic {name} is declared twice in app {self.name}: keep one and share it.")
        if isinstance(name, str) and ".semel." in name:
            raise ConfigurationError(f"topic {name}: names with '.semel.' are Semel's own. Choose another name.")
        topic = Topic(name, key, value, partitions, compression)
        self.topics[name] = topic
        return topic

    def state(
        self,
        name: str,
        *,
        key: type[K],
        value: type[V],
        ttl_seconds: float | None = None,
        value_bytes_max: int | None = None,
        bytes_max: int | None = None,
    ) -> State[K, V]:
        """Declare a store for one processor: kept by partition, changed in the processor's Kafka transaction.

        A value is gone `ttl_seconds` after the time of the record that wrote it, by the time of the record that reads
        it. A key with its value has at most `value_bytes_max` bytes, one partition of the store `bytes_max`; a record
        that would make more is parked.
        """
        if name in self.states:
            raise ConfigurationError(f"state {name} is declared twice in app {self.name}: give one another name.")
        if name == "idempotency":
            raise ConfigurationError(
                "state 'idempotency' is where the endpoints keep their answers: take another name."
            )
        state = State(name, key, value, ttl_seconds=ttl_seconds, value_bytes_max=value_bytes_max, bytes_max=bytes_max)
        self.states[name] = state
        return state

    def database(
        self,
        url: str,
        *,
        schema: str = "",
        name: str = "database",
        outbox: bool = False,
        dual_write: Literal["conditional"] | bool = False,
        connections: int | None = None,
    ) -> DatabaseSpec:
        """Declare a database. `schema` is SQL that makes the app's tables and may run again (IF NOT EXISTS).

        With `outbox` transactions on it may send records (`app.transaction`), and a relay brings them into Kafka. With
        `dual_write` Kafka and the database commit together (KIP-939), on a Kafka that keeps prepared transactions; on
        another one nothing starts, or, with both, the outbox is used: `semel guarantees` says which, and why. With
        `dual_write="conditional"` released Apache Kafka will do, on a condition (docs/guarantees.md).
        `connections` is how many of them one process has at the same time (10; SQLite has one writer).
        """
        if dual_write not in (False, True, "conditional"):
            raise ConfigurationError(
                f"database {name}: dual_write={dual_write!r}, but it is True, False or 'conditional'."
            )
        return self._declare(DatabaseSpec(name, url, schema, outbox, dual_write, connections))

    def cache(
        self, url: str, *, name: str = "cache", dual_write: bool = False, connections: int | None = None
    ) -> CacheSpec:
        """Declare a Valkey or Redis for sinks: `valkey://HOST:PORT/0`, or `valkeys://` with TLS.

        With `dual_write` there are transactions on it that send records (`app.transaction`): Kafka and the cache commit
        together (KIP-939), on a Kafka that keeps prepared transactions and a server that keeps what it acknowledges
        (appendonly yes, appendfsync always). `connections` is how many of them one process has at the same time (10).
        """
        if not isinstance(dual_write, bool):
            raise ConfigurationError(f"cache {name}: dual_write={dual_write!r}, but it is True or False.")
        return self._declare(CacheSpec(name, url, dual_write=dual_write, connections=connections))

    def documents(self, url: str, *, name: str = "documents", connections: int | None = None) -> DocumentsSpec:
        """Declare a document store that speaks MongoDB's protocol, `mongodb://HOST:PORT/NAME`, for transactions by dual
        write (`app.transaction`): each inserts one new document, which Kafka's records are committed together with.

        Nothing but the insert of a new document is atomic in every such store (FerretDB 1.24 updates in two steps), so
        nothing else is offered. `connections` is how many transactions one process has at the same time (10).
        """
        return self._declare(DocumentsSpec(name, url, dual_write=True, connections=connections))

    def search(self, url: str, *, indexes: Mapping[str, Mapping[str, Any]], name: str = "search") -> SearchSpec:
        """Declare an OpenSearch for sinks: `opensearch://HOST:PORT`, or `opensearchs://` with TLS.

        `indexes` are those that sinks write to, each with what it is made with, as OpenSearch takes it:
        `{"products": {"mappings": {"properties": {"name": {"type": "text"}}}}}`.
        """
        check_indexes(indexes, f"search {name}")
        return self._declare(SearchSpec(name, url, indexes=dict(indexes)))

    def _declare(self, store: Store) -> Store:
        known = self._stores(type(store))
        what = f"{store.noun} {check_name(store.name, f'a {store.noun}')}"
        variable = store_variable(store.kind, store.name)
        if any(variable == store_variable(store.kind, other) for other in known):
            raise ConfigurationError(f"{what} is declared twice: give the second a name= of its own.")
        check_url(store.kind, store.url, what)
        if store.connections is not None and (not isinstance(store.connections, int) or store.connections < 1):
            raise ConfigurationError(f"{what}: connections={store.connections!r}, but at least 1 is needed.")
        # Slots, and with them transactional ids, are called by the name of their store.
        if store.sends and any(other.name == store.name and other.sends for other in self.transactional):
            raise ConfigurationError(
                f"{what}: another store of app {self.name} that sends records has this name. Give one a name= of its "
                "own."
            )
        known[store.name] = store
        return store

    def use_databases(self, environ: Mapping[str, str]) -> None:
        """Put the URLs of SEMEL_DATABASE (the database without a name) and SEMEL_DATABASE_<NAME> in place of the app's,
        and those of SEMEL_CACHE, SEMEL_DOCUMENTS and SEMEL_SEARCH, with names likewise.

        Raises `ConfigurationError` for a variable that names nothing of the app: with a misspelt one, effects would go
        where nobody wanted them.
        """
        for kind in (DatabaseSpec, CacheSpec, DocumentsSpec, SearchSpec):
            self._use(environ, kind.kind, self._stores(kind))
        for title, sink in self.sinks.items():
            self.sinks[title] = replace(sink, database=self._stores(type(sink.database))[sink.database.name])

    def _use(self, environ: Mapping[str, str], kind: str, known: dict[str, DatabaseSpec]) -> None:
        names = {store_variable(kind, name): name for name in known}
        bare = store_variable(kind, kind)
        for variable, url in environ.items():
            if variable != bare and not variable.startswith(f"{bare}_"):
                continue
            if variable not in names:
                takes = f"it takes {' and '.join(names)}" if names else "it has none"
                raise ConfigurationError(f"{variable} names no {kind} of app {self.name}: {takes}.")
            check_url(kind, url, variable)
            known[names[variable]] = replace(known[names[variable]], url=url)

    @property
    def transactional(self) -> list[DatabaseSpec]:
        """Every store on which there may be transactions, of whatever kind."""
        return [*self.databases.values(), *self.caches.values(), *self.document_stores.values()]

    def _stores(self, kind: type[Store]) -> dict[str, Store]:
        """What the app has of a kind of stores, by name."""
        every: dict[type[DatabaseSpec], Any] = {
            DatabaseSpec: self.databases,
            CacheSpec: self.caches,
            DocumentsSpec: self.document_stores,
            SearchSpec: self.searches,
        }
        found: dict[str, Store] = every[kind]
        return found

    def _own(self, given: Any, kind: type[Store], what: str) -> Store:
        """The app's store of this kind that is called as what was given."""
        name = given.name if isinstance(given, DatabaseSpec) else repr(given)
        found = self._stores(kind).get(name)
        if found is None:
            raise ConfigurationError(f"{what}: {name} is no {kind.noun} of app {self.name}. Use app.{kind.kind}(...).")
        return found

    # --- What happens ---

    def post(
        self,
        path: str,
        *,
        request: Any,
        principal: Callable[[Any], str] | None = None,
        require_key: bool = True,
        query: Iterable[str] = (),
        timeout_seconds: float = 5.0,
    ) -> Callable[[Handler], Handler]:
        """Declare an endpoint: `handler(request)` yields effects, and returns a `Response` or raises a `Problem`.

        It runs once for each Idempotency-Key; its effects and its answer are one Kafka transaction. Parameters of the
        path (`/orders/{id}`), those of `query`, and `principal` go to the handler by keyword, where it takes them. A
        caller that waits longer than `timeout_seconds` gets 202 and asks again.
        """

        def register(handler: Handler) -> Handler:
            what = f"endpoint POST {path}"
            if not callable(handler):
                raise ConfigurationError(f"{what}: {handler!r} is not a function.")
            endpoint = EndpointSpec(
                path,
                request,
                handler,
                principal=principal,
                key_required=require_key,
                query=tuple(query),
                wait_seconds=timeout_seconds,
            )
            serde(request, f"the request of {what}")
            if endpoint.route in self.endpoints:
                raise ConfigurationError(f"{what} is declared twice in app {self.name}.")
            self.endpoints[endpoint.route] = endpoint
            return handler

        return register

    def processor(
        self,
        topic: Topic[Any, Any],
        *,
        state: State[Any, Any] | Iterable[State[Any, Any]] = (),
        ordering: Ordering = "key",
        batch: bool = False,
        concurrency: int = 1,
        delivery: Delivery = "exactly-once",
        latency: str | None = None,
        deadline: str | None = None,
        name: str | None = None,
    ) -> Callable[[Handler], Handler]:
        """Declare a processor: `handler(record, *states)` yields effects, all in one Kafka transaction with the
        position in `topic`.

        A record that cannot be processed parks its key (`ordering="key"`) or stops its partition (`"partition"`).

        With `batch` the handler takes a list of records of one partition, in order. A batch that fails is handed over
        again in halves, until the record is found whose fault it is. An async handler with `concurrency` above 1 works
        on so many records at once: one at a time of each key, and with state one at a time of each partition. Effects
        become real in the order of the input.

        `delivery` other than "exactly-once" writes effects and position in two steps: "at-least-once" may do effects
        again after a crash, "at-most-once" may lose them; `semel guarantees` says so.

        With `latency="50ms"` the engine chooses how long and how large a transaction gathers, by what it measures, so
        that 99 of 100 records have their effects within that time; without it SEMEL_COMMIT_INTERVAL_MS is the limit.

        With `deadline="30s"` no call of the handler takes longer. An async one is cancelled, a sync one ends its
        process, which is started again; the record is tried again, and parked when it turns out to be at fault
        (`HandlerOverdue`).
        """

        def register(handler: Handler) -> Handler:
            title = self._component_name(handler, name, "processor")
            what = f"processor {title}"
            self._check_topic(topic, what)
            states = (state,) if isinstance(state, State) else self._state_tuple(state, what)
            for item in states:
                self._check_state(item, what)
            if ordering not in ("key", "partition"):
                raise ConfigurationError(f"{what}: ordering={ordering!r} is neither 'key' nor 'partition'.")
            _check_handler(handler, ("records" if batch else "record", *(item.name for item in states)), what)
            if concurrency != 1 and not _is_async(handler):
                raise ConfigurationError(
                    f"{what} has concurrency={concurrency!r}, but its handler is not async and never waits: "
                    "write 'async def', or leave concurrency out."
                )
            objective = self.latency if latency is None else parse_latency(latency, what)
            limit = None if deadline is None else parse_deadline(deadline, what)
            spec = ProcessorSpec(
                title, topic, handler, states, ordering, batch, concurrency, delivery, objective, limit, self.trace
            )
            spec.component(self.name)  # Raises what is wrong with the settings together.
            self.processors[title] = spec
            return handler

        return register

    def sink(
        self,
        topic: Topic[Any, Any],
        database: DatabaseSpec,
        *,
        delivery: Delivery = "exactly-once",
        dedup: Dedup | None = None,
        name: str | None = None,
    ) -> Callable[[Handler], Handler]:
        """Declare a sink: `handler(records, db)` writes a batch to the database, in one database transaction with the
        position in `topic`. On a cache `handler(records, cache)` notes commands, which become one script with it. On a
        search `handler(records, index)` notes documents with versions: they are written first, then the position.

        `delivery` other than "exactly-once" takes a transaction for the effects and another one for the position:
        "at-least-once" may write effects again after a crash, "at-most-once" may lose them.

        The position keeps records apart, not messages: where one message may stand in the topic twice, `dedup` says how
        to know it. `Version("field")` passes over what is not newer than its key, `Inbox()` what has a known id.
        """

        def register(handler: Handler) -> Handler:
            title = self._component_name(handler, name, "sink")
            what = f"sink {title}"
            self._check_topic(topic, what)
            if (
                not isinstance(database, DatabaseSpec)
                or isinstance(database, DocumentsSpec)
                or self._stores(type(database)).get(database.name) is not database
            ):
                raise ConfigurationError(
                    f"{what}: its database is not of app {self.name}. Use app.database(...), app.cache(...) or "
                    "app.search(...)."
                )
            if inspect.isgeneratorfunction(handler) or inspect.isasyncgenfunction(handler):
                raise ConfigurationError(
                    f"{what} writes to a database and yields effects for Kafka: a dual write without a plan, because "
                    "one can happen without the other. Let a processor of the same topic yield the records, and the "
                    "sink write the rows."
                )
            _check_handler(handler, ("records", handler_argument(database)), what)
            self.sinks[title] = sink_spec(title, topic, database, handler, delivery, dedup)
            return handler

        return register

    # --- Transactions ---

    @overload
    def transaction(self, database: CacheSpec) -> CacheBlock: ...  # type: ignore[overload-overlap]

    @overload
    def transaction(self, database: DocumentsSpec) -> DocumentBlock: ...  # type: ignore[overload-overlap]

    @overload
    def transaction(self, database: DatabaseSpec) -> TransactionBlock: ...

    def transaction(self, database: DatabaseSpec) -> TransactionBlock | CacheBlock | DocumentBlock:
        """A transaction on a database; the records that it sends are in Kafka if and only if it commits.

            async with app.transaction(accounts) as tx:
                await tx.execute("UPDATE account SET balance = balance - ? WHERE id = ?", (cents, account))
                tx.send(payments.record(account, Paid(cents)))

        `with` for code without an event loop. It may be used anywhere: in endpoints of any web framework, in scripts.
        On a cache it has Redis' commands instead of `execute`, on a document store `insert`, and all of it happens at
        the end of the block.
        """
        if isinstance(database, CacheSpec):
            from semel.outbox.caches import CacheBlock

            cache = self._own(database, CacheSpec, "app.transaction")
            if not cache.sends:
                raise ConfigurationError(
                    f"app.transaction: cache {cache.name} has no dual write, so its transactions could send nothing: "
                    "declare it with app.cache(url, dual_write=True)."
                )
            return CacheBlock(lambda: self.writer(cache.name), cache.name)
        if isinstance(database, DocumentsSpec):
            from semel.outbox.documents import DocumentBlock

            documents = self._own(database, DocumentsSpec, "app.transaction")
            return DocumentBlock(lambda: self.writer(documents.name), documents.name)
        from semel.outbox.transaction import TransactionBlock

        spec = self._own(database, DatabaseSpec, "app.transaction")
        if not spec.sends:
            raise ConfigurationError(
                f"app.transaction: database {spec.name} has no outbox, so its transactions could send nothing: declare "
                "it with app.database(url, outbox=True) or dual_write=True, and run semel migrate."
            )
        return TransactionBlock(lambda: self.writer(spec.name), spec.name)

    def idempotency(
        self,
        database: DatabaseSpec,
        *,
        principal: Callable[[Any], Any] | None = None,
        keep_days: int = 1,
        wait_seconds: float = 5.0,
    ) -> Idempotency:
        """Idempotency-Key for endpoints of FastAPI or Starlette that write to a database themselves.

            idempotent = app.idempotency(bank)
            api.add_middleware(IdempotencyMiddleware)

            @api.post("/transfers")
            async def transfer(body: Transfer, request: Annotated[IdempotentRequest, Depends(idempotent)]):
                async with app.transaction(bank) as tx, request.claim(tx) as claim:
                    await tx.execute(...)
                    claim.answer(Created({"id": ...}))
                return claim.response

        The endpoint runs once for each key; key and response are rows in its transaction, whatever framework or driver
        began that. `principal(request)` names who asks; a key of one is unknown to every other. A key is kept for
        `keep_days` at least, and less than a day longer; then it is a new one. Who comes while the first request is
        still running waits for its answer, at most `wait_seconds` (or `Prefer: wait=`), and is then refused with 409.
        """
        from semel.ingress.idempotency import Idempotency  # Only a process that serves HTTP pays for starlette.

        name = self._own(database, DatabaseSpec, "app.idempotency").name

        def url() -> str:
            return os.environ.get(database_variable(name), self.databases[name].url)

        made = Idempotency(
            self.name,
            url,
            principal=principal,
            keep_days=keep_days,
            wait_seconds=wait_seconds,
            create_tables=lambda: Settings.from_environment().profile == "dev",
        )
        self.idempotent.append((name, made))
        return made

    def writer(self, name: str) -> Writer:
        """The writing side of a database that sends records: this process' connections, made when first asked for."""
        from semel.outbox.writer import Writer  # Only a process that writes to a database pays for it.

        with self._writing:
            writer = self._writers.get(name)
            if writer is None or writer.pid != os.getpid():  # A forked process must not use its parent's connections.
                spec = next((store for store in self.transactional if store.name == name and store.sends), None)
                if spec is None:
                    raise ConfigurationError(f"app {self.name} has no store called {name} that sends records.")
                url = self._urls.get(name) or os.environ.get(store_variable(spec.kind, name), spec.url)
                check_url(spec.kind, url, f"{spec.kind} {name}")
                if type(spec) is DatabaseSpec and name in self._urls and spec.dual_write:
                    # A test's database, whose rows its own relay publishes.
                    spec = replace(spec, outbox=True, dual_write=False)
                writer = self._writers[name] = Writer(self.name, replace(spec, url=url), self.topics)
            return writer

    def transact_at(self, urls: Mapping[str, str]) -> None:
        """From now on transactions go to the databases at these URLs, by name, and by an outbox; for tests."""
        self.close()
        self._urls = urls

    def close(self) -> None:
        """Close the connections of `transaction`; those in use are closed when their transactions end."""
        with self._writing:
            writers, self._writers = self._writers, {}
        for writer in writers.values():
            writer.close()

    # --- Running it ---

    def components(self) -> list[Component]:
        """The processors, as the engine runs them."""
        return [self.compressing(spec.component(self.name)) for spec in self.processors.values()]

    def compressing(self, component: Component) -> Component:
        """A component of this app that compresses what it writes as the topics say."""
        return replace(component, codecs={topic.name: topic.codec for topic in self.topics.values() if topic.codec})

    def asgi(self, settings: Settings | None = None) -> Any:
        """The endpoints as an ASGI app: mount it anywhere. Its lifespan connects to Kafka and drains."""
        from semel.ingress.asgi import create  # Only a process that serves HTTP pays for starlette.

        return create(self, settings or Settings.from_environment())

    # --- Checks ---

    def _component_name(self, handler: Callable[..., Any], name: str | None, kind: str) -> str:
        title = check_name(name or _name_of(handler, f"a {kind}"), f"a {kind}")
        if title == REQUESTS:
            raise ConfigurationError(f"a {kind} cannot be called {REQUESTS}: the endpoints' own component is.")
        if title in self.processors or title in self.sinks:
            raise ConfigurationError(
                f"two handlers of app {self.name} are called {title}, and a handler's name is its consumer group: "
                "give one a name= of its own."
            )
        return title

    def _check_topic(self, topic: Any, what: str) -> None:
        if not isinstance(topic, Topic) or self.topics.get(topic.name) is not topic:
            given = topic.name if isinstance(topic, Topic) else repr(topic)
            raise ConfigurationError(
                f"{what} reads {given}, which is not a topic of app {self.name}: use app.topic(...)."
            )

    def _state_tuple(self, states: Any, what: str) -> tuple[State[Any, Any], ...]:
        if isinstance(states, DatabaseSpec):
            raise ConfigurationError(
                f"{what} would write to database {states.name} and to Kafka: a dual write without a plan, because one "
                "can happen without the other. Yield records, and let a sink write the rows."
            )
        try:
            return tuple(states)
        except TypeError:
            raise ConfigurationError(f"{what}: state={states!r} is not made by app.state(...).") from None

    def _check_state(self, state: Any, what: str) -> None:
        if not isinstance(state, State) or self.states.get(state.name) is not state:
            raise ConfigurationError(f"{what}: state {state!r} is not of app {self.name}. Use app.state(...).")
        for other in self.processors.values():
            if state in other.states:
                raise ConfigurationError(
                    f"{what} and processor {other.name} both change state {state.name}, but a store has one writer: "
                    "give each its own."
                )


def _is_async(handler: Any) -> bool:
    call = handler if inspect.isroutine(handler) else getattr(handler, "__call__", handler)  # noqa: B004
    return inspect.iscoroutinefunction(call) or inspect.isasyncgenfunction(call)


def _name_of(handler: Any, what: str) -> str:
    name = getattr(handler, "__name__", "")
    if not name or name == "<lambda>":
        raise ConfigurationError(f"{what}: a handler without a name needs name=.")
    return str(name)


def _check_handler(handler: Any, arguments: tuple[str, ...], what: str) -> None:
    if not callable(handler):
        raise ConfigurationError(f"{what}: {handler!r} is not a function.")
    try:
        inspect.signature(handler).bind(*arguments)
    except TypeError as error:
        raise ConfigurationError(
            f"{what}: its handler is called as {getattr(handler, '__name__', 'handler')}({', '.join(arguments)}), "
            f"which it does not accept: {error}."
        ) from None
