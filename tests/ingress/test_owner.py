"""The owner: one outcome and one group of effects for a key, whatever the handler does."""

import asyncio
from collections.abc import Callable
from typing import Any
from uuid import UUID

import msgspec
import pytest

from semel.errors import ConfigurationError
from semel.failpoints import arm_failpoints
from semel.ingress import rules
from semel.ingress.owner import EFFECT_BYTES_MAX, EXPIRED_PER_SWEEP, Owner, owner_component
from semel.ingress.requests import LookUp, Reply, Request, read_reply, read_request, write
from semel.ingress.spec import EndpointSpec
from semel.processing.answers import Created, Problem, Response
from semel.processing.topics import DataError, State, Topic
from tests.ingress.double import Partition

DAY_MS = 24 * 3_600_000
INSTANCE = b"i" * 16


class Order(msgspec.Struct):
    id: int


orders: Topic[str, Order] = Topic("orders", str, Order)
totals: State[str, int] = State("totals", str, int)


def partition(handler: Callable[..., Any], path: str = "/orders", **options: Any) -> Partition:
    owner = Owner("shop", [EndpointSpec(path, Order, handler, **options)], wall_ms=lambda: 0)
    return Partition(owner)


def ask(log: Partition, body: bytes = b'{"id":1}', key: str = "k", route: str = "POST /orders", **fields: Any) -> Reply:
    request = Request(INSTANCE, 7, 2, route, "application/json", body, **fields)
    scope = rules.scope_of("shop", fields.get("principal"), route, rules.key_digest(key))
    (record,) = asyncio.run(log.take(scope, write(request)))
    assert record.key == INSTANCE
    assert record.partition == 2
    reply = read_reply(record.value or b"")
    assert reply.number == 7
    return reply


def place(order: Order) -> Any:
    yield orders.record(f"c{order.id}", order)
    yield orders.record(f"d{order.id}", order)
    return Created({"order": order.id}, {"ETag": '"1"'})


def test_the_first_request_runs_and_every_retry_is_a_replay() -> None:
    log = partition(place)
    first = ask(log)
    assert (first.status, first.body, first.is_replayed) == (201, b'{"order":1}', False)
    assert dict(first.headers) == {"ETag": '"1"', "content-type": "application/json"}
    assert [effect.key for effect in log.effects] == [b"c1", b"d1"]
    for _ in range(3):
        again = ask(log)
        assert (again.status, again.headers, again.body) == (first.status, first.headers, first.body)
        assert again.is_replayed
    assert len(log.effects) == 2


def test_another_body_under_the_key_is_refused_and_changes_nothing() -> None:
    log = partition(place)
    first = ask(log)
    refused = ask(log, b'{"id":2}')
    assert refused.status == 422
    assert msgspec.json.decode(refused.body)["type"] == "/errors/idempotency-key-reused"
    assert len(log.effects) == 2
    assert ask(log).body == first.body


def test_another_principal_never_sees_the_stored_response() -> None:
    log = partition(place)
    ask(log, principal="alice")
    assert not ask(log, principal="bob").is_replayed
    assert ask(log, principal="alice").is_replayed
    assert len(log.effects) == 4


def test_a_problem_is_an_outcome_and_has_no_effects() -> None:
    def refuse(order: Order) -> Any:
        yield orders.record("c", order)
        raise Problem(409, "sold out", left=0)

    log = partition(refuse)
    first, again = ask(log), ask(log)
    assert first.status == again.status == 409
    assert first.body == again.body
    assert msgspec.json.decode(first.body)["left"] == 0
    assert again.is_replayed
    assert log.effects == []


def test_a_failing_handler_leaves_nothing_and_runs_again() -> None:
    runs = []

    def flaky(order: Order) -> Any:
        runs.append(order.id)
        yield orders.record("c", order)
        if len(runs) < 3:
            raise ConnectionError("database away")
        return Created({"order": order.id})

    log = partition(flaky)
    for _ in range(2):
        failed = ask(log)
        assert failed.status == 500
        assert msgspec.json.decode(failed.body)["type"] == "/errors/handler-failed"
        assert b"database" not in failed.body
        assert not failed.is_replayed
        assert log.effects == []
        assert log.stores.stored()[0].is_failed
    assert ask(log, b'{"id":2}').status == 422
    assert ask(log).status == 201
    assert ask(log).is_replayed
    assert len(log.effects) == 1
    assert runs == [1, 1, 1]


@pytest.mark.parametrize(
    "result",
    [
        Response(200, "x" * 70_000),
        Response(200, {"a": object()}),
        Response(200, None, {"Set-Cookie": "session=1"}),
        Response(200, None, {"Transfer-Encoding": "chunked"}),
        Response(200, None, {"X\u00e9": "1"}),
        Response(200, None, {"X": "\x00"}),
        Response(204, {"a": 1}),
        object(),
    ],
)
def test_an_answer_that_cannot_be_stored_is_the_handlers_failure(result: Any) -> None:
    def answer(order: Order) -> Any:
        yield orders.record("c", order)
        return result

    log = partition(answer)
    assert ask(log).status == 500
    assert log.effects == []


@pytest.mark.parametrize(
    "effect",
    [
        lambda: orders.record("c", "not an order"),  # type: ignore[arg-type]
        lambda: orders.record(5, Order(1)),  # type: ignore[arg-type]
        lambda: orders.record("c" * (EFFECT_BYTES_MAX + 1), Order(1)),
        lambda: orders.record("c", Order(1), headers=[("a", "text")]),  # type: ignore[list-item]
        lambda: totals.put("c", 1),
        lambda: "nonsense",
    ],
)
def test_an_effect_that_cannot_be_written_is_the_handlers_failure(effect: Callable[[], Any]) -> None:
    def handler(order: Order) -> Any:
        yield orders.record("c", order)
        yield effect()

    log = partition(handler)
    assert ask(log).status == 500
    assert log.effects == []


def test_a_handler_that_never_ends_is_stopped() -> None:
    def endless(order: Order) -> Any:
        while True:
            yield orders.record("c" * 1000, order)

    log = partition(endless)
    assert ask(log).status == 500
    assert log.effects == []


@pytest.mark.parametrize(
    ("result", "status", "body", "content_type"),
    [
        (None, 204, b"", None),
        ({"a": 1}, 200, b'{"a":1}', "application/json"),
        (Response(202), 202, b"", None),
        (Response(200, b"raw", {"Content-Type": "text/csv"}), 200, b"raw", "text/csv"),
        (Response(200, b"raw"), 200, b"raw", "application/octet-stream"),
    ],
)
def test_what_a_handler_may_answer(result: Any, status: int, body: bytes, content_type: str | None) -> None:
    reply = ask(partition(lambda order: result))
    headers = {name.lower(): value for name, value in reply.headers}
    assert (reply.status, reply.body, headers.get("content-type")) == (status, body, content_type)


def test_async_handlers_of_both_shapes() -> None:
    async def coroutine(order: Order) -> Any:
        await asyncio.sleep(0)
        return Created(order.id)

    async def generator(order: Order) -> Any:
        await asyncio.sleep(0)
        yield orders.record("c", order)
        yield Created(order.id)

    assert ask(partition(coroutine)).status == 201
    log = partition(generator)
    assert ask(log).status == 201
    assert len(log.effects) == 1


def test_path_query_and_principal_reach_a_handler_that_takes_them() -> None:
    def handler(order: Order, id: str, principal: str, dry: str | None = None) -> Any:  # noqa: A002
        return {"id": id, "principal": principal, "dry": dry}

    log = partition(handler, "/orders/{id}/lines/{line}", query=("dry", "verbose"), principal=lambda request: "x")
    reply = ask(log, route="POST /orders/{id}/lines/{line}", path=("7", "8"), query=(("dry", "1"),), principal="alice")
    assert msgspec.json.decode(reply.body) == {"id": "7", "principal": "alice", "dry": "1"}


def test_outputs_carry_ids_that_a_second_run_repeats() -> None:
    ids = []
    for _ in range(2):
        log = partition(place)
        ask(log)
        ids.append([dict(effect.headers)["semel-id"] for effect in log.effects])
    assert ids[0] == ids[1]
    assert len(set(ids[0])) == 2
    assert all(UUID(each.decode()).version == 7 for each in ids[0] if each)
    log = partition(place)
    ask(log, key="other")
    assert dict(log.effects[0].headers)["semel-id"] not in ids[0]


def test_a_stored_response_expires_a_day_after_completion_and_not_before() -> None:
    log = partition(place)
    log.owner._wall_ms = lambda: log.now_ms + 5_000  # The request waited five seconds for its owner.
    ask(log)
    log.owner._wall_ms = lambda: 0
    log.now_ms += DAY_MS + 4_999
    assert ask(log).is_replayed
    log.now_ms += 1
    fresh = ask(log, b'{"id":2}')
    assert (fresh.status, fresh.is_replayed) == (201, False)
    assert len(log.effects) == 4


def test_expired_outcomes_leave_the_store_little_by_little() -> None:
    log = partition(lambda order: None)
    total = EXPIRED_PER_SWEEP + 500
    for number in range(total):
        ask(log, key=f"k{number}")
    assert len(log.stores.stored()) == total
    log.now_ms += DAY_MS
    sizes = []
    for number in range(3):
        ask(log, key=f"later{number}")
        sizes.append(len(log.stores.stored()))
        log.now_ms += 1_000
    assert sizes == [501, 2, 3]


def test_fresh_outcomes_are_not_swept() -> None:
    log = partition(lambda order: None)
    for number in range(50):
        ask(log, key=f"k{number}")
        log.now_ms += DAY_MS // 100
    assert len(log.stores.stored()) == 50


def test_looking_up_an_operation() -> None:
    log = partition(place)
    digest = rules.key_digest("k")
    name = rules.operation_id("POST /orders", digest)

    def look() -> tuple[int, Any]:
        scope = rules.scope_of("shop", None, "POST /orders", digest)
        (record,) = asyncio.run(log.take(scope, write(LookUp(INSTANCE, 9, 1, name))))
        reply = read_reply(record.value or b"")
        assert (reply.number, record.partition) == (9, 1)
        return reply.status, msgspec.json.decode(reply.body)

    assert look()[0] == 404
    ask(log)
    status, document = look()
    assert status == 200
    assert document["id"] == name
    assert document["status"] == "succeeded"
    assert document["response"]["status"] == 201
    assert document["response"]["body"] == {"order": 1}
    arm_failpoints("owner.before_look_up:raise")
    assert look()[0] == 500, "a question that fails is answered, and parks nobody's key"
    assert look()[0] == 200
    log.now_ms += DAY_MS
    assert look()[0] == 404


@pytest.mark.parametrize(
    ("route", "body", "status"),
    [("POST /unknown", b'{"id":1}', 503), ("POST /orders", b'{"id":"text"}', 422), ("POST /orders", b"{", 400)],
)
def test_what_the_owner_cannot_serve_is_seen_by_whoever_was_told_202_and_runs_when_it_can(
    route: str, body: bytes, status: int
) -> None:
    log = partition(place)
    assert ask(log, body, route=route).status == status
    digest = rules.key_digest("k")
    look = write(LookUp(INSTANCE, 9, 1, rules.operation_id(route, digest)))
    (record,) = asyncio.run(log.take(rules.scope_of("shop", None, route, digest), look))
    found = read_reply(record.value or b"")
    document = msgspec.json.decode(found.body)
    assert (found.status, document["status"], document["retriable"]) == (200, "failed", True)
    assert document["response"]["status"] == status
    assert log.effects == [], "the handler did not run"
    again = ask(log, body, route=route)
    assert (again.status, again.is_replayed) == (status, False), "a deployment that can serve it runs it"


@pytest.mark.parametrize("value", [None, b"", b"\x00", b"garbage", b"\x93\x63\x01\x02", b"\x93\x01\x01\x02"])
def test_a_foreign_record_raises_so_that_the_engine_parks_it(value: bytes | None) -> None:
    log = partition(place)
    with pytest.raises(DataError):
        asyncio.run(log.take(b"s" * 32, value))  # type: ignore[arg-type]


def test_the_component_reads_requests_and_keeps_the_responses() -> None:
    component = owner_component("shop", [EndpointSpec("/orders", Order, place)])
    assert (component.group, component.inputs) == ("shop.requests", ("shop.semel.requests",))
    assert component.changelogs == {"idempotency": "shop.semel.state.idempotency"}
    with pytest.raises(ConfigurationError, match="declared twice"):
        owner_component("shop", [EndpointSpec("/a", Order, place), EndpointSpec("/a", Order, place)])


def test_stored_formats_stay_readable() -> None:
    """Bytes written by this version; a later one must read them, or it loses every outcome of the last day."""
    request = Request(INSTANCE, 7, 2, "POST /o", "application/json", b"{}", ("7",), (("a", "b"),), "alice")
    fields = (
        "01c410696969696969696969696969696969690702a7504f5354202f6fb06170706c"
        "69636174696f6e2f6a736f6ec4027b7d91a1379192a161a162a5616c696365"
    )
    assert write(request).hex() == f"9b{fields}90"
    assert read_request(bytes.fromhex(f"9a{fields}")) == request, "as it was before requests had a trace"
    traced = Request(INSTANCE, 7, 2, "POST /o", "", b"", trace=(("traceparent", "00-1"),))
    assert read_request(write(traced)) == traced
    assert write(Reply(7, 201, (("a", "b"),), b"{}", True)).hex() == "960107ccc99192a161a162c4027b7dc3"
    log = partition(lambda order: None)
    ask(log)
    (raw,) = log.stores.tables["idempotency"].values()
    assert (
        raw.hex()
        == "9701c42101ab225a8c289ce2db3040595743acec0a229df556d38bed3a6a83f54cb2dcd7bcc2cf0000018bcfe56800cccc90c400"
    )
