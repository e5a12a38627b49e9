"""One connection: order, time-outs, and honesty about what was sent."""

from __future__ import annotations

import asyncio
import os
import struct

import pytest

from semel.client.cluster import KafkaClient
from semel.client.connection import Connection, ForkedClient
from semel.client.producer import Producer
from semel.env import Env
from semel.errors import ErrorCode, Fatal, OutcomeUnknown, ProtocolError, Retriable
from tests.client.scripted_broker import FIND_COORDINATOR, METADATA, ScriptedBroker

METADATA_FIELDS = {
    "topics": (),
    "allow_auto_topic_creation": False,
    "include_topic_authorized_operations": False,
    "include_cluster_authorized_operations": False,
}


async def opened(broker: ScriptedBroker, timeout: float = 5.0) -> Connection:
    return await Connection.open(
        "127.0.0.1", broker.port, client_id="test", env=Env(), timeout=timeout, connect_timeout=5.0
    )


def test_pipelined_requests_get_their_own_answers() -> None:
    async def main() -> None:
        async with ScriptedBroker() as broker:
            connection = await opened(broker)
            answers = [
                connection.send(FIND_COORDINATOR, 4, key_type=1, coordinator_keys=(f"id-{number}",))
                for number in range(50)
            ]
            assert connection.in_flight == 50
            found = [answer.coordinators[0].key for answer in await asyncio.gather(*answers)]
            assert found == [f"id-{number}" for number in range(50)]
            connection.close()
            await connection.wait_closed()

    asyncio.run(main())


def test_a_lost_answer_is_an_unknown_outcome_and_what_is_not_written_is_retriable() -> None:
    async def main() -> None:
        async with ScriptedBroker() as broker:
            connection = await opened(broker)
            broker.then(METADATA, "close after")
            lost = connection.send(METADATA, 12, **METADATA_FIELDS)
            behind = connection.send(METADATA, 12, **METADATA_FIELDS)
            for future in (lost, behind):
                with pytest.raises(OutcomeUnknown, match="metadata was sent"):
                    await future
            assert not connection.is_open
            with pytest.raises(Retriable):
                connection.send(METADATA, 12, **METADATA_FIELDS)

    asyncio.run(main())


def test_a_time_out_gives_up_the_connection_because_answers_come_in_order() -> None:
    async def main() -> None:
        async with ScriptedBroker() as broker:
            connection = await opened(broker, timeout=0.1)
            broker.then(METADATA, "silent")
            with pytest.raises(OutcomeUnknown, match=r"not answered within 0\.1 s"):
                await connection.send(METADATA, 12, **METADATA_FIELDS)
            assert not connection.is_open

    asyncio.run(main())


def test_bytes_that_are_not_kafka_end_the_connection() -> None:
    async def talk(reply: bytes) -> None:
        def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(reply)

        server = await asyncio.start_server(accepted, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        with pytest.raises((Retriable, ProtocolError)):
            await Connection.open("127.0.0.1", port, client_id="test", env=Env(), timeout=2.0, connect_timeout=2.0)
        server.close()

    for reply in (
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        struct.pack(">i", -5),
        struct.pack(">ii", 4, 77),
        struct.pack(">iih", 6, 1, 0),
    ):
        asyncio.run(talk(reply))


def test_a_broker_too_old_is_refused_by_name() -> None:
    async def main() -> None:
        async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            size = int.from_bytes(await reader.readexactly(4), "big")
            frame = await reader.readexactly(size)
            body = frame[4:8] + struct.pack(">hi", ErrorCode.UNSUPPORTED_VERSION, 1) + struct.pack(">hhh", 18, 0, 2)
            writer.write(len(body).to_bytes(4, "big") + body)

        server = await asyncio.start_server(accepted, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(Fatal, match=r"older than Apache Kafka 2\.4"):
            await Connection.open("127.0.0.1", port, client_id="test", env=Env(), timeout=2.0, connect_timeout=2.0)
        server.close()

    asyncio.run(main())


def test_a_client_from_before_a_fork_refuses_to_work_in_the_child() -> None:
    """C14: the child would write into its parent's connections, and lose what it wrote."""

    async def main() -> int:
        async with ScriptedBroker() as broker:
            client = KafkaClient(broker.address)
            await client.start()
            producer = Producer(client)
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    asyncio.run(producer.send("t", 0, None, b"x"))
                except ForkedClient as error:
                    code = 0 if "forked child" in str(error) else 2
                finally:
                    os._exit(code)
            _, status = await asyncio.to_thread(os.waitpid, child, 0)
            await producer.close()
            await client.close()
            return os.waitstatus_to_exitcode(status)

    assert asyncio.run(main()) == 0
