"""`semel txn` and `semel doctor`: transactions of the cluster, and deciding about those in doubt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import click

from semel.ops.commands.shared import FORMAT, KAFKA, need_kafka, print_rows, run_to_end

__all__ = ["doctor", "txn"]


@click.group()
def txn() -> None:
    """Transactions of the cluster.

    \b
    Ongoing        records may be added; readers stop below it at the last stable offset
    PrepareCommit  decided, markers are being written; it cannot go back
    CompleteCommit done; so is CompleteAbort
    """


@txn.command("list")
@KAFKA
@click.option("--state", multiple=True, help="Only these states, e.g. Ongoing.")
@FORMAT
def txn_list(kafka: str | None, state: tuple[str, ...], output: str) -> None:
    """List transactional ids with their producer, state and age."""
    from semel.ops.listings import list_transactions

    columns = ["transactional_id", "producer_id", "producer_epoch", "state", "age_seconds", "partitions"]
    print_rows(lambda: list_transactions(need_kafka(kafka), state), columns, output)


@txn.command("prepared")
@KAFKA
@FORMAT
def txn_prepared(kafka: str | None, output: str) -> None:
    """List open transactions, the oldest first, and what this Kafka offers of two-phase commit (KIP-939).

    A prepared transaction never ends by itself; until a process or an operator ends it, readers stop below it.
    """
    from semel.ops.transactions import render_open

    click.echo(run_to_end(render_open(need_kafka(kafka), output)))


@click.group()
def doctor() -> None:
    """What is in doubt: which decision is right, and why; and carrying it out."""


@doctor.group("txn")
def doctor_txn() -> None:
    """Open, prepared and hanging transactions, joined with the rows that decide about them.

    \b
    dual write      a slot of app.database(url, dual_write=True): its row in semel_txn decides
    outbox lane     a relay that publishes; its rows stay until it has committed
    component       a processor or the owner of requests; needs APP to be known
    foreign client  no id of the app: only its owner can commit it
    hanging         open in a partition, and no coordinator knows it

    Nothing changes without --yes. What is done stands in the topic <app>.semel.audit, with who and why.
    """


_URLS = click.option("--database", "urls", multiple=True, metavar="URL", help="Look for the row here, too.")


def _app_of(app: str | None) -> Any:
    from semel.ops.loading import load_app

    return None if app is None else load_app(app)


@doctor_txn.command("list")
@click.argument("app", required=False)
@_URLS
@KAFKA
@FORMAT
def doctor_txn_list(app: str | None, urls: tuple[str, ...], kafka: str | None, output: str) -> None:
    """List everything that is open, the oldest first, with the decision that is right."""
    from semel.ops.doctor import list_all

    columns = ["id", "kind", "transaction", "state", "age_seconds", "decision", "title"]
    print_rows(lambda: list_all(need_kafka(kafka), _app_of(app), urls), columns, output)


@doctor_txn.command("explain")
@click.argument("name", metavar="ID")
@click.argument("app", required=False)
@_URLS
@KAFKA
@FORMAT
def doctor_txn_explain(name: str, app: str | None, urls: tuple[str, ...], kafka: str | None, output: str) -> None:
    """Say of one transaction whose it is, which decision is right, and why.

    ID is a transactional id, a transaction's name (producer id:epoch), or the place where one hangs, as listed.
    """
    from semel.ops.doctor import explain, render_finding

    click.echo(render_finding(run_to_end(explain(need_kafka(kafka), _app_of(app), urls, name)), output))


def _decision(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        FORMAT,
        KAFKA,
        _URLS,
        click.option("--reason", default="", metavar="TEXT", help="Stands in the audit topic; needed with --yes."),
        click.option(
            "--against-the-database",
            "against",
            is_flag=True,
            help="Also where the database says otherwise, or cannot say. Records or rows are then lost for the others.",
        ),
        click.option("--yes", is_flag=True, help="Do it; without it only what would be done is shown."),
        click.argument("app", required=False),
        click.argument("name", metavar="ID"),
    ):
        command = option(command)
    return command


def _decide(verb: Literal["commit", "abort"], name: str, **given: Any) -> None:
    from semel.ops.doctor import Asked, decide, render_finding

    asked = Asked(verb, given["reason"], given["yes"], given["against"])
    work = decide(need_kafka(given["kafka"]), _app_of(given["app"]), given["urls"], name, asked)
    click.echo(render_finding(run_to_end(work), given["output"]))


@doctor_txn.command("commit")
@_decision
def doctor_txn_commit(name: str, **given: Any) -> None:
    """Commit a prepared transaction whose database transaction is committed.

    Kafka is fenced first, then the row's fence is raised and read: it has the last word.
    """
    _decide("commit", name, **given)


@doctor_txn.command("abort")
@_decision
def doctor_txn_abort(name: str, **given: Any) -> None:
    """Abort a transaction: a prepared one whose database transaction is not committed, a foreign or a hanging one.

    What belongs to somebody else can only be aborted (KIP-664), which fences its producer.
    """
    _decide("abort", name, **given)
