"""The `semel` command. Data goes to stdout, logs and progress to stderr.

Exit codes: 0 done, 1 not done or not exact, 2 wrong usage or configuration, 75 fenced by another owner.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import msgspec

from semel.errors import ConfigurationError
from semel.failpoints import arm_failpoints
from semel.ops.commands.outbox import outbox
from semel.ops.commands.parking import park
from semel.ops.commands.shared import (
    EXIT_FAILURE,
    EXIT_USAGE,
    FORMAT,
    KAFKA,
    Group,
    complain,
    looking,
    need_kafka,
    print_rows,
    run_to_end,
    settings_of,
)
from semel.ops.commands.transactions import doctor, txn
from semel.settings import read_properties

__all__ = ["main"]


def _show_version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        try:
            from semel.wire.codec import chosen
        except ConfigurationError as error:
            complain(error)
            context.exit(EXIT_USAGE)
        click.echo(f"semel {version('semel')}, record codec: {chosen.why}")
        context.exit()


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="The version.",
)
@click.option("-v", "--verbose", is_flag=True, help="Log more.")
def main(verbose: bool) -> None:
    """Semel: every effect of a request happens exactly once, from HTTP through Kafka to the database.

    \b
    transaction      a set of records, in any topics, that becomes visible whole or not at all
    transactional id names a producer across restarts; a new one with the same id fences the old one
    fence            a number that only grows; who holds an older one can write nothing more
    position         how far a component has read; it is stored in the same transaction as the effects
    park             to set a key's records aside, in order, because one of them cannot be processed
    """
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    profile = os.environ.get("SEMEL_PROFILE", "dev")
    arm_failpoints(os.environ.get("SEMEL_FAILPOINT", ""), profile=profile)
    if page := os.environ.get("SEMEL_FAULT_PAGE", ""):
        from semel.faultpage import use_fault_page

        use_fault_page(page, profile=profile)


def _listen(value: str) -> tuple[str, int]:
    host, _, port = value.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65_535:
        raise ConfigurationError(f"--listen {value!r} is not HOST:PORT with a port up to 65535.")
    return host, int(port)


# --- Running an app ---


@main.command()
@click.argument("app")
@click.option("--http", default=1, show_default=True, help="HTTP instances; they share the port.")
@click.option("--workers", default=1, show_default=True, help="Worker processes.")
@click.option("--listen", default="127.0.0.1:8000", show_default=True, metavar="HOST:PORT")
@KAFKA
@click.option("--data", type=click.Path(path_type=Path), help="Where the embedded broker keeps its data (SEMEL_DATA).")
@click.option("--drain-seconds", type=float, help="How long a stop may take before children are killed.")
def run(
    app: str, http: int, workers: int, listen: str, kafka: str | None, data: Path | None, drain_seconds: float | None
) -> None:
    """Run APP (module:attribute): a broker if no Kafka is named, HTTP instances and workers under a supervisor.

    SIGTERM drains: no new requests, open units are finished, then everything stops. A second SIGTERM stops at once.
    """
    from semel.ops.deployment import deploy

    host, port = _listen(listen)
    settings = settings_of(kafka=kafka, data=data, drain_seconds=drain_seconds)
    run_to_end(deploy(app, settings, http=http, workers=workers, host=host, port=port))


@main.group(hidden=True)
def child() -> None:
    """One process of a deployment; the supervisor starts these."""


@child.command("http")
@click.argument("app")
@click.option("--listen", required=True)
@click.option("--slot", type=int, required=True)
def child_http(app: str, listen: str, slot: int) -> None:
    """One HTTP instance."""
    from semel.ops.children import run_http

    host, port = _listen(listen)
    run_to_end(run_http(app, settings_of(), host=host, port=port, slot=slot))


@child.command("worker")
@click.argument("app")
@click.option("--slot", type=int, required=True)
def child_worker(app: str, slot: int) -> None:
    """One worker: every processor, sink and ingress owner of the app."""
    from semel.ops.children import run_worker

    run_to_end(run_worker(app, settings_of(), slot=slot))


@main.command()
@click.argument("app")
@click.option("--slot", default=0, show_default=True, help="Another number for each relay of this host and folder.")
@KAFKA
def relay(app: str, slot: int, kafka: str | None) -> None:
    """Publish the outboxes of APP, in a process of its own; several of them share the lanes out.

    The workers of `semel run` do it too. SIGTERM ends it when what it has begun is finished.
    """
    from semel.ops.children import run_relay

    run_to_end(run_relay(app, need_kafka(kafka), slot=slot))


@main.command()
@click.option("--data", type=click.Path(path_type=Path), default=Path(".semel/broker"), show_default=True)
@click.option("--listen", default="127.0.0.1:9092", show_default=True, metavar="HOST:PORT")
@click.option("--transaction-version", type=click.IntRange(1, 2), default=2, show_default=True)
@click.option("--two-phase-commit/--no-two-phase-commit", default=True, show_default=True)
@click.option("--fsync", type=click.Choice(["os", "always"]), default="os", show_default=True)
@click.option("--partitions", default=4, show_default=True, help="Of topics that are created without saying how many.")
@click.option("--auto-create-topics/--no-auto-create-topics", default=True, show_default=True)
@click.option(
    "--seed-topics", default="", metavar="TOPICS", help="Topics to have, e.g. orders:3,prices:1:compact (partitions)."
)
@click.option(
    "--config",
    "file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Listeners, TLS, SASL, access rules: names of Kafka's server.properties.",
)
def broker(
    data: Path,
    listen: str,
    transaction_version: int,
    two_phase_commit: bool,
    fsync: str,
    partitions: int,
    auto_create_topics: bool,
    seed_topics: str,
    file: Path | None,
) -> None:
    """Run the embedded broker: durable, Kafka-wire-compatible, one process.

    With --fsync os, what is acknowledged survives kill -9; with always, it survives power loss too. Two-phase commit
    lets a client have transactions that never time out (KIP-939).

    Listeners of --config stand in place of --listen. Users with passwords come from its users.file, or from
    SEMEL_BROKER_USERS (name:password a line).
    """
    from semel.broker.config import BrokerConfig
    from semel.broker.properties import configured
    from semel.broker.seed import SeedTopic
    from semel.ops.broker_process import run_broker

    _listen(listen)
    seed = SeedTopic.parse(seed_topics)
    config = BrokerConfig(
        transaction_version=transaction_version,
        two_phase_commit=two_phase_commit,
        fsync="always" if fsync == "always" else "os",
        num_partitions=partitions,
        auto_create_topics=auto_create_topics,
    )
    config = configured(config, read_properties(file) if file is not None else {}, os.environ)
    run_to_end(run_broker(data, listen, config, seed))


@main.command()
@click.option("--orders", type=click.IntRange(min=1), help="Only the first N purchases.")
@click.option("--seed", default=1, show_default=True, help="Decides faults and duplicates.")
@click.option("--no-faults", is_flag=True, help="Kill and pause nothing.")
@click.option("--rate", type=float, help="Orders a second at most.")
@click.option("--clients", default=64, show_default=True, help="Concurrent HTTP clients.")
@click.option("--keep", type=click.Path(path_type=Path), metavar="DIR", help="Keep data and logs there.")
@click.option("--database", metavar="URL", help="sqlite:///FILE or postgresql://...; default: SQLite in DIR.")
@click.option("-b", "--kafka", metavar="HOST:PORT", help="A Kafka of yours instead of the embedded broker.")
@click.option(
    "--picture",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The throughput as SVG; default: demo.svg in DIR, or semel-demo.svg here.",
)
@FORMAT
def demo(output: str, **options: Any) -> None:
    """Post 69,659 real purchases, kill processes meanwhile, and count what arrived.

    Exits 0 only if nothing is lost and nothing doubled, customer by customer and title by title.
    """
    from semel.ops.demo import run_demo

    raise click.exceptions.Exit(run_to_end(run_demo(output, **options)))


@main.command()
@click.argument("app", required=False)
@click.option(
    "--compare",
    is_flag=False,
    flag_value="all",
    metavar="[PEER,...]",
    help="Instead of an app: the same work and faults on others' loops and on ours (pip install 'semel[compare]').",
)
@click.option("--minutes", default=3.0, show_default=True, help="How long the load lasts.")
@click.option("--faults", default="all", show_default=True, metavar="KIND,...", help="Which kinds; see below.")
@click.option("--every", default=1.4, show_default=True, help="Seconds between two faults, on average.")
@click.option("--seed", default=1, show_default=True, help="Decides inputs and faults.")
@click.option("--workers", default=2, show_default=True, help="Worker processes.")
@click.option("--http", default=2, show_default=True, help="HTTP instances.")
@click.option("--clients", default=64, show_default=True, help="Inputs under way at one moment, at most.")
@click.option("--rate", default=400.0, show_default=True, help="Inputs a second at most; 0: no limit.")
@click.option("--inputs", type=click.IntRange(min=1), help="At most so many inputs.")
@click.option(
    "--plan", metavar="MODULE:NAME", help="The proof plan; default: plan of <app module>_proof, if it is there."
)
@click.option(
    "--kafka", metavar="HOST:PORT", help="A Kafka of yours, without records of this app; default: the embedded broker."
)
@click.option(
    "--database",
    multiple=True,
    metavar="[NAME=]URL",
    help="An empty database; default: a new SQLite file, or what the app names.",
)
@click.option("--keep", type=click.Path(path_type=Path), metavar="DIR", help="Keep data, logs and histories there.")
@click.option(
    "--report",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("semel-proof.html"),
    show_default=True,
    metavar="FILE",
)
@FORMAT
def prove(
    app: str | None,
    compare: str | None,
    output: str,
    report: Path,
    plan: str | None,
    database: tuple[str, ...],
    rate: float,
    **options: Any,
) -> None:
    """Break APP (module:attribute) on purpose, and show that nothing was lost or doubled.

    Starts the app with a broker, sends inputs, strikes processes, network, disk and database with faults, waits until
    everything is worked off, and compares every log and table with what each process wrote down before it tried it.
    Your own rows and topics are never touched: a database with rows, or a Kafka with records of the app, is refused.

    Exits 0 only without any anomaly; 1 with one, and with the command that runs the same again. With --compare only
    --faults, --seed, --kafka, --keep and --format count, and what others do wrong is no failure of ours: it exits 0.
    """
    if compare is not None:
        if app is not None:
            raise ConfigurationError(f"--compare has loops of its own and takes no app: leave {app} out.")
        from semel.ops.compare import run_compare

        chosen_here = {name: options[name] for name in ("faults", "seed", "kafka", "keep")}
        raise click.exceptions.Exit(run_to_end(run_compare(output, compare, **chosen_here)))
    if app is None:
        raise ConfigurationError("Which app? Give MODULE:APP, or --compare for the comparison with others.")
    from semel.ops.prove import parse_databases, run_prove
    from semel.prove.campaign import CampaignOptions

    chosen = CampaignOptions(app, databases=parse_databases(database), rate=rate or None, **options)
    raise click.exceptions.Exit(run_to_end(run_prove(output, chosen, plan=plan, report=report)))


# --- Looking ---


@main.command()
@click.argument("app")
@KAFKA
@FORMAT
def guarantees(app: str, kafka: str | None, output: str) -> None:
    """For every edge of APP: the atomic unit, the fence, the dedup level, and each weakened promise with its reason."""
    from semel.ops.guarantees import report
    from semel.ops.loading import load_app
    from semel.ops.tables import render

    loaded = load_app(app)
    edges = run_to_end(report(loaded, looking(kafka)))
    if output == "json":
        click.echo(msgspec.json.encode([edge.as_json() for edge in edges]).decode())
        return
    rows = [edge.as_json() for edge in edges]
    click.echo(render(rows, ["edge", "atomic_unit", "fence", "dedup"], "text"))
    for edge in edges:
        for weak in edge.weakened:
            click.echo(f"weakened  {edge.edge}: {weak}")


@main.command()
@click.option("--url", metavar="URL", help="An HTTP instance of the app; else the processes of this host's SEMEL_DATA.")
@click.option("--every", default=2.0, show_default=True, type=click.FloatRange(0.01, 3600), help="Seconds a look.")
@click.option("--count", default=0, type=click.IntRange(0), help="End after so many looks; 0 goes on until Ctrl-C.")
@FORMAT
def top(url: str | None, every: float, count: int, output: str) -> None:
    """What every component does now: rates, lag, latency against its objective, parked keys, stopped partitions."""
    from semel.ops.tables import render
    from semel.ops.top import COLUMNS, Sample, from_folder, from_url, rows

    data = settings_of().data

    def look() -> tuple[float, list[Sample]]:
        return time.monotonic(), from_folder(data) if url is None else from_url(url)

    shown = 0
    with suppress(KeyboardInterrupt):
        since, before = look()
        while not count or shown < count:
            time.sleep(every)
            now, after = look()
            if shown and output == "text":
                click.echo("")
            click.echo(render(rows(before, after, now - since), COLUMNS, output))
            since, before, shown = now, after, shown + 1


@main.command()
@click.argument("target", metavar="URL|APP")
@click.option("--sql", is_flag=True, help="Print the statements instead of running them.")
@click.option("--outbox", is_flag=True, help="The tables of an outbox, too. An APP says itself whether it has one.")
@click.option("--dual-write", is_flag=True, help="The tables of the dual write, too. An APP says itself.")
@click.option("--idempotency", is_flag=True, help="The tables of app.idempotency, too. An APP says itself.")
def migrate(target: str, sql: bool, outbox: bool, dual_write: bool, idempotency: bool) -> None:
    """Create Semel's tables in the database at URL (sqlite:///FILE, postgresql://..., mariadb://...), or what the
    databases of APP (module:attribute) need: Semel's tables, those of an outbox, a dual write and idempotency keys
    where it declares them, and its own tables.
    """
    from semel.ops.databases import migrate as run_migration
    from semel.ops.databases import migrate_app
    from semel.ops.loading import load_app

    audit = bool(settings_of().history)
    if "://" in target:
        statements = run_migration(
            target, print_only=sql, audit=audit, outbox=outbox, dual_write=dual_write, idempotency=idempotency
        )
    else:
        statements = migrate_app(load_app(target), print_only=sql, audit=audit)
    click.echo(statements if sql else "Semel's tables are there.")


@main.command()
@KAFKA
@FORMAT
def topics(kafka: str | None, output: str) -> None:
    """List topics with their partitions, records' offsets and the last stable offset."""
    from semel.ops.listings import list_topics

    print_rows(lambda: list_topics(need_kafka(kafka)), ["topic", "partition", "start", "stable", "end"], output)


@main.command("accept-gap")
@click.argument("app")
@click.option("--component", default="", metavar="NAME", help="Only this processor or sink.")
@click.option("--partition", "partitions", multiple=True, metavar="TOPIC-N", help="Only these partitions.")
@click.option("--reason", default="", metavar="TEXT", help="Stands in the topic <app>.semel.audit; must be given.")
@click.option("--dry-run", is_flag=True, help="Only show what stands still, and where it would go on.")
@KAFKA
@FORMAT
def accept_gap(app: str, kafka: str | None, output: str, **chosen: Any) -> None:
    """Let APP's processors and sinks go on where records are missing.

    \b
    DATA_GAP         the next records were deleted unread: it goes on at the log's start
    TOPIC_RECREATED  the topic was deleted and made again: it begins at the new one's start

    What is skipped is lost for ever, so nothing is skipped without this. The workers of a processor must be stopped;
    what its hosts know of an old topic is in SEMEL_DATA. A sink goes on by itself within half a minute.
    """
    from semel.ops.gaps import accept_gaps
    from semel.ops.loading import load_app
    from semel.ops.tables import render

    rows = run_to_end(accept_gaps(load_app(app), need_kafka(kafka), **chosen))
    columns = ["component", "topic", "partition", "problem", "was", "now", "skipped", "outcome"]
    click.echo(render(rows, columns, output) if rows else "Nothing stands still for missing records.")
    if any(row["outcome"].startswith("not changed") for row in rows):
        raise click.exceptions.Exit(EXIT_FAILURE)


@main.group()
def state() -> None:
    """Keyed state of processors."""


@state.command("get")
@click.argument("app")
@click.argument("store")
@click.argument("key")
@KAFKA
@FORMAT
def state_get(app: str, store: str, key: str, kafka: str | None, output: str) -> None:
    """Show what is committed of KEY in the state STORE of APP (module:attribute), read from the state's changelog.

    Each partition keeps its own state: a row for each that has the key. A value whose time to live is over is shown
    until it is taken out. Exits 1 when nothing is there.
    """
    from semel.ops.loading import load_app
    from semel.ops.states import read_state
    from semel.ops.tables import render

    rows = run_to_end(read_state(load_app(app), need_kafka(kafka), store, key))
    click.echo(render(rows, ["partition", "offset", "written", "value"], output))
    if not rows:
        raise click.exceptions.Exit(EXIT_FAILURE)


for group in (doctor, outbox, park, txn):
    main.add_command(group)
