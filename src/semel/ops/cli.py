"""The `semel` command. Data goes to stdout, logs and progress to stderr.

Exit codes: 0 done, 1 not done or not exact, 2 wrong usage or configuration, 75 fenced by another owner.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeVar

import click
import msgspec

from semel.errors import ConfigurationError, Fenced, SemelError
from semel.failpoints import arm_failpoints
from semel.settings import Settings, read_properties, running_kafka

__all__ = ["main"]

T = TypeVar("T")
EXIT_FAILURE, EXIT_USAGE, EXIT_FENCED = 1, 2, 75

_FORMAT = click.option(
    "--format", "output", type=click.Choice(["text", "json"]), default="text", show_default=True, help="How to print."
)
_KAFKA = click.option("-b", "--kafka", envvar="SEMEL_KAFKA", metavar="HOST:PORT", help="Kafka's address (SEMEL_KAFKA).")


class _Group(click.Group):
    """Turns our errors into one message and an exit code; anything else is a bug and keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except Fenced as error:
            _complain(error)
            ctx.exit(EXIT_FENCED)
        except ConfigurationError as error:
            _complain(error)
            ctx.exit(EXIT_USAGE)
        except SemelError as error:
            _complain(error)
            ctx.exit(EXIT_FAILURE)


def _complain(error: SemelError) -> None:
    click.echo(f"semel: {error}", err=True)


def _show_version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        try:
            from semel.wire.codec import chosen
        except ConfigurationError as error:
            _complain(error)
            context.exit(EXIT_USAGE)
        click.echo(f"semel {version('semel')}, record codec: {chosen.why}")
        context.exit()


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
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


def _settings(**overrides: object) -> Settings:
    return Settings.from_environment(None, **overrides)


def _run(work: Coroutine[Any, Any, T]) -> T:
    try:
        return asyncio.run(work)
    except KeyboardInterrupt:
        raise click.exceptions.Exit(130) from None
    except asyncio.CancelledError:  # By SIGTERM, where a command asked for that.
        raise click.exceptions.Exit(143) from None


def _listen(value: str) -> tuple[str, int]:
    host, _, port = value.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65_535:
        raise ConfigurationError(f"--listen {value!r} is not HOST:PORT with a port up to 65535.")
    return host, int(port)


def _looking(kafka: str | None) -> Settings:
    """Settings for a command that only looks: it finds the embedded broker of a `semel run` in the same folder."""
    settings = _settings(kafka=kafka)
    return replace(settings, kafka=running_kafka(settings))


def _need_kafka(kafka: str | None) -> Settings:
    settings = _looking(kafka)
    if not settings.kafka:
        raise ConfigurationError(
            f"Which Kafka? Give --kafka HOST:PORT or set SEMEL_KAFKA: no `semel run` is at work in {settings.data}."
        )
    return settings


# --- Running an app ---


@main.command()
@click.argument("app")
@click.option("--http", default=1, show_default=True, help="HTTP instances; they share the port.")
@click.option("--workers", default=1, show_default=True, help="Worker processes.")
@click.option("--listen", default="127.0.0.1:8000", show_default=True, metavar="HOST:PORT")
@_KAFKA
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
    settings = _settings(kafka=kafka, data=data, drain_seconds=drain_seconds)
    _run(deploy(app, settings, http=http, workers=workers, host=host, port=port))


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
    _run(run_http(app, _settings(), host=host, port=port, slot=slot))


@child.command("worker")
@click.argument("app")
@click.option("--slot", type=int, required=True)
def child_worker(app: str, slot: int) -> None:
    """One worker: every processor, sink and ingress owner of the app."""
    from semel.ops.children import run_worker

    _run(run_worker(app, _settings(), slot=slot))


@main.command()
@click.argument("app")
@click.option("--slot", default=0, show_default=True, help="Another number for each relay of this host and folder.")
@_KAFKA
def relay(app: str, slot: int, kafka: str | None) -> None:
    """Publish the outboxes of APP, in a process of its own; several of them share the lanes out.

    The workers of `semel run` do it too. SIGTERM ends it when what it has begun is finished.
    """
    from semel.ops.children import run_relay

    _run(run_relay(app, _need_kafka(kafka), slot=slot))


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
    _run(run_broker(data, listen, config, seed))


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
@_FORMAT
def demo(output: str, **options: Any) -> None:
    """Post 69,659 real purchases, kill processes meanwhile, and count what arrived.

    Exits 0 only if nothing is lost and nothing doubled, customer by customer and title by title.
    """
    from semel.ops.demo import run_demo

    raise click.exceptions.Exit(_run(run_demo(output, **options)))


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
@_FORMAT
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
        raise click.exceptions.Exit(_run(run_compare(output, compare, **chosen_here)))
    if app is None:
        raise ConfigurationError("Which app? Give MODULE:APP, or --compare for the comparison with others.")
    from semel.ops.prove import parse_databases, run_prove
    from semel.prove.campaign import CampaignOptions

    chosen = CampaignOptions(app, databases=parse_databases(database), rate=rate or None, **options)
    raise click.exceptions.Exit(_run(run_prove(output, chosen, plan=plan, report=report)))


# --- Looking ---


def _listing(read: Callable[[], Coroutine[Any, Any, list[dict[str, Any]]]], columns: list[str], output: str) -> None:
    from semel.ops.tables import render

    click.echo(render(_run(read()), columns, output))


@main.command()
@click.argument("app")
@_KAFKA
@_FORMAT
def guarantees(app: str, kafka: str | None, output: str) -> None:
    """For every edge of APP: the atomic unit, the fence, the dedup level, and each weakened promise with its reason."""
    from semel.ops.guarantees import report
    from semel.ops.loading import load_app
    from semel.ops.tables import render

    loaded = load_app(app)
    edges = _run(report(loaded, _looking(kafka)))
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
@_FORMAT
def top(url: str | None, every: float, count: int, output: str) -> None:
    """What every component does now: rates, lag, latency against its objective, parked keys, stopped partitions."""
    from semel.ops.tables import render
    from semel.ops.top import COLUMNS, Sample, from_folder, from_url, rows

    data = _settings().data

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

    audit = bool(_settings().history)
    if "://" in target:
        statements = run_migration(
            target, print_only=sql, audit=audit, outbox=outbox, dual_write=dual_write, idempotency=idempotency
        )
    else:
        statements = migrate_app(load_app(target), print_only=sql, audit=audit)
    click.echo(statements if sql else "Semel's tables are there.")


@main.command()
@_KAFKA
@_FORMAT
def topics(kafka: str | None, output: str) -> None:
    """List topics with their partitions, records' offsets and the last stable offset."""
    from semel.ops.listings import list_topics

    _listing(lambda: list_topics(_need_kafka(kafka)), ["topic", "partition", "start", "stable", "end"], output)


@main.group()
def txn() -> None:
    """Transactions of the cluster.

    \b
    Ongoing        records may be added; readers stop below it at the last stable offset
    PrepareCommit  decided, markers are being written; it cannot go back
    CompleteCommit done; so is CompleteAbort
    """


@txn.command("list")
@_KAFKA
@click.option("--state", multiple=True, help="Only these states, e.g. Ongoing.")
@_FORMAT
def txn_list(kafka: str | None, state: tuple[str, ...], output: str) -> None:
    """List transactional ids with their producer, state and age."""
    from semel.ops.listings import list_transactions

    columns = ["transactional_id", "producer_id", "producer_epoch", "state", "age_seconds", "partitions"]
    _listing(lambda: list_transactions(_need_kafka(kafka), state), columns, output)


@txn.command("prepared")
@_KAFKA
@_FORMAT
def txn_prepared(kafka: str | None, output: str) -> None:
    """List open transactions, the oldest first, and what this Kafka offers of two-phase commit (KIP-939).

    A prepared transaction never ends by itself; until a process or an operator ends it, readers stop below it.
    """
    from semel.ops.transactions import render_open

    click.echo(_run(render_open(_need_kafka(kafka), output)))


@main.group()
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
@_KAFKA
@_FORMAT
def doctor_txn_list(app: str | None, urls: tuple[str, ...], kafka: str | None, output: str) -> None:
    """List everything that is open, the oldest first, with the decision that is right."""
    from semel.ops.doctor import list_all

    columns = ["id", "kind", "transaction", "state", "age_seconds", "decision", "title"]
    _listing(lambda: list_all(_need_kafka(kafka), _app_of(app), urls), columns, output)


@doctor_txn.command("explain")
@click.argument("name", metavar="ID")
@click.argument("app", required=False)
@_URLS
@_KAFKA
@_FORMAT
def doctor_txn_explain(name: str, app: str | None, urls: tuple[str, ...], kafka: str | None, output: str) -> None:
    """Say of one transaction whose it is, which decision is right, and why.

    ID is a transactional id, a transaction's name (producer id:epoch), or the place where one hangs, as listed.
    """
    from semel.ops.doctor import explain, render_finding

    click.echo(render_finding(_run(explain(_need_kafka(kafka), _app_of(app), urls, name)), output))


def _decision(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        _FORMAT,
        _KAFKA,
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
    work = decide(_need_kafka(given["kafka"]), _app_of(given["app"]), given["urls"], name, asked)
    click.echo(render_finding(_run(work), given["output"]))


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


@main.command("accept-gap")
@click.argument("app")
@click.option("--component", default="", metavar="NAME", help="Only this processor or sink.")
@click.option("--partition", "partitions", multiple=True, metavar="TOPIC-N", help="Only these partitions.")
@click.option("--reason", default="", metavar="TEXT", help="Stands in the topic <app>.semel.audit; must be given.")
@click.option("--dry-run", is_flag=True, help="Only show what stands still, and where it would go on.")
@_KAFKA
@_FORMAT
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

    rows = _run(accept_gaps(load_app(app), _need_kafka(kafka), **chosen))
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
@_KAFKA
@_FORMAT
def state_get(app: str, store: str, key: str, kafka: str | None, output: str) -> None:
    """Show what is committed of KEY in the state STORE of APP (module:attribute), read from the state's changelog.

    Each partition keeps its own state: a row for each that has the key. A value whose time to live is over is shown
    until it is taken out. Exits 1 when nothing is there.
    """
    from semel.ops.loading import load_app
    from semel.ops.states import read_state
    from semel.ops.tables import render

    rows = _run(read_state(load_app(app), _need_kafka(kafka), store, key))
    click.echo(render(rows, ["partition", "offset", "written", "value"], output))
    if not rows:
        raise click.exceptions.Exit(EXIT_FAILURE)


@main.group()
def outbox() -> None:
    """Records that are committed in a database and not in Kafka yet."""


_DATABASE = click.option("--database", "name", metavar="NAME", help="Which database, where the app has several.")
_DRY_RUN = click.option("--dry-run", is_flag=True, help="Only say what would be done.")
_REASON = click.option("--reason", required=True, help="Why; it stays on record with your name.")


@outbox.command("status")
@click.argument("app")
@_FORMAT
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
@_KAFKA
@_FORMAT
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
    work = run_republish(app, name, _need_kafka(kafka), at, first, last, asked)
    _listing(lambda: work, ["topic", "partition", "offset", "key", "bytes"], output)


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


@main.group()
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
@_KAFKA
@_FORMAT
def park_list(app: str, by_group: bool, kafka: str | None, output: str) -> None:
    """List the parked records of APP's processors and sinks, in order per key, with the reason."""
    from semel.ops.park_verbs import list_all

    columns = ["component", "topic", "partition", "offset", "key", "group", "error", "message"]
    if by_group:
        columns = ["group", "component", "keys", "records", "error", "frames", "build", "example", "message"]
    _listing(lambda: list_all(app, _looking(kafka), by_group=by_group), columns, output)


@park.command("show")
@click.argument("app")
@click.argument("item", metavar="ID")
@_KAFKA
@_FORMAT
def park_show(app: str, item: str, kafka: str | None, output: str) -> None:
    """Show one parked record of APP: value, headers, and why it is parked."""
    from semel.ops.park_verbs import show

    click.echo(_run(show(app, _looking(kafka), item, output)))


def _carry_out(output: str, work: Coroutine[Any, Any, list[dict[str, Any]]]) -> None:
    """Print what came of the commands; exit code 1 unless all of it is done and nothing failed."""
    from semel.ops.tables import render

    found = _run(work)
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
@_KAFKA
@_FORMAT
def park_retry(
    app: str, wait: float, kafka: str | None, output: str, build: str, assume: bool, reason: str, **names: Any
) -> None:
    """Handle parked records of APP again: every record of each key that is named, in order.

    Where one fails again, it and what is behind it stay parked.
    """
    from semel.ops.park_verbs import command

    verb: Literal["assume", "retry"] = "assume" if assume else "retry"
    work = command(app, _looking(kafka), verb, names, wait=wait, build=build, reason=reason)
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
@_KAFKA
@_FORMAT
def park_discard(app: str, wait: float, kafka: str | None, output: str, reason: str, **names: Any) -> None:
    """Drop exactly the parked records of APP that are named; who did it and why stays on record."""
    from semel.ops.park_verbs import command

    _carry_out(output, command(app, _looking(kafka), "discard", names, wait=wait, reason=reason))


@park.command("edit")
@click.argument("app")
@click.argument("item", metavar="ID")
@click.option(
    "--value", "value", type=click.File("rb"), required=True, metavar="FILE", help="The new value; - is stdin."
)
@_REASON
@_WAIT_FOR
@_KAFKA
@_FORMAT
def park_edit(app: str, item: str, value: Any, wait: float, kafka: str | None, output: str, reason: str) -> None:
    """Handle a parked record of APP again with another value, and then what is behind it.

    Off unless the workers have SEMEL_PARK_EDIT=yes. Digests of both values, who and why stay on record.
    """
    from semel.ops.park_verbs import command

    names = {"ids": (item,)}
    work = command(app, _looking(kafka), "edit", names, wait=wait, reason=reason, value=value.read())
    _carry_out(output, work)
