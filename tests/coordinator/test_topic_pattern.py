"""Patterns of topic names: the same answers as Python's own engine, in linear time."""

from __future__ import annotations

import re

import hypothesis.strategies as st
import pytest
from hypothesis import given

from semel.coordinator.topic_pattern import InvalidPattern, TopicPattern


def _quantified(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{0,2}", "{1,}", "*?"])).map(
        "(?:{0[0]}){0[1]}".format
    )


_ATOMS = st.sampled_from(["a", "b", ".", "[ab]", "[^a]", r"\d", r"\w", r"\.", "[a-c-]", "0", "()"])
_PATTERNS = st.recursive(
    _ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda items: f"(?:{'|'.join(items)})"),
        _quantified(inner),
    ),
    max_leaves=8,
)


@given(_PATTERNS, st.text("abc.-0", max_size=6))
def test_it_answers_as_pythons_engine_does(pattern: str, name: str) -> None:
    assert TopicPattern(pattern).matches(name) == (re.fullmatch(pattern, name) is not None)


@pytest.mark.parametrize(
    ("pattern", "name", "found"),
    [
        ("orders|prices", "prices", True),
        ("^orders-.*$", "orders-1", True),
        ("^orders-.*$", "my-orders-1", False),
        ("(?i)Orders[A-C]", "ordersb", True),
        (r"a\.b", "axb", False),
        ("x{2", "x{2", True),
        ("", "", True),
    ],
)
def test_what_topics_are_found(pattern: str, name: str, found: bool) -> None:
    assert TopicPattern(pattern).matches(name) is found


@pytest.mark.parametrize(
    "pattern",
    [
        "([",
        "(",
        ")",
        "a)",
        "*",
        "a**",
        "[b-a]",
        r"\1",
        r"(?=a)",
        r"\b",
        "a{1001}",
        "((a{999}){999}){999}",
        "x" * 3000,
        "(" * 60 + ")" * 60,
        "\\",
    ],
)
def test_what_cannot_be_read_is_refused(pattern: str) -> None:
    with pytest.raises(InvalidPattern):
        TopicPattern(pattern)


def test_no_pattern_takes_long() -> None:
    name = "a" * 249
    assert not TopicPattern("(a+)+b").matches(name)
    assert not TopicPattern("(a|a)*(a|aa)*.*.*.*.*.*b").matches(name)
