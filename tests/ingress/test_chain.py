"""The ingress through real logs: one effect and one answer for a key, whatever restarts in between."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from uuid import uuid4

import pytest

from semel.broker.embedded import EmbeddedBroker
from semel.errors import ConfigurationError
from semel.ingress.asgi import create
from semel.ingress.limits import Limits
from semel.settings import Settings
from tests.conftest import Address
from tests.ingress.chain import PARTITIONS, http, items_written, make_app, owners, prepare
from tests.ingress.client import call, post
from tests.ingress.test_server import Client, request
from tests.services.kafka import free_port

ROOT = Path(__file__).parents[2]


def new_name() -> str:
    return f"i{uuid4().hex[:8]}"


def test_sixty_four_duplicates_at_once_over_two_instances(any_broker: Address) -> None:
    bootstrap = any_broker.bootstrap

    async def main() -> None:
        app = make_app(new_name())
        await prepare(bootstrap, app)
        async with http(bootstrap, app) as one, http(bootstrap, app) as two:
            async with owners(bootstrap, app, (0, 1)):
                every = await asyncio.gather(*(post((one, two)[number % 2]) for number in range(64)))
                assert {got.status for got in every} == {201}
                assert {got.body for got in every} == {b'{"order":1}'}
                assert sum("idempotency-replayed" not in got.headers for got in every) == 1
                others = await asyncio.gather(*(post(two, body=b'{"id":%d}' % number) for number in range(2, 10)))
                assert {got.type for got in others} == {"/errors/idempotency-key-reused"}
                for path, user, replayed in (
                    ("/mine", "alice", False),
                    ("/mine", "bob", False),
                    ("/mine", "alice", True),
                    ("/orders", "alice", True),
                ):
                    got = await post(one, path, headers=[("x-user", user)])
                    assert (got.status, "idempotency-replayed" in got.headers) == (201, replayed)
            assert await items_written(bootstrap, app) == sorted([(1, 0), (1, 1)] * 3)

    asyncio.run(main())


def test_outcomes_of_every_kind_survive_new_instances_and_new_owners(any_broker: Address) -> None:
    bootstrap = any_broker.bootstrap

    async def main() -> None:
        app = make_app(new_name())
        await prepare(bootstrap, app)
        keys = [f"k{number}" for number in range(20)]
        firsts = []
        for round_, slot in enumerate((0, 0, 1)):
            async with http(bootstrap, app) as ingress, owners(bootstrap, app, (slot,)):
                placed = await asyncio.gather(
                    *(post(ingress, key=key, body=b'{"id":%d}' % number) for number, key in enumerate(keys, 1))
                )
                refused = await post(ingress, key="refused", body=b'{"id":0}')
                failed = await post(ingress, key="failed", body=b'{"id":-1}')
                assert {got.status for got in placed} == {201}
                assert (refused.status, refused.json["detail"]) == (409, "no such order")
                assert failed.type == "/errors/handler-failed"
                assert ["idempotency-replayed" in got.headers for got in (*placed, refused, failed)] == [
                    *[round_ > 0] * 21,
                    False,
                ]
                firsts.append([got.body for got in (*placed, refused)])
        assert firsts[0] == firsts[1] == firsts[2]
        assert await items_written(bootstrap, app) == [
            (order, position) for order in range(1, 21) for position in (0, 1)
        ]

    asyncio.run(main())


def test_while_no_owner_is_there_a_request_is_accepted_and_done_later(embedded: Address) -> None:
    bootstrap = embedded.bootstrap

    async def main() -> None:
        app = make_app(new_name(), wait_seconds=0.5)
        await prepare(bootstrap, app)
        async with http(bootstrap, app) as ingress:
            first, second = await asyncio.gather(post(ingress), post(ingress))
            assert (first.status, second.status) == (202, 202)
            place = first.headers["location"]
            assert second.headers["location"] == place
            assert (await call(ingress, "GET", place)).type == "/errors/no-answer-yet"
            async with owners(bootstrap, app), asyncio.timeout(20):
                while (looked := await call(ingress, "GET", place)).status == 503:
                    await asyncio.sleep(0.05)
                assert looked.json["status"] == "succeeded"
                assert looked.json["response"]["body"] == {"order": 1}
                assert (await post(ingress)).headers["idempotency-replayed"] == "true"
        assert await items_written(bootstrap, app) == [(1, 0), (1, 1)]

    asyncio.run(main())


@pytest.mark.parametrize(("point", "is_in_log"), [("ingress.before_append", False), ("ingress.after_append", True)])
def test_an_instance_killed_around_the_append_and_the_retry_at_another(
    embedded: Address, point: str, is_in_log: bool
) -> None:
    bootstrap = embedded.bootstrap

    async def main() -> None:
        app = make_app(new_name())
        await prepare(bootstrap, app)
        environment = {**os.environ, "SEMEL_KAFKA": bootstrap, "SEMEL_FAILPOINT": f"{point}:kill:2"}
        command = [sys.executable, "-m", "tests.ingress.chain", app.name]
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(owners(bootstrap, app))
            other = await stack.enter_async_context(http(bootstrap, app))
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
            stack.callback(process.wait)
            stack.callback(process.kill)
            assert process.stdout is not None
            port = int(await asyncio.to_thread(process.stdout.readline))

            async def ask(key: str) -> int:
                client = Client(*await asyncio.open_connection("127.0.0.1", port))
                return await client.ask(request(key))

            async with asyncio.timeout(30):
                while True:
                    try:
                        if await ask("warm") != 503:
                            break
                    except ConnectionError:
                        await asyncio.sleep(0.05)
            with pytest.raises((EOFError, ConnectionError)):
                await ask("k")
            assert await asyncio.to_thread(process.wait, 10) == -9
            retry = await post(other)
            assert (retry.status, retry.body) == (201, b'{"order":1}')
            assert ("idempotency-replayed" in retry.headers) == is_in_log
        assert await items_written(bootstrap, app) == sorted([(1, 0), (1, 1)] * 2)  # "warm" and "k"

    asyncio.run(main())


def test_the_broker_goes_away_and_comes_back(tmp_path: Path) -> None:
    """Down at the start, then up, down in the middle, and up again: honest answers, and one effect in the end."""
    port = free_port()
    bootstrap = f"127.0.0.1:{port}"

    async def main() -> None:
        app = make_app(new_name())
        settings = Settings(kafka=bootstrap, partitions=PARTITIONS, drain_seconds=1)
        ingress = create(app, settings, limits=Limits(start_seconds=0.3))
        await ingress.start()
        early = await post(ingress)
        assert (early.status, early.type) == (503, "/errors/unavailable")
        assert (await call(ingress, "GET", "/readyz")).status == 503

        async def until_done(key: str) -> tuple[int, bytes]:
            async with asyncio.timeout(60):
                while (got := await post(ingress, key=key)).status in (503, 202):
                    assert got.status == 202 or got.headers["retry-after"] == "1"
                    await asyncio.sleep(0.1)
            return got.status, got.body

        with EmbeddedBroker(tmp_path / "data", port=port):
            await prepare(bootstrap, app)
            owning = owners(bootstrap, app)
            await owning.__aenter__()
            assert await until_done("first") == (201, b'{"order":1}')
        waiting = [asyncio.create_task(until_done("second")) for _ in range(8)]
        down = await post(ingress, key="second")
        assert (down.status, (await call(ingress, "GET", "/readyz")).status) == (503, 503)
        with EmbeddedBroker(tmp_path / "data", port=port):
            assert set(await asyncio.gather(*waiting)) == {(201, b'{"order":1}')}
            assert await until_done("first") == (201, b'{"order":1}')
            assert (await call(ingress, "GET", "/readyz")).status == 200
            await owning.__aexit__(None, None, None)
            await ingress.close()
            assert await items_written(bootstrap, app) == sorted([(1, 0), (1, 1)] * 2)

    asyncio.run(main())


def test_another_partition_count_stops_the_start(embedded: Address) -> None:
    bootstrap = embedded.bootstrap

    async def main() -> None:
        app = make_app(new_name())
        await prepare(bootstrap, app)
        async with http(bootstrap, app), owners(bootstrap, app):
            pass
        app.request_partitions = PARTITIONS * 2
        ingress = create(app, Settings(kafka=bootstrap, drain_seconds=1))
        with pytest.raises(ConfigurationError, match=r"PARTITIONS_CHANGED.*request_partitions=4"):
            await ingress.start()
        assert (await post(ingress)).type == "/errors/unavailable"
        await ingress.close()

    asyncio.run(main())


def test_without_a_kafka_address_the_message_says_what_to_set() -> None:
    with pytest.raises(ConfigurationError, match="SEMEL_KAFKA"):
        create(make_app(new_name()), Settings())
