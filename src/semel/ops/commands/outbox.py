"""`semel outbox`: what waits in the outboxes of an app, and what operators do about it."""

from __future__ import annotations

from collections.abc import Callable

import click

from semel.ops.commands.shared import FORMAT, KAFKA, need_kafka, print_rows

__all__ = ["outbox"]


@click.group()
def outbox() -> None:
    """Records that are committed in a database and not in Kafka yet."""


_DATABASE = click.option("--database", "name", metavar="NAME", help="Which database, where the app has several.")
_DRY_RUN = click.option("--dry-run", is_flag=True, help="Only say what would be done.")
_REASON = click.option("--reason", required=True, help="Why; it stays on record with your name.")


@outbox.command("status")
@click.argument("app")
@FORMAT
def outbox_status(app: str, output: str) -> None:
    """What waits in the outboxes of APP, lane by lane, and what is held and why."""
    from semel.ops.outbox import list_status
    from semel.ops.tables import render

    columns = ["database", "what", "owner", "rows", "held", "oldest_ms", "topic", "key", "reason"]
    click.echo(render(list_status(app), columns, output))


def _hold_or_release(verb: str, app: str, name: str | None, reason: str, dry_run: bool, **chosen: str | None) -> None:
    from semel.ops.outbox import carry_out, operator
    from semel.outbox.verbs import Selection, hold, release

    key = chosen["key"]
    selected = Selection(chosen["topic"], None if key is None else key.encode(), chosen["msg_id"])
    asked = operator(reason, dry_run=dry_run)
    call = hold if verb == "held" else release
    count = carry_out(app, name, lambda database: call(database, selected, asked))
    click.echo(f"{count} rows {'would be ' if dry_run else ''}{verb}.")


def _which_rows(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option("--id", "msg_id", metavar="ID", help="The key of this message; without a key it alone."),
        click.option("--key", help="Rows of this key."),
        click.option("--topic", help="Rows of this topic."),
    ):
        command = option(command)
    return command


@outbox.command("hold")
@click.argument("app")
@_which_rows
@_DATABASE
@_DRY_RUN
@_REASON
def outbox_hold(app: str, name: str | None, dry_run: bool, reason: str, **chosen: str | None) -> None:
    """Publish no rows of a topic, a key or a message's key, also not those that come later."""
    _hold_or_release("held", app, name, reason, dry_run, **chosen)


@outbox.command("release")
@click.argument("app")
@_which_rows
@_DATABASE
@_DRY_RUN
@_REASON
def outbox_release(app: str, name: str | None, dry_run: bool, reason: str, **chosen: str | None) -> None:
    """Publish held rows after all, each key's in their order."""
    _hold_or_release("released", app, name, reason, dry_run, **chosen)


@outbox.command("republish")
@click.argument("app")
@click.option("--topic", required=True)
@click.option("--partition", type=int, required=True)
@click.option("--from", "first", type=int, required=True, metavar="OFFSET", help="The first record.")
@click.option("--to", "last", type=int, required=True, metavar="OFFSET", help="The last one.")
@_DATABASE
@_DRY_RUN
@_REASON
@KAFKA
@FORMAT
def outbox_republish(
    app: str,
    topic: str,
    partition: int,
    first: int,
    last: int,
    name: str | None,
    dry_run: bool,
    reason: str,
    kafka: str | None,
    output: str,
) -> None:
    """Send committed records of a topic again, as new ones that name those they stand for (semel-supersedes)."""
    from semel.ops.outbox import operator, run_republish
    from semel.types import TopicPartition

    asked = operator(reason, dry_run=dry_run)
    at = TopicPartition(topic, partition)
    work = run_republish(app, name, need_kafka(kafka), at, first, last, asked)
    print_rows(lambda: work, ["topic", "partition", "offset", "key", "bytes"], output)


@outbox.command("declare-restored")
@click.argument("app")
@_DATABASE
@_DRY_RUN
@_REASON
def outbox_declare_restored(app: str, name: str | None, dry_run: bool, reason: str) -> None:
    """Say that the database was put back to an earlier state: what is in Kafka already is not sent again.

    A new server, or one with a new history, is noticed without it.
    """
    from semel.ops.outbox import carry_out, operator
    from semel.outbox.verbs import declare_restored

    asked = operator(reason, dry_run=dry_run)
    incarnation = carry_out(app, name, lambda database: declare_restored(database, asked))
    click.echo(f"Every lane {'would be' if dry_run else 'is'} compared with its topics. Incarnation {incarnation}.")
