"""The dual write of KIP-939, every interleaving: two overlapping owners, crashes, and copies of EndTxn that come late.

The coordinator is the real one; the database is a row with a state and a counter of owners (semantics 3.10). What must
never be: a transaction that one side has and the other has not, once it is decided on both.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from semel.coordinator.transaction import EPOCH_MAX, TransactionCoordinator, TransactionMetadata, TransactionState
from semel.errors import ErrorCode

from .drivers import ID, P0

Identity = tuple[int, int]
NONE: Identity = (-1, -1)


class Owner(NamedTuple):
    """One process: where it stands, its identity in Kafka, its number in the database, what it knows."""

    at: str = "off"
    identity: Identity = NONE
    number: int = 0
    ongoing: Identity = NONE
    remembered: Identity = NONE


class World(NamedTuple):
    kafka: TransactionMetadata
    owners: tuple[Owner, Owner]
    remembered: Identity
    number: int
    applied: frozenset[Identity]
    """Transactions whose database half is committed."""
    ended: frozenset[tuple[Identity, bool]]
    """Transactions of Kafka that are decided, and how."""
    late: frozenset[tuple[Identity, bool]]
    """EndTxn requests of which a copy may still arrive."""
    transactions: int
    crashes: int


class Recipe(NamedTuple):
    """What the recipe demands; each can be left out, to see that it is needed."""

    kafka_first: bool = True
    fenced_database: bool = True


TRANSACTIONS, CRASHES = 2, 2


def coordinator(world: World) -> TransactionCoordinator:
    """The real coordinator in this world's state."""
    given = max(world.kafka.producer_id, world.kafka.next_producer_id, world.kafka.previous_producer_id)
    made = TransactionCoordinator(new_producer_id=lambda: given + 1)
    made.restore(ID, world.kafka)
    return made


def end(world: World, identity: Identity, commit: bool) -> tuple[World, Identity | None]:
    """EndTxn arrives. The world after it, and the next identity, None when it was refused."""
    machine = coordinator(world)
    answer = machine.end_transaction(ID, *identity, commit, 0, 5)
    if answer.transition is not None:
        machine.complete(answer.transition)
        machine.complete(machine.finish(ID, 0))
        if world.kafka.state is TransactionState.ONGOING:
            assert not any(name == world.kafka.identity for name, _ in world.ended), "one name, two transactions"
            world = world._replace(ended=world.ended | {(world.kafka.identity, commit)})
    found = machine.get(ID)
    assert found is not None
    following = (answer.producer_id, answer.producer_epoch) if answer.error is ErrorCode.NONE else None
    return world._replace(kafka=found), following


def steps(world: World, recipe: Recipe) -> Iterator[World]:
    """Every world that one step leads to."""
    for identity, commit in world.late:
        yield end(world, identity, commit)[0]
    for index, owner in enumerate(world.owners):

        def become(after: World, owner: Owner, index: int = index) -> World:
            owners = list(after.owners)
            owners[index] = owner
            return after._replace(owners=(owners[0], owners[1]))

        yield from _steps_of(world, owner, recipe, become)
        if owner.at != "off" and world.crashes < CRASHES:
            yield become(world._replace(crashes=world.crashes + 1), Owner())


def _steps_of(world: World, owner: Owner, recipe: Recipe, become) -> Iterator[World]:
    match owner.at:
        case "off" if recipe.kafka_first or owner.number:
            machine = coordinator(world)
            answer = machine.init_producer_id(ID, 0, -1, -1, 0, 6, enable_two_phase=True, keep_prepared=True)
            assert answer.transition is not None
            mine = answer.producer_id, answer.producer_epoch
            after = world._replace(kafka=answer.transition)
            yield become(
                after,
                owner._replace(at="fence" if recipe.kafka_first else "recover", identity=mine, ongoing=answer.ongoing),
            )
        case "off" | "fence":
            number = world.number + 1
            yield become(
                world._replace(number=number),
                owner._replace(
                    at="recover" if recipe.kafka_first else "off", number=number, remembered=world.remembered
                ),
            )
        case "recover" if owner.ongoing == NONE:
            yield become(world, owner._replace(at="ready"))
        case "recover":
            yield from _end(world, owner, owner.remembered == owner.ongoing, become)
        case "ready" if world.transactions < TRANSACTIONS:
            machine = coordinator(world)
            added = machine.add_partitions(ID, *owner.identity, [P0], 0, api_version=12, implicit=True)
            if added.error is not ErrorCode.NONE:
                yield become(world, owner._replace(at="fenced"))
                return
            assert added.transition is not None
            after = world._replace(kafka=added.transition, transactions=world.transactions + 1)
            yield become(after, owner._replace(at="prepared"))
        case "prepared":
            if recipe.fenced_database and world.number != owner.number:
                yield become(world, owner._replace(at="fenced"))
            else:
                after = world._replace(remembered=owner.identity, applied=world.applied | {owner.identity})
                yield become(after, owner._replace(at="decided"))
        case "decided":
            yield from _end(world, owner, True, become)


def _end(world: World, owner: Owner, commit: bool, become) -> Iterator[World]:
    """EndTxn is sent; a copy may come late, also when its sender is dead by then."""
    sent = world._replace(late=world.late | {(owner.identity, commit)})
    after, following = end(sent, owner.identity, commit)
    yield become(
        after, owner._replace(at="fenced") if following is None else owner._replace(at="ready", identity=following)
    )
    yield become(sent, Owner("lost"))


def torn(world: World) -> bool:
    """Whether a transaction is on one side only, for good."""
    for name, commit in world.ended:
        if commit and name not in world.applied:
            return True
        # An abort tears only if the database has it or can still get it: "has it" is seen when it gets it.
        if not commit and name in world.applied:
            return True
    return False


def explore(recipe: Recipe, first_epoch: int) -> tuple[int, World | None]:
    """How many worlds there are, and a torn one if there is any."""
    kafka = TransactionMetadata(ID, 7, first_epoch)
    first = World(kafka, (Owner(), Owner()), NONE, 0, frozenset(), frozenset(), frozenset(), 0, 0)
    seen = {first}
    queue = deque([first])
    while queue:
        for world in steps(queue.popleft(), recipe):
            if world in seen:
                continue
            if torn(world):
                return len(seen), world
            seen.add(world)
            queue.append(world)
    return len(seen), None


@pytest.mark.parametrize("first_epoch", [EPOCH_MAX - 2])  # The producer id rotates on the way.
def test_nothing_is_ever_torn(first_epoch: int) -> None:
    worlds, found = explore(Recipe(), first_epoch)
    print(f"{worlds} worlds")
    assert found is None, found
    assert worlds > 10_000


@pytest.mark.parametrize("recipe", [Recipe(kafka_first=False), Recipe(fenced_database=False)])
def test_both_demands_of_the_recipe_are_needed(recipe: Recipe) -> None:
    """The database before Kafka, or no fence in the database: two owners tear a transaction."""
    _, found = explore(recipe, 0)
    assert found is not None
