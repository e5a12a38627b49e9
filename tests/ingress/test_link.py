"""What the gateway's way to the log tells the history of each append."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from semel import history
from semel.client.idempotent import RecordMetadata
from semel.env import Env
from semel.errors import Fatal, OutcomeUnknown, Retriable, SemelError
from semel.history import PROOF, Send
from semel.ingress.link import KafkaLink


class Producer:
    """Takes one record, or raises."""

    def __init__(self, error: SemelError | None = None, offset: int = 7) -> None:
        self.error = error
        self.offset = offset
        self.headers: list[Any] = []

    async def send(self, _topic: str, _partition: int, _key: bytes, _value: bytes, headers: Any = ()) -> RecordMetadata:
        self.headers.append(headers)
        if self.error is not None:
            raise self.error
        return RecordMetadata(self.offset, 1_000)


def link_with(producer: Producer) -> KafkaLink:
    link = KafkaLink("shop", "unused:1", 4, Env())
    link._producer = producer  # type: ignore[assignment]
    return link


def test_an_append_is_told_and_the_record_names_the_attempt() -> None:
    producer = Producer()
    with history.captured() as events:
        asyncio.run(link_with(producer).append(2, b"k", b"v"))
    begun, done = events
    topic = "shop.semel.requests"
    assert begun == Send(t=begun.t, type="invoke", a=begun.a, id=begun.a, topic=topic)
    assert done == Send(t=done.t, type="ok", a=begun.a, topic=topic, partition=2, offset=7)
    assert producer.headers == [((PROOF, begun.a.encode()),)]


@pytest.mark.parametrize(
    ("error", "outcome"), [(Retriable("r"), "fail"), (Fatal("f"), "fail"), (OutcomeUnknown("u"), "info")]
)
def test_an_append_that_is_not_answered_may_have_happened(error: SemelError, outcome: str) -> None:
    with history.captured() as events, pytest.raises(type(error)):
        asyncio.run(link_with(Producer(error)).append(2, b"k", b"v"))
    assert [event.type for event in events] == ["invoke", outcome]


def test_an_append_without_a_place_is_told_as_unknown() -> None:
    """The broker knew the batch already and had forgotten where it stands."""
    with history.captured() as events:
        asyncio.run(link_with(Producer(offset=-1)).append(2, b"k", b"v"))
    assert [event.type for event in events] == ["invoke", "info"]


def test_off_the_record_has_no_header() -> None:
    producer = Producer()
    asyncio.run(link_with(producer).append(2, b"k", b"v"))
    assert producer.headers == [()]
