"""Do database, topic and index agree? Reads all three, and names what does not.

python -m semel.examples.catalogue_check

In the folder of a `semel run`, or with SEMEL_KAFKA. It is to be asked when nothing changes any more: what is on its
way shows as behind.
"""

import asyncio
import os
import sys

import msgspec

from semel.client.admin import Admin
from semel.client.cluster import KafkaClient
from semel.client.consumer import Reader
from semel.databases import connect
from semel.examples.catalogue import Product, app, products, search, shop
from semel.settings import Settings, running_kafka
from semel.sinks.search.http import SearchConnection
from semel.types import TopicPartition

PAGE = 1_000


def disagreements(rows, told, documents):
    """What the three do not agree about. `rows` and `told` are products, the latter in the order of the topic;
    `documents` are (version, document) by sku."""
    history: dict[str, list[Product]] = {}
    for product in told:
        history.setdefault(product.sku, []).append(product)
    for row in sorted(rows, key=lambda row: row.sku):
        records = history.pop(row.sku, [])
        versions = [product.version for product in records]
        if versions != list(range(1, row.version + 1)):
            yield f"{row.sku} has version {row.version}, but the topic has its versions {versions}"
        elif records[-1] != row:
            yield f"{row.sku} is {row}, but its last record says {records[-1]}"
        version, document = documents.pop(row.sku, (0, None))
        shown = {"deleted": True} if row.withdrawn else {"sku": row.sku, "name": row.name, "cents": row.cents}
        if (version, document) != (row.version, shown):
            yield f"{row.sku} is {row}, but the index has version {version} of it: {document}"
    for sku in sorted(history):
        yield f"the topic tells of {sku}, which the database does not know"
    for sku in sorted(documents):
        yield f"the index shows {sku}, which the database does not know"


def read_rows(url):
    """Every product as the database has it."""
    database = connect(url)
    try:
        found = database.query("SELECT sku, name, cents, version, withdrawn FROM product")
    finally:
        database.close()
    return [Product(sku, name, cents, version, bool(withdrawn)) for sku, name, cents, version, withdrawn in found]


def read_index(url):
    """Version and content of every document, by its id; markers of deleted ones, too."""
    connection = SearchConnection(url)
    name = f"{connection.prefix}products"
    found: dict[str, tuple[int, object]] = {}
    last: list[int] = []
    try:
        connection.call("POST", f"/{name}/_refresh")
        while True:
            query = {"size": PAGE, "version": True, "sort": ["_seq_no"]} | ({"search_after": last} if last else {})
            answer = connection.call("POST", f"/{name}/_search", msgspec.json.encode(query))
            if answer.status != 200:
                raise RuntimeError(f"the index cannot be read: {answer.reason}")
            hits = answer.body["hits"]["hits"]
            found |= {hit["_id"]: (hit["_version"], hit["_source"]) for hit in hits}
            if len(hits) < PAGE:
                return found
            last = hits[-1]["sort"]
    finally:
        connection.close()


async def read_topic(bootstrap, kafka_settings=None):
    """Every record of the topic that is committed, partition by partition."""
    async with KafkaClient(bootstrap, settings=kafka_settings) as client:
        partitions = (await client.topic(products.name)).partitions
        places = [TopicPartition(products.name, number) for number in range(partitions)]
        ends = await Admin(client).list_offsets(places, "high_watermark")
        starts = await Admin(client).list_offsets(places, "earliest")
    waiting = {at for at in places if ends[at] > starts[at]}
    found = []
    reader = Reader(bootstrap, settings=kafka_settings)
    await reader.start({at: starts[at] for at in waiting})
    try:
        while waiting:
            batch = await reader.poll(PAGE, 0.5)
            found += [products.decode(record).value for record in batch.records]
            reached = {TopicPartition(each.topic, each.partition): each.offset + 1 for each in batch.records}
            reached |= batch.end_offsets  # These lie behind the markers of transactions, too.
            waiting -= {at for at, offset in reached.items() if offset >= ends[at]}
    finally:
        await reader.close()
    return found


def check(settings):
    """What does not agree, as the three are now."""
    app.use_databases(os.environ)
    told = asyncio.run(read_topic(running_kafka(settings), settings.kafka_client))
    rows = read_rows(app.databases[shop.name].url)
    return list(disagreements(rows, told, read_index(app.searches[search.name].url)))


if __name__ == "__main__":
    wrong = check(Settings.from_environment())
    print("\n".join(wrong) or "database, topic and index agree")  # noqa: T201
    sys.exit(bool(wrong))
