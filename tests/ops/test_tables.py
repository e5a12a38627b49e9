"""Listings: the same rows for people and for programs."""

from __future__ import annotations

import json

from semel.ops.tables import render

ROWS = [
    {"transactional_id": "shop.reserve.a.0", "age_seconds": 0.4, "partitions": 3},
    {"transactional_id": "shop.x.a.11", "age_seconds": None, "partitions": 0, "more": [1]},
]


def test_text_is_aligned_and_shows_the_named_columns_only() -> None:
    lines = render(ROWS, ["transactional_id", "age_seconds", "partitions"], "text").splitlines()
    assert lines == [
        "TRANSACTIONAL-ID  AGE-SECONDS  PARTITIONS",
        "shop.reserve.a.0  0.4          3",
        "shop.x.a.11                    0",
    ]


def test_no_rows_are_a_header_or_an_empty_array() -> None:
    assert render([], ["topic", "partition"], "text") == "TOPIC  PARTITION"
    assert json.loads(render([], ["topic", "partition"], "json")) == []


def test_json_has_every_field_with_its_type() -> None:
    assert json.loads(render(ROWS, ["partitions"], "json")) == ROWS


def test_what_others_wrote_cannot_break_out_of_its_line() -> None:
    """A key or an error message comes from outside; a terminal would obey its control characters."""
    text = render([{"key": "a\nFAKE  row", "message": "\x1b[2Jgone"}], ["key", "message"], "text")
    assert len(text.splitlines()) == 2
    assert "\x1b" not in text
