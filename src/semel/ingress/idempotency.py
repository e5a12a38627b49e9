"""Idempotency-Key for endpoints that write to a database themselves, in FastAPI, Starlette and what stands on it.

The key, the request's fingerprint and the response are rows in the transaction of the endpoint's own rows. The rules
are those of the endpoints that Semel runs (`ingress.rules`); what differs is who decides: there the log, here the
database's index.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Generator, MutableMapping
from types import TracebackType
from typing import Any, Self, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response as HTTPResponse

from semel.databases.borrowed import Borrowed, borrow, is_busy
from semel.databases.database import Cause, open_database, without_password
from semel.errors import ConfigurationError, Fatal, OutcomeUnknown, Retriable
from semel.failpoints import failpoint
from semel.ingress import rules
from semel.ingress.answering import response_answer
from semel.ingress.claims import KEEP_DAYS_MAX, Claimed, Known, check_table, claim, schema_sql, store, tend
from semel.ingress.limits import Limits
from semel.ingress.rules import Answer, failure, problem_answer
from semel.processing.answers import Problem

__all__ = ["Claim", "Idempotency", "IdempotencyMiddleware", "IdempotentRequest"]

log = logging.getLogger("semel.ingress")

T = TypeVar("T")
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

WAIT_SECONDS_MAX = 25.0
"""A waiting request holds a connection of the database; below the statement time-out that Semel's connections have."""
TEND_SECONDS = 3_600.0
"""How often days are made and dropped. A week of them is made ahead."""

_MARK = "semel.idempotency"
_RETRY_AFTER = rules.RETRY_AFTER


class Answered(Exception):
    """The request has its answer already; raised through the endpoint's transaction, so that nothing is committed."""

    def __init__(self, answer: Answer, *, is_replayed: bool) -> None:
        super().__init__(f"answered {answer.status}")
        self.answer = answer
        self.is_replayed = is_replayed


class Idempotency:
    """Makes endpoints run once for each Idempotency-Key; see `App.idempotency`.

    Call it with a request, or use it as a FastAPI dependency: it gives an `IdempotentRequest`. Raises `Problem` 400 for
    a key that is missing or unusable.
    """

    def __init__(
        self,
        app: str,
        url: Callable[[], str],
        *,
        principal: Callable[[Request], str | Awaitable[str]] | None = None,
        keep_days: int = 1,
        wait_seconds: float = 5.0,
        create_tables: Callable[[], bool] = lambda: False,
        body_bytes_max: int | None = None,
    ) -> None:
        if not isinstance(keep_days, int) or isinstance(keep_days, bool) or not 1 <= keep_days <= KEEP_DAYS_MAX:
            raise ConfigurationError(f"idempotency: keep_days={keep_days!r}, but it is 1 to {KEEP_DAYS_MAX} days.")
        if not 0 <= wait_seconds <= WAIT_SECONDS_MAX:
            raise ConfigurationError(f"idempotency: wait_seconds={wait_seconds!r}, but 0 to {WAIT_SECONDS_MAX:g} hold.")
        self.app = app
        self.keep_days = keep_days
        self.principal = principal
        self._url = url
        self._wait_seconds = wait_seconds
        self._create_tables = create_tables
        self._body_bytes_max = Limits().body_bytes if body_bytes_max is None else body_bytes_max
        self._tending = threading.Lock()
        self._tended_at: float | None = None
        # FastAPI looks up annotations in the globals of a function, and an object has none.
        parameter = inspect.Parameter("request", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=Request)
        self.__signature__ = inspect.Signature([parameter])

    def __repr__(self) -> str:
        return f"<Idempotency of {self.app}, keys are kept {self.keep_days} days>"

    async def __call__(self, request: Request) -> IdempotentRequest:
        """What this request is known by. Raises `Problem` for a refusal: nothing was stored."""
        if not request.scope.get(_MARK):
            raise ConfigurationError(
                "idempotent endpoints need IdempotencyMiddleware, which answers for them when a key is known: "
                "app.add_middleware(IdempotencyMiddleware)."
            )
        key = rules.parse_key([value for name, value in request.scope["headers"] if name == b"idempotency-key"])
        if key is None:
            raise failure("idempotency-key-missing")
        body = await self._body(request)
        route, values = _route(request)
        query = sorted(request.query_params.multi_items())
        content_type = rules.media_type(request.headers.get("content-type", "").encode("latin-1"))
        principal = None if self.principal is None else await self._ask_principal(request)
        fingerprint = rules.fingerprint(route, values, query, content_type, body)
        scope = rules.scope_of(self.app, principal, route, rules.key_digest(key))
        prefer = [value for name, value in request.scope["headers"] if name == b"prefer"]
        if self._is_due():
            await asyncio.to_thread(self._tend)
        return IdempotentRequest(scope, fingerprint, self.keep_days, rules.parse_wait(prefer, self._wait_seconds))

    async def _body(self, request: Request) -> bytes:
        limit = self._body_bytes_max
        told = request.headers.get("content-length", "0")
        if not told.isdigit() or int(told[:20]) > limit:
            raise failure("body-too-large", f"The limit is {limit} bytes.")
        body = await request.body()
        if len(body) > limit:
            raise failure("body-too-large", f"The limit is {limit} bytes.")
        return body

    async def _ask_principal(self, request: Request) -> str:
        ask = self.principal
        assert ask is not None
        try:
            name: Any = ask(request)
            if inspect.isawaitable(name):
                name = await name
        except (Problem, HTTPException):
            raise
        except Exception:
            log.exception("the principal of %s could not be determined", request.url.path)
            raise failure("principal-failed") from None
        if not isinstance(name, str) or not name:
            log.error("principal= of %s gave no name; to refuse a request, raise Problem(401)", request.url.path)
            raise failure("principal-failed")
        return name

    # --- The table ---

    def _is_due(self) -> bool:
        return self._tended_at is None or time.monotonic() - self._tended_at >= TEND_SECONDS

    def _tend(self) -> None:
        """Make and drop days. The first request waits for it; later ones do not, while another one is at it."""
        if not self._tending.acquire(blocking=self._tended_at is None):
            return
        try:
            if self._is_due():
                self._look_after_days()
        finally:
            self._tending.release()

    def _look_after_days(self) -> None:
        url = self._url()
        database = open_database(url)
        try:
            database.connect()
            if self._tended_at is None and self._create_tables():
                database.migrate(schema_sql(database.title))
            check_table(database)
            tend(database, self.keep_days)
        except ConfigurationError:
            raise
        except Exception as error:
            if self._tended_at is None:
                text = " ".join(str(error).split())
                if database.cause(error) is Cause.DATA:
                    raise
                raise Retriable(f"the database {without_password(url)} cannot be used now: {text}") from error
            log.warning("days of idempotency keys were not looked after, trying again in a while: %s", error)
        finally:
            database.close()
        self._tended_at = time.monotonic()


class IdempotentRequest:
    """One request, as its key and its content tell it from others."""

    def __init__(self, scope: bytes, fingerprint: bytes, keep_days: int, wait_seconds: float) -> None:
        self._scope = scope
        self._fingerprint = fingerprint
        self._keep_days = keep_days
        self._wait_seconds = wait_seconds

    def __repr__(self) -> str:
        return f"<IdempotentRequest {self._scope.hex()[:12]}>"  # Keys themselves are never shown.

    def claim(self, connection: Any) -> Claim:
        """The key, for the transaction that is open on `connection`: enter it with `with`, or `async with` where the
        connection is one for coroutines, before the first statement.

        `connection` is what `app.transaction(db)` gives, or one of psycopg 3, sqlite3, PyMySQL, SQLAlchemy 2 or Django.
        The block is not entered when the key has a response already, belongs to another request, or is taken by one
        that is still running: then the request is answered, and the transaction rolled back.
        """
        return Claim(self._scope, self._fingerprint, self._keep_days, self._wait_seconds, connection)


class Claim:
    """A key in a transaction. `answer` has to be called inside of the block; `response` is what it stored."""

    def __init__(self, scope: bytes, fingerprint: bytes, keep_days: int, wait_seconds: float, connection: Any) -> None:
        self._scope = scope
        self._fingerprint = fingerprint
        self._keep_days = keep_days
        self._wait_ms = int(wait_seconds * 1000)
        self._connection = connection
        self._borrowed: Borrowed | None = None
        self._day: int | None = None
        self._answer: Answer | None = None

    def __repr__(self) -> str:
        state = "answered" if self._answer else "not entered" if self._day is None else "open"
        return f"<Claim {self._scope.hex()[:12]} [{state}]>"

    def answer(self, response: Any) -> None:
        """What this request, and every retry of it, is answered: a `Response`, a `Problem`, any JSON value as 200, None
        as 204. It is stored when the block ends. Raises `ValueError` or `TypeError` for what cannot be sent, is larger
        than 64 KiB, or has headers that belong to one connection or one client (Set-Cookie).
        """
        if self._day is None:
            raise Fatal("claim.answer() was called outside of 'with request.claim(connection) as claim:'.")
        self._answer = response_answer(response)

    @property
    def response(self) -> HTTPResponse:
        """The answer for the web framework, byte for byte what a retry will get. For after the transaction's end."""
        if self._answer is None:
            raise Fatal("claim.answer(...) was not called, so there is no response to send.")
        return _http_response(self._answer, is_replayed=False)

    # --- The block, in both colours ---

    def __enter__(self) -> Self:
        borrowed = self._borrow(is_async=False)
        self._take(self._run(borrowed, self._claim(borrowed.title)))
        failpoint("idempotency.claimed")
        return self

    async def __aenter__(self) -> Self:
        borrowed = self._borrow(is_async=True)
        self._take(await self._run_async(borrowed, self._claim(borrowed.title)))
        failpoint("idempotency.claimed")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            assert self._borrowed is not None
            self._run(self._borrowed, self._store())
            failpoint("idempotency.stored")

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            assert self._borrowed is not None
            await self._run_async(self._borrowed, self._store())
            failpoint("idempotency.stored")

    def _borrow(self, *, is_async: bool) -> Borrowed:
        if self._borrowed is not None:
            raise Fatal("a claim is entered once: call request.claim(connection) for each transaction.")
        borrowed = self._borrowed = borrow(self._connection)
        if borrowed.is_async is not is_async:
            word = "async with" if borrowed.is_async else "with"
            raise ConfigurationError(f"for this connection write '{word} request.claim(connection) as claim:'.")
        return borrowed

    def _claim(self, title: str) -> Generator[Any, Any, Claimed | Known]:
        return claim(title, self._scope, self._fingerprint, self._keep_days, self._wait_ms)

    def _store(self) -> Generator[Any, Any, None]:
        if self._answer is None:
            raise Fatal(
                "the block of the claim ended without claim.answer(...): retries would have nothing to be answered "
                "with, so the transaction is not committed. Say what the response is."
            )
        assert self._day is not None
        return store(self._day, self._scope, self._answer)

    def _run(self, borrowed: Borrowed, work: Generator[Any, Any, T]) -> T:
        try:
            sql, parameters = next(work)
            while True:
                sql, parameters = work.send(borrowed.run(sql, parameters))
        except StopIteration as end:
            result: T = end.value
            return result
        except Exception as error:
            raise self._translated(borrowed, error) from error

    async def _run_async(self, borrowed: Borrowed, work: Generator[Any, Any, T]) -> T:
        try:
            sql, parameters = next(work)
            while True:
                sql, parameters = work.send(await borrowed.run(sql, parameters))
        except StopIteration as end:
            result: T = end.value
            return result
        except Exception as error:
            raise self._translated(borrowed, error) from error

    def _translated(self, borrowed: Borrowed, error: Exception) -> Exception:
        if not is_busy(error):
            return error
        if borrowed.title == "SQLite":  # Whoever writes is in the way of all others: it says nothing about the key.
            return Retriable(f"the database is busy, nothing was stored: {error}")
        return failure("idempotency-key-in-use", "", _RETRY_AFTER)

    def _take(self, found: Claimed | Known) -> None:
        if isinstance(found, Claimed):
            self._day = found.day
            return
        if found.fingerprint != self._fingerprint:
            raise Answered(rules.key_reused(), is_replayed=False)
        if found.answer is None:
            log.error(
                "an idempotency key was committed without its response: the transaction was committed inside of the "
                "block of the claim. Commit after it."
            )
            raise failure("idempotency-key-in-use", "Its transaction was committed without a response.", _RETRY_AFTER)
        raise Answered(found.answer, is_replayed=True)


class IdempotencyMiddleware:
    """ASGI middleware: answers in place of idempotent endpoints, when a key is known, refused or in use.

    Problems are `application/problem+json` (RFC 9457). It also answers 503 for a commit whose outcome is unknown, and
    for a database that is away; with the same key such a request may be sent again. Everything else passes through.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope[_MARK] = True
        is_begun = False

        async def watched(message: MutableMapping[str, Any]) -> None:
            nonlocal is_begun
            is_begun = True
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except (Answered, Problem, OutcomeUnknown, Retriable) as error:
            if is_begun:
                raise
            answer, is_replayed = _answer_to(error)
            await _http_response(answer, is_replayed=is_replayed)(scope, receive, send)


def _answer_to(error: Exception) -> tuple[Answer, bool]:
    if isinstance(error, Answered):
        return error.answer, error.is_replayed
    if isinstance(error, Problem):
        return problem_answer(error), False
    if isinstance(error, OutcomeUnknown):
        log.error("the outcome of a commit is unknown, the client is asked to send its request again: %s", error)
        return problem_answer(failure("outcome-unknown")), False
    log.warning("a request was not taken: %s", error)
    return problem_answer(failure("unavailable")), False


def _http_response(answer: Answer, *, is_replayed: bool) -> HTTPResponse:
    response = HTTPResponse(answer.body, answer.status)
    for name, value in answer.headers:
        response.headers.append(name, value)
    if is_replayed:
        response.headers["Idempotency-Replayed"] = "true"
    return response


def _route(request: Request) -> tuple[str, list[str]]:
    """Method and path template of a request, and the values in the path; the path itself where no template is known."""
    root = request.scope.get("root_path", "")
    template = getattr(request.scope.get("route"), "path", None)
    if not isinstance(template, str):
        return f"{request.method} {request.url.path}", []
    values = [item for name, value in sorted(request.path_params.items()) for item in (name, str(value))]
    return f"{request.method} {root}{template}", values
