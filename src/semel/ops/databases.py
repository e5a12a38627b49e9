"""Databases as the command line meets them: what a driver says becomes one line, without the password."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from semel.app import App
from semel.databases.database import Database, open_database, title_of, without_password
from semel.dualwrite.keeping import step_store_of
from semel.dualwrite.tables import schema_sql as slots_schema_sql
from semel.errors import Retriable, SemelError
from semel.ingress.claims import schema_sql as keys_schema_sql
from semel.outbox.tables import schema_sql
from semel.sinks.search.indexes import migrate as migrate_search
from semel.sinks.sql import migrate as run_migration

__all__ = ["connected", "migrate", "migrate_app"]


def migrate(
    url: str,
    *,
    print_only: bool,
    audit: bool = False,
    outbox: bool = False,
    dual_write: bool = False,
    idempotency: bool = False,
    schema: str | None = None,
) -> str:
    """Make Semel's tables and then `schema`; with `audit` the ledger that a history needs, too, with `outbox` those of
    an outbox, with `dual_write` and `idempotency` those of these. The SQL.

    Raises `Retriable` when the database cannot be reached.
    """
    title = title_of(url)
    keys = keys_schema_sql(title) if idempotency else ""
    slots = slots_schema_sql(title) if dual_write else ""
    more = [text for text in (schema_sql(title) if outbox else "", slots, keys, schema) if text]
    with _reaching(url):
        return run_migration(url, schema="\n".join(more), print_only=print_only, audit=audit)


def migrate_app(app: App, *, print_only: bool, audit: bool = False) -> str:
    """Make what an app's databases need: Semel's tables, those of an outbox, a dual write and idempotency keys where it
    declares them, its own tables, and the indexes of a search. The SQL, and a search's requests."""
    done = []
    keyed = {name for name, _ in app.idempotent}
    for spec in app.databases.values():
        sql = migrate(
            spec.url,
            print_only=print_only,
            audit=audit,
            outbox=spec.outbox,
            dual_write=bool(spec.dual_write),
            idempotency=spec.name in keyed,
            schema=spec.schema,
        )
        done.append(f"-- Database {spec.name}, {without_password(spec.url)}\n\n{sql}")
    for spec in (*app.caches.values(), *app.document_stores.values()):
        if spec.dual_write:
            slots = step_store_of(app.name, spec)
            if not print_only:
                slots.migrate(app.name)
            slots.close()
            done.append(f"-- {spec.name}, {without_password(spec.url)}: the place for the slots of its dual write\n")
    for search in app.searches.values():
        requests = migrate_search(search.url, search.indexes, print_only=print_only)
        done.append(f"-- Search {search.name}, {without_password(search.url)}\n\n{requests}\n")
    return "\n".join(done)


@contextmanager
def connected(url: str) -> Iterator[Database | None]:
    """A connection for one look or one command; None for a SQLite file that is not there, which looking would make.

    Raises `Retriable` when the database cannot be reached, inside the block too.
    """
    database = open_database(url)
    path = getattr(database, "path", None)
    if path is not None and not path.exists():
        yield None
        return
    with _reaching(url):
        try:
            database.connect()
            yield database
        finally:
            database.close()


@contextmanager
def _reaching(url: str) -> Iterator[None]:
    try:
        yield
    except SemelError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise Retriable(f"the database {without_password(url)} cannot be used now: {text}") from error
