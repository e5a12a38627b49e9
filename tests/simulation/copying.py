"""A plain processor in the simulated world, which goes the quick way: it copies what was counted."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semel.errors import Retriable
from semel.processing.component import Component, ProcessorSpec, park_topic
from semel.processing.topics import Topic
from tests.services.extensions import compiled
from tests.simulation.workers import APP, COUNTED, Poison, is_poison

if TYPE_CHECKING:
    from tests.simulation.world import World

__all__ = ["COPIED", "COPY_GROUP", "COPY_PARKED", "copier", "copies", "quick_run"]

COPIED = "copied"
COPY_GROUP = f"{APP}.copy"
COPY_PARKED = park_topic(APP, COUNTED)


def copier(world: World, process: str = "") -> Component:
    """Gives most inputs one output, some two and some none; some can never be worked on."""
    counted: Topic[bytes, bytes] = Topic(COUNTED, bytes, bytes)
    copied: Topic[bytes, bytes] = Topic(COPIED, bytes, bytes)
    rng = world.stream(f"copies of {process}")
    knobs = world.plan.knobs

    def copy(record: Any) -> Any:
        if rng.random() < knobs["handler trouble"]:
            raise Retriable("a service that the handler asks is away")
        for value in _outputs(record.value.decode()):
            yield copied.record(record.key, value.encode())
        if is_poison(record.value.decode(), knobs["poison"]):
            raise Poison(record.value)

    return ProcessorSpec("copy", counted, copy).component(APP)


def _outputs(value: str) -> list[str]:
    return [value, f"{value}|again"][: int(value[-1]) % 4 % 3]


def copies(values: Iterable[str], poison: int) -> tuple[list[str], list[str]]:
    """What must come of one key's inputs, in their order: outputs, and what is parked."""
    outputs: list[str] = []
    parked: list[str] = []
    for value in values:
        if parked or is_poison(value, poison):
            parked.append(value)
        else:
            outputs += _outputs(value)
    return outputs, parked


@cache
def quick_run() -> Any:
    """The inner loop in C, from the source as it is."""
    with tempfile.TemporaryDirectory(prefix="semel-quick-") as folder:
        return compiled("semel/processing/_quick", Path(folder)).run
