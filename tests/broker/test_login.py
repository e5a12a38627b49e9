"""Logging in: what a stranger may do, what a login leads to, and that neither of them can hurt the others."""

from __future__ import annotations

import socket
import ssl
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from semel.broker.config import BrokerConfig
from semel.broker.embedded import EmbeddedBroker
from semel.broker.exchange import Later, Peer
from semel.broker.security import login as login_room
from semel.broker.security import tls as tls_room
from semel.broker.security.login import LOGIN_FRAME_BYTES, REQUESTS_MAX, Login
from semel.broker.security.settings import Listener, Security, TlsFiles
from semel.broker.security.tls import Certificates, principal_of
from semel.broker.security.users import Users
from semel.env import Env
from semel.errors import ConfigurationError, ProtocolError
from semel.wire.messages import decode_response, encode_request
from semel.wire.scram import ScramClient
from tests.broker.core import Core
from tests.services.certificates import Authority

USER, PASSWORD = "alice", "canary-secret"
NOT_ASKED = {"include_cluster_authorized_operations": False, "include_topic_authorized_operations": False}


class Visitor:
    """One connection that has not logged in yet, without a socket."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.peer = Peer("127.0.0.1", "127.0.0.1", 9092, LOGIN_FRAME_BYTES)
        self.peer.login = Login(self.peer)

    def raw(self, frame: bytes) -> bytes:
        """The answer's bytes without their length. A late one is waited for on the test's clock."""
        answer: Any = self.core.node.handle(memoryview(bytearray(frame)), self.peer)
        if isinstance(answer, Later):
            got: list[Any] = []
            answer.deliver = got.append
            self.core.pass_time(200)
            self.core.node.outbox.drain()
            (answer,) = got
        return b"".join(answer)[4:]

    def ask(self, key: int, version: int, /, **fields: Any) -> Any:
        frame = encode_request(key, version, 7, "test", **fields)[4:]
        return decode_response(key, version, self.raw(frame))

    def scram(
        self, user: str = USER, password: str = PASSWORD, mechanism: str = "SCRAM-SHA-256", version: int = 2
    ) -> Any:
        assert self.ask(17, 1, mechanism=mechanism).error_code == 0
        client = ScramClient(mechanism, user, password, "nonce")
        first = self.ask(36, version, auth_bytes=client.first())
        last = self.ask(36, version, auth_bytes=client.final(first.auth_bytes))
        if last.error_code == 0:
            client.verify(last.auth_bytes)
        return last

    def plain(self, user: str = USER, password: str = PASSWORD, authorization: str = "") -> Any:
        assert self.ask(17, 1, mechanism="PLAIN").error_code == 0
        return self.ask(36, 2, auth_bytes=f"{authorization}\0{user}\0{password}".encode())

    def metadata(self) -> Any:
        return self.ask(3, 9, topics=None, allow_auto_topic_creation=False, **NOT_ASKED)


def core_with(tmp_path: Path, **settings: Any) -> Core:
    security = Security(mechanisms=("SCRAM-SHA-256", "SCRAM-SHA-512", "PLAIN"), users={USER: PASSWORD}, **settings)
    return Core(tmp_path, BrokerConfig(security=security))


@pytest.fixture
def core(tmp_path: Path) -> Core:
    return core_with(tmp_path)


@pytest.mark.parametrize("mechanism", ["SCRAM-SHA-256", "SCRAM-SHA-512"])
@pytest.mark.parametrize("version", [0, 1, 2])
def test_scram(core: Core, mechanism: str, version: int) -> None:
    visitor = Visitor(core)
    assert visitor.ask(18, 3, client_software_name="t", client_software_version="1").error_code == 0
    assert visitor.scram(mechanism=mechanism, version=version).error_code == 0
    assert visitor.peer.principal == f"User:{USER}"
    assert visitor.peer.max_frame_bytes > LOGIN_FRAME_BYTES
    assert visitor.peer.login is None, "no frame of a logged-in connection is looked at twice"
    assert visitor.metadata().brokers
    # Too late now.
    assert visitor.ask(17, 1, mechanism="PLAIN").error_code == 34
    assert visitor.ask(36, 2, auth_bytes=b"").error_code == 34


def test_plain_is_checked_against_the_verifier_and_remembered_without_the_password(core: Core) -> None:
    for _ in range(2):
        visitor = Visitor(core)
        assert visitor.plain().error_code == 0
        assert visitor.peer.principal == f"User:{USER}"
    users = core.node.users
    assert users.remembers(USER, PASSWORD)
    assert not users.remembers(USER, "other")
    assert PASSWORD not in repr(vars(users))
    core.node.metadata.delete_credential(USER, "SCRAM-SHA-256")
    core.node.metadata.delete_credential(USER, "SCRAM-SHA-512")
    assert not users.remembers(USER, PASSWORD), "a password that was taken away is not remembered"
    assert Visitor(core).plain().error_code == 58


def test_bare_tokens_after_a_handshake_of_version_0(core: Core) -> None:
    visitor = Visitor(core)
    assert visitor.ask(17, 0, mechanism="SCRAM-SHA-512").error_code == 0
    client = ScramClient("SCRAM-SHA-512", USER, PASSWORD, "nonce")
    client.verify(visitor.raw(client.final(visitor.raw(client.first()))))
    assert visitor.peer.principal == f"User:{USER}"
    again = Visitor(core)
    again.ask(17, 0, mechanism="PLAIN")
    assert again.raw(f"\0{USER}\0wrong".encode()) == b"", "there is no room for a refusal, only for the end"
    assert again.peer.leaving


@pytest.mark.parametrize("user", [USER, "nobody"])
def test_wrong_password_is_said_late_and_ends_the_connection(core: Core, user: str) -> None:
    for attempt in (Visitor.scram, Visitor.plain):
        visitor = Visitor(core)
        began = core.now_ms
        refused = attempt(visitor, user, "wrong")
        assert refused.error_code == 58
        assert refused.error_message.startswith("Authentication failed")
        assert "wrong" not in refused.error_message
        assert core.now_ms > began
        assert visitor.peer.leaving
        with pytest.raises(ProtocolError):
            visitor.metadata()


def test_unknown_user_is_answered_as_a_known_one(core: Core) -> None:
    salts = []
    for user in (USER, "nobody", "nobody"):
        visitor = Visitor(core)
        visitor.ask(17, 1, mechanism="SCRAM-SHA-256")
        answer = visitor.ask(36, 2, auth_bytes=ScramClient("SCRAM-SHA-256", user, "x", "n").first())
        assert answer.error_code == 0
        salts.append(dict(part.split(b"=", 1) for part in answer.auth_bytes.split(b","))[b"s"])
        assert len(salts[-1]) == len(salts[0])
    assert salts[1] == salts[2], "another salt each time would tell that there is no such user"


def test_unknown_mechanism_is_told_which_there_are(core: Core) -> None:
    visitor = Visitor(core)
    answer = visitor.ask(17, 1, mechanism="GSSAPI")
    assert (answer.error_code, answer.mechanisms) == (33, ("SCRAM-SHA-256", "SCRAM-SHA-512", "PLAIN"))
    assert visitor.peer.leaving


@pytest.mark.parametrize(
    ("key", "version"), [(3, 9), (0, 9), (36, 2), (19, 7), (999, 0), (17, 2), (22, 4), (50, 0), (51, 0)]
)
def test_nothing_else_before_the_login(core: Core, key: int, version: int) -> None:
    visitor = Visitor(core)
    head = key.to_bytes(2, "big") + version.to_bytes(2, "big") + bytes(4) + b"\xff\xff" + bytes(40)
    with pytest.raises(ProtocolError):
        visitor.raw(head)


def test_in_the_middle_of_a_login_nothing_else_either(core: Core) -> None:
    visitor = Visitor(core)
    visitor.ask(17, 1, mechanism="SCRAM-SHA-256")
    with pytest.raises(ProtocolError):
        visitor.metadata()
    visitor = Visitor(core)
    for _ in range(REQUESTS_MAX):
        visitor.ask(18, 3, client_software_name="t", client_software_version="1")
    with pytest.raises(ProtocolError):
        visitor.ask(18, 3, client_software_name="t", client_software_version="1")


@pytest.mark.parametrize(
    "token", [b"", b"\0", b"\0\0", b"a\0b\0c\0d", b"\0alice\0", b"\0\0pw", b"bob\0alice\0canary-secret", b"\xff\0a\0b"]
)
def test_malformed_plain(core: Core, token: bytes) -> None:
    visitor = Visitor(core)
    visitor.ask(17, 1, mechanism="PLAIN")
    assert visitor.ask(36, 2, auth_bytes=token).error_code == 58


def test_login_expires_and_is_renewed_as_the_same_user_only(tmp_path: Path) -> None:
    core = core_with(tmp_path, reauth_seconds=60.0)
    now = [1000.0]
    core.node.env = Env(wall_ms=core.node.env.wall_ms, monotonic=lambda: now[0])
    visitor = Visitor(core)
    assert visitor.scram().session_lifetime.total_seconds() == 60
    now[0] += 59
    assert visitor.metadata().brokers
    assert visitor.scram().error_code == 0
    now[0] += 59
    assert visitor.metadata().brokers, "the second login counts from its own time"
    now[0] += 2
    with pytest.raises(ProtocolError, match="expired"):
        visitor.metadata()
    assert visitor.scram().error_code == 0, "an expired login can be renewed"
    core.node.users.ensure({"bob": PASSWORD})
    assert visitor.scram("bob").error_code == 58
    assert visitor.peer.principal == f"User:{USER}"
    other = Visitor(core)
    assert other.scram().error_code == 0
    assert other.scram(mechanism="SCRAM-SHA-512").error_code == 58, "nor can the mechanism change"


def test_users_survive_a_restart_as_verifiers_only(core: Core) -> None:
    before = dict(core.node.metadata.credentials)
    core.restart()
    assert core.node.metadata.credentials == before, "a right password is not salted anew at each start"
    assert Visitor(core).scram().error_code == 0
    path = core.data / "metadata.log"
    assert PASSWORD.encode() not in path.read_bytes()
    assert path.stat().st_mode & 0o077 == 0, "only its owner may read it"
    Users(core.node.metadata).ensure({USER: "another"})
    core.restart()  # The configuration's password is the user's when the broker has started.
    assert Visitor(core).scram().error_code == 0


# --- Over sockets ---


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture
def tls_broker(authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EmbeddedBroker]:
    monkeypatch.setattr(tls_room, "HANDSHAKE_SECONDS", 1.0)
    monkeypatch.setattr("semel.broker.server.LOGIN_SECONDS", 1.0)
    tls = TlsFiles(authority.sign("broker", "/CN=broker"), truststore=authority.certificate, client_auth="requested")
    security = Security(users={USER: PASSWORD}, tls=tls)
    listeners = tuple(Listener(kind, "127.0.0.1", 0) for kind in ("SSL", "SASL_PLAINTEXT"))  # type: ignore[arg-type]
    with EmbeddedBroker(tmp_path / "data", config=BrokerConfig(listeners=listeners, security=security)) as broker:
        yield broker


def port(broker: EmbeddedBroker, number: int = 0) -> int:
    return int(broker.addresses[number].rpartition(":")[2])


def connected(broker: EmbeddedBroker, number: int = 0) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port(broker, number)), 10)


def context(authority: Authority, certificate: Path | None = None) -> ssl.SSLContext:
    found = ssl.create_default_context(cafile=str(authority.certificate))
    if certificate is not None:
        found.load_cert_chain(certificate)
    return found


HALF_A_HELLO = b"\x16\x03\x01\x02\x00\x01\x00"


def greeted(broker: EmbeddedBroker, authority: Authority, certificate: Path | None = None) -> ssl.SSLSocket:
    """A TLS connection."""
    return context(authority, certificate).wrap_socket(connected(broker), server_hostname="127.0.0.1")


API_VERSIONS = bytes.fromhex("0000000a 0012 0000 00000001 ffff")


def answered(sock: socket.socket) -> bool:
    """Whether ApiVersions is answered."""
    sock.settimeout(10)
    sock.sendall(API_VERSIONS)
    return sock.recv(4) != b""


def closed(sock: socket.socket) -> bool:
    """Whether the other side closes, within ten seconds."""
    sock.settimeout(10)
    try:
        while sock.recv(4096):
            pass
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return True


@pytest.mark.parametrize(
    "bytes_sent",
    [
        b"",
        API_VERSIONS,
        b"GET / HTTP/1.1\r\n\r\n",
        bytes(1000),
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"\x16\x03\x01" * 3000,
    ],
    ids=["silence", "plaintext", "http", "zeros", "half a hello", "repeated head"],
)
def test_no_handshake_is_the_end_and_hurts_nobody(
    tls_broker: EmbeddedBroker, authority: Authority, bytes_sent: bytes
) -> None:
    with connected(tls_broker) as bad, connected(tls_broker) as raw:
        bad.sendall(bytes_sent)
        with context(authority).wrap_socket(raw, server_hostname="127.0.0.1") as good:
            assert answered(good), "the others are served meanwhile"
            assert closed(bad)
            assert answered(good)


def test_garbage_after_the_handshake_closes(tls_broker: EmbeddedBroker, authority: Authority) -> None:
    with connected(tls_broker) as raw, context(authority).wrap_socket(raw, server_hostname="127.0.0.1") as sock:
        sock.sendall(struct.pack(">i", -5))
        assert closed(sock)
    with connected(tls_broker) as raw:
        sock = context(authority).wrap_socket(raw, server_hostname="127.0.0.1")
        assert answered(sock)
        plain = socket.socket(fileno=sock.detach())
        plain.sendall(b"\x17\x03\x03\x00\x05hello")  # A record that nobody encrypted.
        assert closed(plain)
        plain.close()


def test_request_before_the_garbage_is_answered_when_both_come_at_once(
    tls_broker: EmbeddedBroker, authority: Authority
) -> None:
    """What OpenSSL reads in one turn may be good bytes and the error behind them; no further event tells of it."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context(authority).wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
    with connected(tls_broker) as sock:
        sock.settimeout(10)
        while True:
            try:
                client.do_handshake()
            except ssl.SSLWantReadError:
                sock.sendall(outgoing.read())
                incoming.write(sock.recv(65_536))
            else:
                break
        client.write(API_VERSIONS)
        sock.sendall(outgoing.read() + b"\x17\x03\x03\x00\x20" + bytes(32))
        assert closed(sock)


def test_requests_and_answers_of_any_size_over_tls(tls_broker: EmbeddedBroker, authority: Authority) -> None:
    """Frames that end inside, at and behind a TLS record, many in one, and answers larger than every buffer."""
    with connected(tls_broker) as raw, context(authority).wrap_socket(raw, server_hostname="127.0.0.1") as sock:
        sock.settimeout(20)
        for count in (1, 7, 3000):
            sock.sendall(API_VERSIONS * count)
            for _ in range(count):
                size = int.from_bytes(_exactly(sock, 4), "big")
                assert len(_exactly(sock, size)) == size
        # A request whose length comes alone, then the rest byte for byte at the records' edges.
        topics = [{"name": f"t{number}" * 40} for number in range(900)]
        asked = {"topics": topics, "allow_auto_topic_creation": False, **NOT_ASKED}
        frame = encode_request(3, 9, 5, "c" * 16_000, **asked)
        for start in range(0, len(frame), 16_383):
            sock.sendall(frame[start : start + 16_383])
        size = int.from_bytes(_exactly(sock, 4), "big")
        answer = decode_response(3, 9, _exactly(sock, size))
        assert len(answer.topics) == 900


def _exactly(sock: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = sock.recv(size - len(data))
        assert part, "closed"
        data += part
    return bytes(data)


def test_slow_reader_over_tls_gets_everything(tls_broker: EmbeddedBroker, authority: Authority) -> None:
    """Output that waits is offered to OpenSSL again, unchanged."""
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect(("127.0.0.1", port(tls_broker)))
        with context(authority).wrap_socket(raw, server_hostname="127.0.0.1") as sock:
            sock.settimeout(30)
            count = 1500
            sock.sendall(API_VERSIONS * count)
            time.sleep(0.3)  # Long enough for every buffer between the two to fill.
            first = None
            for _ in range(count):
                size = int.from_bytes(_exactly(sock, 4), "big")
                answer = _exactly(sock, size)
                first = first or answer
                assert answer == first


def test_client_certificate_names_the_principal(tls_broker: EmbeddedBroker, authority: Authority) -> None:
    certificate = authority.sign("alice", "/C=CH/O=A, B/OU=x;y/CN=alice")
    with greeted(tls_broker, authority, certificate) as sock:
        assert answered(sock)
        server: Any = tls_broker._broker._server
        (connection,) = server._connections
        assert connection.peer.principal == r"User:CN=alice,OU=x\;y,O=A\, B,C=CH"


def test_stranger_is_sent_away_after_a_while(tls_broker: EmbeddedBroker) -> None:
    with connected(tls_broker, 1) as sock:
        assert answered(sock)
        assert closed(sock)


def test_stranger_gets_little_memory(tls_broker: EmbeddedBroker) -> None:
    with connected(tls_broker, 1) as sock:
        sock.sendall(struct.pack(">i", LOGIN_FRAME_BYTES + 1))
        assert closed(sock)


def test_half_open_handshakes_lock_nobody_out(
    tls_broker: EmbeddedBroker, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    server: Any = tls_broker._broker._server
    monkeypatch.setattr(server._handshakes, "_limit", 20)
    monkeypatch.setattr(tls_room, "HANDSHAKE_SECONDS", 60.0)
    monkeypatch.setattr(tls_room, "SILENT_SECONDS", 0.2)
    silent = [connected(tls_broker) for _ in range(40)]
    deadline = time.monotonic() + 10
    while True:  # As a client does that is refused: try again.
        try:
            with greeted(tls_broker, authority) as sock:
                assert answered(sock)
                break
        except (OSError, AssertionError):
            assert time.monotonic() < deadline, "silent connections hold every place"
            time.sleep(0.05)
    assert len(server._handshakes) <= 20
    for sock in silent:
        sock.close()


def test_certificate_is_renewed_while_the_broker_runs(authority: Authority, tmp_path: Path) -> None:
    pem = tmp_path / "b.pem"
    pem.write_text(authority.sign("one", "/CN=one").read_text())
    certificates = Certificates(TlsFiles(pem))
    before = certificates.context
    pem.write_text("half a file")
    certificates.refresh()
    pem.write_text(authority.sign("two", "/CN=two").read_text())
    certificates.refresh()
    assert certificates.context is before
    assert _served_name(before, authority) == "two"


def _served_name(server: ssl.SSLContext, authority: Authority) -> str:
    """Who the context says it is, in a handshake in memory."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context(authority).wrap_bio(to_client, to_server, server_hostname="127.0.0.1")
    other = server.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(4):
        for side in (client, other):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    certificate: Any = client.getpeercert()
    return str(certificate["subject"][0][0][1])


def test_configuration_that_cannot_work_changes_nothing(authority: Authority, tmp_path: Path) -> None:
    hidden = authority.sign("hidden", "/CN=hidden", password="canary-secret")
    no_key = authority.certificate
    for files in (
        TlsFiles(tmp_path / "none.pem"),
        TlsFiles(no_key),
        TlsFiles(hidden),
        TlsFiles(hidden, key_password="canary-wrong"),
        TlsFiles(authority.sign("k", "/CN=k"), truststore=tmp_path / "none.pem", client_auth="required"),
    ):
        config = BrokerConfig(listeners=(Listener("SSL", "127.0.0.1", 0),), security=Security(tls=files))
        with pytest.raises(ConfigurationError, match=r"ssl\.") as raised:
            EmbeddedBroker(tmp_path / "data", config=config).start()
        assert "canary" not in str(raised.value)
        assert not (tmp_path / "data").exists()
    fine = BrokerConfig(
        listeners=(Listener("SSL", "127.0.0.1", 0),),
        security=Security(tls=TlsFiles(hidden, key_password="canary-secret")),
    )
    EmbeddedBroker(tmp_path / "data", config=fine).start().stop()


@pytest.mark.parametrize(
    ("subject", "principal"),
    [
        (None, "User:ANONYMOUS"),
        ({}, "User:ANONYMOUS"),
        ({"subject": ((("commonName", " a#"),),)}, "User:CN=\\ a#"),
        ({"subject": ((("commonName", "#a "),),)}, "User:CN=\\#a\\ "),
        ({"subject": ((("organizationName", "O"), ("commonName", "c")),)}, "User:O=O+CN=c"),
    ],
)
def test_principal_of_a_certificate(subject: dict[str, Any] | None, principal: str) -> None:
    assert principal_of(subject) == principal


def test_login_room_has_its_limits() -> None:
    assert login_room.LOGIN_SECONDS <= 60
    assert tls_room.HANDSHAKES_MAX * 64 * 1024 <= 128 * 1024 * 1024
