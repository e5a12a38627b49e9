"""The faults of the comparison: what each one does to the loops, the same for everybody.

`late-*` and `lost-answers` are done by the proxy in the middle (`middle.py`), the others to processes. A strike ends
when what it broke is whole again.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from random import Random

from semel.errors import ConfigurationError
from semel.prove.compare.middle import END_TXN, PRODUCE, TXN_OFFSET_COMMIT, Caught, Late, LostAnswer, Middle
from semel.prove.compare.processes import Broker, Loops

__all__ = ["FAULTS", "Field", "Strikes", "faults_named"]

_PAUSE_SECONDS = 8.0
"""Longer than the session of 6 s, shorter than the transaction time-out of 10 s."""
_LATE_SECONDS = 12.0
"""How long a strike waits for the request that it wants; who sends none cannot be struck."""


@dataclass(slots=True)
class Field:
    """What there is to strike."""

    loops: Loops
    middle: Middle
    broker: Broker | None
    rng: Random
    note: Callable[[str], None]


Strike = Callable[[Field, int], Awaitable[bool]]


@dataclass(frozen=True, slots=True)
class Strikes:
    """One kind of fault: how often it strikes in a trial, and how. `flaky`: the work fails now and then."""

    name: str
    does: str
    times: int
    strike: Strike
    flaky: bool = False
    own_broker: bool = False


async def _kill(field: Field, _number: int) -> bool:
    await asyncio.sleep(field.rng.uniform(1.0, 2.5))
    slot = field.rng.randrange(len(field.loops))
    return field.loops.signal(slot, signal.SIGKILL)


async def _kill_at_commit(field: Field, _number: int) -> bool:
    await asyncio.sleep(field.rng.uniform(0.5, 1.5))
    caught = field.middle.strike = Caught()
    try:
        await asyncio.wait_for(caught.done.wait(), _LATE_SECONDS)
        field.loops.kill()
    except TimeoutError:
        return False
    finally:
        field.middle.strike = None
    return True


async def _restart(field: Field, number: int) -> bool:
    await asyncio.sleep(field.rng.uniform(1.5, 2.5))
    return field.loops.signal(number % len(field.loops), signal.SIGTERM)


async def _zombie(field: Field, _number: int) -> bool:
    await asyncio.sleep(field.rng.uniform(1.0, 2.0))
    slot = field.rng.randrange(len(field.loops))
    if not field.loops.signal(slot, signal.SIGSTOP):
        return False
    try:
        await asyncio.sleep(_PAUSE_SECONDS)
    finally:
        field.loops.signal(slot, signal.SIGCONT)
    await asyncio.sleep(3.0)
    return True


def _late(api_key: int, committed: bool | None = None) -> Strike:
    async def strike(field: Field, number: int) -> bool:
        """Early in the next transaction or, every second time, right before its offsets.

        What commits too much or too little is seen when a process then dies before it could repair it: every second
        time for a commit, always for offsets.
        """
        await asyncio.sleep(field.rng.uniform(0.2, 1.0))
        late = field.middle.strike = Late(
            api_key, committed, before_offsets=number % 2 == 1 and api_key != TXN_OFFSET_COMMIT
        )
        try:
            await asyncio.wait_for(late.done.wait(), _LATE_SECONDS)
            if api_key == TXN_OFFSET_COMMIT or (committed and number % 2):
                field.loops.kill()
        except TimeoutError:
            pass
        finally:
            late.drop()
            field.middle.strike = None
        field.note(str(late))
        return late.done.is_set()

    return strike


async def _lost_answers(field: Field, number: int) -> bool:
    await asyncio.sleep(field.rng.uniform(0.2, 1.0))
    lost = field.middle.strike = LostAnswer((END_TXN, TXN_OFFSET_COMMIT, PRODUCE)[number % 3])
    try:
        await asyncio.wait_for(lost.done.wait(), _LATE_SECONDS)
    except TimeoutError:
        return False
    finally:
        field.middle.strike = None
    return True


async def _broker_kill(field: Field, _number: int) -> bool:
    assert field.broker is not None
    await asyncio.sleep(field.rng.uniform(1.0, 3.0))
    field.broker.kill()
    await asyncio.sleep(0.3)
    await field.broker.start()
    return True


FAULTS: dict[str, Strikes] = {
    fault.name: fault
    for fault in (
        Strikes("restart", "SIGTERM and a new start, as every deployment does: no fault at all", 4, _restart),
        Strikes("kill", "kill -9 of a loop at random moments", 5, _kill),
        Strikes("kill-at-commit", "kill -9 at the moment when a loop commits", 3, _kill_at_commit),
        Strikes("zombie", "SIGSTOP of a loop for longer than its session, then SIGCONT", 2, _zombie),
        Strikes("late-commit", "a commit arrives late, in the next transaction", 4, _late(END_TXN, True)),
        Strikes(
            "late-abort",
            "an abort arrives late, in the next transaction; the work fails now and then, so that there are aborts",
            4,
            _late(END_TXN, False),
            flaky=True,
        ),
        Strikes("late-offsets", "offsets arrive late, in the next transaction", 3, _late(TXN_OFFSET_COMMIT)),
        Strikes("late-produce", "a batch arrives late, in the next transaction", 4, _late(PRODUCE)),
        Strikes("lost-answers", "the answer to EndTxn, TxnOffsetCommit or Produce is lost", 6, _lost_answers),
        Strikes("broker-kill", "kill -9 of the broker, and its restart", 3, _broker_kill, own_broker=True),
    )
}


def faults_named(text: str) -> list[Strikes]:
    """The faults of `kill,zombie`, each once; `all` is every one. Raises `ConfigurationError`."""
    names = list(FAULTS) if text.strip() == "all" else [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in FAULTS]
    if unknown or not names:
        what = f"there is no fault {unknown[0]!r}" if unknown else "no fault is named"
        raise ConfigurationError(f"--faults: {what}. Known: {', '.join(FAULTS)}, or all.")
    return [FAULTS[name] for name in dict.fromkeys(names)]
