"""Before an app works: its schemas are registered, and none of them breaks readers or writers that are there."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from typing import Any

from semel.errors import ConfigurationError
from semel.processing.serdes.formats import Registered
from semel.processing.serdes.registry import Registry, SchemaRegistry
from semel.processing.topics import Topic
from semel.settings import Settings

__all__ = ["attach_all", "attach_with", "prepare_schemas", "registered"]


def registered(topics: Iterable[Topic[Any, Any]]) -> Iterator[Registered]:
    """The formats that go by a schema registry."""
    for topic in topics:
        bound = getattr(topic.bound, "inner", None) or topic.bound  # A CloudEvent's data may be in such a format.
        if isinstance(bound, Registered):
            yield bound


def attach_all(topics: Iterable[Topic[Any, Any]], registry: Registry, *, register: bool = True) -> None:
    """Register every schema, or with `register=False` find it. Raises as `Registered.attach`."""
    for bound in registered(topics):
        bound.attach(registry, register=register)


async def prepare_schemas(topics: Iterable[Topic[Any, Any]], settings: Settings) -> None:
    """Do that with the registry of the settings.

    Raises `Incompatible` (the app must not start), `ConfigurationError`, and `Retriable`: nobody answers, try again.
    """
    wanted = list(topics)
    if next(registered(wanted), None) is not None:
        await asyncio.to_thread(attach_with, wanted, settings)


def attach_with(topics: Iterable[Topic[Any, Any]], settings: Settings) -> None:
    """The same where there is no event loop: it blocks."""
    wanted = list(topics)
    needs = next(registered(wanted), None)
    if needs is None:
        return
    if not settings.schema_registry:
        raise ConfigurationError(
            f"{needs.what} goes by a schema registry: set SEMEL_SCHEMA_REGISTRY=http(s)://host[:port]."
        )
    registry = SchemaRegistry(
        settings.schema_registry, auth=settings.schema_registry_auth, ca=settings.schema_registry_ca
    )
    attach_all(wanted, registry, register=settings.schema_registry_register == "yes")
