"""Consumer groups whose members crash, pause, leave, lose answers and restart at random, and so does the coordinator.

At no moment do two members hold one partition, as far as each was told and has not given it up. When the faults stop
everything is assigned, evenly, and one more member moves only what it gets.
"""

from __future__ import annotations

import random

import pytest

from semel.coordinator.assignors import Part
from semel.coordinator.heartbeat import HeartbeatAnswer
from semel.errors import ErrorCode

from .consumers import REVOKE_MS, SESSION_MS, Consumers

E = ErrorCode
STEP_MS = 1_000


class Client:
    """A member as the clients do it: it holds what it was assigned until it has confirmed that it let go."""

    def __init__(self, groups: Consumers, member_id: str, instance: str | None, pattern: str | None) -> None:
        self.groups = groups
        self.member_id, self.instance, self.pattern = member_id, instance, pattern
        self.epoch = 0
        self.held: set[Part] = set()
        self.wanted: set[Part] | None = None
        self.is_new = True
        """Whether it has something to say: a full request, after a start or a lost answer."""
        self.paused_until = 0
        self.heard_ms = groups.now

    def step(self, rng: random.Random, *, answer_is_lost: bool = False) -> None:
        groups = self.groups
        if groups.now < self.paused_until:
            return
        if groups.now - self.heard_ms >= SESSION_MS:
            self.begin_again()  # Nobody answers: its partitions may be another one's by now.
        if self.wanted is not None and rng.random() < 0.7:
            self.held = self.wanted
        answer = self.ask()
        if answer_is_lost:
            self.is_new = True
            return
        self.heard_ms = groups.now
        if answer.error in (E.UNKNOWN_MEMBER_ID, E.FENCED_MEMBER_EPOCH, E.GROUP_ID_NOT_FOUND):
            self.begin_again()
        elif answer.error is E.UNRELEASED_INSTANCE_ID:
            self.begin_again()  # Its predecessor did not say goodbye: its session has to end.
        else:
            assert answer.error is E.NONE, answer
            self.is_new = False
            self.epoch = answer.member_epoch
            if answer.assignment is not None:
                self.wanted = set(answer.assignment)

    def ask(self) -> HeartbeatAnswer:
        if self.epoch == 0:
            wants = {"pattern": self.pattern, "topics": None} if self.pattern else {"topics": ("t", "u")}
            return self.groups.join(self.member_id, instance=self.instance, **wants)
        full = {"rebalance": REVOKE_MS, "pattern": self.pattern, "topics": None if self.pattern else ("t", "u")}
        return self.groups.heartbeat(
            self.member_id,
            self.epoch,
            instance=self.instance,
            owned=frozenset(self.held),
            **(full if self.is_new else {}),  # type: ignore[arg-type]
        )

    def begin_again(self) -> None:
        self.epoch, self.held, self.wanted, self.is_new = 0, set(), None, True
        self.heard_ms = self.groups.now


class Simulation:
    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.groups = Consumers(t=5, u=3)
        self.clients: list[Client] = []
        self.started = 0

    def start_client(self) -> None:
        self.started += 1
        taken = {client.instance for client in self.clients}
        instance = self.rng.choice([None, None, *({"one", "two"} - taken)])
        pattern = self.rng.choice([None, "t|u"])
        self.clients.append(Client(self.groups, f"m{self.started}", instance, pattern))

    def fault(self) -> None:
        kinds = ["start", "start", "crash", "leave", "away", "pause", "restart", "checkpoint", "grow"]
        kind = self.rng.choice(kinds)
        if kind == "start" and len(self.clients) < 6:
            self.start_client()
        elif kind == "restart":
            self.groups.restart()
        elif kind == "checkpoint":
            self.groups.checkpoint()
        elif kind == "grow":
            name = self.rng.choice("tu")
            shape = self.groups.catalog.shape(name)
            assert shape is not None
            if shape.partitions < 9:
                self.groups.catalog.put(name, shape.partitions + 1)
        elif self.clients:
            client = self.rng.choice(self.clients)
            if kind == "pause":
                client.paused_until = self.groups.now + self.rng.randrange(2 * SESSION_MS)
            elif kind in ("crash", "leave", "away"):
                self.clients.remove(client)
                if client.epoch > 0 and kind != "crash":
                    epoch = -2 if kind == "away" and client.instance else -1
                    self.groups.heartbeat(client.member_id, epoch, instance=client.instance)

    def step(self, *, faults: bool) -> None:
        self.groups.sleep(STEP_MS)
        self.rng.shuffle(self.clients)
        for client in self.clients:
            client.step(self.rng, answer_is_lost=faults and self.rng.random() < 0.1)
            self.nobody_shares_a_partition()

    def nobody_shares_a_partition(self) -> None:
        """A member that is paused longer than its session is out, knows it when it wakes up, and cannot commit."""
        owners: dict[Part, str] = {}
        for client in self.clients:
            known = "g" in self.groups.coordinator.consumers.groups and self.groups.group.members.get(client.member_id)
            if not known or client.epoch not in (known.current.epoch, known.current.previous_epoch):
                continue
            for part in client.held:
                other = owners.setdefault(part, client.member_id)
                assert other == client.member_id, f"{other} and {client.member_id} both hold {part}"

    def heal(self, seconds: int) -> None:
        for _ in range(seconds * 1000 // STEP_MS):
            self.step(faults=False)

    def check_assigned(self) -> None:
        catalog = self.groups.catalog
        held = [part for client in self.clients for part in client.held]
        assert sorted(held) == sorted([*catalog.parts("t"), *catalog.parts("u")])
        sizes = [len(client.held) for client in self.clients]
        assert max(sizes) - min(sizes) <= 1, sizes
        assert self.groups.group.state == "Stable"
        assert set(self.groups.group.members) == {client.member_id for client in self.clients}


@pytest.mark.parametrize("seed", range(60))
def test_a_group_heals(seed: int):
    simulation = Simulation(seed)
    simulation.start_client()
    for _ in range(200):
        if simulation.rng.random() < 0.2:
            simulation.fault()
        simulation.step(faults=True)
    if not simulation.clients:
        simulation.start_client()
    simulation.heal(3 * SESSION_MS // 1000 + REVOKE_MS // 1000)
    simulation.check_assigned()

    before = {client.member_id: set(client.held) for client in simulation.clients}
    simulation.start_client()
    simulation.clients[-1].instance = None
    newcomer = simulation.clients[-1].member_id
    simulation.heal(30)
    simulation.check_assigned()
    after = {client.member_id: client.held for client in simulation.clients}
    moved = {part for member_id, held in before.items() for part in held - after[member_id]}
    assert moved == after[newcomer], "a member joined, and more moved than what it got"
    simulation.groups.restart()
    simulation.heal(5)
    assert {client.member_id: client.held for client in simulation.clients} == after
