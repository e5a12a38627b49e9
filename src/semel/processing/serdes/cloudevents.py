"""`CloudEvent(Order, type="shop.order", source="/shop")`: a topic's values as CloudEvents 1.0 over Kafka.

Binary mode puts the attributes into headers (`ce_id`, `ce_type`, ...) and leaves the data as it is; structured mode
puts all into one JSON document. Both are read, whichever is written. Source: CloudEvents 1.0.2, Kafka protocol binding.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Generic, Literal, TypeVar

import msgspec

from semel.errors import ConfigurationError
from semel.processing.serdes.formats import guarded
from semel.processing.topics import Bound, DataError, Format, Serde, serde
from semel.types import Header

__all__ = ["CloudEvent", "Event"]

T = TypeVar("T")
VERSION = "1.0"
STRUCTURED = "application/cloudevents+json"
_PREFIX = "ce_"
_NAME = re.compile(r"[a-z0-9]{1,20}")
_KNOWN = ("specversion", "id", "source", "type", "subject", "time", "datacontenttype", "dataschema")


class Event(msgspec.Struct, Generic[T], frozen=True, kw_only=True):
    """An event: its data and what says which one it is.

    `id` with `source` names the event for ever: take it from the input, not from a random number, so that a handler
    that runs again writes the same event. `type` and `source` are those of the topic where they are empty.
    """

    data: T
    id: str
    type: str = ""
    source: str = ""
    subject: str | None = None
    time: datetime | None = None
    dataschema: str | None = None
    extensions: Mapping[str, str] = {}
    """More attributes; names of lower case letters and digits."""


class CloudEvent(Format[Event[T]], Generic[T]):
    """Events whose data is a `kind`: a type, `bytes`, or another format such as `Avro(Order)` (binary mode only)."""

    content_type = STRUCTURED

    def __init__(
        self,
        kind: type[T] | Format[T],
        *,
        type: str,  # noqa: A002  # the attribute's name in CloudEvents
        source: str,
        mode: Literal["binary", "structured"] = "binary",
    ) -> None:
        if not type or not source:
            raise ConfigurationError("CloudEvent: type= and source= say what the events are and where they come from.")
        if mode not in ("binary", "structured"):
            raise ConfigurationError(f"CloudEvent: mode={mode!r} is neither 'binary' nor 'structured'.")
        if mode == "structured" and isinstance(kind, Format):
            raise ConfigurationError(f"CloudEvent: {kind!r} is no JSON, so its events are written in binary mode.")
        self.kind = Event
        self._data, self._type, self._source, self._mode = kind, type, source, mode

    def __repr__(self) -> str:
        return f"CloudEvent({getattr(self._data, '__name__', self._data)}, type={self._type!r})"

    def bind(self, topic: str) -> Bound:
        """See `Format`."""
        return _CloudEvent(topic, self._data, self._type, self._source, self._mode)


class _CloudEvent(Bound):
    def __init__(self, topic: str, data: Any, kind: str, source: str, mode: str) -> None:
        self.what = f"the value of topic {topic}"
        self._type, self._source, self._mode = kind, source, mode
        self.inner: Bound | None = data.bind(topic) if isinstance(data, Format) else None
        """The format of the data, where it is one."""
        self._serde: Serde | None = None if isinstance(data, Format) else serde(data, self.what)
        self._content_type = _content_type(data)
        if mode == "structured" and getattr(self.inner, "by_guid", False):
            raise ConfigurationError(
                f"{self.what}: guid=True names the schema in a header of the data, and in structured mode the data is "
                'inside of a document. Use mode="binary", or leave guid= out.'
            )

    # --- Writing ---

    def write(self, value: Any, headers: Sequence[Header]) -> tuple[bytes, Sequence[Header]]:
        if not isinstance(value, Event):
            raise DataError(f"{self.what} is an Event(data=..., id=...), got {type(value).__name__} {value!r:.80}")
        attributes = self._attributes(value)
        if self._serde is None:
            assert self.inner is not None
            data, headers = self.inner.write(value.data, headers)
        else:
            data = self._serde.encode(value.data)
        if self._mode == "structured":
            document: dict[str, Any] = {**attributes, "datacontenttype": self._content_type}
            if self._content_type == "application/json":
                document["data"] = msgspec.Raw(data)
            elif self._content_type.startswith("text/"):
                document["data"] = value.data
            else:
                document["data_base64"] = base64.b64encode(data).decode()
            return msgspec.json.encode(document), (*headers, ("content-type", f"{STRUCTURED}; charset=UTF-8".encode()))
        added = [(_PREFIX + name, text.encode()) for name, text in attributes.items()]
        return data, (*headers, *added, ("content-type", self._content_type.encode()))

    def _attributes(self, event: Event[Any]) -> dict[str, str]:
        if not event.id:
            raise DataError(f"{self.what}: an event needs an id")
        found = {
            "specversion": VERSION,
            "id": event.id,
            "source": event.source or self._source,
            "type": event.type or self._type,
        }
        if event.subject is not None:
            found["subject"] = event.subject
        if event.time is not None:
            if event.time.tzinfo is None:
                raise DataError(f"{self.what}: the time of an event has a time zone, and {event.time} has none")
            found["time"] = event.time.isoformat().replace("+00:00", "Z")
        if event.dataschema is not None:
            found["dataschema"] = event.dataschema
        for name, text in event.extensions.items():
            if not _NAME.fullmatch(name) or name in (*_KNOWN, "data"):
                raise DataError(f"{self.what}: {name!r} cannot name an extension: 1 to 20 of a-z and 0-9")
            found[name] = text
        return found

    # --- Reading ---

    def read(self, data: bytes, headers: Sequence[Header]) -> Any:
        named = {name.lower(): value or b"" for name, value in headers}
        media = named.get("content-type", b"").decode(errors="replace")
        if media.lower().startswith(STRUCTURED):
            return self._read_structured(data)
        if media.lower().startswith("application/cloudevents"):
            raise DataError(f"{self.what} is a CloudEvent as {media!r}; JSON ({STRUCTURED}) and binary mode are read")
        attributes = {
            name[len(_PREFIX) :]: value.decode(errors="replace")
            for name, value in named.items()
            if name.startswith(_PREFIX)
        }
        if "specversion" not in attributes:
            raise DataError(
                f"{self.what} is no CloudEvent: neither is its content-type {STRUCTURED}, nor has it ce_ headers"
            )
        if self._serde is not None:
            content: Any = self._serde.decode(data)
        else:
            assert self.inner is not None
            content = self.inner.read(data, headers)
        return self._event(attributes, content)

    def _read_structured(self, data: bytes) -> Any:
        document = guarded(
            f"{self.what} is no CloudEvent", lambda: msgspec.json.decode(data, type=dict[str, msgspec.Raw])
        )
        raw, encoded = document.pop("data", None), document.pop("data_base64", None)
        texts = guarded(
            f"{self.what}: an attribute is neither text nor a number",
            lambda: {name: _text(msgspec.json.decode(item)) for name, item in document.items()},
        )
        if self._serde is None:
            raise DataError(f"{self.what} is a CloudEvent in one JSON document; its data is expected in binary mode")
        if encoded is not None:
            inside = guarded(
                f"{self.what}: data_base64", lambda: base64.b64decode(msgspec.json.decode(encoded, type=str))
            )
        elif self._content_type == "application/json":
            inside = bytes(raw or b"null")
        else:
            inside = guarded(
                f"{self.what}: data is no text", lambda: msgspec.json.decode(raw or b"", type=str).encode()
            )
        return self._event({name: text for name, text in texts.items() if text is not None}, self._serde.decode(inside))

    def _event(self, attributes: dict[str, str], content: Any) -> Event[Any]:
        missing = [name for name in ("id", "source", "type") if not attributes.get(name)]
        if missing:
            raise DataError(f"{self.what} is no CloudEvent: it has no {', '.join(missing)}")
        if attributes["specversion"] != VERSION:
            raise DataError(f"{self.what} is a CloudEvent of version {attributes['specversion']!r:.20}, not {VERSION}")
        time = attributes.get("time")
        when = f"{self.what}: the time of the event"
        return Event(
            data=content,
            id=attributes["id"],
            type=attributes["type"],
            source=attributes["source"],
            subject=attributes.get("subject"),
            time=None if time is None else guarded(when, lambda: msgspec.convert(time, datetime)),
            dataschema=attributes.get("dataschema"),
            extensions={name: text for name, text in attributes.items() if name not in _KNOWN},
        )


def _content_type(data: Any) -> str:
    if isinstance(data, Format):
        return data.content_type
    if data is bytes:
        return "application/octet-stream"
    return "text/plain; charset=UTF-8" if data is str else "application/json"


def _text(value: Any) -> str | None:
    """An attribute as text: its canonical form in CloudEvents."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    raise ValueError(f"{value!r:.80}")
