"""Protections taken away one at a time: each must be missed by the simulation within a few hundred seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

from semel.broker.groups import Groups
from semel.broker.metadata import MetadataStore
from semel.broker.topics import Partition
from semel.broker.transactions import Transactions
from semel.client.transaction import TransactionProtocol
from semel.coordinator.transaction import TransactionCoordinator
from semel.coordinator.transaction_state import TransactionState
from semel.errors import ErrorCode
from semel.log import log as log_module
from semel.log import segments
from semel.log.log import PartitionLog
from semel.log.partition import PartitionState
from semel.log.producer_state import Producers
from semel.log.snapshot import Snapshot
from semel.log.sync import Sync

__all__ = ["MUTANTS", "Mutant", "instead"]

Mutant = Callable[[], AbstractContextManager[Any]]
MUTANTS: dict[str, Mutant] = {}


def instead(mutants: dict[str, Mutant], name: str, owner: Any, attribute: str) -> Callable[[Callable[..., Any]], None]:
    """Register what runs in the place of a function; its first argument is the function that was there."""

    def register(replacement: Callable[..., Any]) -> None:
        @contextmanager
        def mutant() -> Iterator[None]:
            real = getattr(owner, attribute)

            def changed(*args: Any, **kwargs: Any) -> Any:
                return replacement(real, *args, **kwargs)

            with mock.patch.object(owner, attribute, changed):
                yield

        mutants[name] = mutant

    return register


def _instead(name: str, owner: Any, attribute: str) -> Callable[[Callable[..., Any]], None]:
    return instead(MUTANTS, name, owner, attribute)


@_instead("a batch that is there already is appended again", Producers, "check")
def _(real: Any, *args: Any, **kwargs: Any) -> None:
    real(*args, **kwargs)


@_instead("EndTxn of whoever names the transactional id", TransactionCoordinator, "end_transaction")
def _(real: Any, self: Any, transactional_id: str, producer_id: int, epoch: int, *rest: Any) -> Any:
    current = self.get(transactional_id)
    if current is not None:
        producer_id, epoch = current.producer_id, current.producer_epoch
    return real(self, transactional_id, producer_id, epoch, *rest)


@contextmanager
def _old_epochs_write() -> Iterator[None]:
    with (
        mock.patch.object(TransactionCoordinator, "check_produce", return_value=ErrorCode.NONE),
        mock.patch.object(Producers, "_check_start", return_value=None),
    ):
        yield


MUTANTS["an old epoch may write (coordinator and partition: each alone covers for the other)"] = _old_epochs_write


@_instead("InitProducerId keeps the epoch", TransactionCoordinator, "_next_identity")
def _(real: Any, self: Any, current: Any) -> tuple[int, int]:
    return current.producer_id, current.producer_epoch


@_instead("one partition gets no marker", Transactions, "_end_in")
def _(real: Any, self: Any, partition: Partition, *rest: Any) -> None:
    if partition.log.topic != "b":
        real(self, partition, *rest)


@_instead("the decision is not written before its markers", Transactions, "_persist")
def _(real: Any, self: Any, transition: Any, now_ms: int) -> None:
    if transition.state in (TransactionState.PREPARE_COMMIT, TransactionState.PREPARE_ABORT):
        self.coordinator.complete(transition)
    else:
        real(self, transition, now_ms)


@_instead("offsets count whatever becomes of their transaction", Groups, "end_transaction")
def _(real: Any, self: Any, producer_id: int, commit: bool, now_ms: int) -> None:
    real(self, producer_id, True, now_ms)


@_instead("a snapshot knows no producers", Snapshot, "restore")
def _(real: Any, *args: Any) -> Any:
    state, found = real(*args)
    return PartitionState(state.log_start_offset, state.log_end_offset), found


@_instead("recovery believes every checksum", segments, "check_crc")
def _(real: Any, *args: Any) -> bool:
    return True


@_instead("an answer does not wait for the disk", PartitionLog, "_sync")
def _(real: Any, *args: Any) -> None:
    pass


@_instead("group commit does not sync", Sync, "run")
def _(real: Any, *args: Any) -> None:
    pass


@_instead("what a restart found is not synced", log_module, "_make_durable")
def _(real: Any, *args: Any) -> None:
    pass


@_instead("readers of committed records are not stopped", PartitionState, "advance")
def _(real: Any, self: Any, high_watermark: int) -> None:
    real(self, high_watermark)
    self.last_stable_offset = high_watermark


@_instead("aborted transactions are not listed", PartitionLog, "aborted_transactions")
def _(real: Any, *args: Any) -> list[Any]:
    return []


@_instead("producer ids begin again at each start", MetadataStore, "__init__")
def _(real: Any, self: Any, *args: Any) -> None:
    real(self, *args)
    self._next_producer_id = 0


@_instead("the client goes on after an answer that never came", TransactionProtocol, "unanswered")
def _(real: Any, self: Any, *args: Any) -> None:
    real(self, *args)
    self._unanswered = False
