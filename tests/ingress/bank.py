"""A bank in FastAPI whose endpoint writes to its own database, once per Idempotency-Key.

`python -m tests.ingress.bank URL PORT` is one instance, under uvicorn. A transfer is a row in a table without a unique
constraint, so that a doubled one shows; its answer has a random number, so that a second execution shows.
"""

from __future__ import annotations

import os
import sys
import threading
import uuid
from collections.abc import Callable
from typing import Any

from fastapi import Depends, FastAPI, Request
from pydantic import BaseModel

from semel import App, Created, IdempotencyMiddleware, IdempotentRequest, Problem
from semel.databases import connect
from semel.databases.borrowed import is_busy
from semel.errors import Retriable
from semel.failpoints import arm_failpoints

SCHEMA = "CREATE TABLE IF NOT EXISTS transfer (id VARCHAR(64) NOT NULL, cents BIGINT NOT NULL);"


CONNECTIONS = 16
"""Of one instance at the same time: PostgreSQL has 100."""


class Transfer(BaseModel):
    """What is asked for; more than 1,000 is declined, less than 0 fails after it wrote."""

    cents: int


def make_bank(url: str, *, inside: Callable[[], None] = lambda: None, **options: Any) -> FastAPI:
    """The app. `inside` is called in the transaction, between the rows and the answer."""
    app = App("bank")
    connections = threading.BoundedSemaphore(CONNECTIONS)
    bank = app.database(url, schema=SCHEMA)
    idempotent = app.idempotency(bank, **options)
    api = FastAPI()
    api.add_middleware(IdempotencyMiddleware)

    @api.post("/accounts/{account}/transfers")
    def transfer(
        account: str,
        body: Transfer,
        request: IdempotentRequest = Depends(idempotent),  # noqa: B008 - it is local, so no name for an annotation
    ) -> Any:
        with connections:
            return move(account, body, request)

    def move(account: str, body: Transfer, request: IdempotentRequest) -> Any:
        database = connect(url)
        try:
            try:
                database.begin()
            except Exception as error:
                if is_busy(error):
                    raise Retriable(f"busy: {error}") from error
                raise
            with request.claim(database) as claim:
                number = uuid.uuid4().hex
                if body.cents > 1_000:
                    claim.answer(Problem(402, "declined", type="/errors/declined", number=number))
                else:
                    database.execute("INSERT INTO transfer (id, cents) VALUES (?, ?)", (account, body.cents))
                    claim.answer(Created({"number": number}, {"Location": f"/transfers/{number}"}))
                inside()
                if body.cents < 0:
                    raise ZeroDivisionError
            database.commit()
        finally:
            database.rollback()
            database.close()
        return claim.response

    @api.get("/health")
    def health() -> str:
        return "ok"

    return api


def who(request: Request) -> str:
    return request.headers.get("x-user", "")


if __name__ == "__main__":
    import uvicorn

    arm_failpoints(os.environ.get("SEMEL_FAILPOINT", ""))
    uvicorn.run(make_bank(sys.argv[1], wait_seconds=1), host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")
