"""A catalogue: products in a database, every change of them in Kafka, and a search index that follows.

    semel migrate catalogue:app
    semel run catalogue:app

    >>> from catalogue import change, withdraw
    >>> change("cd-0001", "Kind of Blue", 999)
    >>> withdraw("cd-0001")

A change and the record that tells of it are one transaction: the dual write where the Kafka keeps prepared
transactions, an outbox elsewhere. The row counts its changes, and that number is the version of the document: so the
index ends where the database is, however often and in whatever order records reach it. `catalogue_check` compares.
"""

import os

import msgspec

from semel import App


class Product(msgspec.Struct, frozen=True):
    """A product after its `version`-th change."""

    sku: str
    name: str
    cents: int
    version: int
    withdrawn: bool = False


app = App("catalogue")
products = app.topic("products", key=str, value=Product, partitions=4)
shop = app.database(
    os.environ.get("CATALOGUE_DATABASE", "sqlite:///catalogue.db"),
    outbox=True,
    dual_write=True,
    schema="""
    CREATE TABLE IF NOT EXISTS product (sku VARCHAR(40) PRIMARY KEY, name TEXT NOT NULL, cents BIGINT NOT NULL,
                                        version BIGINT NOT NULL, withdrawn BOOLEAN NOT NULL);
    """,
)
search = app.search(
    os.environ.get("CATALOGUE_SEARCH", "opensearch://localhost:9200"),
    indexes={
        "products": {
            "settings": {"number_of_shards": 1, "auto_expand_replicas": "0-1"},
            "mappings": {
                "dynamic": "strict",
                "properties": {
                    "sku": {"type": "keyword"},
                    "name": {"type": "text"},
                    "cents": {"type": "long"},
                },
            },
            # Who searches here finds no markers of products that were withdrawn.
            "aliases": {"catalogue": {"filter": {"bool": {"must_not": {"term": {"deleted": True}}}}}},
        }
    },
)


def change(sku, name, cents):
    """Put a product into the catalogue, or change it."""
    with app.transaction(shop) as tx:
        tx.execute(
            "INSERT INTO product (sku, name, cents, version, withdrawn) VALUES (?, ?, ?, 1, FALSE) "
            "ON CONFLICT (sku) DO UPDATE SET name = excluded.name, cents = excluded.cents, "
            "version = product.version + 1, withdrawn = FALSE",
            (sku, name, cents),
        )
        tell(tx, sku)


def withdraw(sku):
    """Take a product out of the catalogue. Its row stays: a product that comes back must have a higher version."""
    with app.transaction(shop) as tx:
        if tx.execute("UPDATE product SET version = version + 1, withdrawn = TRUE WHERE sku = ?", (sku,)):
            tell(tx, sku)


def tell(tx, sku):
    """Send what the row says; the transaction holds its lock, so its records are in the order of its versions."""
    [(name, cents, version, withdrawn)] = tx.query(
        "SELECT name, cents, version, withdrawn FROM product WHERE sku = ?", (sku,)
    )
    tx.send(products.record(sku, Product(sku, name, cents, version, bool(withdrawn))))


@app.sink(products, search)
def follow(records, index):
    for product in (record.value for record in records):
        if product.withdrawn:
            index.delete("products", product.sku, version=product.version)
        else:
            document = {"sku": product.sku, "name": product.name, "cents": product.cents}
            index.put("products", product.sku, document, version=product.version)
