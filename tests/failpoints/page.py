"""docs/failpoints.md, made of the table in the source: `python -m tests.failpoints.page` writes it anew."""

from __future__ import annotations

from pathlib import Path

from semel.failpoints import FAILPOINTS

PAGE = Path(__file__).parents[2] / "docs" / "failpoints.md"
_HEAD = """# Failpoints

Every line at which `SEMEL_FAILPOINT=name:action:nth` can make a process of Semel die or misbehave, and what has
and has not happened there. Made from `semel.failpoints.FAILPOINTS` (`python -m tests.failpoints.page`); a test
compares. What they are for: [proof.md](proof.md).

All of them can `kill`, `stop`, `raise` and `delay=SECONDS`. **c**: an asyncio task runs there, so `cancel` is
possible too. **t**: a file is written there, so `torn=BYTES` is.
"""
_ROLES = {
    "http": "HTTP instance",
    "worker": "Worker",
    "relay": "Relay of an outbox",
    "broker": "Embedded broker",
    "app": "A program of one's own with two-phase commit",
    "program": "A program of one's own with `app.transaction`",
    "dual": "A program of one's own with the dual write",
    "endpoint": "An endpoint of one's own with `app.idempotency`",
    "search": "A worker whose sink writes to an OpenSearch",
}


def text() -> str:
    """The page."""
    parts = [_HEAD]
    for role, title in _ROLES.items():
        parts.append(f"\n## {title}\n\n| name | | what has and has not happened |\n|---|---|---|\n")
        of_role = [(name, point) for name, point in FAILPOINTS.items() if point.role == role]
        parts += [
            f"| `{name}` | {'c' * point.in_task}{'t' * point.writes} | {point.what} |\n" for name, point in of_role
        ]
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(text())
