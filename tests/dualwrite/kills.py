"""What the dual write's banks share under kill -9: two processes of writers and nothing beside them."""

from __future__ import annotations

from semel.client.admin import Admin
from semel.client.cluster import KafkaClient
from semel.databases.spec import DatabaseSpec
from semel.dualwrite.keeping import make_keeper
from semel.env import Env
from semel.failpoints import FAILPOINTS
from semel.processing.metrics import Metrics
from semel.settings import Settings
from semel.types import TopicPartition
from tests.outbox.kills import World
from tests.reading import ends_without_open

WRITERS = 2
POINTS = [name for name, point in FAILPOINTS.items() if point.role == "dual"]


class Writers(World):
    """No relays: each writer recovers what another one left, and the test what the last ones left."""

    names = ("writer-0", "writer-1")

    def points(self, name: str) -> list[str]:
        return POINTS


def shares(name: str, of: int) -> range:
    """Which of so many shares of the work this writer does."""
    return range(int(name.rpartition("-")[2]), of, WRITERS)


async def recover(app: str, spec: DatabaseSpec, bootstrap: str, topic: str) -> None:
    """What a process does when it starts. Nothing may be open in the topic afterwards, which has three partitions."""
    keeper, close = make_keeper(app, spec, {}, Settings(kafka=bootstrap), Env(), Metrics())
    try:
        await keeper.open()
        await keeper.sweep()
    finally:
        await keeper.abandon()
        await close()
    async with KafkaClient(bootstrap) as client:
        await ends_without_open(Admin(client), [TopicPartition(topic, number) for number in range(3)])
