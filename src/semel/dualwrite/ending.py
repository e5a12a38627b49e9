"""Telling Kafka how a prepared transaction ends, until it has heard it."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

from semel.client.cluster import Backoff
from semel.client.producer import TransactionalProducer
from semel.client.transaction_state import State
from semel.client.two_phase import PreparedState
from semel.dualwrite.limits import BACKOFF_SECONDS
from semel.env import Env
from semel.errors import OutcomeUnknown, Retriable, SemelError

__all__ = ["end", "put_away"]

log = logging.getLogger("semel.dualwrite")


async def end(env: Env, producer: TransactionalProducer, decided: PreparedState, *, patient: bool = True) -> None:
    """Commit the prepared transaction if `decided` names it, else abort what is open, prepared or not.

    Nothing here asks for a new identity: this one is the only proof that the slot is still ours. With `patient` it goes
    on until Kafka answers; else it raises `Retriable` when it does not in time, and what is open stays open. Raises
    `Fenced` when another one took the slot over, `Fatal` when somebody else ended what was to be committed.
    """
    backoff = Backoff(env, *BACKOFF_SECONDS)
    while True:
        try:
            if producer.state is State.Unknown:
                await producer.init_transactions()  # It repeats the decision, and nothing else.
            elif producer.state is State.Prepared:
                await producer.complete(decided)
            elif producer.state is not State.Ready:
                await producer.end_transaction(commit=False)
        except (OutcomeUnknown, Retriable) as error:
            if not patient:
                raise Retriable(f"Kafka was not told how a transaction ends: {error}") from error
            log.warning("%r: Kafka was not told how its transaction ends; trying on: %s", producer, error)
        else:
            return
        await asyncio.sleep(backoff.next())


async def put_away(producer: TransactionalProducer) -> None:
    """Stop a producer, whatever became of it; what it has prepared stays as it is."""
    with suppress(SemelError):
        await producer.close()
