"""Faults of the way to Kafka: of the wire as such, and of one chosen request or its answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from random import Random

from semel.prove.faults.contract import Fault, NotNow, Outcome, Targets
from semel.prove.faults.kafka_proxy import KafkaProxy
from semel.prove.faults.pipe import Direction, Proxy
from semel.prove.faults.rules import Action, Cut, Drop, Duplicate, Hold, Reorder, Rule

__all__ = ["Net", "strike_wire"]

_PATIENCE_SECONDS = 1.5
"""How long a request of the chosen kind is waited for; an idle process sends none."""
_ANSWER_BYTES = 24
"""Answers are cut within their first bytes: in the length, in the correlation id, in the first fields."""
_APIS = (
    "Produce",
    "EndTxn",
    "TxnOffsetCommit",
    "AddOffsetsToTxn",
    "InitProducerId",
    "Fetch",
    "OffsetFetch",
    "JoinGroup",
    "SyncGroup",
    "Heartbeat",
    "LeaveGroup",
    "FindCoordinator",
    "Metadata",
    "ListOffsets",
)
_OFTEN = ("Produce", "EndTxn", "TxnOffsetCommit", "Fetch", "Heartbeat")
"""What a working process sends all the time; three of four strikes are at these."""
_MAY_COME_TWICE = ("Produce", "EndTxn", "TxnOffsetCommit", "AddOffsetsToTxn", "Heartbeat")
"""A client repeats these over another connection when no answer comes, and the first copy may then arrive, too."""
_SILENT: dict[str, tuple[Direction, ...]] = {"silent": (), "deaf": ("response",), "mute": ("request",)}
_WIRE = (*_SILENT, "reset", "refusal", "throttle")


def strike_wire(proxy: Proxy, rng: Random, longest: float) -> Outcome:
    """Spoil all connections of one proxy for up to so many seconds; `Proxy.restore` heals it."""
    what = rng.choice(_WIRE)
    seconds = rng.uniform(0.2, longest)
    match what:
        case "reset":
            return Outcome(f"{proxy.reset()} connections reset")
        case "refusal":
            proxy.refuse()
            return Outcome(f"connections reset and refused for {seconds:.1f} s", seconds)
        case "throttle":
            bytes_per_second = rng.choice([20_000, 100_000, 500_000])
            proxy.throttle(bytes_per_second)
            return Outcome(f"throttled to {bytes_per_second / 1000:.0f} kB/s for {seconds:.1f} s", seconds)
    directions = _SILENT[what]
    proxy.silence(*directions)
    gone = f"no {directions[0]} arrives" if directions else "nothing arrives either way"
    return Outcome(f"connections are open and {gone} for {seconds:.1f} s", seconds)


class Net(Fault):
    """The way of one process to Kafka."""

    kind = "net"
    does = (
        "the way of one process to Kafka: silent in one direction or both, reset, refused, slow; or one request held, "
        "overtaken, delivered twice, dropped, cut at a byte, or the same done to its answer"
    )
    promise = "a request without an answer is never taken for done or not done; a late copy changes nothing"

    def __init__(self, targets: Targets) -> None:
        super().__init__(targets)
        self._proxy: KafkaProxy | None = None
        self._rule: Rule | None = None

    @classmethod
    def refusal(cls, targets: Targets) -> str:
        links = targets.links
        return links.kafka_refusal if links is not None and links.kafka_refusal else super().refusal(targets)

    @classmethod
    def aims(cls, targets: Targets) -> list[str]:
        return [] if targets.links is None else list(targets.links.kafka)

    async def strike(self, target: str, rng: Random) -> Outcome:
        assert self.targets.links is not None
        self.targets.running(target)
        proxy = self._proxy = self.targets.links.kafka[target]
        longest = self.targets.session_seconds * 1.5
        if rng.random() < 0.4:
            if not proxy.connections:
                raise NotNow(f"{target} has no connection to Kafka at this moment.")
            outcome = strike_wire(proxy, rng, longest)
            return outcome._replace(done=f"{target}: {outcome.done}")
        return await self._strike_request(proxy, target, rng, longest)

    async def _strike_request(self, proxy: KafkaProxy, target: str, rng: Random, longest: float) -> Outcome:
        api = rng.choice(_OFTEN if rng.random() < 0.75 else _APIS)
        what, action = _choose(api, rng, longest)
        rule = self._rule = proxy.on(api, action, nth=rng.randint(1, 3))
        try:
            await asyncio.wait_for(rule.struck.wait(), _PATIENCE_SECONDS)
        except TimeoutError:
            raise NotNow(f"{target} sent no {api} within {_PATIENCE_SECONDS:g} s.") from None
        assert rule.header is not None
        seconds = action.seconds or 0.0 if isinstance(action, Hold | Duplicate) else 0.0
        return Outcome(f"{target}: {api} v{rule.header.api_version} {what}", seconds)

    async def heal(self) -> None:
        if self._proxy is not None:
            if self._rule is not None:
                self._proxy.remove(self._rule)
            self._proxy.restore()


def _choose(api: str, rng: Random, longest: float) -> tuple[str, Action]:
    """What is to become of a request, in words and as an action."""
    seconds = rng.uniform(0.2, longest)
    at = rng.randrange(1, _ANSWER_BYTES)
    choices: list[Callable[[], tuple[str, Action]]] = [
        lambda: (f"held for {seconds:.1f} s", Hold("request", seconds)),
        lambda: (f"carried out, its answer held for {seconds:.1f} s", Hold("response", seconds)),
        lambda: ("lost with everything behind it", Drop("request")),
        lambda: ("carried out, its answer lost", Drop("response")),
        lambda: (f"cut at byte {at}", Cut("request", at)),
        lambda: (f"carried out, its answer cut at byte {at}", Cut("response", at)),
        lambda: ("reset before it arrived", Cut("request", reset=True)),
        lambda: ("carried out, then reset", Cut("response", reset=True)),
    ]
    if api in _MAY_COME_TWICE:
        choices.append(lambda: (f"delivered again {seconds:.1f} s later", Duplicate(seconds)))
    if api == "Produce":
        choices.append(lambda: ("overtaken by the next request", Reorder()))
    return rng.choice(choices)()
