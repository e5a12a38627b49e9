"""What is particular to the dual write on Valkey: what was read is watched, the script decides, answers get lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from semel.databases.valkey.effects import CacheEffects, EffectRefused
from semel.dualwrite.store import OUT_OF_USE, Claim
from semel.dualwrite.target import Guard, LeftToAPerson
from semel.dualwrite.valkey.session import Condition, ValkeySession, Work
from semel.dualwrite.valkey.store import ValkeyStore, slot_key
from semel.errors import (
    ConditionFailed,
    ConfigurationError,
    Conflict,
    Fatal,
    Fenced,
    OutcomeUnknown,
    Retriable,
)
from tests.dualwrite.conftest import open_store
from tests.services.valkey import ValkeyServer
from tests.sinks.cutting_proxy import CuttingProxy, When

pytestmark = pytest.mark.valkey


@pytest.fixture
def url(valkey: ValkeyServer) -> str:
    return valkey.new_database()


@pytest.fixture
def client(valkey: ValkeyServer, url: str) -> Iterator[Any]:
    found = valkey.client(url)
    yield found
    found.close()


@pytest.fixture
def store(url: str) -> Iterator[ValkeyStore]:
    found = open_store(url)
    assert isinstance(found, ValkeyStore)
    yield found
    found.close()


@pytest.fixture
def session(url: str) -> Iterator[ValkeySession]:
    found = ValkeySession(url, settle_seconds=20)
    found.begin()
    yield found
    found.close()


def guard_of(store: ValkeyStore, decision: str = "7:1", owner: str = "ann") -> Guard:
    slot = store.add(owner).slot
    return Guard(slot, store.claim(slot, owner).owner_epoch, owner, decision, "")


def paying(cents: int = 30) -> list[tuple[bytes, ...]]:
    tx = CacheEffects()
    tx.incrby("ann", -cents)
    tx.incrby("bob", cents)
    return tx.commands


def prepared(store: ValkeyStore, guard: Guard) -> str:
    found = store.decided(guard.slot)
    assert found is not None
    return found.prepared


def test_effects_and_decision_are_one_step(client: Any, store: ValkeyStore, session: ValkeySession) -> None:
    guard = guard_of(store)
    client.set("ann", 100)
    assert session.read("GET", b"ann") == b"100"
    session.commit(Work(paying(), [Condition(b"ann", 30)]), guard)
    assert client.mget("ann", "bob") == [b"70", b"30"]
    assert prepared(store, guard) == "7:1"


def test_what_was_read_and_changed_makes_nothing_happen(
    client: Any, store: ValkeyStore, session: ValkeySession
) -> None:
    """Also where it was changed back."""
    guard = guard_of(store)
    client.set("ann", 100)
    session.read("GET", b"ann")
    client.set("ann", 5)
    client.set("ann", 100)
    with pytest.raises(Conflict, match="changed by somebody else"):
        session.commit(Work(paying()), guard)
    assert client.mget("ann", "bob") == [b"100", None]
    assert prepared(store, guard) == ""
    session.begin()  # And run again it happens.
    session.read("GET", b"ann")
    session.commit(Work(paying()), guard)
    assert client.mget("ann", "bob") == [b"70", b"30"]


def test_reads_of_a_transaction_that_was_rolled_back_are_forgotten(
    client: Any, store: ValkeyStore, session: ValkeySession
) -> None:
    session.read("GET", b"ann")
    session.rollback()
    client.set("ann", 5)
    session.begin()
    session.commit(Work(paying()), guard_of(store))
    assert client.get("ann") == b"-25"


@pytest.mark.parametrize(
    ("held", "least", "holds"),
    [
        (30, 30, True),
        (29, 30, False),
        (None, 1, False),
        (None, 0, True),
        (-5, -5, True),
        (-6, -5, False),
        (2**62 + 1, 2**62 + 1, True),  # Doubles cannot tell these apart.
        (2**62, 2**62 + 1, False),
        (9, 10, False),
        (-10, -9, False),
        (-9, -10, True),
        (0, -1, True),
    ],
)
def test_a_condition_decides_by_what_is_there_then(
    client: Any, store: ValkeyStore, session: ValkeySession, held: int | None, least: int, holds: bool
) -> None:
    guard = guard_of(store)._replace(before=None)
    if held is not None:
        client.set("limit", held)
        client.hset("limits", "ann", held)
    conditions = [Condition(b"limit", least), Condition(b"limits", least, b"ann")]
    for condition in conditions:
        session.begin()
        if holds:
            session.commit(Work(conditions=[condition]), guard)
        else:
            name = r"limits \[ann\]" if condition.field else "limit"
            with pytest.raises(ConditionFailed, match=f"{name} is {'not there' if held is None else held}, .*{least}"):
                session.commit(Work(paying(), [condition]), guard)
            assert client.get("bob") is None
    assert prepared(store, guard) == ("7:1" if holds else "")


def test_a_condition_on_another_kind_of_value_is_refused(
    client: Any, store: ValkeyStore, session: ValkeySession
) -> None:
    guard = guard_of(store)
    client.set("text", "abc")
    client.rpush("list", "1")
    for key, why in ((b"text", "no integer"), (b"list", "holds a list")):
        session.begin()
        with pytest.raises(EffectRefused, match=why):
            session.commit(Work(paying(), [Condition(key, 1)]), guard)
    assert prepared(store, guard) == ""


def test_an_effect_that_cannot_be_leaves_nothing(client: Any, store: ValkeyStore, session: ValkeySession) -> None:
    guard = guard_of(store)
    client.set("bob", "no number")
    with pytest.raises(EffectRefused, match=r"command 2 .*INCRBY bob: it holds no integer. Nothing happened"):
        session.commit(Work(paying()), guard)
    assert client.get("ann") is None
    assert prepared(store, guard) == ""


def test_a_command_that_the_user_may_not_do_leaves_nothing(client: Any, valkey: ValkeyServer, url: str) -> None:
    client.execute_command("ACL", "SETUSER", "half", "on", ">secret", "~*", "&*", "+@all", "-hset", "+hset|x", "-zadd")
    client.execute_command("ACL", "SETUSER", "half", "+hset")
    store = open_store(url.replace("valkey://", "valkey://half:secret@"))
    assert isinstance(store, ValkeyStore)
    session = ValkeySession(store.url)
    guard = guard_of(store)
    tx = CacheEffects()
    tx.set("first", 1)
    tx.zadd("board", {"ann": 1})
    session.begin()
    with pytest.raises(ConfigurationError, match=r"may not do command 2 .*ZADD board.*Nothing happened"):
        session.commit(Work(tx.commands), guard)
    assert client.get("first") is None
    assert prepared(store, guard) == ""
    store.close()
    session.close()


def test_a_command_that_fails_in_the_middle_all_the_same_is_left_to_a_person(
    client: Any, store: ValkeyStore, session: ValkeySession
) -> None:
    """None that `tx` offers is known to; this one is not offered."""
    guard = guard_of(store)
    with pytest.raises(
        LeftToAPerson, match=r"failed in the middle .*LSET nothing.*semel doctor.*HDEL semel:txn:.* torn"
    ):
        session.commit(Work([(b"SET", b"first", b"1"), (b"LSET", b"nothing", b"0", b"x")]), guard)
    [row] = store.slots()
    assert row.owner.startswith(OUT_OF_USE + "transaction 7:1, after 1 of 2 commands: LSET nothing")
    with pytest.raises(Fatal, match="failed in the middle"):
        store.claim(guard.slot, "bob")
    client.hdel(slot_key(guard.slot), "torn")
    assert store.claim(guard.slot, "bob").prepared == "7:1"


def test_a_zombie_decides_nothing(client: Any, store: ValkeyStore, session: ValkeySession) -> None:
    guard = guard_of(store)
    assert store.claim(guard.slot, "bob") == Claim(guard.owner_epoch + 1, "")
    with pytest.raises(Fenced, match=r"has owner 'bob' by now"):
        session.commit(Work(paying()), guard)
    assert client.get("ann") is None


def test_a_server_that_lost_what_it_acknowledged_is_noticed(
    client: Any, store: ValkeyStore, session: ValkeySession
) -> None:
    guard = guard_of(store)
    session.commit(Work(paying()), guard)
    client.hset(slot_key(guard.slot), "prepared", "")  # As a replica has it that took over too early.
    session.begin()
    with pytest.raises(Fatal, match=r"holds '', and this process wrote '7:1' last: the server lost"):
        session.commit(Work(paying()), guard._replace(decision="7:2", before="7:1"))
    client.flushdb()
    session.begin()
    with pytest.raises(Fatal, match=r"is gone: the server lost"):
        session.commit(Work(paying()), guard._replace(decision="7:2", before="7:1"))


@pytest.mark.parametrize(("when", "done"), [("before", False), ("after", True)])
def test_an_answer_that_is_lost_is_settled(
    valkey: ValkeyServer, url: str, client: Any, store: ValkeyStore, when: When, done: bool
) -> None:
    guard = guard_of(store)
    proxy = CuttingProxy(valkey.port, b"EXEC")
    session = ValkeySession(url.replace(str(valkey.port), str(proxy.port)), settle_seconds=20)
    session.begin()
    proxy.when = when
    if done:
        session.commit(Work(paying()), guard)
    else:
        with pytest.raises(Retriable, match="Nothing of the transaction happened"):
            session.commit(Work(paying()), guard)
    assert proxy.cuts == 1
    assert session.is_fence_raised  # Whatever is still on its way is fenced.
    assert client.get("ann") == (b"-30" if done else None)
    late = ValkeySession(url)
    late.begin()
    with pytest.raises(Fenced):
        late.commit(Work(paying()), guard._replace(before=None))
    for each in (session, late):
        each.close()
    proxy.close()


def test_an_answer_that_is_lost_after_a_takeover_tells_what_the_heir_found(
    valkey: ValkeyServer, url: str, client: Any, store: ValkeyStore
) -> None:
    """The heir has gone on, and its own decision is in the slot by now."""
    guard = guard_of(store)
    proxy = CuttingProxy(valkey.port, b"EXEC")
    session = ValkeySession(url.replace(str(valkey.port), str(proxy.port)), settle_seconds=20)
    session.begin()
    proxy.when, proxy.refuse = "after", True
    failed: list[BaseException | None] = []

    def commit() -> None:
        try:
            session.commit(Work(paying()), guard)
            failed.append(None)
        except BaseException as error:
            failed.append(error)

    work = threading.Thread(target=commit)
    work.start()
    deadline = time.monotonic() + 20
    while prepared(store, guard) != "7:1" and time.monotonic() < deadline:
        time.sleep(0.01)
    heir = store.claim(guard.slot, "bob")
    assert heir.prepared == "7:1"
    other = ValkeySession(url)
    other.begin()
    other.commit(Work(paying()), Guard(guard.slot, heir.owner_epoch, "bob", "7:2", "7:1"))
    proxy.refuse = False
    work.join(30)
    assert failed == [None]
    assert client.get("ann") == b"-60"
    for each in (session, other):
        each.close()
    proxy.close()


def test_nobody_knows_within_the_limit_and_says_how_to_look(valkey: ValkeyServer, url: str, store: ValkeyStore) -> None:
    guard = guard_of(store)
    proxy = CuttingProxy(valkey.port, b"EXEC")
    session = ValkeySession(url.replace(str(valkey.port), str(proxy.port)), settle_seconds=0.2)
    session.begin()
    proxy.when, proxy.refuse = "after", True
    with pytest.raises(OutcomeUnknown, match=rf"HGET {slot_key(guard.slot)} prepared gives 7:1 if it was done"):
        session.commit(Work(paying()), guard)
    session.close()
    proxy.close()


def test_a_connection_that_is_lost_takes_what_was_watched_with_it(
    client: Any, store: ValkeyStore, session: ValkeySession
) -> None:
    session.read("GET", b"ann")
    client.client_kill_filter(_type="normal", skipme=True)
    with pytest.raises(Retriable):
        session.read("GET", b"bob")
    with pytest.raises(Retriable, match="what this transaction had read"):
        session.commit(Work(paying()), guard_of(store))
    assert client.get("ann") is None
    session.begin()  # The next one has a new connection.
    session.commit(Work(paying()), None)
    assert client.get("ann") == b"-30"


def test_an_idle_connection_that_was_closed_is_no_error(client: Any, session: ValkeySession) -> None:
    session.commit(Work(paying()), None)
    client.client_kill_filter(_type="normal", skipme=True)
    session.begin()
    session.commit(Work(paying()), None)
    assert client.get("ann") == b"-60"


def test_a_server_that_forgot_its_scripts_is_told_them_again(
    client: Any, store: ValkeyStore, session: ValkeySession
) -> None:
    client.script_flush()
    with pytest.raises(Retriable, match="forgotten its scripts, and nothing happened"):
        session.commit(Work(paying()), guard_of(store))
    session.begin()
    session.commit(Work(paying()), None)
    assert client.get("ann") == b"-30"


def test_a_server_without_memory_does_nothing_and_says_so(
    client: Any, store: ValkeyStore, session: ValkeySession
) -> None:
    guard = guard_of(store)
    client.config_set("maxmemory", 1)
    try:
        with pytest.raises(Retriable, match="OOM"):
            session.commit(Work(paying()), guard)
    finally:
        client.config_set("maxmemory", 0)
    assert client.get("ann") is None
    assert prepared(store, guard) == ""


@pytest.mark.parametrize(
    ("name", "value"), [("appendonly", "no"), ("appendfsync", "everysec"), ("no-appendfsync-on-rewrite", "yes")]
)
def test_a_server_that_may_lose_what_it_acknowledged_is_refused(client: Any, url: str, name: str, value: str) -> None:
    before = client.config_get(name)[name]
    client.config_set(name, value)
    try:
        with pytest.raises(ConfigurationError, match=f"it has {name} {value}. The dual write needs {name} {before}"):
            open_store(url)
    finally:
        client.config_set(name, before)


def test_a_server_that_does_not_tell_its_settings_is_refused(client: Any, url: str) -> None:
    client.execute_command("ACL", "SETUSER", "blind", "on", ">secret", "~*", "&*", "+@all", "-config")
    with pytest.raises(ConfigurationError, match=r"does not tell its settings.*\+config\|get"):
        open_store(url.replace("valkey://", "valkey://blind:secret@"))


def test_a_server_that_lost_everything_is_not_begun_anew_by_itself(client: Any, url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"either the app was never set up there, or the server lost its data"):
        open_store(url, create_tables=False)
    assert client.dbsize() == 0
