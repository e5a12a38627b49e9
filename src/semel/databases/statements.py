"""SQL text as handlers write it: `?` placeholders on every database, one statement a call, no transaction control."""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import Enum, auto
from functools import lru_cache

from semel.errors import SemelError

__all__ = ["StatementRefused", "check_handler_statement", "placeholders_for_psycopg", "split_statements"]

_TRANSACTION_CONTROL = frozenset(
    {"ABORT", "ATTACH", "BEGIN", "COMMIT", "DETACH", "END", "PRAGMA", "PREPARE"}
    | {"RELEASE", "RESET", "ROLLBACK", "SAVEPOINT", "SET", "START", "VACUUM"}
)

# PostgreSQL's lexical rules (documentation, section 4.1); SQLite's are a part of them. An unfinished literal or
# comment reaches to the end: the database reports it.
_TOKEN = re.compile(
    r"""
    (?P<literal> (?<![\w$]) [eE]' (?: [^'\\] | \\. | '' )* (?: ' | \Z )
               | ' (?: [^'] | '' )* (?: ' | \Z )
               | " (?: [^"] | "" )* (?: " | \Z )
               | (?<![\w$]) \$ (?P<tag> (?: [A-Za-z_\x80-\uffff] [\w]* )? ) \$ .*? (?: \$ (?P=tag) \$ | \Z ) )
  | (?P<line_comment> -- [^\n]* )
  | (?P<block_comment> /\* )
  | (?P<question> \?\? )
  | (?P<placeholder> \? )
  | (?P<semicolon> ; )
    """,
    re.VERBOSE | re.DOTALL,
)
_COMMENT_EDGE = re.compile(r"/\*|\*/")
_KEYWORD = re.compile(r"\s*\(*\s*([A-Za-z]+)")


class StatementRefused(SemelError):
    """A statement that would escape the transaction that Semel began."""


class _Kind(Enum):
    CODE = auto()
    LITERAL = auto()
    COMMENT = auto()
    QUESTION = auto()
    PLACEHOLDER = auto()
    SEMICOLON = auto()


def _pieces(sql: str) -> Iterator[tuple[_Kind, str]]:
    """The text cut into pieces; together they are the text."""
    at = 0
    while (match := _TOKEN.search(sql, at)) is not None:
        if match.start() > at:
            yield _Kind.CODE, sql[at : match.start()]
        kind, end = _kind(match), match.end()
        if match["block_comment"] is not None:
            end = _end_of_comment(sql, end)
        yield kind, sql[match.start() : end]
        at = end
    if at < len(sql):
        yield _Kind.CODE, sql[at:]


def _kind(match: re.Match[str]) -> _Kind:
    if match["literal"] is not None:
        return _Kind.LITERAL
    if match["line_comment"] is not None or match["block_comment"] is not None:
        return _Kind.COMMENT
    if match["question"] is not None:
        return _Kind.QUESTION
    return _Kind.PLACEHOLDER if match["placeholder"] is not None else _Kind.SEMICOLON


def _end_of_comment(sql: str, at: int) -> int:
    """Block comments nest in PostgreSQL."""
    depth = 1
    while depth and (edge := _COMMENT_EDGE.search(sql, at)) is not None:
        depth += 1 if edge[0] == "/*" else -1
        at = edge.end()
    return at if depth == 0 else len(sql)


@lru_cache(maxsize=512)
def placeholders_for_psycopg(sql: str) -> str:
    """`?` becomes `%s` and `%` becomes `%%`, because psycopg reads `%` in literals and comments too.

    `??` stands for PostgreSQL's own operators with a question mark (`??`, `??|` and `??&` on jsonb).
    """
    out = []
    for kind, text in _pieces(sql):
        if kind is _Kind.PLACEHOLDER:
            out.append("%s")
        elif kind is _Kind.QUESTION:
            out.append("?")
        else:
            out.append(text.replace("%", "%%"))
    return "".join(out)


def split_statements(sql: str) -> list[str]:
    """The statements of a script, without their semicolons; comments stay with the statement that they precede."""
    statements, current, has_code = [], "", False
    for kind, text in _pieces(sql):
        if kind is _Kind.SEMICOLON:
            if has_code:
                statements.append(current.strip())
            current, has_code = "", False
            continue
        current += text
        has_code = has_code or (kind is not _Kind.COMMENT and not text.isspace())
    if has_code:
        statements.append(current.strip())
    return statements


@lru_cache(maxsize=512)
def check_handler_statement(sql: str) -> None:
    """Raise `StatementRefused` for several statements at once, and for one that ends or leaves the transaction."""
    if len(split_statements(sql)) > 1:
        raise StatementRefused(f"one call takes one statement, this has several: {sql!r:.200}. Call once for each.")
    code = "".join(text for kind, text in _pieces(sql) if kind is not _Kind.COMMENT)
    keyword = _KEYWORD.match(code)
    if keyword is not None and keyword[1].upper() in _TRANSACTION_CONTROL:
        raise StatementRefused(
            f"{keyword[1].upper()} is not for this code: Semel begins and commits the transaction, and writes its own "
            "rows in it. Leave the statement out; raise an exception where nothing should be written."
        )
