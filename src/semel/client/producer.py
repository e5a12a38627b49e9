"""Our producers: the transactional one and the idempotent one, both over sans-IO rules and one `Sender`.

`TransactionalProducer` drives `client/transaction.py`: it writes what the protocol asks for and reports what came of
every copy. `client/idempotent.py` holds the producer without transactions; both are named here.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any, NoReturn

from semel.client.admin import TWO_PHASE_VERSION, Admin
from semel.client.batches import Batch, Identity, Payload
from semel.client.cluster import GROUP, TRANSACTION, KafkaClient
from semel.client.connection import Connection, check_not_forked
from semel.client.describe import DescribedTransaction, decode_described
from semel.client.idempotent import Producer, RecordMetadata
from semel.client.markers import finish_last
from semel.client.reactions import Reaction
from semel.client.sender import Answer, Sender
from semel.client.transaction import TransactionProtocol
from semel.client.transaction_state import Kind, Request, State, TransactionView
from semel.client.two_phase import PreparedState, TwoPhaseMode
from semel.errors import (
    ConfigurationError,
    ErrorCode,
    Fatal,
    Fenced,
    OutcomeUnknown,
    Retriable,
    SemelError,
    TwoPhaseCommitUnavailable,
)
from semel.failpoints import failpoint
from semel.types import GroupMetadata, TopicPartition

__all__ = ["PreparedState", "Producer", "RecordMetadata", "TransactionalProducer"]

log = logging.getLogger("semel.client")

INIT_PRODUCER_ID, ADD_PARTITIONS, ADD_OFFSETS, END_TXN, TXN_OFFSET_COMMIT, DESCRIBE = 22, 24, 25, 26, 28, 65
_V1_VERSIONS = {DESCRIBE: 0, ADD_PARTITIONS: 3, ADD_OFFSETS: 3, END_TXN: 3, TXN_OFFSET_COMMIT: 3}
_V2_VERSIONS = {DESCRIBE: 0, END_TXN: 5, TXN_OFFSET_COMMIT: 5}
_PRODUCE_NEWEST = {1: 11, 2: 12}
"""Produce v12 adds partitions to the transaction implicitly, which only transactions V2 makes safe."""

_DESCRIBE_TRIES = 5
"""How often a fenced producer asks why; after that its message names both possible reasons."""


class TransactionalProducer:
    """Writes records and offsets in Kafka transactions under one transactional id; one task at a time may use it.

    After `Fenced` and `Fatal` nothing works any more. After `AbortTransaction` call `abort()`; after `OutcomeUnknown`
    call `init_transactions()` (or `abort()`), then go on from the committed offsets: the commit may have happened.

    With `two_phase_commit` its transactions can be prepared and never time out (KIP-939). `prepare_until_timeout` lets
    those be prepared that do time out: whoever decides has to be in time, or what is decided is lost.
    """

    def __init__(
        self,
        client: KafkaClient,
        transactional_id: str,
        *,
        transaction_timeout_ms: int = 10_000,
        delivery_timeout_ms: int | None = None,
        two_phase_commit: bool = False,
        prepare_until_timeout: bool = False,
    ) -> None:
        if not transactional_id:
            raise ConfigurationError("a transactional producer needs a transactional id that is not empty.")
        self.transactional_id = transactional_id
        self.transaction_timeout_ms = transaction_timeout_ms
        settings = client.settings
        self._delivery_timeout = (
            settings.delivery_timeout if delivery_timeout_ms is None else delivery_timeout_ms / 1000
        )
        self._client = client
        self._protocol = TransactionProtocol(
            transactional_id,
            max_in_flight=settings.max_in_flight,
            two_phase=two_phase_commit,
            times_out=prepare_until_timeout,
        )
        self.two_phase_mode: TwoPhaseMode | None = None
        """What the broker offers of two-phase commit; known after `init_transactions`, None without it."""
        self._sender = Sender(client, self._round, lambda _, error: self._protocol.refused(error))
        self._describe_tries = 0
        self._written: dict[TopicPartition, int] = {}
        self._last: tuple[PreparedState, bool] | None = None
        """The last transaction that ended, and whether it is committed."""
        self._losses = 0
        """How many connections had been lost when all its markers were last known to come."""
        self._pid = os.getpid()

    def __repr__(self) -> str:
        protocol = self._protocol
        return f"<TransactionalProducer {self.transactional_id!r} {protocol.identity} [{protocol.state}]>"

    @property
    def state(self) -> State:
        """Where the producer stands; see `client/transaction.py`."""
        return self._protocol.state

    @property
    def identity(self) -> Identity:
        """The producer id and epoch in use."""
        return self._protocol.identity

    @property
    def written(self) -> dict[TopicPartition, int]:
        """Where the records of this transaction end, as far as the broker said: the offset behind the last one."""
        return self._written

    @property
    def transaction_version(self) -> int:
        """2 when the cluster has transactions V2 (KIP-890), else 1: then late copies cost an InitProducerId."""
        return 2 if self._client.transaction_version >= 2 else 1

    # --- The caller's side ---

    async def init_transactions(self, *, keep_prepared: bool = False) -> None:
        """Get an identity; the first call ends what a predecessor left open and fences it.

        Later calls resolve an unknown outcome. With `keep_prepared` (for `two_phase_commit=True`) the predecessor is
        fenced and its open transaction stays open: `prepared_state` names it, and `complete` ends it.

        Raises `Fenced`, `Fatal`, `TwoPhaseCommitUnavailable` (nothing happened), or `Retriable` when no coordinator
        answers within `delivery.timeout.ms`.
        """
        self._check()
        protocol = self._protocol
        await self._check_two_phase(keep_prepared)
        if protocol.state is State.Uninitialized:
            await finish_last(self._client, self.transactional_id, timeout=self._delivery_timeout)
        deadline = self._deadline()
        protocol.initialize(self._client.transaction_version, keep_prepared=keep_prepared)
        self._sender.schedule()
        if not await self._sender.wait(lambda: self._is_initialized(), deadline):
            if protocol.state in (State.Committing, State.Aborting):
                raise protocol.give_up(self._delivery_timeout)
            raise Retriable(
                f"transactional id {self.transactional_id!r} was not initialised within {self._delivery_timeout:g} s; "
                f"the last reason: {self._sender.last_reason}"
            )
        if protocol.state is State.Abortable:  # The transaction to resolve turned out to be lost: clear it away.
            await self.abort()
        elif protocol.state not in (State.Ready, State.Prepared):
            raise protocol.error()

    async def _check_two_phase(self, keep_prepared: bool) -> None:
        """Ask the broker what it offers before anything is done that it could not undo."""
        if not self._protocol.two_phase:
            if keep_prepared:
                raise ConfigurationError(
                    f"the producer of transactional id {self.transactional_id!r} has no two-phase commit: "
                    "keep_prepared needs two_phase_commit=True."
                )
            return
        if self.two_phase_mode is None:
            mode = await Admin(self._client).two_phase_mode(self.transactional_id)
            level = logging.INFO if mode is TwoPhaseMode.FULL else logging.WARNING
            log.log(level, "transactional id %s: %s. %s", self.transactional_id, mode, mode.meaning)
            self.two_phase_mode = mode
        mode = self.two_phase_mode
        if mode is TwoPhaseMode.FULL or (mode is TwoPhaseMode.NO_RECOVERY and not keep_prepared):
            return
        self.two_phase_mode = None  # An operator may change it; the next call asks again.
        raise TwoPhaseCommitUnavailable(
            f"transactional id {self.transactional_id!r} lacks the two-phase commit it needs ({mode}). {mode.meaning}"
        )

    def _is_initialized(self) -> bool:
        protocol = self._protocol
        return protocol.is_idle and not (protocol.state is State.Ready and protocol.needs_init)

    def begin(self) -> None:
        """Open a transaction; nothing is sent before there is something to write."""
        self._check()
        self._protocol.begin(self._client.transaction_version)
        self._written = {}

    async def produce(self, topic: str, partition: int, batches: Payload) -> None:
        """Hand over the records of one partition (a `BatchBuilder`); they are sent pipelined.

        Waits only while `queue.buffering.max.kbytes` are not written yet. Raises what already makes the transaction
        uncommittable; everything else surfaces in `end_transaction` at the latest.
        """
        self._check()
        protocol = self._protocol
        if batches.count == 0:
            return
        deadline = self._deadline()
        limit = self._client.settings.buffer_bytes_max
        await self._sender.wait(lambda: self._waiting_bytes() < limit or protocol.failure is not None, deadline)
        await self._diagnosed(deadline)
        protocol.produce(Batch(TopicPartition(topic, partition), batches, deadline))
        self._sender.schedule()

    def _waiting_bytes(self) -> int:
        return sum(batch.size for batch in self._protocol.batches())

    async def send_offsets(self, offsets: Mapping[TopicPartition, int], group: GroupMetadata) -> None:
        """Put the offsets to read next into the transaction; the broker checks member and generation (KIP-447)."""
        self._check()
        await self._diagnosed(self._deadline())
        self._protocol.send_offsets(offsets, group)
        self._sender.schedule()

    async def flush(self) -> None:
        """Wait until everything handed over is acknowledged. Raises `AbortTransaction`, `Fenced` or `Fatal`."""
        protocol = self._protocol
        deadline = self._deadline()
        done = await self._sender.wait(lambda: protocol.is_delivered or protocol.failure is not None, deadline)
        await self._diagnosed(deadline)
        if protocol.failure is not None:
            raise protocol.error()
        if not done:
            raise Retriable(f"not everything was delivered within {self._delivery_timeout:g} s")

    async def prepare(self) -> PreparedState:
        """Wait until everything is acknowledged, then close the transaction to further writes; returns its name.

        `str()` of the name goes into the database, in the transaction that decides. Only `complete`, `end_transaction`
        and `abort` may follow. Raises what `flush` raises.
        """
        self._check()
        await self.flush()
        failpoint("producer.before_prepare")
        prepared = self._protocol.prepare()
        failpoint("producer.after_prepare")
        return prepared

    @property
    def prepared_state(self) -> PreparedState:
        """The name of the prepared transaction, our own or the one taken over; the empty one when there is none."""
        return self._protocol.prepared

    async def complete(self, decided: PreparedState | str) -> bool:
        """End the prepared transaction as the database says: commit if it holds this transaction's name, else abort.

        True if it is committed now, False if it was aborted or the predecessor had left nothing open. Raises what
        `end_transaction` raises; `Fatal` too when somebody else ended what is to be committed. After
        `OutcomeUnknown` call `init_transactions()`, which repeats the decision until it is answered.
        """
        self._check()
        name = PreparedState.parse(decided) if isinstance(decided, str) else decided
        commit = name == self.prepared_state
        failpoint("producer.before_complete")
        if not self._protocol.complete(name):
            return False
        await self._ended()
        failpoint("producer.after_complete")
        return commit

    async def end_transaction(self, commit: bool) -> None:
        """Commit or abort; returns when the coordinator decided as asked.

        Raises `AbortTransaction` (not committed: call `abort()`), `Fenced`, `Fatal`, or `OutcomeUnknown`.
        """
        self._check()
        await self._diagnosed(self._deadline())
        self._protocol.end(commit=commit)
        await self._ended()

    async def _ended(self) -> None:
        protocol = self._protocol
        deadline = self._deadline()
        self._sender.schedule()
        if not await self._sender.wait(lambda: protocol.is_idle, deadline):
            raise protocol.give_up(self._delivery_timeout)
        if protocol.state is not State.Ready:
            raise protocol.error()

    async def abort(self) -> None:
        """Bring the producer back to a clean state, whatever happened before.

        An EndTxn without an answer is repeated until it has one, so a commit in doubt may turn out committed: go on
        from the committed offsets. Raises `Fenced`, `Fatal`, or `OutcomeUnknown` when nobody answers in time.
        """
        self._check()
        protocol = self._protocol
        deadline = self._deadline()
        await self._diagnosed(deadline)
        if protocol.state in (State.Unknown, State.Uninitialized, State.Failed):
            failpoint("producer.before_resolve")
            await self.init_transactions()
        elif protocol.state is not State.Ready:
            await self.end_transaction(commit=False)

    async def check_owner(self) -> None:
        """Raise `Fenced` when somebody else owns our transactional id now. Asks the coordinator and changes nothing.

        Raises `Retriable` and the like when it cannot be asked. A later epoch of ours is no other owner while a
        transaction is open: it may have timed out.
        """
        self._check()
        ours = self.identity
        for found in await Admin(self._client).describe_transactions([self.transactional_id]):
            theirs = Identity(found.producer_id, found.producer_epoch)
            if theirs.producer_id != ours.producer_id or (self.state is State.Ready and theirs.epoch > ours.epoch):
                raise Fenced(
                    f"transactional id {self.transactional_id!r} was ours as {ours}; another process owns it now as "
                    f"{theirs} ({found.state})."
                )

    async def close(self) -> None:
        """Abort what is open, if anybody answers, and stop. The next owner of the id aborts what is left."""
        try:
            if self._pid == os.getpid() and self.state in (State.InTransaction, State.Abortable):
                await self.abort()
        except SemelError:
            self._sender.last_reason = "closing"
        finally:
            await self._sender.close()

    async def _diagnosed(self, deadline: float) -> None:
        """While a broker's refusal is being explained, wait for the explanation: it decides the error's class."""
        if self._protocol.state is State.Suspect:
            await self._sender.wait(lambda: self._protocol.state is not State.Suspect, deadline)

    def _check(self) -> None:
        check_not_forked(self._pid, f"the producer of transactional id {self.transactional_id!r}")

    def _deadline(self) -> float:
        return self._client.env.monotonic() + self._delivery_timeout

    # --- Rounds ---

    def _round(self) -> None:
        protocol = self._protocol
        protocol.expire(self._client.env.monotonic(), self._sender.last_reason)
        request = protocol.next_request()
        if request is not None:
            self._sender.spawn(self._control(request))
        while self._write_batches():
            continue

    def _write_batches(self) -> bool:
        """One Produce request for every broker that may have one; False when nothing was written."""
        protocol = self._protocol
        requests: dict[int, tuple[Connection, list[Batch]]] = {}
        partitions = protocol.sendable()
        if partitions and self._is_last_in_doubt:
            self._sender.prepare("the last transaction's markers", self._finish_last())
            return False
        for partition in partitions:
            route = self._sender.route(partition)
            if route is None:
                continue
            node_id, connection = route
            batch = protocol.take_batch(partition, node_id)
            if batch is not None:
                requests.setdefault(node_id, (connection, []))[1].append(batch)
        newest = _PRODUCE_NEWEST[protocol.protocol]
        for node_id, (connection, batches) in requests.items():
            self._sender.write(
                node_id,
                connection,
                batches,
                self._batch_answered,
                self._batch_lost,
                transactional_id=self.transactional_id,
                newest=newest,
            )
        return bool(requests) and not self._sender.is_paused

    @property
    def _is_last_in_doubt(self) -> bool:
        """Whether a broker was away since the last transaction ended: some of its markers may have been given up.

        Then nothing is written under its id before they are there: see `client/markers.py`.
        """
        return self._last is not None and self._client.losses != self._losses

    async def _finish_last(self) -> None:
        losses = self._client.losses
        await finish_last(self._client, self.transactional_id, self._last, timeout=self._delivery_timeout)
        self._losses = losses

    def _batch_answered(self, batch: Batch, answer: Answer) -> None:
        reaction = self._protocol.batch_answered(batch, answer.code, answer.message)
        if reaction is Reaction.DONE and answer.base_offset >= 0:  # A copy of one that is long done has no offset.
            end = answer.base_offset + batch.payload.count
            self._written[batch.partition] = max(end, self._written.get(batch.partition, 0))
        self._react(reaction, f"Produce to {batch.partition}: error {answer.code}", topic=batch.partition.topic)

    def _batch_lost(self, batch: Batch, reason: str, unanswered: bool) -> None:
        if unanswered:
            self._protocol.batch_unanswered(batch, reason)
        else:
            self._protocol.batch_not_sent(batch, reason)

    def _react(self, reaction: Reaction, what: str, *, topic: str | None = None, group: str | None = None) -> None:
        if reaction is Reaction.DONE:
            self._sender.succeeded()
        elif reaction is Reaction.REFRESH:
            if topic is not None:
                self._client.invalidate(topic=topic)
            elif group is not None:
                self._client.invalidate(group=group)
            else:
                self._client.invalidate(transactional_id=self.transactional_id)
        if reaction in (Reaction.RETRY, Reaction.REFRESH):
            self._sender.pause(what)

    # --- Requests to coordinators ---

    async def _control(self, request: Request) -> None:
        """Write one request, report what came of it."""
        try:
            await self._perform(request)
        except OutcomeUnknown as error:
            self._protocol.unanswered(request)
            self._again(request, error)
        except Retriable as error:
            self._protocol.not_sent(request)
            self._again(request, error)
        except SemelError as error:
            self._protocol.broken(request, error)
        except Exception as error:
            # A mistake of ours, as in reading an answer. The request must not count as out for ever: nothing would be
            # sent any more, and every abort would wait in vain.
            what = f"{request.kind} of transactional id {self.transactional_id!r}"
            self._protocol.broken(request, Fatal(f"{what} failed unexpectedly: {error!r}"))
            raise

    def _again(self, request: Request, error: SemelError) -> None:
        if request.kind is Kind.TxnOffsetCommit and request.group is not None:
            self._client.invalidate(group=request.group.group_id)
        else:
            self._client.invalidate(transactional_id=self.transactional_id)
        self._sender.pause(str(error))

    async def _perform(self, request: Request) -> None:
        match request.kind:
            case Kind.InitProducerId:
                await self._init_producer_id(request)
            case Kind.AddPartitionsToTxn:
                await self._add_partitions(request)
            case Kind.AddOffsetsToTxn:
                await self._add_offsets(request)
            case Kind.TxnOffsetCommit:
                await self._commit_offsets(request)
            case Kind.EndTxn:
                await self._end(request)
            case Kind.DescribeTransactions:
                await self._describe(request)
            case _:
                self._unexpected(request)

    def _unexpected(self, request: Request) -> NoReturn:
        raise AssertionError(f"{request.kind} is not sent to a coordinator")

    async def _call(self, request: Request, api_key: int, /, **fields: Any) -> Any:
        node_id = await self._client.coordinator(self.transactional_id, TRANSACTION)
        return await self._client.call(api_key, node_id, self._version(request, api_key), **fields)

    def _version(self, request: Request, api_key: int) -> int | None:
        if request.two_phase:
            return TWO_PHASE_VERSION
        return (_V2_VERSIONS if request.transaction_version == 2 else _V1_VERSIONS).get(api_key)

    def _who(self, request: Request) -> dict[str, Any]:
        identity = request.identity
        return {
            "transactional_id": self.transactional_id,
            "producer_id": identity.producer_id,
            "producer_epoch": identity.epoch,
        }

    async def _init_producer_id(self, request: Request) -> None:
        failpoint("producer.before_init")
        answer = await self._call(
            request,
            INIT_PRODUCER_ID,
            transaction_timeout=self.transaction_timeout_ms,
            enable2_pc=request.two_phase,
            keep_prepared_txn=request.keep_prepared,
            **self._who(request),
        )
        failpoint("producer.after_init")
        identity = Identity(answer.producer_id, answer.producer_epoch)
        ongoing = PreparedState(
            getattr(answer, "ongoing_txn_producer_id", -1), getattr(answer, "ongoing_txn_producer_epoch", -1)
        )
        reaction = self._protocol.init_answered(request, int(answer.error_code), identity, ongoing)
        self._react(reaction, f"InitProducerId: error {int(answer.error_code)}")

    async def _add_partitions(self, request: Request) -> None:
        topics: dict[str, list[int]] = {}
        for partition in sorted(request.partitions):
            topics.setdefault(partition.topic, []).append(partition.partition)
        who = {f"v3_and_below_{name}": value for name, value in self._who(request).items()}
        listed = [{"name": name, "partitions": numbers} for name, numbers in topics.items()]
        answer = await self._call(request, ADD_PARTITIONS, v3_and_below_topics=listed, **who)
        codes = {
            TopicPartition(topic.name, item.partition_index): int(item.partition_error_code)
            for topic in answer.results_by_topic_v3_and_below
            for item in topic.results_by_partition
        }
        self._react(self._protocol.partitions_answered(request, codes), f"AddPartitionsToTxn: errors {codes}")

    async def _add_offsets(self, request: Request) -> None:
        assert request.group is not None
        answer = await self._call(request, ADD_OFFSETS, group_id=request.group.group_id, **self._who(request))
        reaction = self._protocol.offsets_added(request, int(answer.error_code))
        self._react(reaction, f"AddOffsetsToTxn: error {int(answer.error_code)}")

    async def _commit_offsets(self, request: Request) -> None:
        group = request.group
        assert group is not None
        topics: dict[str, list[dict[str, Any]]] = {}
        for partition, offset in request.offsets.items():
            topics.setdefault(partition.topic, []).append(
                {"partition_index": partition.partition, "committed_offset": offset, "committed_metadata": ""}
            )
        failpoint("producer.before_offsets")
        node_id = await self._client.coordinator(group.group_id, GROUP)
        await self._client.connection(node_id)  # A new one tells that the coordinator was away.
        if self._is_last_in_doubt:
            await self._finish_last()
        answer = await self._client.call(
            TXN_OFFSET_COMMIT,
            node_id,
            self._version(request, TXN_OFFSET_COMMIT),
            group_id=group.group_id,
            generation_id=group.generation_id,
            member_id=group.member_id,
            group_instance_id=group.group_instance_id,
            topics=[{"name": name, "partitions": items} for name, items in topics.items()],
            **self._who(request),
        )
        failpoint("producer.after_offsets")
        codes = {
            TopicPartition(topic.name, item.partition_index): int(item.error_code)
            for topic in answer.topics
            for item in topic.partitions
        }
        reaction = self._protocol.offsets_answered(request, codes)
        self._react(reaction, f"TxnOffsetCommit: errors {codes}", group=group.group_id)

    async def _end(self, request: Request) -> None:
        failpoint("producer.before_end")
        losses = self._client.losses
        answer = await self._call(request, END_TXN, committed=request.commit, **self._who(request))
        failpoint("producer.after_end")
        identity = Identity(getattr(answer, "producer_id", -1), getattr(answer, "producer_epoch", -1))
        reaction = self._protocol.end_answered(request, int(answer.error_code), identity)
        if reaction is Reaction.DONE:
            self._last, self._losses = (PreparedState(*request.identity), request.commit), losses
        self._react(reaction, f"EndTxn: error {int(answer.error_code)}")

    async def _describe(self, request: Request) -> None:
        """Find out why our epoch was refused; a coordinator that cannot tell leaves the general message."""
        self._describe_tries += 1
        try:
            answer = await self._call(
                request, DESCRIBE, transactional_ids=(self.transactional_id,), decode=decode_described
            )
            found: DescribedTransaction = answer[0]
        except (SemelError, IndexError) as error:
            if isinstance(error, (Retriable, OutcomeUnknown)) and self._describe_tries < _DESCRIBE_TRIES:
                raise
            self._protocol.diagnosed(request, None)
            return
        self._describe_tries = 0
        if found.error is not ErrorCode.NONE:
            self._protocol.diagnosed(request, None)
            return
        identity = Identity(found.producer_id, found.producer_epoch)
        self._protocol.diagnosed(request, TransactionView(identity, found.state, found.timeout_ms))
