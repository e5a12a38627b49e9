"""Running handlers: every form of handler gives the same effects, in order."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from semel.processing.answers import Accepted, Created, Ok, Problem, Response
from semel.processing.effects import Change, Write, perform

ONE, TWO = Write("t", b"k", b"1"), Change("s", b"k", b"2")


def generator() -> Any:
    yield ONE
    yield TWO
    return Ok("done")


async def coroutine_of_list() -> Any:
    await asyncio.sleep(0)
    return [ONE, TWO]


async def coroutine_of_answer() -> Any:
    return Ok("done")


async def async_generator() -> Any:
    yield ONE
    await asyncio.sleep(0)
    yield TWO
    yield Ok("done")


async def coroutine_of_generator() -> Any:
    return generator()


@pytest.mark.parametrize(
    ("result", "effects", "answer"),
    [
        (generator, [ONE, TWO], Ok("done")),
        (async_generator, [ONE, TWO], Ok("done")),
        (coroutine_of_list, [ONE, TWO], None),
        (coroutine_of_generator, [ONE, TWO], Ok("done")),
        (coroutine_of_answer, [], Ok("done")),
        (lambda: [ONE, TWO], [ONE, TWO], None),
        (lambda: (effect for effect in (ONE, TWO)), [ONE, TWO], None),
        (lambda: iter((ONE,)), [ONE], None),
        (lambda: ONE, [ONE], None),
        (lambda: None, [], None),
        (lambda: Created({"a": 1}), [], Created({"a": 1})),
    ],
)
def test_every_form_of_handler(result: Any, effects: list[Any], answer: Any) -> None:
    seen: list[Any] = []
    assert asyncio.run(perform(result(), seen.append)) == answer
    assert seen == effects


async def two_answers() -> Any:
    yield Ok()
    yield Ok()


@pytest.mark.parametrize("result", [lambda: [ONE, "text"], lambda: iter([None]), two_answers])
def test_what_is_no_effect_is_refused(result: Any) -> None:
    with pytest.raises(TypeError):
        asyncio.run(perform(result(), lambda _: None))


def test_effects_are_taken_as_they_come_so_that_the_handler_reads_them() -> None:
    seen: list[Any] = []

    def handler() -> Any:
        yield ONE
        assert seen == [ONE]
        yield TWO

    asyncio.run(perform(handler(), seen.append))
    assert seen == [ONE, TWO]


def test_an_exception_of_a_handler_passes() -> None:
    def handler() -> Any:
        yield ONE
        raise Problem(409, "sold out")

    with pytest.raises(Problem, match="409 sold out"):
        asyncio.run(perform(handler(), lambda _: None))


def test_answers() -> None:
    assert (Ok().status, Created().status, Accepted().status) == (200, 201, 202)
    assert Response(204) != Response(200)
    problem = Problem(422, "an order has at least one CD", type="/errors/empty", balance=3)
    assert problem.body() == {
        "type": "/errors/empty",
        "title": problem.title,
        "status": 422,
        "detail": "an order has at least one CD",
        "balance": 3,
    }
    assert Problem(499).title == "Status 499"


@pytest.mark.parametrize(
    "make",
    [
        lambda: Response(100),
        lambda: Response("200"),  # type: ignore[arg-type]
        lambda: Problem(200),
        lambda: Ok(headers={"X": "a\r\nSet-Cookie: b"}),
        lambda: Problem(400, headers={"X": 1}),  # type: ignore[dict-item]
    ],
)
def test_an_answer_that_http_cannot_carry_is_refused(make: Any) -> None:
    with pytest.raises(ValueError, match=r"status|header"):
        make()
