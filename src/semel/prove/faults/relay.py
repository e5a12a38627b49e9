"""One Kafka connection through the proxy: which answer belongs to which request, and what a rule does to either."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import TYPE_CHECKING

from semel.errors import ProtocolError
from semel.prove.faults.frames import FrameStream, Mode
from semel.prove.faults.pipe import Address, Pipe
from semel.prove.faults.readdress import names_brokers, readdressed
from semel.prove.faults.rules import Cut, Drop, Duplicate, Hold, Reorder, Rule
from semel.wire.messages import api_name, decode_request_header

if TYPE_CHECKING:
    from semel.prove.faults.kafka_proxy import KafkaProxy

__all__ = ["Relay"]

log = logging.getLogger("semel.prove.proxy")

_SASL_HANDSHAKE = 17
_LINGER_SECONDS = 5.0
"""How long the broker may take over what was struck when its client is gone, before we go, too."""


class _Asked:
    """One request that the broker has and has not answered."""

    __slots__ = ("after", "api_key", "behind", "correlation_id", "done", "is_copy", "rule", "version")

    def __init__(self, correlation_id: bytes, api_key: int, version: int, rule: Rule | None = None) -> None:
        self.correlation_id = correlation_id
        self.api_key = api_key
        self.version = version
        self.rule = rule
        self.is_copy = False
        self.done = False
        self.after: _Asked | None = None
        """It overtook this one: its answer waits for that one's."""
        self.behind: list[bytes] = []
        """Answers that wait for this one's."""


class _Overtaken:
    """A request that others are to overtake."""

    def __init__(self, asked: _Asked, frame: bytes, behind: int, timer: asyncio.TimerHandle) -> None:
        self.asked, self.frame, self.left, self.timer = asked, frame, behind, timer


class Relay(Pipe):
    """Forwards frames as bytes; only their heads are read, unless a rule asks for more."""

    def __init__(self, proxy: KafkaProxy, upstream: Address) -> None:
        super().__init__(proxy, upstream)
        self._rules = proxy.rules
        self._kafka = proxy
        self._asked: deque[_Asked] = deque()
        """In the order in which the broker got them, which is the order of its answers."""
        self._answering: _Asked | None = None
        self._requests = FrameStream(12, self._begin_request, self._take_request, self.server.write)
        self._responses = FrameStream(8, self._begin_response, self._take_response, self.client.write)
        self._cut_off = False
        """A request was dropped: nothing behind it reaches the broker."""
        self._deaf = False
        """A response was dropped: nothing behind it reaches the client."""
        self._overtaken: _Overtaken | None = None
        self._client_left = False

    def from_client(self, data: bytes) -> None:
        self._requests.feed(data)

    def from_server(self, data: bytes) -> None:
        self._responses.feed(data)

    # --- Requests ---

    def _begin_request(self, data: bytes, at: int) -> Mode:
        if self._cut_off:
            return Mode.SKIP
        api_key = int.from_bytes(data[at + 4 : at + 6], "big")
        version = int.from_bytes(data[at + 6 : at + 8], "big")
        if self._overtaken is not None or api_key == _SASL_HANDSHAKE:
            return Mode.WHOLE
        if self._rules and any(rule.may_take(api_key, version) for rule in self._rules):
            return Mode.WHOLE
        self._asked.append(_Asked(data[at + 8 : at + 12], api_key, version))
        return Mode.PASS

    def _take_request(self, frame: bytes) -> None:
        body = frame[4:]
        try:
            header = decode_request_header(body)
        except ProtocolError:
            self._requests.is_opaque = self._responses.is_opaque = True
            self.server.write(frame)
            return
        if header.api_key == _SASL_HANDSHAKE and header.api_version == 0:
            # What follows are bare tokens without a head. Such a connection is carried as it is.
            self._requests.is_opaque = self._responses.is_opaque = True
        rule = None
        for each in list(self._rules):
            if each.may_take(header.api_key, header.api_version) and each.takes(header, body):
                rule = each
                break
        asked = _Asked(frame[8:12], header.api_key, header.api_version, rule)
        if rule is None:
            self._forward(asked, frame)
            return
        log.debug("%s v%d: %s", api_name(header.api_key), header.api_version, rule.action)
        self._act_on_request(rule, asked, frame)

    def _act_on_request(self, rule: Rule, asked: _Asked, frame: bytes) -> None:
        match rule.action:
            case Hold("request", seconds):
                self._requests.halt()
                self.client.pause("held")
                self.when_let_go(rule, seconds, lambda: self._let_request_go(asked, frame))
            case Reorder(behind, seconds) if self._overtaken is None:
                timer = asyncio.get_running_loop().call_later(seconds, self._requests.between_frames, self._catch_up)
                self._overtaken = _Overtaken(asked, frame, behind, timer)
            case Duplicate(seconds):
                self._forward(asked, frame)
                copy = _Asked(asked.correlation_id, asked.api_key, asked.version, rule)
                copy.is_copy = True

                def again() -> None:
                    self._forward(copy, frame)

                self.when_let_go(rule, seconds, lambda: self._requests.between_frames(again))
            case Drop("request"):
                self._cut_off = True
                rule.settle(None)
            case Cut("request", at, reset):
                self.server.write(frame[:at])
                rule.settle(None)
                self.close(reset=reset)
            case _:
                self._forward(asked, frame)  # The rule is about the response.

    def _forward(self, asked: _Asked, frame: bytes) -> None:
        self._asked.append(asked)
        self.server.write(frame)
        overtaken = self._overtaken
        if overtaken is not None and not asked.is_copy:
            asked.after = overtaken.asked
            overtaken.left -= 1
            if overtaken.left <= 0:
                self._catch_up()

    def _catch_up(self) -> None:
        """What was overtaken goes now."""
        overtaken, self._overtaken = self._overtaken, None
        if overtaken is not None:
            overtaken.timer.cancel()
            self._forward(overtaken.asked, overtaken.frame)

    def _let_request_go(self, asked: _Asked, frame: bytes) -> None:
        self._forward(asked, frame)
        self._requests.go()
        self.client.resume("held")

    # --- Responses ---

    def _begin_response(self, data: bytes, at: int) -> Mode:
        correlation_id = data[at + 4 : at + 8]
        while self._asked:
            asked = self._asked.popleft()
            if asked.correlation_id == correlation_id:
                break
            self._settle(asked, None)  # Produce with acks=0 has no answer.
        else:
            log.error("an answer that nobody asked for: the connection is closed")
            self.close()
            return Mode.SKIP
        self._answering = asked
        if asked.rule is None and asked.after is None and not self._deaf and not self._names_brokers(asked):
            asked.done = True
            return Mode.PASS
        return Mode.WHOLE

    def _names_brokers(self, asked: _Asked) -> bool:
        return names_brokers(asked.api_key, asked.version, several=self._kafka.is_cluster)

    def _take_response(self, frame: bytes) -> None:
        asked = self._answering
        assert asked is not None, "a response is taken when its head was read"
        asked.done = True
        self._settle(asked, frame[4:])
        if self._deaf or asked.is_copy:
            self._leave_if_idle()
            return
        if self._names_brokers(asked):
            frame = self._moved(asked, frame)
        if asked.after is not None and not asked.after.done:
            asked.after.behind.append(frame)
            return
        self._act_on_response(asked, frame)
        for each in asked.behind:
            self.client.write(each)
        self._leave_if_idle()

    def _act_on_response(self, asked: _Asked, frame: bytes) -> None:
        match asked.rule.action if asked.rule is not None else None:
            case Hold("response", seconds):
                assert asked.rule is not None
                self._responses.halt()
                self.server.pause("held")
                self.when_let_go(asked.rule, seconds, lambda: self._let_response_go(frame))
            case Drop("response"):
                self._deaf = True
            case Cut("response", at, reset):
                self.client.write(frame[:at])
                self.close(reset=reset)
            case _:
                self.client.write(frame)

    def _let_response_go(self, frame: bytes) -> None:
        self.client.write(frame)
        self._responses.go()
        self.server.resume("held")

    def _moved(self, asked: _Asked, frame: bytes) -> bytes:
        try:
            return readdressed(asked.api_key, asked.version, frame, self._kafka.port_for)
        except ProtocolError as error:
            # Passed on as it is: the client may go round us, and that must be seen.
            log.error("addresses stay as they are: %s", error)
            return frame

    # --- Time, and the end ---

    def _settle(self, asked: _Asked, answer: bytes | None) -> None:
        rule = asked.rule
        if rule is not None and (asked.is_copy or not isinstance(rule.action, Duplicate)):
            rule.settle(answer)

    def _is_busy(self) -> bool:
        """Whether something that a rule took is still on its way to the broker, or in its hands."""
        return bool(self.waiting) or self._overtaken is not None or any(asked.rule for asked in self._asked)

    def client_gone(self) -> None:
        # What was taken must still arrive: a late frame is late because its client has gone on elsewhere.
        self._client_left = True
        if self._is_busy():
            return
        self.server.close()

    def _leave_if_idle(self) -> None:
        if not self._client_left or self.waiting:
            return
        if self._is_busy():
            asyncio.get_running_loop().call_later(_LINGER_SECONDS, self.server.close)
        else:
            self.server.close()

    def server_gone(self) -> None:
        for asked in self._asked:
            self._settle(asked, None)
        self._asked.clear()
        super().server_gone()

    def done_waiting(self) -> None:
        self._leave_if_idle()
