"""What a broker's shell does around the coordinators, without a log: for tests."""

from __future__ import annotations

from itertools import count

from semel.coordinator.group import (
    GroupConfig,
    GroupCoordinator,
    JoinAnswer,
    JoinRequest,
    LeavingMember,
    OffsetCommit,
    SyncAnswer,
)
from semel.coordinator.group_log import LogRecord
from semel.coordinator.transaction import Answer, TransactionCoordinator, TransactionMetadata
from semel.coordinator.transaction_log import decode_transaction, decode_transactional_id, encode_transaction
from semel.errors import ErrorCode
from semel.types import GroupMetadata, TopicPartition

ID = "shop.reserve.a.0"
P0, P1 = TopicPartition("orders", 0), TopicPartition("orders", 1)


class Transactions:
    """One transactional id after the other; every transition is logged and can be replayed."""

    def __init__(self, version: int = 2, first_producer_id: int = 1000, *, two_phase_commit: bool = True) -> None:
        self.version = version
        self.two_phase_commit = two_phase_commit
        self.ids = count(first_producer_id)
        self.log: list[tuple[bytes, bytes | None]] = []
        self.now = 1_000
        self.coordinator = self._coordinator()

    def _coordinator(self) -> TransactionCoordinator:
        return TransactionCoordinator(
            new_producer_id=lambda: next(self.ids),
            transaction_version=self.version,
            two_phase_commit=self.two_phase_commit,
        )

    def restart(self) -> None:
        """Forget everything that is not in the log."""
        self.coordinator = self._coordinator()
        for key, value in self.log:
            self.coordinator.restore(decode_transactional_id(key), decode_transaction(key, value))

    def log_it(self, transition: TransactionMetadata | None) -> None:
        if transition is not None:
            self.log.append(encode_transaction(transition))
            self.coordinator.complete(transition)

    def place(self, metadata: TransactionMetadata) -> None:
        """Start from this value instead of the steps that lead to it."""
        self.log.append(encode_transaction(metadata))
        self.coordinator.restore(metadata.transactional_id, metadata)

    @property
    def current(self) -> TransactionMetadata:
        found = self.coordinator.get(ID)
        assert found is not None
        return found

    def init(
        self,
        producer_id: int = -1,
        epoch: int = -1,
        version: int = 6,
        timeout_ms: int = 60_000,
        *,
        two_phase: bool = False,
        keep: bool = False,
    ) -> Answer:
        answer = self.coordinator.init_producer_id(
            *(ID, timeout_ms, producer_id, epoch, self.now, version), enable_two_phase=two_phase, keep_prepared=keep
        )
        self.log_it(answer.transition)
        return answer

    def add(self, producer_id: int, epoch: int, *partitions: TopicPartition, implicit: bool | None = None) -> Answer:
        implicit = self.version >= 2 if implicit is None else implicit
        answer = self.coordinator.add_partitions(
            ID, producer_id, epoch, partitions or (P0,), self.now, api_version=12 if implicit else 3, implicit=implicit
        )
        self.log_it(answer.transition)
        return answer

    def decide(self, producer_id: int, epoch: int, commit: bool, version: int | None = None) -> Answer:
        """EndTxn up to PrepareX; the markers are still to be written."""
        version = (5 if self.version >= 2 else 4) if version is None else version
        answer = self.coordinator.end_transaction(ID, producer_id, epoch, commit, self.now, version)
        self.log_it(answer.transition)
        return answer

    def finish(self) -> None:
        for prepared in self.coordinator.unfinished():
            self.log_it(self.coordinator.finish(prepared.transactional_id, self.now))

    def end(self, producer_id: int, epoch: int, commit: bool, version: int | None = None) -> Answer:
        answer = self.decide(producer_id, epoch, commit, version)
        self.finish()
        return answer

    def produce(self, producer_id: int, epoch: int, partition: TopicPartition = P0, version: int = 12) -> ErrorCode:
        return self.coordinator.check_produce(ID, producer_id, epoch, partition, version)

    def time_out(self) -> Answer:
        answer = self.coordinator.time_out(ID, self.now)
        self.log_it(answer.transition)
        return answer


RANGE = (("range", b"range-subscription"),)


class Groups:
    """A group coordinator with its log; answers are kept by token."""

    def __init__(self, config: GroupConfig | None = None) -> None:
        self.config = config
        self.ids = count(1)
        self.log: list[LogRecord] = []
        self.answers: dict[int, JoinAnswer | SyncAnswer] = {}
        self.now = 0
        self.coordinator = self._coordinator()

    def _coordinator(self) -> GroupCoordinator:
        return GroupCoordinator(new_member_id=lambda prefix: f"{prefix}-{next(self.ids)}", config=self.config)

    def restart(self) -> None:
        self.coordinator = self._coordinator()
        self.answers.clear()
        for key, value in self.log:
            self.coordinator.replay(key, value, self.now)
        self.coordinator.resume(self.now)

    def settle(self) -> None:
        self.log += self.coordinator.take_records()
        self.answers.update(self.coordinator.drain())

    def sleep(self, ms: int) -> None:
        """Time passes; whatever is due on the way happens when it is due."""
        end = self.now + ms
        while True:
            deadline = self.coordinator.next_deadline()
            if deadline is None or deadline > end:
                break
            self.now = max(self.now, deadline)
            self.coordinator.tick(self.now)
            self.settle()
        self.now = end

    def join(
        self,
        member_id: str = "",
        *,
        group: str = "g",
        instance: str | None = None,
        protocols: tuple[tuple[str, bytes], ...] = RANGE,
        version: int = 5,
        client: str = "c",
        session: int = 6_000,
        rebalance: int = 60_000,
        protocol_type: str = "consumer",
    ) -> int:
        request = JoinRequest(
            group, member_id, instance, client, "/127.0.0.1", protocol_type, protocols, session, rebalance, version
        )
        token = self.coordinator.join(request, self.now)
        self.settle()
        return token

    def enter(self, *, client: str = "c", **options: object) -> tuple[str, int]:
        """JoinGroup in two steps: the id first, then the join. Returns the id and the waiting token."""
        token = self.join(client=client, **options)  # type: ignore[arg-type]
        answer = self.joined(token)
        assert answer.error is ErrorCode.MEMBER_ID_REQUIRED
        return answer.member_id, self.join(answer.member_id, client=client, **options)  # type: ignore[arg-type]

    def sync(self, member_id: str, generation: int, assignments: dict[str, bytes] | None = None, **options: str) -> int:
        identity = GroupMetadata("g", generation, member_id, options.pop("instance", None))
        token = self.coordinator.sync(identity, assignments or {}, self.now, **options)
        self.settle()
        return token

    def is_waiting(self, token: int) -> bool:
        return token not in self.answers

    def joined(self, token: int) -> JoinAnswer:
        answer = self.answers[token]
        assert isinstance(answer, JoinAnswer)
        return answer

    def synced(self, token: int) -> SyncAnswer:
        answer = self.answers[token]
        assert isinstance(answer, SyncAnswer)
        return answer

    def heartbeat(self, member_id: str, generation: int, instance: str | None = None) -> ErrorCode:
        return self.coordinator.heartbeat(GroupMetadata("g", generation, member_id, instance), self.now)

    def leave(self, member_id: str, instance: str | None = None) -> ErrorCode:
        (error,) = self.coordinator.leave("g", [LeavingMember(member_id, instance)], self.now)
        self.settle()
        return error

    def stable(self, count_: int = 1, **options: object) -> list[str]:
        """A stable group of this many dynamic members; the first leads. Its generation is in `generation`."""
        members: dict[str, int] = {}
        for _ in range(count_):
            member_id, token = self.enter(**options)
            members[member_id] = token
            for other in members:
                if self.is_waiting(members[member_id]) and other != member_id:
                    members[other] = self.join(other, **options)  # type: ignore[arg-type]
        self.balance(members)
        return list(members)

    def balance(self, members: dict[str, int]) -> None:
        """All joined: every member syncs, the leader last, with its own name as each member's assignment."""
        answers = {member_id: self.joined(token) for member_id, token in members.items()}
        leader = next(iter(answers.values())).leader
        tokens = {}
        for member_id in sorted(answers, key=lambda item: item == leader):
            assignments = {item.member_id: item.member_id.encode() for item in answers[member_id].members}
            tokens[member_id] = self.sync(member_id, answers[member_id].generation_id, assignments)
        for member_id, token in tokens.items():
            assert self.synced(token).assignment == member_id.encode()

    @property
    def generation(self) -> int:
        return self.coordinator.describe("g").generation_id

    @property
    def state(self) -> str:
        return self.coordinator.describe("g").state

    def commit(
        self, offset: int, *, generation: int = -1, member: str = "", instance: str | None = None, version: int = 8
    ) -> ErrorCode:
        write = self.coordinator.commit_offsets(
            GroupMetadata("g", generation, member, instance), {P0: OffsetCommit(offset)}, self.now, version
        )
        self.write(write.records)
        return write.errors[P0]

    def commit_in(
        self,
        producer_id: int,
        offset: int,
        *,
        generation: int = -1,
        member: str = "",
        instance: str | None = None,
    ) -> ErrorCode:
        write = self.coordinator.commit_transactional_offsets(
            GroupMetadata("g", generation, member, instance), producer_id, {P0: OffsetCommit(offset)}, self.now
        )
        self.write(write.records)
        return write.errors[P0]

    def end_transaction(self, producer_id: int, commit: bool) -> None:
        self.write(self.coordinator.end_transaction(producer_id, commit))

    def write(self, records: list[LogRecord]) -> None:
        self.log += records
        self.coordinator.apply(records)

    def fetch(self, *, stable: bool = True) -> tuple[ErrorCode, int]:
        found = self.coordinator.fetch_offsets("g", [P0], require_stable=stable)[P0]
        return found.error, found.offset
