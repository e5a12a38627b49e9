"""`semel park`: keys that are set aside, and what becomes of them."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, Literal

import click

from semel.ops.commands.shared import EXIT_FAILURE, FORMAT, KAFKA, looking, print_rows, run_to_end

__all__ = ["park"]


@click.group()
def park() -> None:
    """Keys that are set aside because one of their records cannot be processed.

    \b
    retry    handle a key's records again, in order; it goes on live when none is left
    discard  drop exactly the records that are named; what waits behind them stays
    edit     retry with another value for one record (the workers need SEMEL_PARK_EDIT=yes)

    A command is left beside the records; the worker that owns the partition carries it out in one transaction.
    """


_IDS = click.argument("ids", nargs=-1, metavar="[ID...]")
_BY_KEY = click.option("--key", "keys", multiple=True, metavar="KEY", help="Everything of this key.")
_BY_GROUP = click.option("--group", multiple=True, metavar="GROUP", help="Keys that failed like this; see --groups.")
_BY_COMPONENT = click.option("--component", default="", metavar="NAME", help="Only of this processor or sink.")
_ALL = click.option("--all", "everything", is_flag=True, help="Everything that is parked.")
_WAIT_FOR = click.option("--wait", default=30.0, show_default=True, metavar="SECONDS", help="For the outcome, at most.")
_REASON = click.option("--reason", default="", metavar="TEXT", help="Stands in the record of what was done.")


@park.command("list")
@click.argument("app")
@click.option("--groups", "by_group", is_flag=True, help="One line a cause: exception, top frames, build.")
@KAFKA
@FORMAT
def park_list(app: str, by_group: bool, kafka: str | None, output: str) -> None:
    """List the parked records of APP's processors and sinks, in order per key, with the reason."""
    from semel.ops.park_verbs import list_all

    columns = ["component", "topic", "partition", "offset", "key", "group", "error", "message"]
    if by_group:
        columns = ["group", "component", "keys", "records", "error", "frames", "build", "example", "message"]
    print_rows(lambda: list_all(app, looking(kafka), by_group=by_group), columns, output)


@park.command("show")
@click.argument("app")
@click.argument("item", metavar="ID")
@KAFKA
@FORMAT
def park_show(app: str, item: str, kafka: str | None, output: str) -> None:
    """Show one parked record of APP: value, headers, and why it is parked."""
    from semel.ops.park_verbs import show

    click.echo(run_to_end(show(app, looking(kafka), item, output)))


def _carry_out(output: str, work: Coroutine[Any, Any, list[dict[str, Any]]]) -> None:
    """Print what came of the commands; exit code 1 unless all of it is done and nothing failed."""
    from semel.ops.tables import render

    found = run_to_end(work)
    columns = ["component", "state", "released", "discarded", "failed", "message"]
    click.echo(render(found, columns, output))
    if any(row["state"] != "done" or row["failed"] for row in found):
        raise click.exceptions.Exit(EXIT_FAILURE)


@park.command("retry")
@click.argument("app")
@_IDS
@_BY_KEY
@_BY_GROUP
@_BY_COMPONENT
@_ALL
@click.option("--build", default="", metavar="BUILD", help="Only by a worker whose SEMEL_BUILD is this or a later one.")
@click.option(
    "--assume-not-processed",
    "assume",
    is_flag=True,
    help="Apply messages too that are older than every id in the inbox: you say that they were not applied.",
)
@_REASON
@_WAIT_FOR
@KAFKA
@FORMAT
def park_retry(
    app: str, wait: float, kafka: str | None, output: str, build: str, assume: bool, reason: str, **names: Any
) -> None:
    """Handle parked records of APP again: every record of each key that is named, in order.

    Where one fails again, it and what is behind it stay parked.
    """
    from semel.ops.park_verbs import command

    verb: Literal["assume", "retry"] = "assume" if assume else "retry"
    work = command(app, looking(kafka), verb, names, wait=wait, build=build, reason=reason)
    _carry_out(output, work)


@park.command("discard")
@click.argument("app")
@_IDS
@_BY_KEY
@_BY_GROUP
@_BY_COMPONENT
@_ALL
@_REASON
@_WAIT_FOR
@KAFKA
@FORMAT
def park_discard(app: str, wait: float, kafka: str | None, output: str, reason: str, **names: Any) -> None:
    """Drop exactly the parked records of APP that are named; who did it and why stays on record."""
    from semel.ops.park_verbs import command

    _carry_out(output, command(app, looking(kafka), "discard", names, wait=wait, reason=reason))


@park.command("edit")
@click.argument("app")
@click.argument("item", metavar="ID")
@click.option(
    "--value", "value", type=click.File("rb"), required=True, metavar="FILE", help="The new value; - is stdin."
)
@_REASON
@_WAIT_FOR
@KAFKA
@FORMAT
def park_edit(app: str, item: str, value: Any, wait: float, kafka: str | None, output: str, reason: str) -> None:
    """Handle a parked record of APP again with another value, and then what is behind it.

    Off unless the workers have SEMEL_PARK_EDIT=yes. Digests of both values, who and why stay on record.
    """
    from semel.ops.park_verbs import command

    names = {"ids": (item,)}
    work = command(app, looking(kafka), "edit", names, wait=wait, reason=reason, value=value.read())
    _carry_out(output, work)
