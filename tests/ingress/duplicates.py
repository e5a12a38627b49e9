"""Many copies of each request at once, against the HTTP instances of a real deployment that are killed meanwhile.

Every copy is a client that does not rest before it knows what became of its request: it sends it again under the same
key, or asks the operation resource. `judge` compares what all of them were told with what is in the log.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
from base64 import urlsafe_b64encode
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

from semel.settings import KAFKA_ADDRESS
from tests.ops.deployment import Deployment
from tests.processing.running import drained, read_all

__all__ = ["Figures", "Plan", "run"]

APP = """
from uuid import uuid4
import msgspec
from semel import App, Created, Problem

class Order(msgspec.Struct, frozen=True):
    number: int
    note: str

app = App("NAME", request_partitions=4)
orders = app.topic("NAME.orders", key=str, value=list, partitions=4)

@app.post("/orders", request=Order)
def place(order: Order):
    token = uuid4().hex  # A second run of the same request would answer something else.
    if order.number % 10 == 9:
        raise Problem(409, token)
    yield orders.record(str(order.number), [order.number, order.note, token])
    return Created({"order": order.number, "token": token})
"""
PARTITIONS = 4
ROUTE = "POST /orders"
ANSWER_SECONDS = 20.0
PAUSE_SECONDS = (0.02, 0.5)
KEYS_AT_ONCE = 2


class Plan(NamedTuple):
    """`keys` requests, each sent by `copies` clients at once; instances are killed `kills` times on the way."""

    keys: int
    copies: int
    kills: int
    http: int
    workers: int = 1
    seed: int = 1


@dataclass(slots=True)
class Figures:
    """What happened, for the report of a run."""

    keys: int = 0
    clients: int = 0
    attempts: int = 0
    unanswered: int = 0
    answers: Counter[int] = field(default_factory=Counter)
    """Answers to POST by status."""
    replayed: int = 0
    learned_by_operation: int = 0
    unknown_operations: int = 0
    """Asked for before the request was in the log, or while the instance that had it was being killed."""
    kills: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        fields = {name: getattr(self, name) for name in self.__slots__}
        return json.dumps(fields | {"answers": dict(sorted(self.answers.items()))})


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


class Outcome(NamedTuple):
    """What one client knows in the end. `body` is what the handler answered, byte for byte."""

    note: str
    status: int
    body: bytes
    replayed: bool = False
    by_operation: bool = False


class Client:
    """One connection at a time to whichever instance the kernel gives it to; opened again when it breaks."""

    def __init__(self, port: int, figures: Figures) -> None:
        self._port = port
        self._figures = figures
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, request: bytes) -> Answer | None:
        """The answer, or None when none came: then nobody here knows whether the request was taken."""
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                return await self._ask(request)
        except (OSError, EOFError, TimeoutError):
            self.close()
            return None

    async def _ask(self, request: bytes) -> Answer:
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:-2])}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        if headers.get("connection") == "close":
            self.close()
        return Answer(int(head[0].split()[1]), headers, body)

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None

    # --- Until the outcome is known ---

    async def learn(self, key: str, number: int, note: str, rng: random.Random, *, prefer: str = "") -> Outcome:
        """Send one request until it is known what became of it; some ask the operation resource for that."""
        body = json.dumps({"number": number, "note": note}).encode()
        lines = [f"{ROUTE} HTTP/1.1", "Host: shop", "Content-Type: application/json", f'Idempotency-Key: "{key}"']
        lines += [f"Prefer: {prefer}"] if prefer else []
        request = "\r\n".join([*lines, f"Content-Length: {len(body)}"]).encode() + b"\r\n\r\n" + body
        place = operation_place(key)
        pauses = Pauses(rng)
        while True:
            self._figures.attempts += 1
            answer = await self.ask(request)
            found = None
            if answer is None:
                self._figures.unanswered += 1
                # What stands under the key is this request's outcome only if no other body came under it.
                if note == "main" and rng.random() < 0.5:
                    found = await self.ask_operation(place, pauses)
            else:
                self._figures.answers[answer.status] += 1
                if answer.status == 202:
                    assert answer.headers["location"] == place
                    assert json.loads(answer.body) == {"id": place.rpartition("/")[2], "status": "accepted"}
                    found = await self.ask_operation(place, pauses)
                    assert found is not None, f"{key}: accepted, and then unknown"
                elif answer.status != 503:
                    replayed = answer.headers.get("idempotency-replayed") == "true"
                    self._figures.replayed += replayed
                    return Outcome(note, answer.status, answer.body, replayed)
                else:
                    assert answer.headers["retry-after"] == "1"
            if found is not None:
                self._figures.learned_by_operation += 1
                return found._replace(note=note)
            await pauses.wait()

    async def ask_operation(self, place: str, pauses: Pauses) -> Outcome | None:
        """What the operation resource says, asked until it says something; None when it knows no such request."""
        while True:
            answer = await self.ask(f"GET {place} HTTP/1.1\r\nHost: shop\r\n\r\n".encode())
            if answer is not None and answer.status == 404:
                self._figures.unknown_operations += 1
                return None
            if answer is not None and answer.status == 200:
                document = json.loads(answer.body)
                status, inner = document["response"]["status"], document["response"]["body"]
                assert document["status"] == ("succeeded" if status < 400 else "failed")
                # The stored bytes stand in the document as they are.
                raw = json.dumps(inner, separators=(",", ":"), ensure_ascii=False).encode()
                assert raw in answer.body
                return Outcome("", status, raw, by_operation=True)
            assert answer is None or answer.status == 503, answer
            await pauses.wait()


class Pauses:
    """Longer each time, and never the same for two clients."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._seconds = PAUSE_SECONDS[0]

    async def wait(self) -> None:
        await asyncio.sleep(self._seconds * (0.5 + self._rng.random()))
        self._seconds = min(self._seconds * 1.7, PAUSE_SECONDS[1])


def operation_place(key: str) -> str:
    """As docs/howto.md tells clients to make it."""
    name = sha256(ROUTE.encode()).digest()[:6] + sha256(key.encode()).digest()[:30]
    return f"/operations/{urlsafe_b64encode(name).decode()}"


class _Killer:
    """Kills instances as the work goes on, so that every run has its kills however fast it is."""

    def __init__(self, running: Deployment, plan: Plan, figures: Figures) -> None:
        self._running = running
        self._plan = plan
        self._figures = figures
        self._rng = random.Random(f"{plan.seed}:kills")
        self.done = 0
        """Keys that are through."""
        self._progress = asyncio.Event()

    def passed(self) -> None:
        self.done += 1
        self._progress.set()

    async def run(self) -> None:
        while self._figures.kills < self._plan.kills:
            due = self._figures.kills * self._plan.keys // self._plan.kills
            while self.done < due:
                self._progress.clear()
                await self._progress.wait()
            await asyncio.sleep(self._rng.random() * 0.05)  # Somewhere in the middle of the next requests.
            self._kill()
            await asyncio.sleep(0.01)

    def _kill(self) -> None:
        instances = [
            child
            for name, child in self._running.children().items()
            if name.startswith("http") and child["state"] == "running" and child["pid"]
        ]
        if instances:
            with suppress(ProcessLookupError):
                os.kill(self._rng.choice(instances)["pid"], signal.SIGKILL)
                self._figures.kills += 1


def run(plan: Plan, folder: Path, bootstrap: str = "") -> Figures:
    """Run the plan and judge it; over the embedded broker, or over the Kafka at `bootstrap`."""
    name = f"d{uuid4().hex[:8]}"
    (folder / "shop.py").write_text(APP.replace("NAME", name))
    arguments = ["--http", str(plan.http), "--workers", str(plan.workers)]
    arguments += ["--kafka", bootstrap] if bootstrap else []
    with Deployment("shop:app", folder, *arguments) as running:
        running.wait_ready()
        figures, outcomes = asyncio.run(_load(plan, running))
        bootstrap = bootstrap or (folder / ".semel" / KAFKA_ADDRESS).read_text().strip()
        effects = asyncio.run(_effects(bootstrap, name))
    print(figures)
    judge(plan, outcomes, effects)
    return figures


async def _load(plan: Plan, running: Deployment) -> tuple[Figures, dict[int, list[Outcome]]]:
    figures = Figures()
    outcomes: dict[int, list[Outcome]] = {}
    killer = _Killer(running, plan, figures)
    killing = asyncio.create_task(killer.run())
    numbers = iter(range(plan.keys))
    started = time.monotonic()

    async def lane() -> None:
        clients = [Client(running.port, figures) for _ in range(plan.copies)]
        for number in numbers:
            outcomes[number] = await asyncio.gather(
                *(_copy(client, plan, number, copy) for copy, client in enumerate(clients))
            )
            figures.keys += 1
            killer.passed()
        for client in clients:
            client.close()

    await asyncio.gather(*(lane() for _ in range(KEYS_AT_ONCE)))
    figures.clients = sum(len(found) for found in outcomes.values())
    figures.seconds = round(time.monotonic() - started, 1)
    await killing
    return figures, outcomes


async def _copy(client: Client, plan: Plan, number: int, copy: int) -> Outcome:
    """One copy. One of all, not always the first, comes with another body; another does not wait for its answer."""
    rng = random.Random(f"{plan.seed}:{number}:{copy}")
    other = random.Random(f"{plan.seed}:{number}").randrange(plan.copies)
    note = "other" if copy == other else "main"
    prefer = "respond-async" if copy == (other + 1) % plan.copies else ""
    return await client.learn(f"key-{number}", number, note, rng, prefer=prefer)


async def _effects(bootstrap: str, name: str) -> dict[int, list[tuple[str, str]]]:
    """By number: note and token of every committed effect, when everything that was appended is done."""
    await drained(bootstrap, f"{name}.requests", f"{name}.semel.requests")
    found: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for record in await read_all(bootstrap, f"{name}.orders", PARTITIONS):
        number, note, token = json.loads(record.value or b"")
        found[number].append((note, token))
    return found


def judge(plan: Plan, outcomes: dict[int, list[Outcome]], effects: dict[int, list[tuple[str, str]]]) -> None:
    """One effect a key, one answer for everybody who sent the same request, 422 for everybody else."""
    assert sorted(outcomes) == list(range(plan.keys))
    assert set(effects) == {number for number in range(plan.keys) if number % 10 != 9}
    for number, found in outcomes.items():
        assert len(found) == plan.copies
        [answer] = {outcome.body for outcome in found if outcome.status in (201, 409)}
        if number % 10 == 9:
            status = 409
            assert len(json.loads(answer)["detail"]) == 32
            # Without an effect only an answer tells who came first; there is none when all of them learned it later.
            winners = {outcome.note for outcome in found if outcome.status == 409 and not outcome.by_operation}
            assert len(winners) <= 1, (number, winners)
        else:
            status = 201
            [(winner, token)] = effects[number]
            winners = {winner}
            assert answer == b'{"order":%d,"token":"%s"}' % (number, token.encode())
        for outcome in found:
            if outcome.note in winners or outcome.by_operation:
                assert (outcome.status, outcome.body) == (status, answer), (number, outcome)
            else:
                assert outcome.status == 422, (number, outcome)
                assert json.loads(outcome.body)["type"] == "/errors/idempotency-key-reused"
        assert len({outcome.note for outcome in found if outcome.status == 422}) <= 1, (number, found)
        firsts = [one for one in found if one.status == status and not (one.replayed or one.by_operation)]
        assert len(firsts) <= 1, f"key {number} was answered for the first time {len(firsts)} times"
