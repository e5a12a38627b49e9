"""Fixtures for every test: real components, one of each a session.

With CI=true a component that cannot be started is a failure; on a user's machine it is a named skip.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.services.broker import BrokerProcess
from tests.services.ferretdb import FerretServer, missing_ferretdb
from tests.services.kafka import KafkaNode, missing_tools
from tests.services.mariadb import MariadbServer, missing_mariadb
from tests.services.opensearch import OpenSearchNode, missing_opensearch_tools
from tests.services.postgres import PostgresServer, missing_postgres
from tests.services.valkey import ValkeyServer, missing_valkey

# In CI the examples are the same every time: what lands is not decided by chance. Elsewhere every run looks further.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI") == "true":
    hypothesis.settings.load_profile("ci")


LONG_ON_MARIADB = ("test_dedup", "test_delivery", "test_release", "test_transaction_crashes")
"""What these show of MariaDB beyond the suites that every store runs takes longer than `make test` has."""
LONG_ON_OPENSEARCH = ("test_release", "test_judgement", "test_crashes", "test_engine_kafka")
"""The same of OpenSearch, where `sinks/test_search` runs the suites of other modules."""
LONG_WITHOUT_C = ("test_blame", "test_latency", "test_overlap", "test_provenance", "test_release")
"""The engine's suites whose second run, without the inner loop in C, is in `make soak`; `test_engine` has both."""


LONGEST = (
    *("processing/test_engine_kafka", "client/test_brokers", "test_bad_input", "demo/test_demo", "models/test_models"),
    *(
        "sinks/test_engine_kafka",
        "sinks/test_search",
        "log/test_compaction",
        "broker/test_crash_points",
        "prove/test_campaign",
    ),
    *("sinks/test_commit_outcome", "broker/test_process", "ingress/test_chain", "simulation/test_simulation"),
    *("test_docs", "differential/test_differential", "prove/test_faults_transactions", "outbox/test_bank"),
    *("outbox/test_relay", "ops/test_run", "outbox/test_transaction_crashes", "sinks/test_crashes"),
    *("outbox/test_crashes", "failpoints/test_cases", "conformance/test_java_clients"),
)
"""The modules that take longest, the longest first: begun last, one of them would run alone at the end."""


def _rank(item: pytest.Item) -> int:
    module = item.path.relative_to(Path(__file__).parent).with_suffix("").as_posix()
    return LONGEST.index(module) if module in LONGEST else len(LONGEST)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_rank)
    for item in items:
        module = item.path.stem
        second_way = module in LONG_WITHOUT_C and item.path.parent.name == "processing" and "general" in item.name
        origin = item.function.__module__.rpartition(".")[2] if isinstance(item, pytest.Function) else module
        older = "killed_at_every_failpoint" in item.name and item.name.endswith("_v1]")
        on_opensearch = module == "test_search" and origin in LONG_ON_OPENSEARCH
        if second_way or older or on_opensearch or (module in LONG_ON_MARIADB and item.get_closest_marker("mariadb")):
            item.add_marker(pytest.mark.soak)


@pytest.fixture(autouse=True)
def _settings_of_one_test() -> Iterator[None]:
    """What a test puts into the environment is not there for the next one, nor for the processes that it starts."""
    before = {name: value for name, value in os.environ.items() if name.startswith("SEMEL_")}
    yield
    for name in [name for name in os.environ if name.startswith("SEMEL_")]:
        if name not in before:
            del os.environ[name]
    os.environ.update(before)


def unavailable(what: str, why: str) -> None:
    """Fail in CI, skip with a name elsewhere."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what} is needed here and cannot be started: {why}")
    pytest.skip(f"{what}: {why}")


def _node(transaction_version: int) -> Iterator[KafkaNode]:
    tools = missing_tools()
    if tools:
        unavailable("Apache Kafka", f"{' and '.join(tools)} not found")
    node = KafkaNode(transaction_version)
    try:
        yield node.start()
    finally:
        node.stop()


@pytest.fixture(scope="session")
def kafka() -> Iterator[KafkaNode]:
    """Apache Kafka 4.3.1 with transactions V2; shared, so use topics and ids of your own."""
    yield from _node(2)


@pytest.fixture(scope="session")
def kafka_v1() -> Iterator[KafkaNode]:
    """Apache Kafka 4.3.1 finalized at transaction.version 1."""
    yield from _node(1)


class Address:
    """Where a broker of either kind listens, and which transaction protocol it finalized."""

    def __init__(self, bootstrap: str, kind: str, transaction_version: int) -> None:
        self.bootstrap = bootstrap
        self.kind = kind
        self.transaction_version = transaction_version

    def __repr__(self) -> str:
        return f"<{self.kind} broker at {self.bootstrap}, transaction.version {self.transaction_version}>"


def _embedded(folder: Path, transaction_version: int) -> Iterator[Address]:
    """In a process of its own: many tests put a disk that fails, or other limits, into this one."""
    broker = BrokerProcess(folder / "data", transaction_version=transaction_version)
    broker.start()
    try:
        yield Address(broker.bootstrap, "embedded", transaction_version)
    finally:
        broker.kill()  # A clean stop would sync the logs of a thousand topics that nobody reads again.


@pytest.fixture(scope="session")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Address]:
    """The embedded broker with transactions V2; shared, so use topics and ids of your own."""
    yield from _embedded(tmp_path_factory.mktemp("embedded"), 2)


@pytest.fixture(scope="session")
def embedded_v1(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Address]:
    """The embedded broker finalized at transaction.version 1."""
    yield from _embedded(tmp_path_factory.mktemp("embedded-v1"), 1)


@pytest.fixture
def own_broker(tmp_path: Path) -> Iterator[BrokerProcess]:
    """An embedded broker of the test's own, which may be killed."""
    broker = BrokerProcess(tmp_path / "broker")
    broker.start()
    try:
        yield broker
    finally:
        broker.stop()


@pytest.fixture(params=["embedded", "embedded_v1", "kafka", "kafka_v1"])
def any_broker(request: pytest.FixtureRequest) -> Address:
    """Every broker that the same app must run on: one suite, four runs."""
    return _address(request)


@pytest.fixture(params=["embedded", "kafka"])
def newest_broker(request: pytest.FixtureRequest) -> Address:
    """The brokers with transactions V2: where the protocol of transactions decides nothing, half the runs do."""
    return _address(request)


def _address(request: pytest.FixtureRequest) -> Address:
    found = request.getfixturevalue(request.param)
    if isinstance(found, Address):
        return found
    return Address(found.bootstrap, "kafka", found.transaction_version)


DEFERRING = ["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)]
"""Databases whose constraints may wait for COMMIT; MariaDB's cannot."""
DATABASES = [*DEFERRING, pytest.param("mariadb", marks=pytest.mark.mariadb)]


@pytest.fixture(params=DATABASES)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database: one suite, a run on each kind."""
    return empty_database(request, tmp_path)


def empty_database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database of the kind that the fixture's parameter names."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/database.db"
    return str(request.getfixturevalue(request.param).new_database())


@pytest.fixture(scope="session")
def mariadb() -> Iterator[MariadbServer]:
    """MariaDB; shared, so use `new_database()`. Whoever kills or restarts it starts it again."""
    why = missing_mariadb()
    if why:
        unavailable("MariaDB", why)
    server = MariadbServer()
    try:
        yield server.start()
    finally:
        server.stop()


@pytest.fixture(scope="session")
def ferretdb() -> Iterator[FerretServer]:
    """A store that speaks MongoDB's protocol; its tests are `peers`, because it is built with Go."""
    why = missing_ferretdb()
    if why:
        unavailable("FerretDB", why)
    server = FerretServer().start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def valkey() -> Iterator[ValkeyServer]:
    """Valkey; shared, so use `new_database()`. Whoever kills it starts it again."""
    why = missing_valkey()
    if why:
        unavailable("Valkey", why)
    server = ValkeyServer()
    try:
        yield server.start()
    finally:
        server.stop()


@pytest.fixture(scope="session")
def opensearch() -> Iterator[OpenSearchNode]:
    """OpenSearch 2.19.3; shared, so use `new_database()`. Whoever kills it starts it again."""
    tools = missing_opensearch_tools()
    if tools:
        unavailable("OpenSearch", f"{' and '.join(tools)} not found")
    node = OpenSearchNode()
    try:
        yield node.start()
    finally:
        node.stop()


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """PostgreSQL 18; shared, so use `new_database()`. Whoever kills or restarts it starts it again."""
    why = missing_postgres()
    if why:
        unavailable("PostgreSQL", why)
    server = PostgresServer()
    try:
        yield server.start()
    finally:
        server.stop()
