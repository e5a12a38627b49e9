"""Settings: read once from the environment, checked, immutable.

Settings of Kafka clients keep librdkafka's names: `ssl.ca.location` is `ssl.ca.location=...` in the file that
SEMEL_KAFKA_CONFIG names, or SEMEL_KAFKA_SSL_CA_LOCATION. Passwords are never shown.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from semel.errors import ConfigurationError

__all__ = [
    "KAFKA_ADDRESS",
    "Settings",
    "codec_choice",
    "database_variable",
    "quick_choice",
    "read_properties",
    "running_kafka",
    "store_variable",
]

KAFKA_ADDRESS = "kafka.address"
"""A file in the data folder, while `semel run` is at work: where its embedded broker listens."""


_CLIENT_PREFIX = "SEMEL_KAFKA_"
_CLIENT_FILE = "SEMEL_KAFKA_CONFIG"
_KUBERNETES = re.compile(r"(\w+_)?(PORT|SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_[A-Z]+(_(PROTO|PORT|ADDR))?)")
"""What Kubernetes puts into the environment for services named semel-kafka and semel-kafka-...; no setting ends so."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What `SEMEL_*` variables and the command line say. Units are in the names."""

    kafka: str = ""
    """`host:port[,host:port]` of Kafka; empty means the embedded broker under `data`."""
    data: Path = Path(".semel")
    """Where the embedded broker and the instance id live."""
    profile: str = "dev"
    """`dev` or `production`; production refuses failpoints and a history."""
    instance: str = ""
    """Identity of this deployment's host in transactional ids; empty: made once and kept in `data`."""
    failpoint: str = ""
    history: str = ""
    """A folder for the history of what is tried (`semel.history`); empty: none is written."""
    history_in_production: str = ""
    """`yes` lets a history be written in production too: it makes everything slower and adds a table and headers."""
    transaction_timeout_ms: int = 10_000
    commit_interval_ms: int = 100
    session_timeout_ms: int = 6_000
    drain_seconds: float = 25.0
    partitions: int = 4
    """Partitions of topics that the app creates without saying how many."""
    build: str = ""
    """Which build of the app this is: a version, a date, a commit. Parked records say which build failed on them."""
    park_retry: str = "asked"
    """`asked`: parked keys are tried again when an operator says so. `build`: also once by each new build."""
    park_edit: str = "no"
    """`yes` lets operators change the value of a parked record."""
    schema_registry: str = field(default="", repr=False)
    """`http(s)://host[:port][/path][,...]` of the schema registry, for topics in Avro, Protobuf or JSON Schema."""
    schema_registry_auth: str = field(default="", repr=False)
    """`user:password`, or `Bearer TOKEN`."""
    schema_registry_ca: str = ""
    """A PEM file of the authorities that the registry's certificate may come from; empty: the system's."""
    schema_registry_register: str = "yes"
    """`no`: schemas have to be in the registry before the app starts; it only looks whether they are."""
    kafka_client: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Settings of every Kafka client of the app, under librdkafka's names."""

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None, **overrides: object) -> Settings:
        """Read `SEMEL_<NAME>`; `overrides` that are not None win. Raises `ConfigurationError`, naming the variable."""
        source = os.environ if environ is None else environ
        values: dict[str, object] = {}
        client = _client_settings(source)
        if "bootstrap.servers" in client:
            values["kafka"] = client.pop("bootstrap.servers")
        for item in fields(cls):
            if item.name == "kafka_client":
                continue
            name = f"SEMEL_{item.name.upper()}"
            raw = source.get(name)
            if raw is None:
                continue
            default: Any = item.default
            try:
                values[item.name] = type(default)(raw)
            except (TypeError, ValueError):
                kind = "a whole number" if isinstance(default, int) else "a number"
                raise ConfigurationError(f"{name}={raw!r} is not {kind}.") from None
        values.update({key: value for key, value in overrides.items() if value is not None})
        settings = cls(**values, kafka_client=client)  # type: ignore[arg-type]
        settings.check()
        return settings

    def check(self) -> None:
        """Raise `ConfigurationError` for values that cannot work."""
        if self.profile not in ("dev", "production"):
            raise ConfigurationError(f"SEMEL_PROFILE={self.profile!r} is neither dev nor production.")
        if self.history and self.profile == "production" and self.history_in_production != "yes":
            raise ConfigurationError(
                "SEMEL_HISTORY is set but SEMEL_PROFILE is production: a history makes everything slower and adds a "
                "header to records and a table to databases. Unset one of the two, or set "
                "SEMEL_HISTORY_IN_PRODUCTION=yes."
            )
        words = {
            "park_retry": ("asked", "build"),
            "park_edit": ("no", "yes"),
            "schema_registry_register": ("yes", "no"),
        }
        for name, known in words.items():
            if getattr(self, name) not in known:
                raise ConfigurationError(
                    f"SEMEL_{name.upper()}={getattr(self, name)!r} is neither {' nor '.join(known)}."
                )
        if self.park_retry == "build" and not self.build:
            raise ConfigurationError("SEMEL_PARK_RETRY=build needs SEMEL_BUILD, which says what build this is.")
        for name in ("transaction_timeout_ms", "commit_interval_ms", "session_timeout_ms", "partitions"):
            if getattr(self, name) <= 0:
                raise ConfigurationError(f"SEMEL_{name.upper()} must be greater than 0.")
        if self.commit_interval_ms >= self.transaction_timeout_ms:
            raise ConfigurationError(
                "SEMEL_COMMIT_INTERVAL_MS must be below SEMEL_TRANSACTION_TIMEOUT_MS, or every transaction times out."
            )


def running_kafka(settings: Settings) -> str:
    """The Kafka that the settings name, or the embedded broker of a `semel run` in the same folder; empty for none."""
    with suppress(OSError):
        return settings.kafka or (settings.data / KAFKA_ADDRESS).read_text().strip()
    return ""


def codec_choice() -> str:
    """What SEMEL_CODEC says of the record codec: `native`, `python` or nothing. Raises `ConfigurationError`.

    It is asked once in a process, when `semel.wire` is imported, before there are `Settings`.
    """
    choice = os.environ.get("SEMEL_CODEC", "")
    if choice not in ("", "native", "python"):
        raise ConfigurationError(f"SEMEL_CODEC={choice!r} is neither native nor python.")
    return choice


def quick_choice() -> bool:
    """Whether the inner loop in C is wanted: SEMEL_QUICK. Raises `ConfigurationError`. Asked once in a process."""
    choice = os.environ.get("SEMEL_QUICK", "")
    if choice not in ("", "on", "off"):
        raise ConfigurationError(f"SEMEL_QUICK={choice!r} is neither on nor off.")
    return choice != "off"


def store_variable(kind: str, name: str) -> str:
    """The variable that says where an app's database, cache or search is, in place of the URL that the app names."""
    bare = f"SEMEL_{kind.upper()}"
    return bare if name == kind else f"{bare}_" + re.sub(r"[^A-Z0-9]", "_", name.upper())


def database_variable(name: str) -> str:
    """The same for a database."""
    return store_variable("database", name)


def _client_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """What the file says, and what the environment says over it."""
    path = environ.get(_CLIENT_FILE)
    found = {} if not path else read_properties(Path(path))
    for variable, value in environ.items():
        name = variable.removeprefix(_CLIENT_PREFIX)
        if name not in (variable, "CONFIG") and not _KUBERNETES.fullmatch(name):
            found[name.lower().replace("_", ".")] = value
    return found


def read_properties(path: Path) -> dict[str, str]:
    """`name=value` lines, `#` comments, `\\` at the end goes on in the next line. Raises `ConfigurationError`."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8'}.") from None
    found: dict[str, str] = {}
    for number, line in enumerate(text.replace("\\\n", "").splitlines(), 1):
        stripped = line.strip()
        if not stripped or stripped.startswith(("#", "!")):
            continue
        name, equals, value = stripped.partition("=")
        if not equals or not name.strip():
            raise ConfigurationError(f"{path}, line {number} is not name=value.")
        found[name.strip()] = value.strip()
    return found
