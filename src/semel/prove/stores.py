"""The databases of a campaign: fresh ones where that is possible, and never one that holds somebody's rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from semel.app import App
from semel.databases.database import Database, open_database, without_password
from semel.errors import ConfigurationError, Retriable
from semel.settings import database_variable

__all__ = ["check_empty", "choose_databases", "describe", "sqlite_files"]

_TABLES = {
    "SQLite": """
SELECT '"' || replace(name, '"', '""') || '"' FROM sqlite_master
WHERE type = 'table' AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\'
""",
    "PostgreSQL": """
SELECT quote_ident(schemaname) || '.' || quote_ident(tablename) FROM pg_tables
WHERE schemaname <> 'information_schema' AND left(schemaname, 3) <> 'pg_'
""",
    "MariaDB": """
SELECT CONCAT('`', REPLACE(table_name, '`', '``'), '`') FROM information_schema.tables
WHERE table_schema = DATABASE() AND table_type = 'BASE TABLE'
""",
}
_VERSIONS = {"SQLite": "SELECT sqlite_version()", "PostgreSQL": "SHOW server_version", "MariaDB": "SELECT VERSION()"}


def choose_databases(app: App, given: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Where each database of the app is during the campaign, as environment variables.

    What was given by name (or under the empty name, for all of them); else a new SQLite file in `folder` for an app
    that uses SQLite; else what the app names. Raises `ConfigurationError`.
    """
    for declared, what in ((app.caches, "a cache, and a campaign cannot read what a Valkey"),
                           (app.document_stores, "a document store, and a campaign cannot read what it"),
                           (app.searches, "a search, and a campaign cannot read what an OpenSearch")):  # fmt: skip
        if declared:
            raise ConfigurationError(f"app {app.name} has {what} holds: nothing would be proved.")
    unknown = sorted(given.keys() - app.databases.keys() - {""})
    if unknown:
        known = ", ".join(app.databases) or "none"
        raise ConfigurationError(f"--database {unknown[0]}=...: app {app.name} has no such database. It has: {known}.")
    chosen = {}
    for name, spec in app.databases.items():
        fresh = f"sqlite:///{(folder / f'{name}.db').absolute()}" if spec.url.startswith("sqlite:") else spec.url
        chosen[database_variable(name)] = given.get(name) or given.get("") or fresh
    return chosen


def check_empty(app: App) -> None:
    """Raise `ConfigurationError` when one of the app's databases has a row in any table.

    What is counted at the end must come from this campaign; and a campaign must never write among rows that matter.
    """
    for url in sorted({spec.url for spec in app.databases.values()}):
        database = open_database(url)
        path = getattr(database, "path", None)
        if path is not None and not path.exists():
            continue
        filled = _tables_with_rows(database)
        if filled:
            raise ConfigurationError(
                f"{without_password(url)} is not empty: there are rows in {', '.join(filled[:5])}. A campaign needs a "
                "database of its own: name an empty one with --database URL."
            )


def sqlite_files(app: App) -> list[Path]:
    """The files of the app's databases that are SQLite's."""
    paths = {getattr(open_database(spec.url), "path", None) for spec in app.databases.values()}
    return sorted(path for path in paths if path is not None)


def describe(app: App) -> list[str]:
    """Kind and version of each database, without address or login."""
    found = []
    for url in sorted({spec.url for spec in app.databases.values()}):
        database = open_database(url)
        try:
            database.connect()
            found.append(f"{database.title} {database.query(_VERSIONS[database.title])[0][0]}")
        finally:
            database.close()
    return found


def _tables_with_rows(database: Database) -> list[str]:
    try:
        database.connect()
        tables = [name for (name,) in database.query(_TABLES[database.title])]
        return [name for name in tables if database.query(f"SELECT 1 FROM {name} LIMIT 1")]  # noqa: S608 - quoted
    except ConfigurationError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise Retriable(f"the database {without_password(database.url)} cannot be used now: {text}") from error
    finally:
        database.close()
