"""The ASGI shell: what it refuses, what it says when the log misbehaves, how it starts and ends."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.routing import Mount

from semel import failpoints
from semel.errors import ConfigurationError, Retriable
from semel.ingress import rules
from semel.ingress.asgi import Ingress
from semel.ingress.limits import Limits
from semel.ingress.owner import Owner
from semel.ingress.spec import EndpointSpec
from semel.processing.answers import Created, Problem
from semel.processing.topics import Topic
from tests.ingress.client import Got, call, post
from tests.ingress.double import Partition, ScriptedLink


class Order(msgspec.Struct):
    id: int


orders: Topic[str, Order] = Topic("orders", str, Order)


def place(order: Order) -> Any:
    yield orders.record(f"c{order.id}", order)
    return Created({"order": order.id})


def described(order: Order, id: str, dry: str | None = None) -> Any:  # noqa: A002
    return {"id": id, "dry": dry}


async def who(request: Any) -> str:
    name = request.headers.get("x-user")
    if name is None:
        raise Problem(401, "say who you are")
    if name == "broken":
        raise KeyError(name)
    if name == "forbidden":
        raise HTTPException(403, "not you")
    return "" if name == "nobody" else str(name)


ENDPOINTS = [
    EndpointSpec("/orders", Order, place, wait_seconds=0.3),
    EndpointSpec("/orders/{id}/notes", Order, described, query=("dry",)),
    EndpointSpec("/raw", bytes, lambda body: body[::-1], wait_seconds=0.3),
    EndpointSpec("/mine", Order, place, principal=who),
    EndpointSpec("/loose", Order, place, key_required=False),
]


@contextlib.asynccontextmanager
async def started(limits: Limits | None = None, **options: Any) -> AsyncIterator[tuple[Ingress, ScriptedLink]]:
    link = ScriptedLink(Partition(Owner("shop", ENDPOINTS)))
    ingress = Ingress("shop", ENDPOINTS, link, limits=limits, **{"drain_seconds": 1.0, **options})
    await ingress.start()
    try:
        yield ingress, link
    finally:
        await ingress.close()


def run(test: Callable[[Ingress, ScriptedLink], Awaitable[Any]], limits: Limits | None = None) -> Any:
    async def body() -> Any:
        async with started(limits) as (ingress, link):
            return await test(ingress, link)

    return asyncio.run(body())


def test_a_request_becomes_a_record_and_its_retry_a_replay() -> None:
    async def test(ingress: Ingress, link: ScriptedLink) -> None:
        first = await post(ingress)
        assert (first.status, first.body) == (201, b'{"order":1}')
        assert first.headers["content-length"] == "11"
        assert "idempotency-replayed" not in first.headers
        again = await post(ingress, key="k")
        assert (again.status, again.body, again.headers["idempotency-replayed"]) == (201, b'{"order":1}', "true")
        assert (await post(ingress, body=b'{"id":2}')).type == "/errors/idempotency-key-reused"
        assert len(link.partition.effects) == 1
        scope = rules.scope_of("shop", None, "POST /orders", rules.key_digest("k"))
        assert {key for _, key, _ in link.appended} == {scope}
        assert len({partition for partition, _, _ in link.appended}) == 1
        assert b"line-1" not in b"".join(value for _, _, value in link.appended)

    run(test)


@pytest.mark.parametrize(
    ("request_", "status", "type_"),
    [
        ({"key": None}, 400, "idempotency-key-missing"),
        ({"key": '""'}, 400, "idempotency-key-invalid"),
        ({"key": "x" * 256}, 400, "idempotency-key-invalid"),
        ({"key": '"a"', "headers": [("idempotency-key", '"b"')]}, 400, "idempotency-key-invalid"),
        ({"headers": [("content-type", "text/plain")]}, 415, "unsupported-media-type"),
        ({"body": b'{"id":'}, 400, "malformed-json"),
        ({"body": b'{"id":"1"}'}, 422, "validation"),
        ({"body": b"x" * 600}, 413, "body-too-large"),
        ({"body": [b"x" * 300, b"x" * 300, b"x" * 300]}, 413, "body-too-large"),
        ({"headers": [("content-length", "601")]}, 413, "body-too-large"),
        ({"headers": [("content-length", "9" * 5000)]}, 413, "body-too-large"),
        ({"headers": [("content-length", "-1")]}, 413, "body-too-large"),
        ({"body": [b'{"id":', 0.5, b"1}"]}, 408, "receive-timeout"),
        ({"body": [0.5, b'{"id":1}']}, 408, "receive-timeout"),
        ({"path": "/orders/7/notes?dry=1&dry=2"}, 400, "malformed-request"),
        ({"path": "/orders/7/notes?dry=%ff"}, 400, "malformed-request"),
        ({"path": "/nothing"}, 404, "not-found"),
        ({"path": "/orders/"}, 404, "not-found"),
        ({"path": "/livez"}, 405, "method-not-allowed"),
    ],
)
def test_what_is_refused_before_the_log(request_: dict[str, Any], status: int, type_: str) -> None:
    async def test(ingress: Ingress, link: ScriptedLink) -> Got:
        got = await post(ingress, **request_)
        assert link.appended == []
        return got

    got = run(test, Limits(body_bytes=512, body_seconds=0.2))
    assert (got.status, got.type) == (status, f"/errors/{type_}")
    assert got.json["status"] == status
    if status in (408, 413):
        assert got.headers["connection"] == "close"
    if type_ == "idempotency-key-missing":
        assert 'rel="describedby"' in got.headers["link"]


def test_refusals_tell_where_the_fault_is() -> None:
    async def test(ingress: Ingress, _: ScriptedLink) -> tuple[Got, Got]:
        return await post(ingress, body=b'{"id": 1,}'), await post(ingress, body=b'{"id":"1"}')

    malformed, wrong = run(test)
    assert "byte 9" in malformed.json["detail"]
    assert "$.id" in wrong.json["detail"]


def test_the_other_method_names_the_right_one() -> None:
    async def test(ingress: Ingress, _: ScriptedLink) -> list[Got]:
        return [await call(ingress, method, "/orders/7/notes") for method in ("GET", "PUT", "DELETE")]

    for got in run(test):
        assert (got.status, got.headers["allow"]) == (405, "POST")
        assert got.type == "/errors/method-not-allowed"


def test_a_body_in_pieces_is_one_request() -> None:
    async def test(ingress: Ingress, _: ScriptedLink) -> tuple[Got, Got]:
        return await post(ingress, body=[b'{"id', b"", b'":', b"1}"]), await post(ingress)

    first, again = run(test)
    assert first.status == 201
    assert again.headers["idempotency-replayed"] == "true"


def test_a_client_that_goes_away_is_not_answered_and_nothing_is_stored() -> None:
    async def test(ingress: Ingress, link: ScriptedLink) -> None:
        assert (await post(ingress, body=[b'{"id":1}'], gone=True)).status == 0
        assert link.appended == []

    run(test)


def test_path_and_query_parameters_and_which_make_another_request() -> None:
    async def test(ingress: Ingress, _: ScriptedLink) -> None:
        got = await post(ingress, "/orders/7/notes?dry=yes&utm=1")
        assert got.json == {"id": "7", "dry": "yes"}
        assert (await post(ingress, "/orders/7/notes?utm=2&dry=yes")).headers["idempotency-replayed"] == "true"
        assert (await post(ingress, "/orders/8/notes?dry=yes")).type == "/errors/idempotency-key-reused"
        assert (await post(ingress, "/orders/7/notes?dry=no")).type == "/errors/idempotency-key-reused"

    run(test)


def test_raw_bodies_of_any_content_type() -> None:
    async def test(ingress: Ingress, _: ScriptedLink) -> Got:
        return await call(ingress, "POST", "/raw", b"\xff\x00", [("idempotency-key", "k")])

    got = run(test)
    assert (got.status, got.body) == (200, b"\x00\xff")


def test_principals_are_strangers_to_each_other() -> None:
    async def test(ingress: Ingress, link: ScriptedLink) -> None:
        async def mine(user: str | None, path: str = "/mine") -> Got:
            return await post(ingress, path, headers=[] if user is None else [("x-user", user)])

        assert (await mine("alice")).status == 201
        assert "idempotency-replayed" not in (await mine("bob")).headers
        assert (await mine("alice")).headers["idempotency-replayed"] == "true"
        assert len(link.partition.effects) == 2
        taken = len(link.appended)
        assert ((await mine(None)).status, (await mine("forbidden")).status) == (401, 403)
        assert (await mine("broken")).type == "/errors/principal-failed"
        assert (await mine("nobody")).type == "/errors/principal-failed"
        assert len(link.appended) == taken

    run(test)


def test_operations_are_seen_by_whoever_asked_for_them_only() -> None:
    async def test(ingress: Ingress, link: ScriptedLink) -> None:
        name = rules.operation_id("POST /mine", rules.key_digest("k"))

        async def look(user: str, name: str = name) -> Got:
            return await call(ingress, "GET", f"/operations/{name}", headers=[("x-user", user)])

        assert (await look("alice")).status == 404
        await post(ingress, "/mine", headers=[("x-user", "alice")])
        got = await look("alice")
        assert (got.status, got.json["status"], got.json["response"]["body"]) == (200, "succeeded", {"order": 1})
        assert (await look("bob")).type == "/errors/operation-not-found"
        assert (await look("alice", "nonsense")).type == "/errors/operation-not-found"
        link.behaviour = "silent"
        assert (await call(ingress, "GET", f"/operations/{name}")).status == 401
        slow = await call(ingress, "GET", f"/operations/{name}", headers=[("x-user", "alice"), ("prefer", "wait=0")])
        assert slow.type == "/errors/no-answer-yet"

    run(test)


def test_without_a_key_where_none_is_required_every_request_runs() -> None:
    async def test(ingress: Ingress, link: ScriptedLink) -> None:
        for _ in range(2):
            assert (await post(ingress, "/loose", key=None)).status == 201
        assert len(link.partition.effects) == 2

    run(test)


def test_an_answer_that_takes_too_long_is_202_with_a_place_to_ask() -> None:
    async def test(ingress: Ingress, link: ScriptedLink) -> None:
        link.behaviour = "silent"
        for headers in ([], [("prefer", "wait=0")], [("prefer", "respond-async")]):
            got = await post(ingress, headers=headers)
            assert (got.status, got.json["status"]) == (202, "accepted")
            assert got.headers["retry-after"] == "1"
            assert got.headers["location"] == f"/operations/{got.json['id']}"
        mounted = await post(ingress, root_path="/api")
        assert mounted.headers["location"].startswith("/api/operations/")
        assert ingress.gateway.in_flight == 0

    run(test)


@pytest.mark.parametrize(
    ("behaviour", "type_"),
    [("refused", "unavailable"), ("lost", "outcome-unknown"), ("broken", "outcome-unknown")],
)
def test_what_is_said_when_the_append_fails(behaviour: str, type_: str) -> None:
    async def test(ingress: Ingress, link: ScriptedLink) -> None:
        link.behaviour = behaviour
        got = await post(ingress)
        assert (got.status, got.type, got.headers["retry-after"]) == (503, f"/errors/{type_}", "1")
        assert ("nothing was stored" in got.body.decode().lower()) == (behaviour == "refused")
        if behaviour != "refused":
            assert "same Idempotency-Key" in got.json["detail"]
        assert ingress.gateway.in_flight == 0

    run(test)


def test_a_reply_settles_what_the_append_left_open() -> None:
    async def test(ingress: Ingress, link: ScriptedLink) -> Got:
        link.behaviour = "unknown"
        return await post(ingress)

    assert run(test).status == 201


@pytest.mark.parametrize(("point", "appended"), [("ingress.before_append", 0), ("ingress.after_append", 1)])
def test_a_crash_around_the_append_never_claims_that_nothing_was_stored(point: str, appended: int) -> None:
    async def test(ingress: Ingress, link: ScriptedLink) -> None:
        failpoints.arm_failpoints(f"{point}:raise:1")
        try:
            got = await post(ingress)
        finally:
            failpoints.arm_failpoints("")
        assert got.type == "/errors/outcome-unknown"
        assert len(link.appended) == appended
        retry = await post(ingress)
        assert retry.status == 201
        assert ("idempotency-replayed" in retry.headers) == bool(appended)
        assert len(link.partition.effects) == 1

    run(test)


def test_more_than_the_limit_in_flight_is_shed() -> None:
    async def test(ingress: Ingress, link: ScriptedLink) -> None:
        link.behaviour = "silent"
        waiting = [asyncio.create_task(post(ingress, key=f"k{number}")) for number in range(3)]
        while ingress.gateway.in_flight < 3:
            await asyncio.sleep(0)
        shed = await post(ingress, key="one-more")
        assert (shed.status, shed.type, shed.headers["retry-after"]) == (503, "/errors/overloaded", "1")
        assert {got.status for got in await asyncio.gather(*waiting)} == {202}
        assert len(link.appended) == 3
        link.behaviour = "answer"
        assert (await post(ingress)).status == 201

    run(test, Limits(in_flight=3))


def test_memory_for_bodies_is_bounded_and_given_back_on_every_path() -> None:
    async def test(ingress: Ingress, link: ScriptedLink) -> None:
        link.behaviour = "silent"
        large = b'{"id":1,"x":"' + b"x" * 600 + b'"}'
        waiting = asyncio.create_task(post(ingress, body=large))
        while not link.appended:
            await asyncio.sleep(0)
        for body in (large, [large[:300], large[300:]]):
            shed = await post(ingress, key="other", body=body)
            assert (shed.status, shed.type) == (503, "/errors/overloaded")
        assert (await waiting).status == 202
        link.behaviour = "answer"
        for body in (large, [large[:300], large[300:]], b"{", b'{"id":"1"}', [large[:300], 0.4, b"}"], b"x" * 950):
            await post(ingress, key="more", body=body)
        assert (await post(ingress, body=[large[:300]], gone=True)).status == 0
        assert "semel_http_held_bytes 0\n" in (await call(ingress, "GET", "/metrics")).body.decode()
        assert (await post(ingress, key="last", body=large)).status == 201

    run(test, Limits(held_bytes=1_000, body_bytes=900, body_seconds=0.2))


def test_concurrent_duplicates_have_one_effect_and_one_answer() -> None:
    async def test(ingress: Ingress, link: ScriptedLink) -> None:
        every = await asyncio.gather(*(post(ingress) for _ in range(64)))
        assert {got.status for got in every} == {201}
        assert {got.body for got in every} == {b'{"order":1}'}
        assert sum("idempotency-replayed" not in got.headers for got in every) == 1
        assert len(link.partition.effects) == 1

    run(test)


def test_readiness_follows_the_log() -> None:
    async def test(ingress: Ingress, link: ScriptedLink) -> None:
        async def ready() -> int:
            return (await call(ingress, "GET", "/readyz")).status

        assert await ready() == 200
        link.behaviour = "refused"
        link.is_reachable = False
        await post(ingress)
        assert await ready() == 503
        link.is_reachable = True
        assert await ready() == 200
        assert (await call(ingress, "GET", "/livez")).status == 200

    run(test)


def test_the_log_is_opened_again_when_reading_replies_fails() -> None:
    async def test(ingress: Ingress, link: ScriptedLink) -> None:
        link.fail_reading(Retriable("connection lost"))
        while link.opened == 1:
            got = await call(ingress, "GET", "/readyz")
            await asyncio.sleep(0.01)
        assert (got.status, b"connection lost" in got.body) == (503, True)
        while not ingress.gateway.is_ready:
            await asyncio.sleep(0.01)
        assert (await post(ingress)).status == 201
        assert (await call(ingress, "GET", "/readyz")).status == 200

    run(test)


def test_nothing_is_taken_before_the_log_is_open_nor_after_the_end() -> None:
    async def body() -> None:
        link = ScriptedLink(Partition(Owner("shop", ENDPOINTS)))
        link.open_errors = [Retriable("Kafka is away")] * 2
        ingress = Ingress("shop", ENDPOINTS, link, limits=Limits(start_seconds=0.05), drain_seconds=0.1)
        await ingress.start()
        early = await post(ingress)
        assert (early.status, early.type) == (503, "/errors/unavailable")
        assert "Kafka is away" in early.json["detail"]
        assert (await call(ingress, "GET", "/readyz")).status == 503
        while not ingress.gateway.is_ready:
            await asyncio.sleep(0.01)
        assert (await post(ingress)).status == 201
        await ingress.close()
        late = await post(ingress)
        assert (late.status, late.type) == (503, "/errors/unavailable")
        assert len(link.appended) == 1

    asyncio.run(body())


def test_closing_waits_for_the_replies_that_are_due() -> None:
    async def body() -> None:
        async with started() as (ingress, link):
            link.behaviour = "silent"
            waiting = asyncio.create_task(post(ingress))
            while not link.appended:
                await asyncio.sleep(0)
            closing = asyncio.create_task(ingress.close())
            await asyncio.sleep(0)
            assert (await post(ingress, key="late")).status == 503
            link._replies.put_nowait(await link.partition.take(*link.appended[0][1:]))
            assert (await waiting).status == 201
            await closing

    asyncio.run(body())


def test_lifespan_starts_and_ends_and_a_wrong_setup_stops_the_start() -> None:
    async def body() -> list[dict[str, Any]]:
        sent: list[dict[str, Any]] = []
        for errors in ([], [ConfigurationError("PARTITIONS_CHANGED: 4 and 8")]):
            link = ScriptedLink(Partition(Owner("shop", ENDPOINTS)))
            link.open_errors = list(errors)
            messages = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]

            async def receive(messages: list[dict[str, Any]] = messages) -> dict[str, Any]:
                return messages.pop(0)

            async def send(message: dict[str, Any]) -> None:
                sent.append(message)

            await Ingress("shop", ENDPOINTS, link)({"type": "lifespan"}, receive, send)
        return sent

    complete, ended, failed = asyncio.run(body())
    assert (complete["type"], ended["type"]) == ("lifespan.startup.complete", "lifespan.shutdown.complete")
    assert failed["type"] == "lifespan.startup.failed"
    assert "PARTITIONS_CHANGED" in failed["message"]


@pytest.mark.parametrize("framework", ["starlette", "fastapi"])
def test_mounted_where_lifespan_does_not_reach_it_starts_with_the_first_request(framework: str) -> None:
    async def body() -> None:
        link = ScriptedLink(Partition(Owner("shop", ENDPOINTS)))
        ingress = Ingress("shop", ENDPOINTS, link, drain_seconds=0.1)
        parent: Any
        if framework == "starlette":
            parent = Starlette(routes=[Mount("/shop", ingress)])
        else:
            parent = FastAPI()
            parent.mount("/shop", ingress)
        got = await post(parent, "/shop/orders")
        assert (got.status, got.body) == (201, b'{"order":1}')
        assert (await post(parent, "/shop/orders/7/notes")).json["id"] == "7"
        assert (await call(parent, "GET", "/shop/readyz")).status == 200
        assert (await call(parent, "GET", "/shop/orders")).headers["allow"] == "POST"
        name = rules.operation_id("POST /orders", rules.key_digest("k"))
        assert (await call(parent, "GET", f"/shop/operations/{name}")).json["status"] == "succeeded"
        link.behaviour = "silent"
        slow = await post(parent, "/shop/orders", key="slow")
        assert slow.headers["location"].startswith("/shop/operations/")
        await ingress.close()

    asyncio.run(body())


def test_metrics_and_explanations() -> None:
    async def test(ingress: Ingress, _: ScriptedLink) -> None:
        await post(ingress)
        await post(ingress)
        text = (await call(ingress, "GET", "/metrics")).body.decode()
        assert 'semel_http_answers_total{status="201",replayed="false"} 1' in text
        assert 'semel_http_answers_total{status="201",replayed="true"} 1' in text
        assert "semel_http_in_flight 0" in text
        got = await call(ingress, "GET", "/errors/idempotency-key-missing")
        assert (got.status, got.json["status"]) == (200, 400)
        assert (await call(ingress, "GET", "/errors/none")).status == 404

    run(test)


def test_keys_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def test(ingress: Ingress, link: ScriptedLink) -> None:
        for behaviour in ("answer", "refused", "lost", "broken"):
            link.behaviour = behaviour
            await post(ingress, key='"canary-key"')
            assert b"canary-key" not in b"".join(value for _, _, value in link.appended)

    with caplog.at_level(0):
        run(test)
    assert "canary-key" not in caplog.text
