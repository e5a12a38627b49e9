"""Handlers may run again: what they do apart from their unit of work would then be done twice.

Who runs handlers says so in the context of its loop or thread, once; everything that a handler starts inherits it.
"""

from __future__ import annotations

from contextvars import ContextVar

from semel.errors import ConfigurationError

__all__ = ["YIELD_INSTEAD", "check_apart", "handlers_repeat"]

YIELD_INSTEAD = (
    "Yield records, and let a sink write them, which can send others (enqueue_in). A processor whose effects may be "
    "done twice says so with delivery='at-least-once'; an endpoint that writes to a database itself is one of FastAPI "
    "or Starlette, with app.idempotency."
)

_repeated: ContextVar[str] = ContextVar("semel_repeated", default="")
"""Whose handler runs here and what to do instead; empty where no handler runs, or where it may do things twice."""


def handlers_repeat(name: str, instead: str) -> None:
    """From here on the handler of `name` runs in this context. `instead` says how its effects are done once."""
    _repeated.set(
        f"the handler of {name} may run again, and a transaction of its own would then be there twice, so none is "
        f"begun. {instead}"
    )


def check_apart() -> None:
    """Raise `ConfigurationError` where something would be committed apart from the unit of work of a handler."""
    if refusal := _repeated.get():
        raise ConfigurationError(refusal)
