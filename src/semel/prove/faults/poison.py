"""Records and requests that no handler can read: garbage, another type, too much of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from random import Random

from semel import history
from semel.client.cluster import KafkaClient
from semel.client.idempotent import Producer
from semel.errors import Fatal, OutcomeUnknown, Retriable, SemelError
from semel.ingress.limits import Limits
from semel.prove.clients import Connection, request_bytes
from semel.prove.faults.contract import Fault, NotNow, Outcome, Targets
from semel.prove.faults.intake import Intake

__all__ = ["Poison"]

_SETTINGS = {"delivery.timeout.ms": 10_000}
_HEADERS = 500
_DEEP = 100_000
_RECORDS: dict[str, Callable[[Random], bytes]] = {
    "garbage": lambda rng: rng.randbytes(rng.randint(1, 200)) + b"\xff",
    "half of a JSON text": lambda _rng: b'{"a": [1, 2',
    "JSON of another type": lambda _rng: b'[[null, {"no": "such"}], -1e999]',
    "deeply nested JSON": lambda _rng: b"[" * _DEEP,
    "a large value": lambda rng: b"\xff" * rng.randint(100_000, 500_000),
    "a value of Kafka's largest size": lambda _rng: b"\xff" * 1_048_000,
}
_BODIES: dict[str, Callable[[Random], bytes]] = {
    "garbage": lambda rng: rng.randbytes(rng.randint(1, 200)) + b"\xff",
    "half of a JSON text": lambda _rng: b'{"a": [1, 2',
    "deeply nested JSON": lambda _rng: b"[" * _DEEP,
    "a body above the limit": lambda _rng: b"1" * (Limits().body_bytes + 1),
}


class Poison(Fault):
    """One record into a topic, or one request to an endpoint."""

    kind = "poison"
    does = "a record or a request that nobody can read: garbage, cut JSON, another type, deep nesting, too large"
    promise = "a record is parked with its reason and holds up nothing else; a request is refused with 4xx"

    @classmethod
    def aims(cls, targets: Targets) -> list[str]:
        intake = targets.intake
        if intake is None:
            return []
        return [f"topic {name}" for name in intake.topics] + [f"POST {path}" for path in intake.paths]

    async def strike(self, target: str, rng: Random) -> Outcome:
        intake = self.targets.intake
        assert intake is not None
        what, _, name = target.partition(" ")
        return await (_post(intake, name, rng) if what == "POST" else _send(intake, name, rng))


async def _send(intake: Intake, topic: str, rng: Random) -> Outcome:
    what, make = rng.choice(list(_RECORDS.items()))
    headers = [(f"h{number}", b"x") for number in range(_HEADERS if rng.random() < 0.2 else 0)]
    attempt = history.attempt()
    note = partial(history.Send, a=attempt, id=f"poison: {what}", topic=topic)
    client = KafkaClient(intake.bootstrap, client_id="semel-poison", settings={**intake.settings, **_SETTINGS})
    producer = Producer(client)
    history.note(note(type="invoke"))
    try:
        await client.start()
        partition = rng.randrange((await client.topic(topic)).partitions)
        # Without a key: a parked one would hold up every later record of its key, and all of those are somebody's.
        written = await producer.send(topic, partition, None, make(rng), ((history.PROOF, attempt.encode()), *headers))
    except Fatal as error:
        history.note(note(type="fail"))
        return Outcome(f"{what} to topic {topic}: refused, {error}")
    except Retriable as error:
        history.note(note(type="fail"))
        raise NotNow(f"Kafka takes no record at this moment: {error}") from error
    except OutcomeUnknown:
        history.note(note(type="info"))
        return Outcome(f"{what} to topic {topic}: nobody knows whether it is there")
    finally:
        await producer.close()
        await client.close()
    history.note(note(type="ok", partition=partition, offset=written.offset))
    return Outcome(f"{what} to topic {topic}, at {partition}@{written.offset}; it is to be parked")


async def _post(intake: Intake, path: str, rng: Random) -> Outcome:
    what, make = rng.choice(list(_BODIES.items()))
    body, key, attempt = make(rng), f"poison-{rng.randbytes(6).hex()}", history.attempt()
    note = partial(history.Http, a=attempt, key=key, route=f"POST {path}", body=history.digest(body))
    connection = Connection(lambda: rng.choice(list(intake.addresses())))
    history.note(note(type="invoke"))
    try:
        answer = await connection.post(request_bytes("POST", path, key, body))
    finally:
        connection.close()
    if not answer.is_final:
        history.note(note(type="info"))
        raise NotNow(f"POST {path} was not answered with anything final ({answer.status}).")
    is_refused = 400 <= answer.status < 500
    reply = history.digest(answer.body)
    history.note(note(type="fail" if is_refused else "ok", status=answer.status, reply=reply))
    if not is_refused:
        raise SemelError(f"POST {path} with {what} was answered {answer.status}, and should have been refused.")
    return Outcome(f"{what} to POST {path}: refused with {answer.status}")
