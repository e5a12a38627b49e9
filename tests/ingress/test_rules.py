"""The rules as tables: which key is a key, whose it is, which request is the same, what a request gets."""

import msgspec
import pytest

from semel.ingress import rules
from semel.ingress.rules import KnownOutcome, Verdict
from semel.processing.answers import Problem


@pytest.mark.parametrize(
    ("header", "key"),
    [
        (b'"abc"', "abc"),
        (b"abc", "abc"),
        (b"8e03978e-40d5-43e8-bc93-6894a57f9324", "8e03978e-40d5-43e8-bc93-6894a57f9324"),
        (b'"8e03978e"; v=1; name=token', "8e03978e"),
        (b'  "with space"  ', "with space"),
        (rb'"a\"b\\c"', 'a"b\\c'),
        (b'"' + b"x" * 255 + b'"', "x" * 255),
        (b"y" * 255, "y" * 255),
    ],
)
def test_keys_that_are_keys(header: bytes, key: str) -> None:
    assert rules.parse_key([header]) == key


@pytest.mark.parametrize(
    "headers",
    [
        [b""],
        [b'""'],
        [b'"open'],
        [b'"a" "b"'],
        [b'"a", "b"'],
        [b"a b"],
        [b"a,b"],
        [b'"a\nb"'],
        [b'"a\r\nSet-Cookie: x"'],
        [b'"a\x00b"'],
        [b'"a\\nb"'],
        ['"ключ"'.encode()],
        [b'"' + b"x" * 256 + b'"'],
        [b"x" * 4096],
        [b'"a"', b'"a"'],
    ],
)
def test_headers_that_are_no_key_are_refused(headers: list[bytes]) -> None:
    with pytest.raises(Problem) as refused:
        rules.parse_key(headers)
    assert refused.value.status == 400
    assert refused.value.type == "/errors/idempotency-key-invalid"


def test_no_header_is_no_key() -> None:
    assert rules.parse_key([]) is None


@pytest.mark.parametrize(
    ("prefer", "seconds"),
    [
        ([], 5.0),
        ([b"wait=2"], 2.0),
        ([b"wait=60"], 5.0),
        ([b"respond-async, wait=3"], 0.0),
        ([b"return=minimal; wait = 1"], 1.0),
        ([b"return=minimal", b"wait=4"], 4.0),
        ([b"await=1"], 5.0),
        ([b"wait=-1"], 5.0),
        ([b"wait=9999999999"], 5.0),
    ],
)
def test_how_long_a_request_waits(prefer: list[bytes], seconds: float) -> None:
    assert rules.parse_wait(prefer, 5.0) == seconds


def test_a_key_of_one_scope_is_unknown_in_every_other() -> None:
    digest = rules.key_digest("k")
    scopes = {
        rules.scope_of(app, principal, route, digest)
        for app in ("shop", "shop2")
        for principal in (None, "", "alice", "bob", "shop")
        for route in ("POST /orders", "PUT /orders", "POST /orders/{id}")
    }
    assert len(scopes) == 2 * 5 * 3
    assert rules.scope_of("a", "bc", "d", digest) != rules.scope_of("ab", "c", "d", digest)
    assert all(len(scope) == 32 for scope in scopes)


def test_scopes_and_fingerprints_never_change() -> None:
    """They are stored: a release that computes others runs every retry of the last 24 hours again."""
    scope = rules.scope_of("shop", "alice", "POST /orders", rules.key_digest("line-1"))
    assert scope.hex() == "7e56764f051efbe5ea6fc5151a3be602f21e8a3772041cc680a987796d756c13"
    seen = rules.fingerprint("POST /orders/{id}", ("7",), (("dry", "1"),), "application/json", b"{}")
    assert seen.hex() == "019583a4c3f4734fa264943eb4b85da0429a4cc1abd3c85ceb7d26c816b7a9f98d"


def test_what_makes_a_request_another_one() -> None:
    base = ("POST /orders/{id}", ("7",), (("dry", "1"),), "application/json", b'{"a":1}')
    same = rules.fingerprint(*base)
    others = [
        rules.fingerprint("PUT /orders/{id}", *base[1:]),
        rules.fingerprint(base[0], ("8",), *base[2:]),
        rules.fingerprint(base[0], ("7", "dry"), (("1", ""),), *base[3:]),
        rules.fingerprint(base[0], base[1], (), *base[3:]),
        rules.fingerprint(*base[:3], "text/json", base[4]),
        rules.fingerprint(*base[:4], b'{"a":2}'),
        rules.fingerprint(*base[:4], b'{"a": 1}'),
    ]
    assert rules.fingerprint(*base) == same
    assert same not in others
    assert len(set(others)) == len(others)
    assert same[0] == rules.FINGERPRINT_VERSION


ONE, OTHER = b"\x01one", b"\x01other"


@pytest.mark.parametrize(
    ("known", "verdict"),
    [
        (None, Verdict.RUN),
        (KnownOutcome(ONE, False, 1001), Verdict.REPLAY),
        (KnownOutcome(ONE, True, 1001), Verdict.RUN),
        (KnownOutcome(OTHER, False, 1001), Verdict.REUSED),
        (KnownOutcome(OTHER, True, 1001), Verdict.REUSED),
        (KnownOutcome(ONE, False, 1000), Verdict.RUN),
        (KnownOutcome(OTHER, False, 1000), Verdict.RUN),
    ],
)
def test_the_decision_table(known: KnownOutcome | None, verdict: Verdict) -> None:
    assert rules.judge(known, ONE, now_ms=1000) is verdict


def test_an_operation_id_leads_back_to_route_and_key() -> None:
    digest = rules.key_digest("line-1")
    name = rules.operation_id("POST /orders", digest)
    assert rules.read_operation_id(name, ["POST /other", "POST /orders"]) == ("POST /orders", digest)
    assert rules.read_operation_id(name, ["POST /other"]) is None
    assert name.replace("-", "").replace("_", "").isalnum()
    for bad in ("", "x", "!!", "ключ", name[:-4], name + "AAAA"):
        assert rules.read_operation_id(bad, ["POST /orders"]) is None


def test_every_problem_is_problem_json_with_a_type() -> None:
    for name, (status, title) in rules.ERRORS.items():
        answer = rules.problem_answer(rules.failure(name))
        document = msgspec.json.decode(answer.body)
        assert answer.status == document["status"] == status
        assert document["type"] == f"/errors/{name}"
        assert document["title"] == title
        assert dict(answer.headers)["content-type"] == "application/problem+json"
        assert (status == 503) == ("Retry-After" in dict(answer.headers))
