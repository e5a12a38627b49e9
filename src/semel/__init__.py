"""Semel: every effect of a request happens exactly once, from HTTP through Kafka to the database."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from semel.app import App
    from semel.processing.answers import Accepted, Created, Ok, Problem, Response

__all__ = ["Accepted", "App", "Created", "Ok", "Problem", "Response"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for: a broker or a tool needs none of the app's rooms."""
    if name == "App":
        from semel.app import App

        return App
    if name in __all__:
        from semel.processing import answers

        return getattr(answers, name)
    raise AttributeError(f"module 'semel' has no attribute {name!r}")
