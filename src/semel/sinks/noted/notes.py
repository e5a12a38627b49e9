"""What a handler notes its effects in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

__all__ = ["Notes"]


class Notes(Protocol):
    """Notes of one call of a handler, which are valid while it runs."""

    @property
    def noted(self) -> Sequence[Any]:
        """The effects, in the order in which they were noted."""

    def end(self) -> None:
        """The handler returned or raised: nothing can be noted any more."""
