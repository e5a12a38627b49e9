"""A group of simulated clients that crash, pause, leave and restart at random, with a coordinator that restarts too.

Whatever happened: when the faults stop the group becomes stable with exactly the living members, and at no moment do
two members hold one partition in the same generation.
"""

from __future__ import annotations

import random

import pytest

from semel.errors import ErrorCode

from .drivers import Groups

E = ErrorCode
PARTITIONS = 8
STEP_MS = 250


class Client:
    """A consumer as the clients do it: join, sync, heartbeat, and again from the start when told so."""

    def __init__(self, groups: Groups, name: str, instance: str | None) -> None:
        self.groups = groups
        self.name, self.instance = name, instance
        self.member_id, self.generation = "", -1
        self.join_token = self.sync_token = -1
        self.assigned: set[int] = set()
        self.paused_until = self.next_heartbeat = 0
        self.is_fenced = False

    def join(self) -> None:
        self.assigned, self.sync_token = set(), -1
        self.join_token = self.groups.join(
            self.member_id, client=self.name, instance=self.instance, session=6_000, rebalance=20_000
        )

    def begin_again(self) -> None:
        self.member_id, self.generation = "", -1
        self.join()

    def step(self) -> None:
        if self.groups.now < self.paused_until or self.is_fenced:
            return
        if self.join_token >= 0:
            self._on_joined()
        elif self.sync_token >= 0:
            self._on_synced()
        elif self.generation < 0:
            self.begin_again()
        elif self.groups.now >= self.next_heartbeat:
            self.next_heartbeat = self.groups.now + 1_000
            self._on_error(self.groups.heartbeat(self.member_id, self.generation, self.instance))

    def _on_joined(self) -> None:
        if self.groups.is_waiting(self.join_token):
            return
        answer = self.groups.joined(self.join_token)
        self.join_token = -1
        if answer.error is E.MEMBER_ID_REQUIRED:
            self.member_id = answer.member_id
            self.join()
        elif answer.error is E.NONE:
            self.member_id, self.generation = answer.member_id, answer.generation_id
            shares = {}
            for number, member in enumerate(answer.members):
                shares[member.member_id] = bytes(range(number, PARTITIONS, len(answer.members)))
            options = {} if self.instance is None else {"instance": self.instance}
            self.sync_token = self.groups.sync(self.member_id, self.generation, shares, **options)
        else:
            self._on_error(answer.error)

    def _on_synced(self) -> None:
        if self.groups.is_waiting(self.sync_token):
            return
        answer = self.groups.synced(self.sync_token)
        self.sync_token = -1
        if answer.error is E.NONE:
            self.assigned = set(answer.assignment)
        self._on_error(answer.error)

    def _on_error(self, error: ErrorCode) -> None:
        if error is E.REBALANCE_IN_PROGRESS:
            self.join()
        elif error in (E.UNKNOWN_MEMBER_ID, E.ILLEGAL_GENERATION):
            self.begin_again()
        elif error is E.FENCED_INSTANCE_ID:
            self.is_fenced, self.assigned = True, set()
        else:
            assert error is E.NONE, error

    def lose_connection(self, reported: bool) -> None:
        """The answer to what was asked will never arrive; a client asks again with what it knows."""
        for token in (self.join_token, self.sync_token):
            if token >= 0 and reported:
                self.groups.coordinator.abandon(token, self.groups.now)
        if self.join_token >= 0 or self.sync_token >= 0:
            self.join_token = self.sync_token = -1
            self.join()


class Simulation:
    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.groups = Groups()
        self.clients: list[Client] = []
        self.started = 0

    def start_client(self) -> None:
        self.started += 1
        instance = self.rng.choice([None, None, "one", "two"])
        self.clients.append(Client(self.groups, f"c{self.started}", instance))

    def fault(self) -> None:
        kind = self.rng.choice(["start", "start", "crash", "leave", "pause", "connection", "restart"])
        if kind == "start" and len(self.clients) < 6:
            self.start_client()
        elif kind == "restart":
            self.groups.restart()
            for client in self.clients:
                client.lose_connection(reported=False)
        elif self.clients:
            client = self.rng.choice(self.clients)
            if kind == "pause":
                client.paused_until = self.groups.now + self.rng.randrange(10_000)
            elif kind == "connection":
                client.lose_connection(reported=self.rng.random() < 0.5)
            elif kind in ("crash", "leave"):
                self.clients.remove(client)
                if kind == "leave" and client.member_id:
                    self.groups.leave(client.member_id, client.instance)

    def step(self) -> None:
        self.groups.sleep(STEP_MS)
        self.rng.shuffle(self.clients)
        for client in list(self.clients):
            client.step()
        self.clients = [client for client in self.clients if not client.is_fenced]
        self.nobody_shares_a_partition()

    def nobody_shares_a_partition(self) -> None:
        """A static member's successor has its partitions at once; the old one hears of it with its next request."""
        held: dict[tuple[int, int], str] = {}
        for client in self.clients:
            place = client.instance or client.name
            for partition in client.assigned:
                other = held.setdefault((client.generation, partition), place)
                assert other == place, f"{other} and {place} both hold {partition}"


@pytest.mark.parametrize("seed", range(100))
def test_a_group_heals(seed: int):
    simulation = Simulation(seed)
    simulation.start_client()
    for _ in range(300):
        if simulation.rng.random() < 0.15:
            simulation.fault()
        simulation.step()
    if not simulation.clients:
        simulation.start_client()
    for _ in range(90_000 // STEP_MS):
        simulation.step()

    clients, groups = simulation.clients, simulation.groups
    assert clients
    described = groups.coordinator.describe("g")
    assert described.state == "Stable"
    assert {member.member_id for member in described.members} == {client.member_id for client in clients}
    assert {client.generation for client in clients} == {described.generation_id}
    assert sorted(partition for client in clients for partition in client.assigned) == list(range(PARTITIONS))
    groups.restart()
    for client in clients:
        assert groups.heartbeat(client.member_id, client.generation, client.instance) is E.NONE
