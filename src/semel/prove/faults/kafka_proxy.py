"""A TCP proxy before a Kafka cluster: what it carries are frames, and rules say what happens to which of them.

Clients that begin with `bootstrap` stay behind it: addresses of brokers in answers are replaced by its own, one port
for each broker. Plaintext and SASL over plaintext are understood; of TLS nothing can be read, so its addresses are not
replaced, and no rule applies.
"""

from __future__ import annotations

from semel.client.cluster import parse_bootstrap
from semel.errors import ConfigurationError
from semel.prove.faults.pipe import HERE, Address, Pipe, Proxy
from semel.prove.faults.relay import Relay
from semel.prove.faults.rules import Action, Rule
from semel.wire.messages import api_key_of

__all__ = ["KafkaProxy"]


class KafkaProxy(Proxy):
    """Use it within one event loop: `start`, then `add` and `remove` rules, then `close`."""

    def __init__(self, bootstrap: str) -> None:
        super().__init__()
        self._upstream = parse_bootstrap(bootstrap)
        self.rules: list[Rule] = []

    @property
    def bootstrap(self) -> str:
        """What clients are given in place of the cluster's address. Call it in the event loop."""
        return ",".join(f"{HERE}:{self.port_for(*address)}" for address in self._upstream)

    @property
    def is_cluster(self) -> bool:
        """Whether more than one broker is known."""
        return len(self._servers) > 1

    async def start(self) -> KafkaProxy:
        """Listen for each broker that is known so far."""
        for address in self._upstream:
            self.port_for(*address)
        return self

    def make_pipe(self, upstream: Address) -> Pipe:
        return Relay(self, upstream)

    def on(self, api: str, action: Action, *, nth: int = 1, times: int = 1, version: int | None = None) -> Rule:
        """Add a rule for an API by its name (`EndTxn`). Raises `ConfigurationError` for a name that does not exist."""
        key = api_key_of(api)
        if key is None:
            raise ConfigurationError(f"There is no API {api!r} in Kafka's protocol: EndTxn, for example, is one.")
        return self.add(Rule(action, key, version, on=nth, times=times))

    def add(self, rule: Rule) -> Rule:
        """Put a rule in force; the first that takes a request wins."""
        self.rules.append(rule)
        return rule

    def remove(self, rule: Rule) -> None:
        """Take a rule out of force; what it holds goes on."""
        if rule in self.rules:
            self.rules.remove(rule)
        rule.release()

    def clear(self) -> None:
        """Take every rule out of force."""
        for rule in list(self.rules):
            self.remove(rule)

    async def close(self) -> None:
        self.clear()
        await super().close()
