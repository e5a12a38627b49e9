"""Tables that cannot be worked with are refused before anything is changed, and the error says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest

from semel.databases import Database, connect
from semel.databases.database import title_of
from semel.dualwrite.tables import SCHEMA_VERSION, check_tables, claim_environment, read_meta, schema_sql
from semel.errors import ConfigurationError
from tests.services.postgres import PostgresServer


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    found = connect(url)
    found.migrate(schema_sql(title_of(url)))
    yield found
    found.close()


def test_the_migration_may_run_again(database: Database) -> None:
    claim_environment(database, "bank", "cluster-a")
    before = read_meta(database)
    database.migrate(schema_sql(title_of(database.url)))
    assert read_meta(database) == before


def test_missing_tables_are_told(url: str) -> None:
    database = connect(url)
    with pytest.raises(ConfigurationError, match=r"is not in .* semel migrate"):
        check_tables(database, "bank")
    for table in ("semel_txn", "semel_txn_beat"):
        database.migrate(schema_sql(title_of(url)))
        database.execute(f"DROP TABLE {table}")
        with pytest.raises(ConfigurationError, match=rf"{table} is not in .* semel migrate"):
            check_tables(database, "bank")
    database.close()


@pytest.mark.parametrize(("version", "advice"), [(SCHEMA_VERSION + 1, "Use the newer Semel"), (1, "run the migration")])
def test_another_schema_version(database: Database, version: int, advice: str) -> None:
    database.execute("UPDATE semel_txn_meta SET schema_version = ?", (version,))
    with pytest.raises(ConfigurationError, match=f"schema version {version}.*{advice}"):
        check_tables(database, "bank")


def test_slots_belong_to_one_app_in_one_cluster(database: Database) -> None:
    assert claim_environment(database, "bank", "cluster-a").app == "bank"
    check_tables(database, "bank", "cluster-a")
    with pytest.raises(ConfigurationError, match="belongs to app 'bank', and this is app 'shop'"):
        check_tables(database, "shop")
    with pytest.raises(ConfigurationError, match=r"Kafka cluster 'cluster-a'.*'cluster-b'"):
        claim_environment(database, "bank", "cluster-b")
    assert read_meta(database)[1:3] == ("cluster-a", "bank")


@pytest.mark.postgres
def test_a_missing_privilege_is_named(postgres: PostgresServer) -> None:
    url = postgres.new_database()
    owner = connect(url)
    owner.migrate(schema_sql("PostgreSQL"))
    owner.execute("CREATE ROLE dual_writer LOGIN")
    owner.execute("GRANT ALL ON ALL TABLES IN SCHEMA public TO dual_writer")
    limited = connect(url.replace("postgres@", "dual_writer@"))
    check_tables(limited, "bank")
    for privilege, table in product(("UPDATE", "INSERT"), ("semel_txn", "semel_txn_beat")):
        owner.execute(f"REVOKE {privilege} ON {table} FROM dual_writer")
        with pytest.raises(ConfigurationError, match=f"has no {privilege} on {table} .*GRANT {privilege}"):
            check_tables(limited, "bank")
        owner.execute(f"GRANT {privilege} ON {table} TO dual_writer")
    limited.close()
    owner.execute("DROP OWNED BY dual_writer")
    owner.execute("DROP ROLE dual_writer")
    owner.close()
