"""A client of a schema registry with Confluent's REST API: few calls, each blocking for a bounded time.

What is asked while records are worked on never blocks: a schema that is not known yet is fetched by a thread, and the
caller gets `Retriable`, as from any target that is away.
"""

from __future__ import annotations

import base64
import json
import logging
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol
from urllib.parse import quote, unquote, urlsplit, urlunsplit
from uuid import UUID

from semel.errors import ConfigurationError, Retriable
from semel.processing.topics import DataError

__all__ = ["Incompatible", "Reference", "Registry", "Schema", "SchemaRegistry"]

log = logging.getLogger("semel.schemas")

CALL_SECONDS = 10.0
"""One answer of the registry: it works on kilobytes, but a JVM that is just starting takes its time."""
ANSWER_BYTES_MAX = 8 * 1024 * 1024
"""Of one answer: a large schema has some 100 KB."""
SCHEMAS_MAX = 10_000
"""Known schemas; a topic has as many as its writers had versions."""
MISSING_SECONDS = 30.0
"""How long it is believed that there is no such schema."""
_CONTENT_TYPE = "application/vnd.schemaregistry.v1+json"
_NO_SUBJECT, _NO_VERSION, _NO_SCHEMA = 40401, 40402, 40403


class Reference(NamedTuple):
    """Another schema that a schema uses, by the name under which it does."""

    name: str
    subject: str
    version: int


class Schema(NamedTuple):
    """A schema as the registry keeps it. `kind` is AVRO, PROTOBUF or JSON."""

    text: str
    kind: str
    references: tuple[Reference, ...] = ()


class Incompatible(ConfigurationError):
    """A schema that the subject's earlier versions do not allow."""


class Registry(Protocol):
    """What serdes ask of a schema registry."""

    def register(self, subject: str, schema: Schema) -> int:
        """The id of a schema under its subject, new or not.

        Raises `Incompatible`, `ConfigurationError` (refused for another reason) and `Retriable` (nobody answers).
        """

    def look_up(self, subject: str, schema: Schema) -> int | None:
        """The id of a schema if it is registered. Raises `Incompatible` when it could not be, and as `register`."""

    def version_of(self, subject: str, schema: Schema) -> int:
        """Which version of its subject a registered schema is. Raises as `register`."""

    def guid_of(self, subject: str, schema: Schema) -> UUID:
        """The GUID of a registered schema. Raises as `register`."""

    def find(self, schema: int | UUID) -> Schema:
        """A schema by id or GUID, without waiting. Raises `Retriable` (ask again) or `DataError` (there is none)."""


class _Refused(Exception):
    """The registry's answer is an error of its own; `code` is its error_code."""

    def __init__(self, status: int, code: int, text: str) -> None:
        super().__init__(f"{status} {text}")
        self.status, self.code, self.text = status, code, text


class SchemaRegistry:
    """The registry at `url`, or the first of several (separated by commas) that answers.

    `auth` is `user:password`, which may stand in the URL too, or `Bearer TOKEN`; `ca` a PEM file of authorities.
    """

    def __init__(self, url: str, *, auth: str = "", ca: str = "") -> None:
        self._addresses: list[str] = []
        for item in filter(None, (part.strip() for part in url.split(","))):
            parts = urlsplit(item)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ConfigurationError("SEMEL_SCHEMA_REGISTRY is not http(s)://host[:port][/path][,...].")
            if parts.username is not None and not auth:
                auth = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            host = parts.netloc.rpartition("@")[2]
            self._addresses.append(urlunsplit((parts.scheme, host, parts.path.rstrip("/"), "", "")))
        if not self._addresses:
            raise ConfigurationError("SEMEL_SCHEMA_REGISTRY names no registry: http(s)://host[:port].")
        self._headers = {"Accept": _CONTENT_TYPE, "Content-Type": _CONTENT_TYPE}
        if auth:
            is_token = auth.lower().startswith("bearer ")
            self._headers["Authorization"] = auth if is_token else f"Basic {base64.b64encode(auth.encode()).decode()}"
        try:
            context = ssl.create_default_context(cafile=ca or None)
        except OSError as error:
            raise ConfigurationError(f"SEMEL_SCHEMA_REGISTRY_CA={ca}: {error.strerror or error}.") from error
        self._opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=context))
        self._schemas: dict[int | UUID, Schema] = {}
        self._missing: dict[int | UUID, tuple[float, str]] = {}
        self._asked: set[int | UUID] = set()
        self._outage = ""
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<SchemaRegistry {', '.join(self._addresses)}, {len(self._schemas)} schemas known>"

    # --- At the start ---

    def register(self, subject: str, schema: Schema) -> int:
        """See `Registry.register`."""
        path = f"/subjects/{quote(subject, safe='')}/versions"
        try:
            return _number(self._call("POST", path, _body(schema)), "id")
        except _Refused as error:
            if error.status == 409:
                raise self._incompatible(subject, schema, error) from None
            raise _misconfigured(f"schema of subject {subject} is refused by the registry", error) from None

    def look_up(self, subject: str, schema: Schema) -> int | None:
        """See `Registry.look_up`."""
        try:
            return _number(self._call("POST", f"/subjects/{quote(subject, safe='')}", _body(schema)), "id")
        except _Refused as error:
            if error.code == _NO_SUBJECT:
                return None
            if error.code != _NO_SCHEMA:
                raise _misconfigured(f"schema of subject {subject} cannot be looked up", error) from None
        broken = self._first_broken(subject, schema)
        if broken is not None:
            raise self._incompatible(subject, schema, None)
        return None

    def version_of(self, subject: str, schema: Schema) -> int:
        """See `Registry.version_of`."""
        try:
            return _number(self._call("POST", f"/subjects/{quote(subject, safe='')}", _body(schema)), "version")
        except _Refused as error:
            raise _misconfigured(f"subject {subject}", error) from None

    def guid_of(self, subject: str, schema: Schema) -> UUID:
        """See `Registry.guid_of`."""
        try:
            answer = self._call("POST", f"/subjects/{quote(subject, safe='')}", _body(schema))
        except _Refused as error:
            raise _misconfigured(f"subject {subject}", error) from None
        try:
            return UUID(answer["guid"])
        except (KeyError, TypeError, ValueError, AttributeError):
            raise ConfigurationError(
                f"the schema registry gives subject {subject} no GUID, which guid=True asks for: registries have them "
                "since Confluent Platform 8. Leave guid= out, and ids stand in front of the values."
            ) from None

    def _incompatible(self, subject: str, schema: Schema, refused: _Refused | None) -> Incompatible:
        """Says which version is in the way, and why: the registry's own words, and what we see ourselves."""
        broken = self._first_broken(subject, schema)
        words = [] if refused is None else [refused.text]
        against = ""
        if broken is not None:
            version, why = broken
            against = f" with version {version}"
            words = why or words
        return Incompatible(
            f"SCHEMA_INCOMPATIBLE: the app's schema for subject {subject} is not compatible{against}: "
            f"{'; '.join(words) or 'the registry does not say why'}. Records of one form could not be read by readers "
            "of the other. Change the type so that both forms fit (a new field with a default), or give the topic "
            "another name; to allow it all the same, set the subject's compatibility in the registry."
        )

    def _first_broken(self, subject: str, schema: Schema) -> tuple[int, list[str]] | None:
        """The latest version that this schema does not go with, and what is wrong; None when it goes with all."""
        base = f"subjects/{quote(subject, safe='')}/versions"
        try:
            versions = [int(number) for number in self._call("GET", f"/{base}")]
            for version in reversed(versions):
                answer = self._call("POST", f"/compatibility/{base}/{version}?verbose=true", _body(schema))
                if not answer.get("is_compatible", True):
                    found = self._call("GET", f"/{base}/{version}")
                    return version, [
                        *differences(found.get("schema", ""), schema),
                        *map(str, answer.get("messages") or ()),
                    ]
        except (_Refused, Retriable) as error:
            log.info("subject %s: why its schema does not fit cannot be found out: %s", subject, error)
        return None

    # --- At work ---

    def find(self, schema: int | UUID) -> Schema:
        """See `Registry.find`."""
        known = self._schemas.get(schema)
        if known is not None:
            return known
        with self._lock:
            missing = self._missing.get(schema)
            if missing is not None:
                if time.monotonic() - missing[0] < MISSING_SECONDS:
                    raise DataError(missing[1])
                del self._missing[schema]
            if schema not in self._asked:
                self._asked.add(schema)
                threading.Thread(target=self._fetch, args=(schema,), name="semel-schema", daemon=True).start()
        raise Retriable(f"schema {schema} is asked for at {self._addresses[0]}{self._outage}")

    def _fetch(self, schema: int | UUID) -> None:
        try:
            path = f"/schemas/guids/{schema}" if isinstance(schema, UUID) else f"/schemas/ids/{schema}"
            found = _schema(self._call("GET", path))
            with self._lock:
                while len(self._schemas) >= SCHEMAS_MAX:
                    del self._schemas[next(iter(self._schemas))]
                self._schemas[schema] = found
            self._outage = ""
        except _Refused as error:
            if error.status in (401, 403):
                self._outage = f": {error}"
                return
            with self._lock:
                if len(self._missing) >= SCHEMAS_MAX:
                    self._missing.clear()
                self._missing[schema] = time.monotonic(), f"the registry has no schema {schema}: {error}"
        except Retriable as error:
            self._outage = f": {error}"
        except Exception as error:
            self._outage = f": {error!r}"
            log.exception("schema %s could not be fetched", schema)
        finally:
            with self._lock:
                self._asked.discard(schema)

    # --- HTTP ---

    def _call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The decoded answer. Raises `_Refused` for an answer that is an error, `Retriable` for none from anybody."""
        data = None if body is None else json.dumps(body).encode()
        why = ""
        for address in self._addresses:
            request = urllib.request.Request(address + path, data, self._headers, method=method)  # noqa: S310
            try:
                with self._opener.open(request, timeout=CALL_SECONDS) as answer:
                    return json.loads(answer.read(ANSWER_BYTES_MAX))
            except urllib.error.HTTPError as error:
                refused = _refusal(error)
                if refused.status < 500 and refused.status not in (408, 429):
                    raise refused from None
                why = f"{address} answers {refused}"
            except (OSError, ValueError) as error:
                why = f"{address}: {getattr(error, 'reason', None) or error}"
        raise Retriable(f"the schema registry does not do its work: {why}")


def _refusal(error: urllib.error.HTTPError) -> _Refused:
    try:
        document = json.loads(error.read(ANSWER_BYTES_MAX))
        text = document.get("message") or document.get("detail") or document.get("title") or error.reason
        return _Refused(error.code, int(document.get("error_code", error.code)), str(text))
    except (ValueError, AttributeError, OSError):
        return _Refused(error.code, error.code, str(error.reason))


def _number(answer: Any, name: str) -> int:
    """A number of an answer. Raises `Retriable` for an answer that is not a registry's, as of a proxy."""
    found = answer.get(name) if isinstance(answer, dict) else None
    if not isinstance(found, int):
        raise Retriable(f"the schema registry does not do its work: it answers {answer!r:.200}")
    return found


def _misconfigured(what: str, error: _Refused) -> ConfigurationError:
    hint = " Check SEMEL_SCHEMA_REGISTRY_AUTH." if error.status in (401, 403) else ""
    return ConfigurationError(f"{what}: {error}.{hint}")


def _body(schema: Schema) -> dict[str, Any]:
    body: dict[str, Any] = {"schema": schema.text}
    if schema.kind != "AVRO":  # The default; the oldest registries do not know the field.
        body["schemaType"] = schema.kind
    if schema.references:
        body["references"] = [reference._asdict() for reference in schema.references]
    return body


def _schema(answer: Mapping[str, Any]) -> Schema:
    references: Sequence[Mapping[str, Any]] = answer.get("references") or ()
    kept = tuple(Reference(str(item["name"]), str(item["subject"]), int(item["version"])) for item in references)
    return Schema(answer["schema"], answer.get("schemaType") or "AVRO", kept)


def differences(before: str, schema: Schema) -> list[str]:
    """What is different between two records or objects, field by field: registries differ in what they say."""
    try:
        old, new = _fields(json.loads(before), schema.kind), _fields(json.loads(schema.text), schema.kind)
    except (ValueError, TypeError, KeyError, AttributeError):
        return []
    changed = [
        f"field {name!r} is {kind}, and was {old[name][0]}"
        for name, (kind, _) in new.items()
        if name in old and old[name][0] != kind
    ]
    added = [
        f"field {name!r} is new and {'optional' if is_optional else 'has no default'}"
        for name, (_, is_optional) in new.items()
        if name not in old
    ]
    return [*changed, *added, *(f"field {name!r} is gone" for name in old if name not in new)]


def _fields(document: Any, kind: str) -> dict[str, tuple[str, bool]]:
    """By name: a field's type as text, and whether one may leave it out."""
    if kind == "AVRO":
        return {
            item["name"]: (json.dumps(item["type"], sort_keys=True), "default" in item) for item in document["fields"]
        }
    if "$ref" in document:
        kept = document.get("definitions") or document["$defs"]
        document = kept[document["$ref"].rpartition("/")[2]]
    required = set(document.get("required", ()))
    return {
        name: (
            json.dumps({key: item for key, item in rule.items() if key != "default"}, sort_keys=True),
            name not in required,
        )
        for name, rule in document.get("properties", {}).items()
    }
