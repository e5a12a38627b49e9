"""The metrics of all processes of a deployment on one page.

Every process writes its registry into a file of the data folder, once a second; an HTTP instance that is asked for
`/metrics` joins what is there, and says by the label `process` whose a series is. The files are in Prometheus' text
format, so a deployment without HTTP instances can give them to node_exporter's textfile collector.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from semel.databases.processes import ProcessIdentity, is_alive
from semel.processing.files import replace_file
from semel.processing.metrics import Metrics

__all__ = ["PUBLISH_SECONDS", "join", "publishing", "read_others"]

log = logging.getLogger("semel.metrics")

PUBLISH_SECONDS = 1.0
_HEADER = "# semel process "


@asynccontextmanager
async def publishing(metrics: Metrics, data: Path, process: str) -> AsyncIterator[None]:
    """Keep the file of this process fresh, and take it away at the end. A disk that refuses it is told and no more."""
    path = _folder(data) / f"{process}.prom"
    task = asyncio.create_task(_publish(metrics, path), name=f"metrics of {process}")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        with suppress(OSError):
            path.unlink()


def read_others(data: Path, process: str) -> dict[str, str]:
    """The registries of the other processes that run, by name. Files of the dead are passed over."""
    texts = {}
    for path in sorted(_folder(data).glob("*.prom")):
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError):
            continue  # It ended just now, or somebody put something else here.
        owner = ProcessIdentity.parse(text.partition("\n")[0]) if text.startswith(_HEADER) else None
        if path.stem != process and owner is not None and is_alive(owner):
            texts[path.stem] = text
    return texts


def join(texts: dict[str, str]) -> str:
    """One page of several registries' texts: help and type once a name, and a label `process` on every series."""
    families: dict[str, _Family] = {}
    for process, text in texts.items():
        family = _Family("", "")
        for line in text.splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                name = line.split(" ", 3)[2]
                family = families.setdefault(name, _Family("", ""))
                if line.startswith("# HELP "):
                    family.help = family.help or line
                else:
                    family.type = family.type or line
            elif line and not line.startswith("#"):
                family.samples.append(_labelled(line, process))
    lines: list[str] = []
    for _, family in sorted(families.items()):
        lines += [family.help, family.type, *family.samples]
    return "\n".join(lines) + "\n"


@dataclass(slots=True)
class _Family:
    """All series of one name."""

    help: str
    type: str
    samples: list[str] = field(default_factory=list)


def _labelled(line: str, process: str) -> str:
    name, brace, rest = line.partition("{")
    if brace:
        return f'{name}{{process="{process}",{rest}'
    name, _, value = line.partition(" ")
    return f'{name}{{process="{process}"}} {value}'


def _folder(data: Path) -> Path:
    return data / "metrics"


async def _publish(metrics: Metrics, path: Path) -> None:
    header = f"{_HEADER}{path.stem} {ProcessIdentity.current()}\n"
    is_refused = False
    while True:
        # Rendered here, where the registry does not change meanwhile; written there, where a slow disk holds up nobody.
        text = header + metrics.render()
        try:
            await asyncio.to_thread(replace_file, path, text.encode())
            is_refused = False
        except OSError as error:
            if not is_refused:
                log.warning("the metrics of this process are not published: %s", error)
            is_refused = True
        await asyncio.sleep(PUBLISH_SECONDS)
