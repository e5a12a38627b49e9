"""The dual write with a store that has nothing but unique inserts, every interleaving.

A document store without transactions over several documents, where an update compares and writes in two steps (FerretDB
1.24), has one thing that is atomic: the insert of a document whose `_id` must not be there yet. So

- a slot is a log: entries are inserted at its next position. A claim is an entry, and an owner who finds an entry of
  somebody else at its next position is fenced;
- a transaction is one new document. Before it is inserted, the slot's log says which one it will be (the intent);
- who takes over inserts its claim, reads the last intent before it, and inserts a *fence* in the intended document's
  place. Where that works, the document can never come; where something is there already, it tells whether it is it;
- intents before the last one are deleted, claims never: a place that is free again must not be one where somebody
  else's next entry would have to go.

The coordinator is the real one. Two overlapping owners, crashes, and copies of every insert and of EndTxn that come
late.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from semel.coordinator.transaction import TransactionCoordinator, TransactionMetadata, TransactionState
from semel.errors import ErrorCode

from .drivers import ID, P0

Identity = tuple[int, int]
NONE: Identity = (-1, -1)
FENCE = "fence"
Entry = tuple[str, object]
"""("claim", who) or ("intent", the Kafka transaction). Its document has the same name in this model."""


class Owner(NamedTuple):
    at: str = "off"
    identity: Identity = NONE
    ongoing: Identity = NONE
    position: int = 0
    """Where its next entry goes."""
    decided: Identity = NONE


class World(NamedTuple):
    kafka: TransactionMetadata
    owners: tuple[Owner, Owner]
    log: frozenset[tuple[int, Entry]] = frozenset()
    documents: frozenset[tuple[Identity, object]] = frozenset()
    ended: frozenset[tuple[Identity, bool]] = frozenset()
    late: frozenset[tuple[str, object, object]] = frozenset()
    """Copies that may still arrive: ("end", identity, commit), ("log", position, entry), ("document", name, what)."""
    claims: int = 0
    transactions: int = 0
    crashes: int = 0


class Recipe(NamedTuple):
    """What the recipe demands; each can be left out, to see that it is needed."""

    kafka_first: bool = True
    intent_first: bool = True
    fence_document: bool = True
    unique_inserts: bool = True
    keep_claims: bool = True


Become = Callable[[World, Owner], World]


def end(world: World, identity: Identity, commit: bool) -> tuple[World, Identity | None]:
    """EndTxn arrives. The world after it, and the next identity, None when it was refused."""
    given = max(world.kafka.producer_id, world.kafka.next_producer_id, world.kafka.previous_producer_id)
    machine = TransactionCoordinator(new_producer_id=lambda: given + 1)
    machine.restore(ID, world.kafka)
    answer = machine.end_transaction(ID, *identity, commit, 0, 5)
    if answer.transition is not None:
        machine.complete(answer.transition)
        machine.complete(machine.finish(ID, 0))
        if world.kafka.state is TransactionState.ONGOING:
            world = world._replace(ended=world.ended | {(world.kafka.identity, commit)})
    found = machine.get(ID)
    assert found is not None
    following = (answer.producer_id, answer.producer_epoch) if answer.error is ErrorCode.NONE else None
    return world._replace(kafka=found), following


def insert(world: World, where: str, name: object, what: object, recipe: Recipe) -> tuple[World, object]:
    """The insert arrives: the world after it, and what is there now."""
    place = world.log if where == "log" else world.documents
    there = next((found for at, found in place if at == name), None)
    if there is None or not recipe.unique_inserts:
        place = frozenset(item for item in place if item[0] != name) | {(name, what)}
        there = what
    return world._replace(**{"log" if where == "log" else "documents": place}), there


def steps(world: World, recipe: Recipe) -> Iterator[World]:
    for kind, name, what in world.late:
        if kind == "end":
            yield end(world, name, what)[0]  # type: ignore[arg-type]
        else:
            yield insert(world, kind, name, what, recipe)[0]
    for index, owner in enumerate(world.owners):

        def become(after: World, owner: Owner, index: int = index) -> World:
            owners = list(after.owners)
            owners[index] = owner
            return after._replace(owners=(owners[0], owners[1]))

        yield from _steps_of(index, world, owner, recipe, become)
        if owner.at != "off" and world.crashes < 2:
            yield become(world._replace(crashes=world.crashes + 1), Owner())


def _sent(world: World, kind: str, name: object, what: object) -> World:
    """Whatever is sent may arrive a second time, late."""
    return world._replace(late=world.late | {(kind, name, what)})


def _steps_of(index: int, world: World, owner: Owner, recipe: Recipe, become: Become) -> Iterator[World]:
    match owner.at:
        case "off" if recipe.kafka_first or owner.position:
            given = max(world.kafka.producer_id, world.kafka.next_producer_id, world.kafka.previous_producer_id)
            machine = TransactionCoordinator(new_producer_id=lambda: given + 1)
            machine.restore(ID, world.kafka)
            answer = machine.init_producer_id(ID, 0, -1, -1, 0, 6, enable_two_phase=True, keep_prepared=True)
            mine = answer.producer_id, answer.producer_epoch
            assert answer.transition is not None
            at = "look" if recipe.kafka_first else "recover"
            yield become(
                world._replace(kafka=answer.transition), owner._replace(at=at, identity=mine, ongoing=answer.ongoing)
            )
        case "off" | "look":
            head = max((position for position, _ in world.log), default=0)
            yield become(world, owner._replace(at="claim", position=head + 1))
        case "claim":
            entry: Entry = ("claim", (index, world.claims))
            after = _sent(world._replace(claims=world.claims + 1), "log", owner.position, entry)
            after, there = insert(after, "log", owner.position, entry, recipe)
            if there == entry:
                yield become(after, owner._replace(at="fence"))
            else:
                yield become(world, owner._replace(at="look"))
        case "fence":
            intents = [(position, entry[1]) for position, entry in world.log if entry[0] == "intent"]
            before = [item for item in intents if item[0] < owner.position]
            decided, after = NONE, world
            if before:
                name = max(before)[1]
                there = next((what for at, what in world.documents if at == name), None)
                if recipe.fence_document:
                    after, there = insert(_sent(world, "document", name, FENCE), "document", name, FENCE, recipe)
                decided = name if there == "effect" else NONE  # type: ignore[assignment]
            at = "recover" if recipe.kafka_first else "off"
            yield become(after, owner._replace(at=at, position=owner.position + 1, decided=decided))
        case "recover" if owner.ongoing == NONE:
            yield become(world, owner._replace(at="ready"))
        case "recover":
            yield from _end(world, owner, owner.decided == owner.ongoing, become)
        case "ready" if world.transactions < 2:
            given = max(world.kafka.producer_id, world.kafka.next_producer_id, world.kafka.previous_producer_id)
            machine = TransactionCoordinator(new_producer_id=lambda: given + 1)
            machine.restore(ID, world.kafka)
            added = machine.add_partitions(ID, *owner.identity, [P0], 0, api_version=12, implicit=True)
            if added.error is not ErrorCode.NONE:
                yield become(world, owner._replace(at="fenced"))
                return
            assert added.transition is not None
            after = world._replace(kafka=added.transition, transactions=world.transactions + 1)
            yield become(after, owner._replace(at="intend" if recipe.intent_first else "effect"))
        case "intend":
            entry = ("intent", owner.identity)
            after = _sent(world, "log", owner.position, entry)
            after, there = insert(after, "log", owner.position, entry, recipe)
            if there != entry:
                yield become(world, owner._replace(at="fenced"))
            else:
                at = "effect" if recipe.intent_first else "decided"
                done = owner._replace(at=at, position=owner.position + 1)
                yield become(after, done)
                kinds = ("intent",) if recipe.keep_claims else ("intent", "claim")
                old = {item for item in after.log if item[1][0] in kinds and item[0] < owner.position}
                if old:
                    yield become(after._replace(log=after.log - old), done)
        case "effect":
            after = _sent(world, "document", owner.identity, "effect")
            after, there = insert(after, "document", owner.identity, "effect", recipe)
            if there != "effect":
                yield from _end(world, owner, False, become)
            else:
                yield become(after, owner._replace(at="decided" if recipe.intent_first else "intend"))
        case "decided":
            yield from _end(world, owner, True, become)


def _end(world: World, owner: Owner, commit: bool, become: Become) -> Iterator[World]:
    after, following = end(_sent(world, "end", owner.identity, commit), owner.identity, commit)
    if following is None:
        yield become(after, owner._replace(at="fenced"))
    else:
        yield become(after, owner._replace(at="ready", identity=following))


def torn(world: World) -> bool:
    """Whether a transaction is on one side only, for good: an abort, and the document is there, is for good, too."""
    there = {name for name, what in world.documents if what == "effect"}
    return any(commit != (name in there) for name, commit in world.ended)


def explore(recipe: Recipe, limit: int) -> tuple[int, World | None]:
    """How many worlds there are, `limit` at most, and a torn one if there is any."""
    first = World(TransactionMetadata(ID, 7, 0), (Owner(), Owner()))
    seen, queue = {first}, deque([first])
    while queue and len(seen) < limit:
        for world in steps(queue.popleft(), recipe):
            if world not in seen:
                if torn(world):
                    return len(seen), world
                seen.add(world)
                queue.append(world)
    return len(seen), None


@pytest.mark.soak
def test_nothing_is_ever_torn() -> None:
    worlds, found = explore(Recipe(), 1_000_000)
    print(f"{worlds} worlds")
    assert found is None, found
    assert 100_000 < worlds < 1_000_000, "not all of them were looked at"


def test_nothing_is_torn_in_the_first_worlds() -> None:
    assert explore(Recipe(), 20_000)[1] is None


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(kafka_first=False),
        Recipe(intent_first=False),
        Recipe(fence_document=False),
        Recipe(unique_inserts=False),
        Recipe(keep_claims=False),
    ],
)
def test_every_demand_of_the_recipe_is_needed(recipe: Recipe) -> None:
    worlds, found = explore(recipe, 400_000)
    print(f"{worlds} worlds")
    assert found is not None
