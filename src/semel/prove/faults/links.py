"""The way of each process to Kafka and to the databases, each through a proxy of its own.

So a fault of the network meets one process and not its neighbour. The processes are given the proxies' addresses in
place of the real ones, by the same variables that a user would set.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from urllib.parse import urlsplit

from semel.prove.faults.kafka_proxy import KafkaProxy
from semel.prove.faults.postgres_proxy import PostgresProxy

__all__ = ["Links"]

_POSTGRES = ("postgresql", "postgres")


class Links:
    """Proxies for these processes. Use it within one event loop, and `close` it when the processes have ended.

    `bootstrap` is Kafka's address, `security` the Kafka clients' security.protocol, `databases` the URL by environment
    variable. What no proxy can stand before is reached directly; `kafka_refusal` and `database_refusals` say why.
    """

    def __init__(
        self, names: Iterable[str], bootstrap: str, databases: Mapping[str, str], *, security: str = "plaintext"
    ) -> None:
        self._bootstrap = bootstrap
        self._databases = dict(databases)
        through = {name: url for name, url in databases.items() if urlsplit(url).scheme in _POSTGRES}
        self.database_refusals = {name: why for name, url in through.items() if (why := PostgresProxy.refusal(url))}
        self.kafka_refusal = ""
        if security.lower() in ("ssl", "sasl_ssl"):
            self.kafka_refusal = "Kafka is reached by TLS, and of that a proxy can read nothing."
        self.kafka: dict[str, KafkaProxy] = {}
        """By process."""
        self.postgres: dict[str, list[PostgresProxy]] = {}
        """By process; one for each of the app's databases on a PostgreSQL."""
        self._urls: dict[str, dict[str, PostgresProxy]] = {}
        for name in names:
            if not self.kafka_refusal:
                self.kafka[name] = KafkaProxy(bootstrap)
            own = {
                variable: PostgresProxy(url)
                for variable, url in through.items()
                if variable not in self.database_refusals
            }
            if own:
                self._urls[name], self.postgres[name] = own, list(own.values())

    def __repr__(self) -> str:
        return f"<Links of {len(self.kafka)} processes to Kafka, of {len(self.postgres)} to PostgreSQL>"

    def environment(self, name: str) -> dict[str, str]:
        """Where this process finds Kafka and its databases. Call it in the event loop."""
        kafka = self.kafka.get(name)
        found = {"SEMEL_KAFKA": self._bootstrap if kafka is None else kafka.bootstrap, **self._databases}
        return found | {variable: proxy.url for variable, proxy in self._urls.get(name, {}).items()}

    async def close(self) -> None:
        """End every connection."""
        for kafka in self.kafka.values():
            await kafka.close()
        for proxies in self.postgres.values():
            for proxy in proxies:
                await proxy.close()
