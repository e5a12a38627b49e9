"""What the verbs of `semel` share: options, settings, exit codes, and how their work is run and printed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any, TypeVar

import click

from semel.errors import ConfigurationError, Fenced, SemelError
from semel.settings import Settings, running_kafka

__all__ = [
    "EXIT_FAILURE",
    "EXIT_FENCED",
    "EXIT_USAGE",
    "FORMAT",
    "KAFKA",
    "Group",
    "complain",
    "looking",
    "need_kafka",
    "print_rows",
    "run_to_end",
    "settings_of",
]

T = TypeVar("T")
EXIT_FAILURE, EXIT_USAGE, EXIT_FENCED = 1, 2, 75

FORMAT = click.option(
    "--format", "output", type=click.Choice(["text", "json"]), default="text", show_default=True, help="How to print."
)
KAFKA = click.option("-b", "--kafka", envvar="SEMEL_KAFKA", metavar="HOST:PORT", help="Kafka's address (SEMEL_KAFKA).")


class Group(click.Group):
    """Turns our errors into one message and an exit code; anything else is a bug and keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except Fenced as error:
            complain(error)
            ctx.exit(EXIT_FENCED)
        except ConfigurationError as error:
            complain(error)
            ctx.exit(EXIT_USAGE)
        except SemelError as error:
            complain(error)
            ctx.exit(EXIT_FAILURE)


def complain(error: SemelError) -> None:
    """One message on stderr."""
    click.echo(f"semel: {error}", err=True)


def settings_of(**overrides: object) -> Settings:
    """The settings of the environment; what an option gave comes first."""
    return Settings.from_environment(None, **overrides)


def run_to_end(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in an event loop of its own; an interrupt is an exit code, and no traceback."""
    try:
        return asyncio.run(work)
    except KeyboardInterrupt:
        raise click.exceptions.Exit(130) from None
    except asyncio.CancelledError:  # By SIGTERM, where a command asked for that.
        raise click.exceptions.Exit(143) from None


def looking(kafka: str | None) -> Settings:
    """Settings for a command that only looks: it finds the embedded broker of a `semel run` in the same folder."""
    settings = settings_of(kafka=kafka)
    return replace(settings, kafka=running_kafka(settings))


def need_kafka(kafka: str | None) -> Settings:
    """The same for a command that does nothing without Kafka. Raises `ConfigurationError` where none is named."""
    settings = looking(kafka)
    if not settings.kafka:
        raise ConfigurationError(
            f"Which Kafka? Give --kafka HOST:PORT or set SEMEL_KAFKA: no `semel run` is at work in {settings.data}."
        )
    return settings


def print_rows(read: Callable[[], Coroutine[Any, Any, list[dict[str, Any]]]], columns: list[str], output: str) -> None:
    """Print what `read` gives as a table, or as JSON."""
    from semel.ops.tables import render

    click.echo(render(run_to_end(read()), columns, output))
