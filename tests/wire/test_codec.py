"""The codec in C does what the one in Python does, with any bytes; many records at once are the same as one by one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hatch_build import CannotBuild, build
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from semel.errors import ConfigurationError
from semel.wire import codec, pycodec
from semel.wire.codec import Codec, choose
from semel.wire.partitioner import partition_for
from semel.wire.records import BATCH_OVERHEAD, BatchBuilder, decode_records, encode_batches, read_header

INT64 = st.integers(-(2**63), 2**63 - 1)
SMALL = st.integers(1_780_000_000_000, 1_780_000_100_000)
FIELD = st.none() | st.binary(max_size=80) | st.integers(60, 9_000).map(lambda n: b"v" * n)
HEADERS = st.lists(st.tuples(st.text(max_size=10), st.none() | st.binary(max_size=70)), max_size=3)
OUTPUTS = st.lists(
    st.tuples(st.integers(0, 4), FIELD, FIELD, SMALL, HEADERS)
    | st.tuples(st.none(), st.binary(max_size=20), FIELD, SMALL, HEADERS),
    max_size=40,
)
VARINTS = st.sampled_from([b"\0", b"\1", b"\2", b"\x7f", b"\x80\1", b"\xff\xff\3", b"\xff" * 9 + b"\1", b"\x80" * 10])

both = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def outcome(call: Callable[..., Any], *args: Any) -> Any:
    """What a call gave, or what it raised, word for word."""
    try:
        return call(*args)
    except Exception as error:
        return type(error), str(error)


@st.composite
def bodies(draw: st.DrawFn) -> tuple[bytes, int]:
    """Encoded records with a few bytes put in place of others, cut out or added; and how many there should be."""
    parts = [
        pycodec.encode_record(draw(SMALL) - 1_780_000_050_000, number, draw(FIELD), draw(FIELD), draw(HEADERS))
        for number in range(draw(st.integers(0, 4)))
    ]
    body = b"".join(parts)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, min(len(body), 400)))
        body = body[:at] + draw(st.binary(max_size=3) | VARINTS) + body[at + draw(st.integers(0, 4)) :]
    return body, len(parts)


@given(bodies(), INT64 | st.just(5), INT64 | SMALL, st.none() | SMALL, st.integers(0, 9))
@both
def test_damaged_records_are_the_same_records_or_the_same_error(
    native: Codec, body: tuple[bytes, int], base_offset: int, base_ts: int, append_time: int | None, last: int
) -> None:
    args = (b"..." + body[0], 3, 3 + len(body[0]), body[1], base_offset, base_ts, append_time, last, "t", 7)
    expected = outcome(pycodec.decode, *args)
    found = outcome(native.decode, *args)
    assert found == expected
    assert type(found) is type(expected)


@given(st.binary(max_size=120), st.integers(-1, 8))
@both
def test_any_bytes_are_the_same_records_or_the_same_error(native: Codec, body: bytes, count: int) -> None:
    args = (bytearray(body), 0, len(body), count, 0, 0, None, 9, "t", 7)
    assert outcome(native.decode, *args) == outcome(pycodec.decode, *args)


@given(st.tuples(INT64, st.integers(0, 2**31 - 1), FIELD, FIELD, HEADERS))
@both
def test_a_record_is_the_same_bytes(native: Codec, record: Any) -> None:
    assert native.encode_record(*record) == pycodec.encode_record(*record)


@given(OUTPUTS, st.integers(5, 9), st.integers(0, 20_000))
@both
def test_many_records_are_the_same_batches(native: Codec, records: Any, partitions: int, limit: int) -> None:
    assert native.encode(records, partitions, limit) == pycodec.encode(records, partitions, limit)


@given(st.binary(max_size=70), st.integers(1, 2**31 - 1))
@both
def test_keys_go_to_the_same_partitions(native: Codec, key: bytes, partitions: int) -> None:
    assert native.murmur2(key) == pycodec.murmur2(key)
    assert native.partition(key, partitions) == pycodec.partition(key, partitions)


@pytest.mark.parametrize(
    ("record", "error"),
    [
        ((None, None, b"v", 0, ()), ValueError("a record without a key needs a partition")),
        ((4, b"k", b"v", 0, ()), ValueError("there is no partition 4 among 4")),
        ((-1, b"k", b"v", 0, ()), ValueError("there is no partition -1 among 4")),
        ((0, "k", b"v", 0, ()), TypeError("keys and values are bytes or None")),
        ((0, b"k", 1, 0, ()), TypeError("keys and values are bytes or None")),
        ((0, b"k", bytearray(b"v"), 0, ()), TypeError("keys and values are bytes or None")),
        ((0, b"k", b"v", 2**63, ()), ValueError("timestamps and their differences must fit in 64 bits")),
        ((0, b"k", b"v", 0, [("a", b"b", b"c")]), ValueError("a header is a key and a value")),
        ((0, b"k", b"v", 0, [(b"a", b"b")]), TypeError("the key of a header is a str")),
        ((0, b"k", b"v", 0, [("a", "b")]), TypeError("keys and values are bytes or None")),
        ((0, b"k", b"v", 0, [("\ud800", b"b")]), UnicodeEncodeError),
    ],
)
def test_what_cannot_be_encoded_is_refused_alike(native: Codec, record: Any, error: Any) -> None:
    good = (0, b"k", b"v", 1, ())
    for implementation in (pycodec, native):
        kind, text = outcome(implementation.encode, [good, record], 4, 1_000)
        assert kind is (error if isinstance(error, type) else type(error))
        assert isinstance(error, type) or text == str(error)
    if record[0] == 0:
        assert outcome(native.encode_record, record[3], 0, *record[1:3], record[4])[0] is kind


def test_timestamps_too_far_apart_are_refused_alike(native: Codec) -> None:
    records: Any = [(0, None, None, -(2**63), ()), (0, None, None, 2**62, ())]
    for implementation in (pycodec, native):
        with pytest.raises(ValueError, match="64 bits"):
            implementation.encode(records, 1, 1_000)


def test_a_place_outside_the_buffer_is_refused(native: Codec) -> None:
    for implementation in (pycodec, native):
        for start, stop in ((-1, 2), (2, 1), (0, 4)):
            with pytest.raises(ValueError, match="do not lie in the buffer"):
                implementation.decode(b"abc", start, stop, 0, 0, 0, None, 0, "t", 0)


def test_a_list_that_changes_under_the_encoder_does_no_harm(native: Codec) -> None:
    class Emptying:
        def __len__(self) -> int:
            records.clear()
            return 1

        def __getitem__(self, _: int) -> Any:
            return ("name", b"value")

    records: Any = [(0, b"k" * 50, b"v" * 50, 0, Emptying()), (0, b"k", b"v", 0, ())]
    [(_, count, *_, body)] = native.encode(records, 1, 1_000)
    assert count == 1
    assert pycodec.decode(body, 0, len(body), 1, 0, 0, None, 0, "t", 0)[0].headers == (("name", b"value"),)


def place_of(record: Any) -> int:
    return partition_for(record[1], 5) if record[0] is None else record[0]


@pytest.mark.usefixtures("each_codec")
@given(OUTPUTS, st.integers(0, 4))
@settings(max_examples=100, deadline=None)
def test_many_at_once_are_what_one_by_one_would_be(records: Any, compression: int) -> None:
    limit = 4_000
    found = encode_batches(records, 5, limit, compression)
    assert sum(builder.count for _, builder in found) == len(records)
    for wanted in range(5):
        mine = [record for record in records if place_of(record) == wanted]
        read = []
        for partition, builder in found:
            if partition == wanted:
                batch = builder.build(producer_id=1, producer_epoch=0, base_sequence=0, transactional=True)
                alone = BatchBuilder(compression)
                for record in mine[len(read) :][: builder.count]:
                    alone.append(*record[1:])
                assert builder.size == alone.size
                assert builder.size <= limit or builder.count == 1
                assert batch == alone.build(producer_id=1, producer_epoch=0, base_sequence=0, transactional=True)
                read += decode_records(batch, 0, read_header(batch), "t", wanted)
        assert [(r.key, r.value, r.timestamp_ms, list(r.headers)) for r in read] == [
            (key, value, timestamp, headers) for _, key, value, timestamp, headers in mine
        ]


@pytest.mark.usefixtures("each_codec")
def test_a_batch_that_came_of_many_takes_one_more() -> None:
    [(_, builder)] = encode_batches([(0, b"a", b"1", 5, ()), (0, b"b", b"2", 9, ())], 1, 1_000)
    builder.append(b"c", b"3", 7)
    batch = builder.build()
    assert builder.size == len(batch) == BATCH_OVERHEAD + 3 * 9
    assert [(r.key, r.timestamp_ms) for r in decode_records(batch, 0, read_header(batch), "t", 0)] == [
        (b"a", 5),
        (b"b", 9),
        (b"c", 7),
    ]
    assert builder.max_timestamp == 9


# --- Which one is at work ---


def test_without_a_compiler_nothing_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "/bin/false")
    with pytest.raises(CannotBuild, match="/bin/false ended with 1"):
        build("semel/wire/_codec", tmp_path / "x.so")
    monkeypatch.setenv("CC", str(tmp_path / "no-compiler"))
    with pytest.raises(CannotBuild, match="no-compiler"):
        build("semel/wire/_codec", tmp_path / "x.so")
    assert list(tmp_path.iterdir()) == []


def test_without_the_extension_python_does_it_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "semel.wire._codec", None)
    choice = choose("")
    assert (choice.codec, choice.name) == (pycodec, "python")
    assert re.search("the one in C is faster, but it was installed without a C compiler", choice.why)
    with pytest.raises(ConfigurationError, match="Install semel again where a C compiler"):
        choose("native")


@pytest.mark.parametrize(
    ("wish", "code", "says"),
    [("python", 0, "record codec: python, as SEMEL_CODEC says"), ("", 0, "record codec: "), ("rust", 2, "neither")],
)
def test_the_command_says_which_one_is_at_work(wish: str, code: int, says: str) -> None:
    argv = [sys.executable, "-m", "semel", "--version"]
    done = subprocess.run(argv, env=os.environ | {"SEMEL_CODEC": wish}, capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    assert says in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_in_ci_the_extension_is_built_and_at_work() -> None:
    """What `make test` runs on must be what users get: a build that fails there is a failure, not a fallback."""
    if os.environ.get("CI") == "true" and not os.environ.get("SEMEL_CODEC"):
        assert codec.chosen.name == "native", codec.chosen.why
        assert callable(import_module("semel.processing._quick").run), "it is built, and at work"


@pytest.mark.soak
def test_no_byte_is_read_or_written_that_is_not_ours() -> None:
    """What runs in C under the address and undefined-behaviour sanitizers of gcc."""
    asan = subprocess.run(["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    environ = os.environ | {
        "LD_PRELOAD": asan.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python itself leaks at its end.
        "PYTHONMALLOC": "malloc",  # Every object is an allocation with guarded ends.
        "CC": "gcc",
        "CFLAGS": "-fsanitize=address,undefined -fno-sanitize-recover=all -g -O1",
    }
    argv = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not soak"]
    argv += ["-k", "not java and not compiler and not command and not without_the_extension"]
    folder = Path(__file__).parents[1]
    names = (
        "wire/test_codec",
        "wire/test_records",
        "wire/test_partitioner",
        "wire/test_golden",
        "processing/test_quick",
    )
    files = [str(folder / f"{name}.py") for name in names]
    done = subprocess.run([*argv, *files], env=environ, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
