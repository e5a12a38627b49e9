"""The embedded broker: an asyncio shell over log/ and coordinator/ that speaks Kafka's wire protocol.

Who does what: `server` moves bytes, `node` dispatches requests and holds the state, `metadata` remembers topics,
`topics` holds their partitions, `transactions` and `groups` make the coordinators' decisions durable, `apis` has one
handler an API, `embedded` runs it all in a thread.
"""

from semel.broker.broker import Broker, serve
from semel.broker.config import BrokerConfig
from semel.broker.embedded import EmbeddedBroker

__all__ = ["Broker", "BrokerConfig", "EmbeddedBroker", "serve"]
