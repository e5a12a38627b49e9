"""One handler for each API, grouped by what they work on; this table is what ApiVersions advertises.

Version ranges are Apache Kafka 4.3.1's. An API that is not here is not advertised, and a request for it closes the
connection, as a real broker does.
"""

from __future__ import annotations

from collections.abc import Mapping

from semel.broker.apis import (
    cluster,
    configs,
    consumer_groups,
    fetch,
    groups,
    markers,
    offsets,
    produce,
    replicas,
    security,
    topics,
    transactions,
)
from semel.broker.exchange import Api

__all__ = ["APIS"]

APIS: Mapping[int, Api] = {
    api.key: api
    for module in (
        cluster,
        configs,
        consumer_groups,
        produce,
        fetch,
        offsets,
        replicas,
        topics,
        transactions,
        markers,
        groups,
        security,
    )
    for api in module.APIS
}
