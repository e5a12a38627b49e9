"""The search sink on a real OpenSearch: the suite that every sink runs, and what is particular to documents.

All of it is one module, so that one node serves it.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import inspect
import json
import logging
import random
import signal
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from semel import App, Version
from semel.errors import ConfigurationError
from semel.ops.parking import StoreShelf
from semel.processing.parklog import Command
from semel.processing.ports import free_ports
from semel.sinks.contract import Applied, PartitionsLost, PartitionsStopped, Stop, StopReason, Unavailable
from semel.sinks.search import effects as effects_module
from semel.sinks.search import store as store_module
from semel.sinks.search.effects import DocumentRefused, SearchEffects
from semel.sinks.search.http import Answer, SearchConnection
from semel.sinks.search.indexes import migrate
from semel.sinks.search.store import SearchStore
from tests.services.certificates import Authority
from tests.services.opensearch import OpenSearchNode
from tests.sinks import child, ledger, test_contract, test_crashes, test_engine_kafka, test_judgement, test_release
from tests.sinks.cutting_proxy import CuttingProxy, When
from tests.sinks.ledger import a_slice, claim, partition, record

# A busy machine takes its time to start a JVM.
pytestmark = [pytest.mark.opensearch, pytest.mark.timeout(300)]

LONG = 2**62


@pytest.fixture
def url(opensearch: OpenSearchNode) -> str:
    return opensearch.new_database()


@pytest.fixture
def any_url(url: str) -> str:
    return url


for _suite in (test_contract, test_crashes, test_judgement, test_release):
    for _name, _test in inspect.getmembers(_suite, inspect.isfunction):
        if _name.startswith("test_") and list(inspect.signature(_test).parameters)[:1] == ["any_url"]:
            globals()[_name] = _test
# Which store it is stands in its own parameters.
del globals()["test_a_kill_within_a_release_leaves_all_or_nothing_of_it"]

broker = test_engine_kafka.broker
test_kills_and_pauses_leave_every_effect_there_once = (
    test_engine_kafka.test_kills_and_pauses_leave_every_effect_there_once
)


def putting(put: Callable[[Any, SearchEffects], None]) -> Any:
    """A handler that does something for each record."""

    def handler(records: Sequence[Any], index: SearchEffects) -> None:
        for item in records:
            put(item, index)

    return handler


def by_value(records: Sequence[Any], index: SearchEffects) -> None:
    """A document for each key; its version is the value, and 0 deletes it."""
    for item in records:
        if item.value % 100:
            index.put("ledger", item.key, {"customer": item.key, "cents": item.value}, version=item.value)
        else:
            index.delete("ledger", item.key, version=item.value)


def found(url: str) -> dict[str, tuple[int, Any]]:
    """Every document by its id: its version, and what it says."""
    return {hit["_id"]: (hit["_version"], hit["_source"]) for hit in ledger.documents(url)}


# --- Versions ---


def test_each_document_ends_at_its_newest_version_whatever_comes_late_or_twice(url: str) -> None:
    sink = ledger.sink(url, by_value)
    sink.take_over([claim(0), claim(1)])
    sink.apply([a_slice(record(0, "ann", 7), record(1, "bob", 3), record(2, "ann", 5))])
    sink.apply([a_slice(record(0, "ann", 6, 1), record(1, "bob", 4, 1), part=1)])
    assert found(url) == {
        "ann": (7, {"customer": "ann", "cents": 7}),
        "bob": (4, {"customer": "bob", "cents": 4}),
    }
    sink.close()
    mended = ledger.sink(url, putting(lambda item, index: index.put("ledger", item.key, {"cents": 700}, version=7)))
    mended.take_over([claim(0)])
    mended.apply([a_slice(record(3, "ann", 7))])
    assert found(url)["ann"] == (7, {"cents": 700}), "a mended handler gives the same version another content"
    mended.close()


def test_a_deletion_is_a_marker_that_an_older_version_does_not_undo(url: str) -> None:
    """OpenSearch itself forgets the version of a deleted document: here at once, else after a restart or a minute."""
    sink = ledger.sink(url, by_value)
    sink.take_over([claim()])
    with ledger.store(url) as store:
        settings = json.dumps({"index.gc_deletes": "0s"}).encode()
        assert store.call("PUT", f"/{store.prefix}ledger/_settings", settings).status == 200
        path = f"/{store.prefix}ledger/_doc/plain?version_type=external_gte&version="
        assert store.call("PUT", f"{path}8", b'{"cents": 8}').status == 201
        assert store.call("DELETE", f"{path}9").status == 200
        deadline = time.monotonic() + 30
        while store.call("PUT", f"{path}8", b'{"cents": 8}').status != 201:
            assert time.monotonic() < deadline, "it is remembered: then no marker would be needed"
            store.call("POST", f"/{store.prefix}ledger/_refresh")
    sink.apply([a_slice(record(0, "ann", 101), record(1, "ann", 200), record(2, "bob", 300))])
    sink.apply([a_slice(record(3, "ann", 101), record(4, "bob", 299))])
    assert found(url)["ann"] == (200, {"deleted": True})
    assert found(url)["bob"] == (300, {"deleted": True})
    sink.apply([a_slice(record(5, "ann", 201))])
    assert found(url)["ann"] == (201, {"customer": "ann", "cents": 201})
    sink.close()


def test_a_zombie_changes_no_document_that_its_successor_wrote(url: str) -> None:
    zombie = ledger.sink(url, putting(lambda item, index: index.put("ledger", item.key, {"cents": item.value})))
    zombie.take_over([claim()])
    batch = [a_slice(record(0, "ann", 1), record(1, "bob", 1))]
    owner = ledger.sink(url, putting(lambda item, index: index.delete("ledger", item.key)))
    owner.take_over([claim()])
    owner.apply([a_slice(record(0, "ann", 1), record(1, "bob", 1), record(2, "ann", 2), record(3, "bob", 2))])
    with pytest.raises(PartitionsLost, match=r"taken over by semel .*owner epoch 2, ours was 1"):
        zombie.apply(batch)
    assert found(url) == {"ann": (2, {"deleted": True}), "bob": (3, {"deleted": True})}
    assert ledger.position(url) == (4, 2)
    owner.close()
    zombie.close()


@pytest.mark.soak
@pytest.mark.parametrize("how", ["kill", "shut_down"])
def test_markers_positions_and_versions_outlive_the_server(opensearch: OpenSearchNode, how: str) -> None:
    url = opensearch.new_database()
    zombie, owner = ledger.sink(url, by_value), ledger.sink(url, by_value)
    zombie.take_over([claim()])
    batch = [a_slice(record(0, "ann", 101))]
    owner.take_over([claim()])
    owner.apply([*batch])
    owner.apply([a_slice(record(1, "ann", 200))])
    with ledger.store(url) as store:
        store.call("POST", f"/{store.prefix}ledger/_flush")
    getattr(opensearch, how)()
    with pytest.raises(Unavailable):
        owner.apply([a_slice(record(2, "bob", 201))])
    opensearch.start()
    with pytest.raises(PartitionsLost):
        zombie.apply(batch)
    assert owner.apply([a_slice(record(2, "bob", 201))]) == Applied(1, 0, 1)
    assert found(url) == {"ann": (200, {"deleted": True}), "bob": (201, {"customer": "bob", "cents": 201})}
    assert ledger.position(url) == (3, 2)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_server_that_is_killed_again_and_again_loses_nothing(opensearch: OpenSearchNode) -> None:
    url, rng = opensearch.new_database(), random.Random(9)
    sink = ledger.sink(url)
    sink.take_over([claim()])

    def strike() -> None:
        opensearch.kill()
        opensearch.start()

    strikes: list[threading.Timer] = []
    failed = 0
    while (at := sink.position(partition(0))) < 3_000 or len(strikes) < 6 or strikes[-1].is_alive():
        if len(strikes) < 6 and at >= 400 * (len(strikes) + 1) and not any(timer.is_alive() for timer in strikes):
            strikes.append(threading.Timer(rng.random() * 0.2, strike))  # Somewhere within the requests that follow.
            strikes[-1].start()
        try:
            sink.apply([a_slice(*(record(offset, f"k{offset % 7}", 1) for offset in range(at, at + 5)))])
        except Unavailable:
            failed += 1
            time.sleep(0.05)
    assert failed
    assert ledger.seen(url) == [(0, offset) for offset in range(at)]
    newest = {hit["_id"]: hit["_version"] for hit in ledger.documents(url) if hit["_id"].startswith("newest-")}
    assert newest == {f"newest-0-k{n}": max(o for o in range(at) if o % 7 == n) for n in range(7)}
    sink.close()


# --- What is killed and what is cut ---


def test_a_kill_between_documents_and_position_does_them_again(url: str) -> None:
    process = test_crashes.start(url, "sink.before_position:kill:2")
    assert process.wait(60) == -signal.SIGKILL, "the failpoint was not reached"
    process.communicate()
    assert any(offset >= ledger.position(url, part)[0] for part, offset in ledger.seen(url)), "nothing to do again"
    child.work(url, test_crashes.TOTAL)
    test_crashes.check_exact(url)


@pytest.mark.soak
def test_a_kill_within_a_release_is_carried_out_by_the_next_owner(url: str) -> None:
    test_release.test_a_kill_within_a_release_leaves_all_or_nothing_of_it(url, "sink.before_position:kill:2")


def test_a_position_without_an_answer_is_settled(opensearch: OpenSearchNode) -> None:
    """It did not reach the server, is on its way, was carried out: done once in each case."""
    proxy = CuttingProxy(opensearch.port, b'"kind":"position"')
    url = opensearch.new_database()
    sink = ledger.sink(url.replace(str(opensearch.port), str(proxy.port)))
    sink.take_over([claim()])
    whens: tuple[When, ...] = ("before", "at", "after")
    for number, when in enumerate(whens):
        at = 2 * number
        batch = [a_slice(record(at, "ann", 2), record(at + 1, f"bob{at}", -1))]
        proxy.when, proxy.refuse = when, True
        with pytest.raises(Unavailable):
            sink.apply(batch)
        proxy.refuse = False
        done = sink.apply(batch)
        assert (done.records, done.parked) == (2, 1), "once, whether it was settled or done again"
        assert proxy.cuts == number + 1
        assert sink.apply(batch) == Applied()
    assert ledger.position(url)[0] == 6
    assert ledger.seen(url) == [(0, 0), (0, 2), (0, 4)]
    assert [row[1] for row in ledger.parked(url)] == [1, 3, 5]
    sink.close()
    proxy.close()


@pytest.mark.soak
def test_a_connection_that_was_closed_while_idle_is_opened_again(opensearch: OpenSearchNode) -> None:
    proxy = CuttingProxy(opensearch.port, b"_bulk")
    url = opensearch.new_database()
    sink = ledger.sink(url.replace(str(opensearch.port), str(proxy.port)))
    sink.take_over([claim()])
    proxy.when = "before"  # As a server does that has closed it.
    assert sink.apply([a_slice(record(0, "ann", 1))]) == Applied(1, 0, 1)
    assert proxy.cuts == 1
    sink.close()
    proxy.close()


# --- Whose fault ---


def test_a_document_that_does_not_fit_parks_its_record_alone(url: str) -> None:
    def put(item: Any, index: SearchEffects) -> None:
        document: dict[str, Any] = {"customer": item.key, "cents": item.value}
        if item.value == 13:
            document["cents"] = "a lot"
        if item.value == 14:
            document["colour"] = "not in the mapping"
        index.put("ledger", item.key, document)

    sink = ledger.sink(url, putting(put))
    sink.take_over([claim()])
    values = [("ann", 1), ("bob", 13), ("ann", 2), ("eve", 14), ("bob", 3), ("kim", 4)]
    done = sink.apply([a_slice(*(record(offset, key, value) for offset, (key, value) in enumerate(values)))])
    assert (done.records, done.parked) == (6, 3)
    assert ledger.parked(url) == [
        (0, 1, b"bob", "DocumentRefused"),
        (0, 3, b"eve", "DocumentRefused"),
        (0, 4, b"bob", None),
    ]
    assert {key: version for key, (version, _) in found(url).items() if key in ("ann", "kim")} == {"ann": 2, "kim": 5}
    with ledger.store(url) as store:
        fault = store.parked(ledger.place())[1].fault
    assert "failed to parse field [cents]" in fault.message
    sink.close()
    mended = ledger.sink(url, putting(lambda item, index: index.put("ledger", item.key, {"cents": item.value})))
    mended.take_over([claim()])
    ledger.ask(url, "retry", 1, 3)
    mended.apply([a_slice(record(6, "ann", 9))])  # The command came between, and is not lost.
    mended.carry_out()
    assert ledger.parked(url) == []
    assert {key: version for key, (version, _) in found(url).items()} == {"ann": 6, "bob": 4, "eve": 3, "kim": 5}
    mended.close()


def test_an_index_that_takes_no_writes_is_an_outage_and_parks_nothing(url: str) -> None:
    sink = ledger.sink(url)
    sink.take_over([claim()])
    batch = [a_slice(record(0, "ann", 1))]
    with ledger.store(url) as store:

        def block(value: bool) -> None:
            body = json.dumps({"index.blocks.read_only_allow_delete": value}).encode()
            assert store.call("PUT", f"/{store.prefix}ledger/_settings", body).status == 200

        block(True)
        for _ in range(2):
            with pytest.raises(Unavailable, match="cluster_block_exception"):
                sink.apply(batch)
        assert sink._store.bulk_items < store_module.BULK_ITEMS, "429 makes the requests smaller"
        block(False)
        store.call("POST", f"/{store.prefix}ledger/_close")
        with pytest.raises(Unavailable, match="closed"):
            sink.apply(batch)
        store.call("POST", f"/{store.prefix}ledger/_open?wait_for_active_shards=1")
    assert sink.apply(()) == Applied(), "so it is found out whether it works again"
    assert sink.apply(batch) == Applied(1, 0, 1)
    assert ledger.parked(url) == []
    sink.close()


ERRORS = [
    (503, "unavailable_shards_exception", "unavailable_shards_exception"),
    (429, "rejected_execution_exception", "rejected_execution_exception"),
    (404, "index_not_found_exception", "index_not_found_exception"),
    (403, "cluster_block_exception", "cluster_block_exception"),
    (500, "null_pointer_exception", "whether the record is at fault is not known yet"),
    (400, "illegal_argument_exception", "whether the record is at fault is not known yet"),
]


def test_errors_of_items_by_class(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a healthy node does not answer: put in place of its answer for one document."""
    sink = ledger.sink(url, putting(lambda item, index: index.put("ledger", item.key, {"cents": item.value})))
    sink.take_over([claim()])
    real, bad = SearchStore.call, {"status": 0, "error": {"type": "", "reason": "as if"}}

    def call(self: SearchStore, method: str, path: str, body: bytes | None = None, **options: Any) -> Answer:
        answer = real(self, method, path, body, **options)
        heads = [] if body is None or not path.startswith("/_bulk") else body.splitlines()[::2]
        if not bad["status"] or not any(b'"bad' in head for head in heads):
            return answer
        items = [{"index": bad if b'"bad' in head else {"status": 201}} for head in heads]
        return Answer(200, {"errors": True, "items": items})

    monkeypatch.setattr(SearchStore, "call", call)
    parked = []
    for number, (status, kind, message) in enumerate(ERRORS):
        bad.update(status=status, error={"type": kind, "reason": "as if"})
        at = 3 * number
        batch = [a_slice(record(at, "ann", 1), record(at + 1, f"bad{at}", 2), record(at + 2, "eve", 3))]
        with pytest.raises(Unavailable, match=message):
            sink.apply(batch)
        assert [row[1] for row in ledger.parked(url)] == parked
        if status in (400, 500):  # Others succeeded meanwhile, so the second time it is the document.
            parked.append(at + 1)
        else:
            bad["status"] = 0
        sink.apply(batch)
        assert [row[1] for row in ledger.parked(url)] == parked
    sink.close()


@pytest.mark.soak
def test_bulk_requests_are_bounded_and_made_smaller_where_the_server_says_so(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    real = SearchStore.call

    def call(self: SearchStore, method: str, path: str, body: bytes | None = None, **options: Any) -> Answer:
        if path.startswith("/_bulk") and body is not None and b"semel:" not in body:
            sizes.append(len(body.splitlines()) // 2)
            if len(body) > 4_000:
                return Answer(413, None)
        return real(self, method, path, body, **options)

    monkeypatch.setattr(SearchStore, "call", call)
    monkeypatch.setattr(store_module, "BULK_BYTES", 3_000)
    monkeypatch.setattr(store_module, "BULK_ITEMS", 8)
    text = {"large": "x" * 5_000, "middle": "x" * 2_500}

    def put(item: Any, index: SearchEffects) -> None:
        index.put("ledger", item.key, {"customer": text.get(item.key, item.key)})

    sink = ledger.sink(url, putting(put))
    sink._store.bulk_items = 8
    sink.take_over([claim()])
    keys = [*(f"k{number}" for number in range(20)), "middle", "k20", "large", "k21"]
    done = sink.apply([a_slice(*(record(offset, key, 1) for offset, key in enumerate(keys)))])
    assert done.parked == 1
    assert [row[1] for row in ledger.parked(url)] == [keys.index("large")]
    assert set(found(url)) == set(keys) - {"large"}
    assert max(sizes) == 8
    sink.close()


# --- Indexes that are not what they were ---


def test_an_index_that_was_deleted_is_built_anew_while_the_log_is_whole(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    sink = ledger.sink(url)
    sink.take_over([claim()])
    sink.apply([a_slice(record(0, "ann", 1), record(1, "bob", -1))])
    with ledger.store(url) as store:
        store.call("DELETE", f"/{store.prefix}ledger")
    sink._look_due = 0.0
    with pytest.raises(PartitionsLost, match="written to other indexes"):
        sink.apply([a_slice(record(2, "ann", 3))])
    with caplog.at_level(logging.WARNING):
        assert sink.take_over([claim()]) == {partition(0): 0}
    assert "built anew from offset 0" in caplog.text
    sink.apply([a_slice(record(0, "ann", 1), record(1, "bob", -1), record(2, "ann", 3))])
    assert ledger.seen(url) == [(0, 0), (0, 2)]
    assert [row[1] for row in ledger.parked(url)] == [1]
    with ledger.store(url) as store:
        store.call("DELETE", f"/{store.prefix}ledger")
    stop = sink.take_over([claim(log_start=2)])[partition(0)]
    assert isinstance(stop, Stop)
    assert stop.reason is StopReason.DATA_GAP
    assert "was at offset 3" in stop.detail
    ledger.accept_start(url)
    assert sink.take_over([claim(log_start=2)]) == {partition(0): 2}
    assert [row[1] for row in ledger.parked(url)] == [1], "it cannot come again from the log"
    sink.close()


@pytest.mark.soak
def test_in_production_a_missing_index_is_waited_for_and_said(url: str) -> None:
    with pytest.raises(ConfigurationError, match="semel migrate APP"):
        ledger.sink(url, create_tables=False)
    indexes = {"ledger": ledger.LEDGER}
    text = migrate(url, indexes, print_only=True)
    assert '"deleted"' in text
    with pytest.raises(ConfigurationError, match="semel migrate APP"):
        ledger.sink(url, create_tables=False)
    assert migrate(url, indexes, print_only=False) == text
    sink = ledger.sink(url, create_tables=False)
    with ledger.store(url) as store:
        store.call("DELETE", f"/{store.prefix}ledger")
    with pytest.raises(Unavailable, match="It was deleted"):
        sink.take_over([claim()])
    sink.close()


@pytest.mark.soak
def test_an_alias_that_is_switched_leads_to_a_new_build(url: str) -> None:
    with ledger.store(url) as store:
        body = json.dumps({**ledger.LEDGER, "aliases": {f"{store.prefix}ledger": {}}}).encode()
        assert store.call("PUT", f"/{store.prefix}ledger-1", body).status == 200
        sink = ledger.sink(url)
        sink.take_over([claim()])
        sink.apply([a_slice(record(0, "ann", 1))])
        assert store.call("PUT", f"/{store.prefix}ledger-2", json.dumps(ledger.LEDGER).encode()).status == 200
        alias = f"{store.prefix}ledger"
        actions = [
            {"remove": {"index": f"{alias}-1", "alias": alias}},
            {"add": {"index": f"{alias}-2", "alias": alias}},
        ]
        assert store.call("POST", "/_aliases", json.dumps({"actions": actions}).encode()).status == 200
        assert ledger.seen(url) == []
        assert sink.take_over([claim()]) == {partition(0): 0}
        sink.apply([a_slice(record(0, "ann", 1), record(1, "ann", 2))])
        assert ledger.seen(url) == [(0, 0), (0, 1)]
        add = [{"add": {"index": f"{alias}-1", "alias": alias}}]
        store.call("POST", "/_aliases", json.dumps({"actions": add}).encode())
    with pytest.raises(Unavailable, match="none of them is its write index"):
        sink.take_over([claim()])
    sink.close()
    with pytest.raises(ConfigurationError, match="none of them is its write index"):
        ledger.sink(url)


@pytest.mark.soak
def test_a_field_that_is_no_marker_is_refused(url: str) -> None:
    with ledger.store(url) as store:
        body = json.dumps({"mappings": {"properties": {"deleted": {"type": "date"}}}}).encode()
        store.call("PUT", f"/{store.prefix}ledger", body)
    with pytest.raises(ConfigurationError, match="has to be boolean"):
        ledger.sink(url)


@pytest.mark.soak
def test_a_position_that_is_gone_stops_the_partition(url: str) -> None:
    sink = ledger.sink(url)
    sink.take_over([claim()])
    sink.apply([a_slice(record(0, "ann", 1))])
    with ledger.store(url) as store:
        store.call("DELETE", f"/{store.prefix}semel-sink")
    with pytest.raises(PartitionsStopped, match="somebody deleted it") as stopped:
        sink.apply([a_slice(record(1, "ann", 1))])
    assert stopped.value.stops[partition(0)].reason is StopReason.DATA_GAP
    sink.close()


@pytest.mark.soak
def test_partitions_that_were_added_stop_who_takes_offsets_for_versions(url: str) -> None:
    four = claim()._replace(partitions=4)
    sink = ledger.sink(url)
    sink.take_over([four])
    sink.apply([a_slice(record(0, "ann", 1))])
    sink.take_over([four._replace(partitions=8)])
    with pytest.raises(PartitionsStopped, match="had 4 partitions when this sink began, and has 8 now") as stopped:
        sink.apply([a_slice(record(1, "ann", 1))])
    assert stopped.value.stops[partition(0)].reason is StopReason.PARTITIONS_ADDED
    sink.close()
    own = ledger.sink(url, by_value)
    own.take_over([four._replace(partitions=8)])
    assert own.apply([a_slice(record(1, "ann", 1))]).records == 1
    own.close()


# --- What a handler may note ---


def refused(call: Callable[[SearchEffects], None]) -> str:
    item = ledger.TOPIC.decode(record(5, "ann", 1))
    effects = SearchEffects([item], {"ledger"})
    with pytest.raises(DocumentRefused) as raised:
        call(effects)
    assert effects.noted == []
    return str(raised.value)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda index: index.put("other", "ann", {}), "is no index of the app, which declares ledger"),
        (lambda index: index.put("ledger", "bob", {}), "no record of this call has the key 'bob'"),
        (lambda index: index.put("ledger", "", {}, version=1), "an id is text"),
        (lambda index: index.put("ledger", "x" * 513, {}, version=1), "an id is text"),
        (lambda index: index.put("ledger", True, {}, version=1), "an id is text"),
        (lambda index: index.put("ledger", "ann", {}, version=-1), "is not between"),
        (lambda index: index.put("ledger", "ann", {}, version=2**63), "is not between"),
        (lambda index: index.put("ledger", "ann", {}, version="7"), "a version is an int or a record"),
        (lambda index: index.put("ledger", "ann", {}, version=True), "a version is an int or a record"),
        (lambda index: index.put("ledger", "ann", [1]), "a document is an object"),
        (lambda index: index.put("ledger", "ann", {"x": object()}), "cannot be written as JSON"),
        (lambda index: index.put("ledger", "ann", {"deleted": False}), "the field 'deleted' marks"),
        (lambda index: index.put("ledger", "ann", {"x": "y" * 2_000}), "above 1000"),
    ],
)
def test_what_cannot_be_written_is_refused_where_it_is_noted(
    monkeypatch: pytest.MonkeyPatch, call: Callable[[SearchEffects], None], text: str
) -> None:
    monkeypatch.setattr(effects_module, "DOCUMENT_BYTES_MAX", 1_000)
    assert text in refused(call)


def test_too_many_documents_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effects_module, "EFFECTS_MAX", 3)
    effects = SearchEffects()
    for number in range(3):
        effects.put("any", number, {}, version=LONG)
    with pytest.raises(DocumentRefused, match="more than 3 documents"):
        effects.put("any", 4, {}, version=1)
    effects.end()
    with pytest.raises(DocumentRefused, match="after the handler ended"):
        effects.delete("any", 1, version=1)


def test_versions_that_a_record_gives() -> None:
    records = [ledger.TOPIC.decode(record(offset, key, 1)) for offset, key in ((5, "ann"), (6, "bob"), (8, "ann"))]
    index = SearchEffects(records)
    index.put("any", "ann", {"nested": {"deleted": True}})
    index.put("any", "ann/de", {}, version=records[0])
    index.delete("any", "bob", version=LONG)
    assert [(note.id, note.version, note.by_position) for note in index.noted] == [
        ("ann", 8, True),
        ("ann/de", 5, True),
        ("bob", LONG, False),
    ]


# --- The connection ---


@contextlib.contextmanager
def answering(body: bytes, status: int = 200, tls: ssl.SSLContext | None = None) -> Iterator[int]:
    """A server that gives one answer to everything; its port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_what_is_no_opensearch_is_an_outage_without_a_password_in_it() -> None:
    for body, status, text in (
        (b"<html>", 502, "<html>"),
        (b'{"error": "no"}', 401, "Check the user"),
        (b"[]", 200, ""),
    ):
        with answering(body, status) as port, pytest.raises(Unavailable) as raised:
            ledger.sink(f"opensearch://me:hunter2@127.0.0.1:{port}")
        assert text in str(raised.value)
        assert "hunter2" not in str(raised.value)
    with pytest.raises(Unavailable) as raised:
        ledger.sink(f"opensearch://me:hunter2@127.0.0.1:{free_ports(1)[0]}")
    assert "hunter2" not in str(raised.value) + repr(SearchStore("opensearch://me:hunter2@host"))


def test_tls_is_checked_against_the_authority_that_is_named(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority.sign("server", "/CN=search"))
    with answering(b'{"version": {"number": "2.19.3"}}', tls=context) as port:
        trusting = SearchConnection(f"opensearchs://127.0.0.1:{port}?ssl_ca={authority.certificate}")
        assert trusting.call("GET", "/").body["version"]["number"] == "2.19.3"
        trusting.close()
        with pytest.raises(Unavailable, match="certificate verify failed"):
            SearchConnection(f"opensearchs://127.0.0.1:{port}").call("GET", "/")
    with pytest.raises(ConfigurationError, match="ssl_ca=/nowhere"):
        SearchConnection("opensearchs://127.0.0.1?ssl_ca=/nowhere")


@pytest.mark.parametrize(
    "wrong", ["opensearch://", "opensearch://host:port", "http://host:9200", "opensearch://host?prefx=a"]
)
def test_a_url_that_names_nothing_is_refused(wrong: str) -> None:
    with pytest.raises(ConfigurationError, match="options are prefix= and ssl_ca="):
        SearchConnection(wrong)


# --- Declaring, operating ---


def test_a_search_is_declared_and_put_elsewhere_by_its_variable() -> None:
    app = App("shop")
    orders = app.topic("orders", key=str, value=int)
    search = app.search("opensearch://localhost:9200", indexes={"orders": {}})

    @app.sink(orders, search)
    def view(records: Any, index: SearchEffects) -> None: ...

    app.use_databases({"SEMEL_SEARCH": "opensearchs://other:9201"})
    assert app.sinks["view"].database.url == "opensearchs://other:9201"
    assert app.sinks["view"].database.indexes == {"orders": {}}
    with pytest.raises(ConfigurationError, match="SEMEL_SEARCH_X names no search of app shop: it takes SEMEL_SEARCH"):
        app.use_databases({"SEMEL_SEARCH_X": "opensearch://other"})
    with pytest.raises(ConfigurationError, match="is no search"):
        app.search("sqlite:///x.db", indexes={"a": {}}, name="other")
    with pytest.raises(ConfigurationError, match="declared twice"):
        app.search("opensearch://localhost", indexes={"a": {}})
    with pytest.raises(ConfigurationError, match="has no index"):
        app.search("opensearch://localhost", indexes={}, name="none")
    with pytest.raises(ConfigurationError, match="is no name for an index"):
        app.search("opensearch://localhost", indexes={"semel-sink": {}}, name="none")
    with pytest.raises(ConfigurationError, match=r"app\.search"):
        app.database("opensearch://localhost")
    for option in ({"delivery": "at-least-once"}, {"dedup": Version("cents")}):
        with pytest.raises(ConfigurationError, match="the version of each document decides"):
            app.sink(app.topics["orders"], app.searches["search"], name="weak", **option)(lambda records, index: None)


def test_parked_records_are_seen_and_released_from_outside(url: str) -> None:
    sink = test_release.parked_sink(url)

    async def operate() -> None:
        shelf = StoreShelf(SearchStore(url))
        items = await shelf.items()
        assert [item.id for item in items][:2] == ["shop.totals:purchases-0@1", "shop.totals:purchases-0@3"]
        shown = await shelf.record(items[0])
        assert shown is not None
        assert shown.value == b"-1"
        await shelf.ask(items[0], Command(id="c1", verb="discard", offsets=[1], by="me"))
        assert await shelf.outcomes("c1") == []
        sink.carry_out()
        [outcome] = await shelf.outcomes("c1")
        assert (outcome.discarded, outcome.finished, outcome.by) == ([1], True, "me")
        assert await shelf.record(items[0]) is None

    asyncio.run(operate())
    sink.close()
