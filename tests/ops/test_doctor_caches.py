"""The doctor knows slots in a Valkey as it knows those in a database."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from semel import App
from semel.client.admin import Admin, TopicSpec
from semel.client.cluster import KafkaClient
from semel.client.producer import TransactionalProducer
from semel.dualwrite.target import Guard
from semel.dualwrite.valkey.session import ValkeySession, Work
from semel.dualwrite.valkey.store import ValkeyStore
from semel.ops.databases import migrate_app
from semel.ops.doctor import Asked, decide, explain, list_all
from semel.settings import Settings
from tests.client.test_brokers import records
from tests.conftest import Address
from tests.dualwrite.world import CacheWorld
from tests.services.valkey import ValkeyServer

pytestmark = pytest.mark.valkey
DEAD = "host=elsewhere/boot/ns pid=1 started=1 6f1f"


class Ward:
    """An app with a cache, and a slot whose owner has prepared a transaction and is seen no more."""

    def __init__(self, world: CacheWorld) -> None:
        self.world, self.app = world, App(world.name)
        self.app.cache(world.url, dual_write=True)
        self.settings = Settings(kafka=world.bootstrap, data=Path("unused"))
        migrate_app(self.app, print_only=False)

    async def left(self, client: KafkaClient, *, decided: bool) -> str:
        store = ValkeyStore(self.world.url, self.world.name, "cache")
        store.open(self.world.name, client.cluster_id, create_tables=False)
        slot = store.add(DEAD).slot
        epoch = store.claim(slot, DEAD).owner_epoch
        producer = TransactionalProducer(client, slot, two_phase_commit=True)
        await producer.init_transactions()
        producer.begin()
        await producer.produce(self.world.topic, 0, records("paid"))
        name = str(await producer.prepare())
        if decided:
            session = ValkeySession(self.world.url)
            session.begin()
            session.commit(Work([(b"SET", b"paid", b"1")]), Guard(slot, epoch, DEAD, name))
            session.close()
        store.close()
        return slot


def run(world: CacheWorld, work: Callable[[Ward, KafkaClient], Awaitable[None]]) -> None:
    ward = Ward(world)

    async def whole() -> None:
        async with KafkaClient(world.bootstrap) as client:
            await client.refresh_metadata(world.topic)
            await work(ward, client)

    asyncio.run(whole())


@pytest.fixture
def world(valkey: ValkeyServer, embedded: Address) -> CacheWorld:
    return CacheWorld(valkey.new_database(), embedded.bootstrap)


def test_what_the_cache_decided_is_committed_and_what_it_did_not_is_aborted(world: CacheWorld) -> None:
    async def work(ward: Ward, client: KafkaClient) -> None:
        await Admin(client).create_topics({f"{world.name}.semel.audit": TopicSpec(1)})
        for decided, right in ((True, "commit"), (False, "abort")):
            slot = await ward.left(client, decided=decided)
            found = await explain(ward.settings, ward.app, (), slot)
            assert (found["decision"], found["database"]) == (right, "cache")
            assert slot in {row["id"] for row in await list_all(ward.settings, ward.app, (world.url,))}
            asked = Asked(right, "ticket 7", yes=True)  # type: ignore[arg-type]
            outcome = str((await decide(ward.settings, ward.app, (), slot, asked))["outcome"])
            assert outcome.endswith("is committed" if decided else "is aborted")
        assert world.owners() == []

    run(world, work)
    assert world.open_in_kafka() == []


def test_a_cache_of_another_environment_says_nothing_about_this_one(world: CacheWorld) -> None:
    async def work(ward: Ward, client: KafkaClient) -> None:
        slot = await ward.left(client, decided=True)
        world.client.hset(f"semel:txn:meta:{world.name}.dual.cache.", "environment", "staging")
        found = await explain(ward.settings, ward.app, (), slot)
        assert "another environment: Kafka cluster 'staging'" in found["why"]

    run(world, work)
