"""What an endpoint's declaration accepts, and the message for what it does not."""

from typing import Any

import msgspec
import pytest

from semel.errors import ConfigurationError
from semel.ingress.spec import EndpointSpec
from semel.processing.answers import Problem


class Order(msgspec.Struct):
    id: int
    name: str = ""


def handler(order: Order) -> Any:
    return order


def test_paths_and_their_parameters() -> None:
    spec = EndpointSpec("/shops/{shop}/orders/{id}.json", Order, handler)
    assert spec.parameters == ("shop", "id")
    match = spec.pattern.fullmatch("/shops/a/orders/7.json")
    assert match
    assert match.groups() == ("a", "7")
    for other in (
        "/shops/a/orders/7xjson",
        "/shops/a/b/orders/7.json",
        "/shops//orders/7.json",
        "/shops/a/orders/7.json/",
    ):
        assert spec.pattern.fullmatch(other) is None
    assert spec.route == "POST /shops/{shop}/orders/{id}.json"


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("orders", {}, "begins with '/'"),
        ("/a b", {}, "plain ASCII"),
        ("/operations/x", {}, "answers /operations itself"),
        ("/metrics", {}, "answers /metrics itself"),
        ("/{a}/{a}", {}, "stands there twice"),
        ("/{1}", {}, "not a parameter name"),
        ("/{a", {}, "without its partner"),
        ("/a}", {}, "without its partner"),
        ("/o", {"method": "GET"}, "POST, PUT, PATCH or DELETE"),
        ("/o", {"wait_seconds": -1}, "negative"),
        ("/{id}", {"query": ("id",)}, "used twice"),
        ("/{principal}", {}, "used twice"),
        ("/o", {"request": object}, "cannot be read from JSON"),
        ("/o", {"handler": lambda: None}, "takes no argument"),
        ("/o", {"handler": lambda order, other: None}, "wants other"),
    ],
)
def test_declarations_that_cannot_work(path: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        EndpointSpec(path, **{"request": Order, "handler": handler, **options})


@pytest.mark.parametrize(
    ("body", "status", "detail"),
    [
        (b"", 400, "truncated"),
        (b'{"id": 1', 400, "truncated"),
        (b'{"id": 1,}', 400, "byte 9"),
        (b'{"id": "1"}', 422, "Expected `int`, got `str` - at `$.id`"),
        (b"{}", 422, "missing required field `id`"),
        (b'{"id": 1, "name": "\xff"}', 400, "UTF-8"),
        (b'{"id": 1, "x": ' + b"[" * 100_000, 400, "nested too deeply"),
    ],
)
def test_bodies_that_are_refused_say_where(body: bytes, status: int, detail: str) -> None:
    with pytest.raises(Problem) as refused:
        EndpointSpec("/o", Order, handler).decode(body)
    assert refused.value.status == status
    assert detail.lower() in refused.value.detail.lower()


def test_raw_bodies_are_handed_over_as_they_came() -> None:
    spec = EndpointSpec("/hook", bytes, handler)
    assert spec.is_raw
    assert spec.decode(b"\xff\x00") == b"\xff\x00"
