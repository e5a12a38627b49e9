"""Topics and stores: keys and values come back as they went, or say why not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from semel.errors import ConfigurationError
from semel.processing.effects import Change, Delete, Produce, Put, Write, lower
from semel.processing.topics import DataError, InputRecord, State, StateView, Topic, UndecodableKey
from semel.types import Record


class Item(msgspec.Struct, frozen=True):
    name: str
    count: int = 0


@dataclass(frozen=True)
class Point:
    x: int
    y: float


def record(key: bytes | None, value: bytes | None) -> Record:
    return Record("t", 1, 7, 1234, key, value, (("h", b"1"),))


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (Item, Item("a", 3)),
        (Point, Point(1, 2.5)),
        (dict[str, int], {"a": 1}),
        (list[Item], [Item("a")]),
        (int, -5),
        (str, "ä\n"),
        (bytes, b"\x00\xff"),
        (bool, True),
        (int | None, 4),
        (Any, {"a": [1, None]}),
    ],
)
def test_values_come_back(kind: Any, value: Any) -> None:
    topic = Topic("t", str, kind)
    effect = topic.record("k", value, headers=[("h", b"1")])
    written = lower(effect)
    assert isinstance(written, Write)
    assert written.headers == (("h", b"1"),)
    assert topic.decode(record(written.key, written.value)).value == value


@given(
    st.one_of(
        st.tuples(st.just(str), st.text()),
        st.tuples(st.just(bytes), st.binary()),
        st.tuples(st.just(int), st.integers()),
    )
)
def test_keys_come_back_and_equal_keys_are_equal_bytes(item: tuple[Any, Any]) -> None:
    kind, key = item
    topic = Topic("t", kind, int)
    try:
        encoded = topic.encode_key(key)
    except DataError:
        # Text with lone surrogates is not UTF-8, and JSON readers disagree about numbers above 64 bits.
        assert kind is str or not -(2**63) <= key < 2**64
        return
    assert topic.decode(record(encoded, b"1")).key == key
    assert topic.encode_key(key) == encoded


def test_tombstones_and_records_without_a_key() -> None:
    topic = Topic("t", str, Item)
    assert lower(topic.record("k", None)) == Write("t", b"k", None)
    seen = topic.decode(record(None, None))
    assert (seen.key, seen.value) == (None, None)
    assert (seen.topic, seen.partition, seen.offset, seen.timestamp_ms) == ("t", 1, 7, 1234)
    assert seen.headers == (("h", b"1"),)


@pytest.mark.parametrize("value", [b"", b"{", b'{"name": 3}', b"[]", b"\xff", b"null", b"[" * 100_000])
def test_a_value_of_another_shape_is_a_data_error(value: bytes) -> None:
    with pytest.raises(DataError, match="the value of topic t"):
        Topic("t", str, Item).decode(record(b"k", value))


@pytest.mark.parametrize("key_kind", [str, bytes, int])
@pytest.mark.parametrize("kind", [Item, str, bytes, dict[str, Any]])
def test_many_records_are_decoded_as_each_of_them_is(key_kind: Any, kind: Any) -> None:
    topic = Topic("t", key_kind, kind)
    good = [record(b"17", b'{"name": "a"}'), record(None, b'{"name": "b", "count": 2}'), record(b"-1", None)]
    found = topic.decode_all(good)
    assert found == [topic.decode(each) for each in good]
    assert all(type(each) is InputRecord for each in found)
    assert topic.decode_all([]) == []
    for bad in (record(b"\xff", b'{"name": "a"}'), record(b"1", b"\xff"), record(b"1", b'{"name": 3}')):
        try:
            seen = [topic.decode(each) for each in (*good, bad)]
        except DataError as error:
            with pytest.raises(type(error), match=re.escape(str(error))):
                topic.decode_all([*good, bad])
        else:
            assert topic.decode_all([*good, bad]) == seen


@pytest.mark.parametrize(("kind", "key"), [(str, b"\xff"), (int, b"x")])
def test_a_key_that_cannot_be_read_is_told_apart(kind: Any, key: bytes) -> None:
    with pytest.raises(UndecodableKey):
        Topic("t", kind, Item).decode(record(key, b"{"))


@pytest.mark.parametrize(
    ("key", "value"), [(1, Item("a")), ("k", Point(1, 2)), ("k", "text"), ("\ud800", Item("a")), (b"k", Item("a"))]
)
def test_what_is_not_of_the_declared_type_is_not_written(key: Any, value: Any) -> None:
    with pytest.raises(DataError):
        lower(Topic("t", str, Item).record(key, value))


class Rows(dict[bytes, bytes]):
    """A store as a view sees it."""

    def get(self, store: str, key: bytes) -> bytes | None:  # type: ignore[override]
        return super().get(key)

    def prefixed(self, store: str, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        yield from sorted(item for item in super().items() if item[0].startswith(prefix))


def test_a_view_reads_and_its_effects_are_values() -> None:
    state = State("counts", str, int)
    view = StateView(state, Rows({b"a": b"3"}))
    assert view.get("a") == 3
    assert view.get("b", 0) == 0
    assert "a" in view
    assert "b" not in view
    assert view.put("a", 4) == state.put("a", 4) == Put(state, "a", 4)
    assert view.delete("a") == Delete(state, "a")
    assert lower(view.put("a", 4)) == Change("counts", b"a", b"4")
    assert lower(view.delete("a")) == Change("counts", b"a", None)


def test_equal_effects_are_equal_so_that_a_test_can_compare_them() -> None:
    topic = Topic("t", str, Item)
    assert topic.record("k", Item("a")) == Produce(topic, "k", Item("a"))
    assert topic.record("k", Item("a")) != topic.record("k", Item("b"))


@pytest.mark.parametrize("kind", [object, type("Foreign", (), {}), dict[str, object]])
def test_a_type_that_cannot_be_read_back_is_refused(kind: Any) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read from JSON"):
        Topic("t", str, kind)


def test_a_recursive_type_is_fine() -> None:
    assert Topic("t", str, Tree).decode(record(b"k", b'{"children": [{"children": []}]}')).value == Tree([Tree([])])


class Tree(msgspec.Struct):
    children: list[Tree]
