"""Tables that cannot be worked with are refused before anything is changed, and the error says what to do."""

from __future__ import annotations

import pytest

from semel.databases import Database, connect
from semel.databases.database import title_of
from semel.errors import ConfigurationError
from semel.outbox.rows import SHARDS, decode_headers, encode_headers, shard_of
from semel.outbox.tables import check_outbox, claim_environment, read_meta, schema_sql
from tests.services.postgres import PostgresServer

_INSERT = "INSERT INTO semel_outbox (shard, msg_id, topic, headers, created_at) VALUES (?, ?, 't', '[]', 0)"


def test_the_migration_may_run_again(database: Database) -> None:
    before = read_meta(database)
    database.migrate(schema_sql(title_of(database.url)))
    assert read_meta(database) == before
    assert before.lanes == 16
    lanes = database.query("SELECT lane, owner_epoch, batch FROM semel_outbox_lane ORDER BY lane")
    assert lanes == [(lane, 0, 0) for lane in range(16)]


def test_two_databases_are_told_apart(database: Database, tmp_path: object) -> None:
    other = connect(f"sqlite:///{tmp_path}/other.db")
    other.migrate(schema_sql("SQLite"))
    assert read_meta(other).database_id != read_meta(database).database_id
    other.close()


def test_a_number_never_comes_again(database: Database) -> None:
    """A manifest names rows by number: the number of a deleted row must not be given to another one."""
    database.executemany(_INSERT, [(shard, f"m{shard}") for shard in range(3)])
    [(last,)] = database.query("SELECT MAX(seq) FROM semel_outbox")
    database.execute("DELETE FROM semel_outbox")
    database.execute(_INSERT, (0, "m3"))
    [(following,)] = database.query("SELECT seq FROM semel_outbox")
    assert following > last


def test_a_database_without_an_outbox(url: str) -> None:
    database = connect(url)
    with pytest.raises(ConfigurationError, match=r"table semel_outbox_meta is not in .* semel migrate"):
        check_outbox(database, "writer", "shop")
    database.migrate(schema_sql(title_of(url)))
    database.execute("DROP TABLE semel_outbox_hold")
    check_outbox(database, "writer", "shop")
    with pytest.raises(ConfigurationError, match="table semel_outbox_hold is not in"):
        check_outbox(database, "relay", "shop")
    database.close()


@pytest.mark.parametrize(("version", "advice"), [(2, "Use the newer Semel"), (0, "run the migration")])
def test_another_schema_version(database: Database, version: int, advice: str) -> None:
    database.execute("UPDATE semel_outbox_meta SET schema_version = ?", (version,))
    with pytest.raises(ConfigurationError, match=f"schema version {version}.*{advice}"):
        check_outbox(database, "writer", "shop")


def test_an_outbox_belongs_to_one_app_in_one_cluster(database: Database) -> None:
    assert claim_environment(database, "shop", "cluster-a").environment == "cluster-a"
    assert claim_environment(database, "shop", "cluster-a").app == "shop"
    check_outbox(database, "writer", "shop")
    with pytest.raises(ConfigurationError, match="belongs to app 'shop', and this is app 'bank'"):
        check_outbox(database, "writer", "bank")
    with pytest.raises(ConfigurationError, match=r"Kafka cluster 'cluster-a'.*'cluster-b'"):
        claim_environment(database, "shop", "cluster-b")
    assert read_meta(database)[3:5] == ("cluster-a", "shop")


@pytest.mark.postgres
@pytest.mark.parametrize("privilege", ["SELECT", "DELETE", "UPDATE"])
def test_a_missing_privilege_is_named(postgres: PostgresServer, privilege: str) -> None:
    url = postgres.new_database()
    owner = connect(url)
    owner.migrate(schema_sql("PostgreSQL"))
    user = f"relay_{privilege.lower()}"
    owner.execute(f"CREATE ROLE {user} LOGIN")
    owner.execute(f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {user}")
    limited = connect(url.replace("postgres@", f"{user}@"))
    check_outbox(limited, "relay", "shop")
    owner.execute(f"REVOKE {privilege} ON semel_outbox FROM {user}")
    with pytest.raises(ConfigurationError, match=f"has no {privilege} on semel_outbox .*GRANT {privilege}"):
        check_outbox(limited, "relay", "shop")
    limited.close()
    owner.execute(f"DROP OWNED BY {user}")
    owner.execute(f"DROP ROLE {user}")
    owner.close()


def test_headers_and_shards() -> None:
    headers = (("semel-id", b"1"), ("none", None), ("bytes", bytes(range(256))))
    assert decode_headers(encode_headers(headers)) == headers
    with pytest.raises(ValueError, match="not pairs"):
        decode_headers('{"a": 1}')
    assert shard_of(b"k1", "x") == shard_of(b"k1", "y")
    assert {shard_of(None, f"{number}") for number in range(2000)} == set(range(SHARDS))
