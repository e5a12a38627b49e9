"""A keeper as a process has it: its client, its connections, its metrics."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

from semel.client.cluster import KafkaClient
from semel.client.producer import TransactionalProducer
from semel.databases.database import is_cache, is_documents, open_database
from semel.databases.spec import DatabaseSpec
from semel.dualwrite.conditional import CONDITION_TIMEOUT_MS, ConditionalRecipe
from semel.dualwrite.keeper import Keeper
from semel.dualwrite.limits import KAFKA_SECONDS
from semel.dualwrite.measures import Measures
from semel.dualwrite.plan import Plan
from semel.dualwrite.recipe import FullRecipe
from semel.dualwrite.rows import Rows
from semel.dualwrite.sql import SqlStore
from semel.dualwrite.store import Store, slot_prefix
from semel.dualwrite.thread import KeeperThread
from semel.dualwrite.writing import Writing
from semel.env import Env
from semel.errors import ConfigurationError
from semel.processing.metrics import Metrics
from semel.settings import Settings, running_kafka

if TYPE_CHECKING:
    from semel.dualwrite.documents.store import DocumentStore
    from semel.dualwrite.valkey.store import ValkeyStore

__all__ = ["component_name", "keeper_thread", "make_keeper", "step_store_of", "store_of"]

Close = Callable[[], Coroutine[Any, Any, None]]


def component_name(database: str) -> str:
    """What the dual write of a database is called in the app."""
    return "dual" if database == "database" else f"dual-{database}"


def store_of(app: str, spec: DatabaseSpec) -> Store:
    """The slots of a database of any kind, not yet open. Raises `ConfigurationError`."""
    if is_cache(spec.url) or is_documents(spec.url):
        return step_store_of(app, spec)
    return SqlStore(open_database(spec.url), app, spec.name)


def step_store_of(app: str, spec: DatabaseSpec) -> ValkeyStore | DocumentStore:
    """The same for a store that is no SQL database. Only who has one has its driver."""
    if is_cache(spec.url):
        from semel.dualwrite.valkey.store import ValkeyStore

        return ValkeyStore(spec.url, app, spec.name)
    from semel.dualwrite.documents.connection import DocumentDatabase
    from semel.dualwrite.documents.store import DocumentStore

    return DocumentStore(DocumentDatabase(spec.url), app, spec.name)


def make_keeper(
    app: str, spec: DatabaseSpec, codecs: Mapping[str, int], settings: Settings, env: Env, metrics: Metrics
) -> tuple[Keeper, Close]:
    """A keeper and what closes it, in the event loop in which it will live. Raises `ConfigurationError`."""
    kafka = running_kafka(settings)
    if not kafka:
        raise ConfigurationError(
            f"database {spec.name} is declared with dual_write=True, and nothing says where Kafka is: set "
            f"SEMEL_KAFKA=host:port, or start `semel run` in the folder {settings.data}."
        )
    name = component_name(spec.name)
    # Whoever asks for a slot waits for it: what does not answer for so long is said to be away.
    patience = {**settings.kafka_client, "delivery.timeout.ms": int(KAFKA_SECONDS * 1000)}
    client = KafkaClient(kafka, client_id=f"{app}.{name}", env=env, settings=patience)
    rows, recovery = (
        Rows(
            store_of(app, spec),
            ThreadPoolExecutor(1, thread_name_prefix=f"semel {name} {what}"),
        )
        for what in ("rows", "recovery")
    )

    def producer(name: str, two_phase: bool = True) -> TransactionalProducer:
        return TransactionalProducer(
            client,
            name,
            transaction_timeout_ms=CONDITION_TIMEOUT_MS,
            delivery_timeout_ms=int(KAFKA_SECONDS * 1000),
            two_phase_commit=two_phase,
            prepare_until_timeout=not two_phase,
        )

    conditional = ConditionalRecipe(client, producer)
    either = spec.outbox and isinstance(rows.store, SqlStore)
    keeper = Keeper(
        app,
        slot_prefix(app, spec.name),
        client,
        rows,
        recovery,
        Writing(client, codecs),
        env,
        Measures(metrics, name),
        create_tables=settings.profile == "dev",
        recipe=conditional if spec.dual_write == "conditional" else FullRecipe(env, producer, conditional.resolve),
        confirm=partial(rows.store.confirm, Plan.DUAL_WRITE) if isinstance(rows.store, SqlStore) and either else None,
    )

    async def close() -> None:
        rows.end()
        recovery.end()
        await client.close()

    return keeper, close


def keeper_thread(app: str, spec: DatabaseSpec, codecs: Mapping[str, int], metrics: Metrics) -> KeeperThread:
    """A keeper in a thread of its own, for the sessions of a process; settings come from the environment."""
    return KeeperThread(
        lambda: make_keeper(app, spec, codecs, Settings.from_environment(), Env(), metrics), f"database {spec.name}"
    )
