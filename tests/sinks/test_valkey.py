"""What is particular to Valkey: scripts are not rolled back, data may be lost, answers may be lost."""

from __future__ import annotations

import asyncio
import builtins
import logging
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from semel import App
from semel.databases.valkey import effects as effects_module
from semel.databases.valkey.effects import CacheEffects, EffectRefused
from semel.errors import ConfigurationError
from semel.processing.parklog import Command
from semel.processing.ports import free_ports
from semel.sinks.contract import Applied, PartitionsLost, PartitionsStopped, Stop, StopReason, Unavailable
from tests.services.valkey import ValkeyServer
from tests.sinks import ledger
from tests.sinks.cutting_proxy import CuttingProxy, When
from tests.sinks.ledger import a_slice, claim, partition, record

pytestmark = pytest.mark.valkey


@pytest.fixture
def url(valkey: ValkeyServer) -> str:
    return valkey.new_database()


@pytest.fixture
def client(url: str) -> Iterator[Any]:
    with ledger.cache(url) as (found, _):
        yield found


def noting(note: Callable[[Any, CacheEffects], None]) -> Any:
    """A handler that does something for each record."""

    def handler(records: Sequence[Any], cache: CacheEffects) -> None:
        for item in records:
            note(item, cache)
            cache.rpush("done", item.offset)

    return handler


def test_every_command_does_what_it_says(url: str, client: Any) -> None:
    def note(item: Any, cache: CacheEffects) -> None:
        cache.set("s", "text")
        cache.set("gone", b"\x00\xff", ttl_seconds=1000)
        cache.set("f", 1.5)
        cache.incrby("n", 2**62)
        cache.incrby("n", -1)
        cache.delete("s", "not there")
        cache.hset("h", {"a": 1, "b": "2", b"\xff": b"\x00"})
        cache.hincrby("h", "a", 41)
        cache.hdel("h", "b")
        cache.sadd("set", "x", "y", 3)
        cache.srem("set", "x")
        cache.zadd("z", {"low": 1, "high": 2.5})
        cache.zincrby("z", "low", 10)
        cache.zrem("z", "high")
        cache.rpush("l", *range(2_500))
        cache.lpush("l", "first")
        cache.ltrim("l", 0, 2_499)
        cache.expire("l", 500)

    sink = ledger.sink(url, noting(note))
    sink.take_over([claim()])
    assert sink.apply([a_slice(record(0, "ann", 1))]) == Applied(1, 0, 1)
    assert client.exists("s") == 0
    assert (client.get("n"), client.get("f")) == (str(2**62 - 1), "1.5")
    assert 900 < client.ttl("gone") <= 1000
    assert client.hget("h", "a") == "42"
    assert client.hlen("h") == 2
    assert client.smembers("set") == {"y", "3"}
    assert client.zrange("z", 0, -1, withscores=True) == [("low", 11.0)]
    assert client.lrange("l", 0, -1) == ["first", *map(str, range(2_499))]
    assert 400 < client.ttl("l") <= 500
    sink.close()


@pytest.mark.parametrize(
    "last",
    [
        lambda cache: cache.hset("text", {"a": 1}),
        lambda cache: cache.incrby("text"),
        lambda cache: cache.incrby("big", 9 * 10**18),
        lambda cache: cache.hincrby("hash", "word"),
        lambda cache: (cache.set("new", "x"), cache.sadd("new", "y")),
        lambda cache: (cache.delete("hash"), cache.hincrby("hash", "word"), cache.rpush("hash", 1)),
        lambda cache: (cache.hset("fresh", {"a": "1.5"}), cache.hincrby("fresh", "a")),
        lambda cache: cache.zadd("x", {"a": float("nan")}),
        lambda cache: cache.set("x", True),
        lambda cache: cache.set("x", None),
        lambda cache: cache.set("", "x"),
        lambda cache: cache.set("semel:position:x", "x"),
        lambda cache: cache.set("x", "y", ttl_seconds=0),
    ],
)
def test_an_effect_that_cannot_be_leaves_nothing_of_its_record(
    url: str, client: Any, last: Callable[[CacheEffects], None]
) -> None:
    """Valkey would do the commands before it and keep them: the record is parked whole, and the others go on."""
    client.set("text", "word")
    client.set("big", 10**18)
    client.hset("hash", "word", "x")
    before = {key: client.dump(key) if key != "text" else client.get(key) for key in ("text",)}

    def note(item: Any, cache: CacheEffects) -> None:
        cache.incrby(f"count:{item.key}")
        if item.value < 0:
            last(cache)

    sink = ledger.sink(url, noting(note))
    sink.take_over([claim()])
    batch = [record(0, "ann", 1), record(1, "bob", -1), record(2, "ann", 1), record(3, "bob", 1)]
    assert sink.apply([a_slice(*batch)]).parked == 2
    assert ledger.parked(url) == [(0, 1, b"bob", "EffectRefused"), (0, 3, b"bob", None)]
    assert (client.get("count:ann"), client.get("count:bob")) == ("2", None)
    assert client.lrange("done", 0, -1) == ["0", "2"]
    assert client.get("text") == before["text"]
    assert client.exists("new", "fresh", "x") == 0
    assert ledger.position(url) == (4, 1)
    sink.close()


def test_what_the_script_lets_through_the_server_does(url: str, client: Any) -> None:
    """Random effects on few keys: none of them may fail in the middle, where nothing could be undone."""
    rng = random.Random(11)
    keys = ["a", "b", "c"]
    calls: list[Callable[[CacheEffects], None]] = [
        lambda cache: cache.set(rng.choice(keys), rng.choice(["7", "x", "-3", "9000000000000000000", "007", ""])),
        lambda cache: cache.incrby(rng.choice(keys), rng.choice([1, -1, 2**62])),
        lambda cache: cache.delete(rng.choice(keys)),
        lambda cache: cache.delete(rng.choice(keys)),
        lambda cache: cache.hset(rng.choice(keys), {"f": rng.choice(["1", "x", "1e3"])}),
        lambda cache: cache.hincrby(rng.choice(keys), "f", rng.choice([1, -(2**62)])),
        lambda cache: cache.hdel(rng.choice(keys), "f"),
        lambda cache: cache.sadd(rng.choice(keys), "m"),
        lambda cache: cache.srem(rng.choice(keys), "m"),
        lambda cache: cache.zadd(rng.choice(keys), {"m": 1e308}),
        lambda cache: cache.zincrby(rng.choice(keys), "m", 1e308),
        lambda cache: cache.zrem(rng.choice(keys), "m"),
        lambda cache: cache.rpush(rng.choice(keys), "i"),
        lambda cache: cache.ltrim(rng.choice(keys), 1, 0),
        lambda cache: cache.expire(rng.choice(keys), 100),
    ]
    sink = ledger.sink(url, noting(lambda item, cache: [rng.choice(calls)(cache) for _ in range(rng.randrange(1, 6))]))
    sink.take_over([claim()])
    for offset in range(400):
        sink.apply([a_slice(record(offset, f"k{offset}", 1))])
    parked = len(ledger.parked(url))
    assert 60 < parked < 340, "both kinds have to occur"
    assert client.llen("done") == 400 - parked
    sink.close()


def test_a_right_that_is_missing_in_the_middle_stops_and_nobody_goes_on_silently(
    url: str, client: Any, valkey: ValkeyServer
) -> None:
    client.execute_command("ACL", "SETUSER", "half", "on", ">secret", "~*", "+@all", "-zadd")

    def note(item: Any, cache: CacheEffects) -> None:
        cache.incrby("count")
        cache.zadd("z", {"a": 1})

    mine = url.replace("valkey://", "valkey://half:secret@")
    sink = ledger.sink(mine, noting(note))
    sink.take_over([claim()])
    with pytest.raises(PartitionsStopped, match="ZADD") as stopped:
        sink.apply([a_slice(record(0, "ann", 1))])
    assert stopped.value.stops[partition(0)].reason is StopReason.EFFECTS_TORN
    assert "secret" not in str(stopped.value) + repr(sink)
    successor = ledger.sink(url, noting(note))
    stop = successor.take_over([claim()])[partition(0)]
    assert isinstance(stop, Stop)
    assert stop.reason is StopReason.EFFECTS_TORN
    assert "offsets 0 to 1, after 1 of 3 commands" in stop.detail
    client.hdel(ledger.place().key("position"), "torn")
    assert successor.take_over([claim()]) == {partition(0): 1}
    sink.close()
    successor.close()


@pytest.mark.parametrize("log_start", [0, 3])
def test_a_server_that_lost_everything_stops_the_sink(url: str, client: Any, log_start: int) -> None:
    sink = ledger.sink(url)
    client.set("semel:accept_start:shop.totals", "yes")
    assert sink.take_over([claim(log_start=log_start)]) == {partition(0): log_start}
    sink.apply([a_slice(record(log_start, "ann", 1))])
    client.flushdb()
    with pytest.raises(PartitionsStopped, match="lost data") as stopped:
        sink.apply([a_slice(record(log_start + 1, "ann", 1))])
    assert stopped.value.stops[partition(0)].reason is StopReason.DATA_GAP
    sink.release(stopped.value.stops)
    assert isinstance(sink.take_over([claim(log_start=log_start)])[partition(0)], Stop), "it began anew by itself"
    assert client.dbsize() == 0
    successor = ledger.sink(url)
    answer = successor.take_over([claim(log_start=log_start)])[partition(0)]
    if log_start == 0:
        assert answer == 0, "everything that ever was is still in the log"
    else:
        assert isinstance(answer, Stop), "records that are not in the log any more would be missing for ever"
        assert "semel:accept_start:shop.totals" in answer.detail
    sink.close()
    successor.close()


def test_a_server_that_was_set_back_is_healed_by_reading_again(url: str, client: Any) -> None:
    """As by a fail-over to a replica that lacked the last writes: effects and position went back together."""
    sink = ledger.sink(url)
    sink.take_over([claim()])
    sink.apply([a_slice(record(0, "ann", 1))])
    saved = {key: client.execute_command("DUMP", key, NEVER_DECODE=True) for key in client.scan_iter()}
    sink.apply([a_slice(record(1, "ann", 1))])
    client.flushdb()
    for key, raw in saved.items():
        client.restore(key, 0, raw)
    with pytest.raises(PartitionsLost, match="set back"):
        sink.apply([a_slice(record(2, "ann", 1))])
    assert sink.take_over([claim()]) == {partition(0): 1}
    sink.apply([a_slice(record(1, "ann", 1), record(2, "ann", 1))])
    assert ledger.seen(url) == [(0, 0), (0, 1), (0, 2)]
    assert ledger.totals(url) == {"ann": (3, 3)}
    sink.close()


@pytest.mark.parametrize("when", ["before", "at", "after"])
@pytest.mark.parametrize("is_fenced", [False, True])
def test_a_script_without_an_answer_is_settled(url: str, valkey: ValkeyServer, when: When, is_fenced: bool) -> None:
    proxy = CuttingProxy(valkey.port, b"EVALSHA")
    try:
        sink = ledger.sink(url.replace(f":{valkey.port}/", f":{proxy.port}/"))
        sink.take_over([claim()])
        sink.apply([a_slice(record(0, "eve", 1))])  # The server knows the script from here on.
        proxy.when = when
        batch = [a_slice(record(1, "ann", 5), record(2, "bob", 1))]
        with pytest.raises(Unavailable):
            sink.apply(batch)
        assert proxy.cuts == 1
        if is_fenced:
            heir = ledger.sink(url)
            heir.take_over([claim()])
            heir.apply(batch)
            with pytest.raises(PartitionsLost, match="taken over by"):
                sink.apply(batch)
            heir.close()
        else:
            assert sink.apply(batch) == Applied(2, 0, 1)  # Done again, or counted from what was found.
            sink.apply([a_slice(record(3, "ann", 1))])
        assert ledger.seen(url) == [(0, offset) for offset in range(3 if is_fenced else 4)]
        sink.close()
    finally:
        proxy.close()


def test_a_server_that_forgot_its_scripts_is_told_them_again(url: str, client: Any) -> None:
    sink = ledger.sink(url)
    sink.take_over([claim()])
    sink.apply([a_slice(record(0, "ann", 1))])
    client.script_flush()
    assert sink.apply([a_slice(record(1, "ann", 1))]) == Applied(1, 0, 1)
    sink.close()


def test_a_server_that_is_killed_loses_and_doubles_nothing(valkey: ValkeyServer) -> None:
    ledger.write_while_it_is_killed(valkey.new_database(), valkey, 0.1)


def test_more_effects_than_a_script_holds_go_record_by_record(
    url: str, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(effects_module, "EFFECTS_MAX", 10)

    def note(item: Any, cache: CacheEffects) -> None:
        for _ in range(item.value):
            cache.incrby("count")

    sink = ledger.sink(url, noting(note))
    sink.take_over([claim()])
    assert sink.apply([a_slice(record(0, "ann", 6), record(1, "bob", 7), record(2, "eve", 20))]) == Applied(3, 1, 3)
    assert client.get("count") == "13"
    assert ledger.parked(url) == [(0, 2, b"eve", "EffectRefused")]
    sink.close()


def test_an_operator_releases_what_is_parked(url: str) -> None:
    from semel.ops.parking import StoreShelf
    from semel.sinks.valkey.store import ValkeyStore

    sink = ledger.sink(url)
    sink.take_over([claim()])
    sink.apply([a_slice(record(0, "bob", -1), record(1, "bob", 2), record(2, "ann", 3))])
    sink.close()
    mended = ledger.sink(url, ledger.count_all)
    mended.take_over([claim()])

    async def operate() -> None:
        shelf = StoreShelf(ValkeyStore(url))
        items = await shelf.items()
        assert [item.id for item in items] == ["shop.totals:purchases-0@0", "shop.totals:purchases-0@1"]
        assert items[0].fault is not None
        assert "negative amount" in items[0].fault.message
        shown = await shelf.record(items[0])
        assert shown is not None
        assert shown.value == b"-1"
        await shelf.ask(items[0], Command(id="c1", verb="retry", offsets=[0], by="me"))
        assert await shelf.outcomes("c1") == []
        mended.carry_out()
        [outcome] = await shelf.outcomes("c1")
        assert (outcome.released, outcome.finished, outcome.by) == ([0, 1], True, "me")
        assert await shelf.items() == []

    asyncio.run(operate())
    assert ledger.in_order(url) == [("ann", 2), ("bob", 0), ("bob", 1)]
    mended.close()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru"), "throws any key away"),
        (("--cluster-enabled", "yes", "--cluster-port", "PORT", "--databases", "1"), "is a cluster"),
    ],
)
def test_a_server_that_cannot_keep_the_promise_is_refused(valkey: ValkeyServer, options: Any, text: str) -> None:
    server = ValkeyServer(*(str(free_ports(1)[0]) if option == "PORT" else option for option in options))
    try:
        server.start()
        with pytest.raises(ConfigurationError, match=text):
            ledger.sink(server.url())
    finally:
        server.stop()


def test_a_server_that_may_forget_is_told_of(url: str, client: Any, caplog: pytest.LogCaptureFixture) -> None:
    client.config_set("appendfsync", "everysec")
    try:
        with caplog.at_level(logging.WARNING):
            ledger.sink(url).close()
    finally:
        client.config_set("appendfsync", "always")
    assert "appendfsync=everysec" in caplog.text
    caplog.clear()
    ledger.sink(url).close()
    assert caplog.text == ""


def test_a_server_that_is_away_is_an_outage_without_a_password_in_it(valkey: ValkeyServer) -> None:
    with pytest.raises(Unavailable) as raised:
        ledger.sink(f"valkey://me:hunter2@127.0.0.1:{free_ports(1)[0]}/0")
    assert "hunter2" not in str(raised.value)


def test_a_missing_driver_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_driver(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "redis":
            raise ImportError("No module named 'redis'")
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "semel.databases.valkey.connection", raising=False)
    monkeypatch.delitem(sys.modules, "semel.sinks.valkey.store", raising=False)
    monkeypatch.delitem(sys.modules, "semel.sinks.valkey.sink", raising=False)
    monkeypatch.setattr(builtins, "__import__", without_driver)
    with pytest.raises(ConfigurationError, match=r"semel\[valkey\]"):
        ledger.sink("valkey://host/0")


def test_notes_after_the_handler_are_refused(url: str) -> None:
    kept: list[CacheEffects] = []
    sink = ledger.sink(url, lambda records, cache: kept.append(cache))
    sink.take_over([claim()])
    sink.apply([a_slice(record(0, "ann", 1))])
    with pytest.raises(EffectRefused, match="after the handler ended"):
        kept[0].set("x", "y")
    sink.close()


def test_a_cache_is_declared_and_put_elsewhere_by_its_variable() -> None:
    app = App("shop")
    orders = app.topic("orders", key=str, value=int)
    cache = app.cache("valkey://localhost/0")

    @app.sink(orders, cache)
    def view(records: Any, cache: CacheEffects) -> None: ...

    app.use_databases({"SEMEL_CACHE": "rediss://other:6380/2"})
    assert app.sinks["view"].database.url == "rediss://other:6380/2"
    with pytest.raises(ConfigurationError, match="SEMEL_CACHE_X names no cache of app shop: it takes SEMEL_CACHE"):
        app.use_databases({"SEMEL_CACHE_X": "valkey://other/2"})
    with pytest.raises(ConfigurationError, match="is no cache"):
        app.cache("sqlite:///x.db", name="other")
    with pytest.raises(ConfigurationError, match="declared twice"):
        app.cache("valkey://localhost/1")
    with pytest.raises(ConfigurationError, match=r"app\.cache"):
        app.database("redis://localhost/0")
    with pytest.raises(ConfigurationError, match="saves nothing on a cache"):
        app.sink(orders, app.caches["cache"], delivery="at-least-once", name="weak")(lambda records, cache: None)
