"""Who is compared: each library's loop, what its documentation promises for it, and how it is started."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from semel.errors import ConfigurationError

__all__ = ["PEERS", "Peer", "installed", "peers_named"]

_LOOPS = "semel.prove.compare.loops"


@dataclass(frozen=True, slots=True)
class Peer:
    """One library. `packages` are its distributions; the first one names it."""

    name: str
    packages: tuple[str, ...]
    promise: Literal["exactly-once", "at-least-once"]
    """What the library's own documentation promises for such a loop at best."""
    script: str
    """The module of its loop."""
    group_suffix: str = ""
    writes_rows: bool = False
    """Its effects are rows of a database, not records of a topic."""

    def argv(self, _slot: int) -> list[str]:
        """What starts one process of the loop."""
        return [sys.executable, "-m", f"{_LOOPS}.{self.script}"]

    def versions(self) -> str:
        """The installed versions. Raises `ConfigurationError` when one is not installed."""
        return ", ".join(f"{name} {installed(name)}" for name in self.packages)


def installed(package: str) -> str:
    """The version of a distribution. Raises `ConfigurationError` when it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError as error:
        raise ConfigurationError(
            f"{error.name} is not installed here: pip install 'semel[compare]' brings all that are compared."
        ) from error


class _Semel(Peer):
    """Ours: an app, run by the worker that `semel run` starts."""

    def argv(self, slot: int) -> list[str]:
        app = f"{_LOOPS}.{self.script}:app"
        return [sys.executable, "-m", "semel", "child", "worker", app, "--slot", str(slot)]


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        _Semel("semel", ("semel",), "exactly-once", "semel_app", ".reserve"),
        Peer("confluent-kafka", ("confluent-kafka",), "exactly-once", "confluent_kafka_loop"),
        Peer("aiokafka", ("aiokafka",), "exactly-once", "aiokafka_loop"),
        Peer("quixstreams", ("quixstreams", "confluent-kafka"), "exactly-once", "quixstreams_loop"),
        Peer("faststream", ("faststream", "aiokafka"), "at-least-once", "faststream_loop"),
        _Semel("semel-rows", ("semel",), "exactly-once", "semel_rows", ".reserve", writes_rows=True),
        Peer("confluent-kafka-rows", ("confluent-kafka",), "at-least-once", "confluent_kafka_rows", writes_rows=True),
        Peer("aiokafka-rows", ("aiokafka",), "at-least-once", "aiokafka_rows", writes_rows=True),
        Peer("quixstreams-rows", ("quixstreams",), "at-least-once", "quixstreams_rows", writes_rows=True),
        Peer("faststream-rows", ("faststream", "aiokafka"), "at-least-once", "faststream_rows", writes_rows=True),
    )
}


def peers_named(text: str) -> list[Peer]:
    """The peers of `aiokafka,quixstreams`, each once; `all` is every one, ours first. Raises `ConfigurationError`."""
    names = list(PEERS) if text.strip() == "all" else [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in PEERS]
    if unknown or not names:
        what = f"there is no {unknown[0]!r} here" if unknown else "nobody is named"
        raise ConfigurationError(f"--compare: {what}. Known: {', '.join(PEERS)}, or all.")
    return [PEERS[name] for name in dict.fromkeys(names)]
