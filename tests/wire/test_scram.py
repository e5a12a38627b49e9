"""SCRAM against the RFCs' examples, and against whoever does not know the password."""

from __future__ import annotations

import base64

import pytest

from semel.wire.scram import ScramClient, ScramCredential, ScramError, ScramServer, make_credential, matches

SALT = bytes.fromhex("5b6d9968".ljust(32, "7"))

# RFC 7677, section 3, with its user, password and nonces.
CLIENT_NONCE = "rOprNGfwEbeRWgbNEkqO"
CLIENT_FIRST = b"n,,n=user,r=rOprNGfwEbeRWgbNEkqO"
SERVER_FIRST = b"r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096"
CLIENT_FINAL = (
    b"c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ="
)
SERVER_FINAL = b"v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4="


def conversation(
    mechanism: str, user: str, password: str, credential: ScramCredential
) -> tuple[ScramClient, ScramServer]:
    client = ScramClient(mechanism, user, password, "clientnonce")
    server = ScramServer(mechanism, lambda _: credential, "servernonce")
    client.verify(server.respond(client.final(server.respond(client.first()))))
    return client, server


def test_client_says_what_the_rfc_says() -> None:
    client = ScramClient("SCRAM-SHA-256", "user", "pencil", CLIENT_NONCE)
    assert client.first() == CLIENT_FIRST
    assert client.final(SERVER_FIRST) == CLIENT_FINAL
    client.verify(SERVER_FINAL)


def test_server_says_what_the_rfc_says() -> None:
    credential = make_credential("SCRAM-SHA-256", "pencil", base64.b64decode("W22ZaJ0SNY7soEsUEjb6gQ=="))
    server = ScramServer("SCRAM-SHA-256", lambda _: credential, "%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0")
    assert server.respond(CLIENT_FIRST) == SERVER_FIRST
    assert server.user is None
    assert server.respond(CLIENT_FINAL) == SERVER_FINAL
    assert server.user == "user"


@pytest.mark.parametrize("mechanism", ["SCRAM-SHA-256", "SCRAM-SHA-512"])
@pytest.mark.parametrize("user", ["alice", "a,b=c", "Jürgen", "=2C"])
def test_both_sides_agree(mechanism: str, user: str) -> None:
    credential = make_credential(mechanism, "pässword,=", SALT)
    _, server = conversation(mechanism, user, "pässword,=", credential)
    assert server.user == user
    assert matches(mechanism, credential, "pässword,=")
    assert not matches(mechanism, credential, "password")


def test_wrong_password_is_refused_and_leaves_no_user() -> None:
    credential = make_credential("SCRAM-SHA-256", "right", SALT)
    client = ScramClient("SCRAM-SHA-256", "alice", "wrong", "c")
    server = ScramServer("SCRAM-SHA-256", lambda _: credential, "s")
    final = client.final(server.respond(client.first()))
    with pytest.raises(ScramError, match="invalid credentials"):
        server.respond(final)
    assert server.user is None


def test_client_refuses_a_server_that_does_not_know_the_password() -> None:
    client = ScramClient("SCRAM-SHA-256", "user", "pencil", CLIENT_NONCE)
    client.final(SERVER_FIRST)
    for answer in (b"v=" + b"A" * 43 + b"=", b"v=", b"x=1", b"e=invalid-proof", b"", b"\xff"):
        with pytest.raises(ScramError):
            client.verify(answer)
    fresh = ScramClient("SCRAM-SHA-256", "user", "pencil", CLIENT_NONCE)
    with pytest.raises(ScramError):  # An answer before any proof was given.
        fresh.verify(b"v=")


@pytest.mark.parametrize(
    "server_first",
    [
        b"r=somebody-else,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096",
        b"r=c,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096",  # Nothing of the server's in it: could be replayed.
        b"r=cX,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4095",
        b"r=cX,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=99999999999",
        b"r=cX,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=-4096",
        b"r=cX,s=%%%,i=4096",
        b"r=cX,i=4096",
        b"",
        b"r=cX,s=" + b"A" * 5000 + b",i=4096",
    ],
)
def test_client_refuses_what_no_sound_server_says(server_first: bytes) -> None:
    with pytest.raises(ScramError):
        ScramClient("SCRAM-SHA-256", "u", "p", "c").final(server_first)


@pytest.mark.parametrize(
    "client_first",
    [
        b"p=tls-unique,,n=u,r=c",
        b"n,a=other,n=u,r=c",
        b"n,,n=u",
        b"n,,r=c",
        b"n,,n=u=,r=c",
        b"n,,n=u,r=c,tokenauth=true",
        b"n,,m=x,n=u,r=c",
        b"n,",
        b"",
        b"\x00\xff" * 10,
    ],
)
def test_server_refuses_malformed_first_messages(client_first: bytes) -> None:
    credential = make_credential("SCRAM-SHA-256", "p", SALT)
    with pytest.raises(ScramError):
        ScramServer("SCRAM-SHA-256", lambda _: credential, "s").respond(client_first)


def test_server_refuses_a_proof_in_the_wrong_place() -> None:
    credential = make_credential("SCRAM-SHA-256", "p", SALT)
    client = ScramClient("SCRAM-SHA-256", "u", "p", "c")
    server = ScramServer("SCRAM-SHA-256", lambda _: credential, "s")
    binding, nonce, proof = client.final(server.respond(client.first())).split(b",")
    with pytest.raises(ScramError):
        server.respond(b",".join((proof, binding, nonce)))


def test_a_proof_cannot_be_used_in_another_conversation() -> None:
    credential = make_credential("SCRAM-SHA-256", "p", SALT)
    first = ScramServer("SCRAM-SHA-256", lambda _: credential, "s1")
    client = ScramClient("SCRAM-SHA-256", "u", "p", "c")
    final = client.final(first.respond(client.first()))
    second = ScramServer("SCRAM-SHA-256", lambda _: credential, "s2")
    second.respond(client.first())
    with pytest.raises(ScramError):
        second.respond(final)


def test_credential_does_not_show_itself() -> None:
    credential = make_credential("SCRAM-SHA-256", "p", SALT)
    assert credential.stored_key.hex() not in repr(credential)
    assert repr(credential.stored_key) not in repr(credential)
