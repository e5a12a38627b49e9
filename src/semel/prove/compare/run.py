"""Every fault on every peer, one after the other: what `semel prove --compare` calls."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from semel.prove.compare.peers import installed, peers_named
from semel.prove.compare.strikes import faults_named
from semel.prove.compare.trial import Trial, run_trial

__all__ = ["compare"]


async def compare(
    peers: str = "all",
    faults: str = "all",
    *,
    seed: int = 1,
    kafka: str | None = None,
    keep: Path | None = None,
    say: Callable[[str], None] = lambda _line: None,
    done: Callable[[Trial], None] = lambda _trial: None,
) -> list[Trial]:
    """Run every named fault on every named peer, one after the other; `done` gets each trial when it is judged.

    `kafka` is the address of an Apache Kafka; without it each trial starts an embedded broker of its own. Faults that
    need a broker which may be killed are left out with `kafka`, and that is said.

    Raises `ConfigurationError` for a name that is not known or a library that is not installed, before anything runs,
    and `SemelError` when a trial cannot be carried out.
    """
    chosen = peers_named(peers)
    strikes = faults_named(faults)
    installed("confluent-kafka")  # Its producer writes the input, whoever works on it.
    for peer in chosen:
        peer.versions()
    trials = []
    for fault in strikes:
        if fault.own_broker and kafka is not None:
            say(f"{fault.name} is left out: it kills a broker, and {kafka} is not ours")
            continue
        for peer in chosen:
            say(f"{peer.name}: {fault.does}")
            trial = await run_trial(peer, fault, seed, kafka=kafka, say=say, keep=keep)
            done(trial)
            trials.append(trial)
    return trials
