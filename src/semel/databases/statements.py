"""SQL text as handlers write it: `?` placeholders on every database, one statement a call, no transaction control.

PostgreSQL and SQLite share one lexer; MariaDB, in the sql_mode that its sessions get, has its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import Enum, auto
from functools import lru_cache

from semel.errors import SemelError

__all__ = [
    "StatementRefused",
    "check_handler_statement",
    "check_handler_statement_for_mariadb",
    "placeholders_for_psycopg",
    "placeholders_for_pymysql",
    "split_statements",
    "split_statements_for_mariadb",
]

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
# MariaDB's lexical rules (Knowledge Base: "Comment Syntax", "String Literals", "Identifier Names") with
# NO_BACKSLASH_ESCAPES in its sql_mode. `--` begins a comment only before a blank; block comments do not nest.
_MARIADB_TOKEN = re.compile(
    r"""
    (?P<literal> ' (?: [^'] | '' )* (?: ' | \Z ) | " (?: [^"] | "" )* (?: " | \Z ) | ` (?: [^`] | `` )* (?: ` | \Z ) )
  | (?P<line_comment> -- (?= [\s\x00-\x1f] | \Z ) [^\n]* | \# [^\n]* )
  | (?P<block_comment> /\* .*? (?: \*/ | \Z ) )
  | (?P<question> \?\? )
  | (?P<placeholder> \? )
  | (?P<semicolon> ; )
    """,
    re.VERBOSE | re.DOTALL,
)
_MARIADB_STATEMENTS = frozenset(
    {"DELETE", "DESCRIBE", "DO", "EXPLAIN", "INSERT", "REPLACE", "SELECT", "SHOW", "UPDATE", "VALUES", "WITH"}
)
"""What never commits there. Most other statements (DDL, GRANT, LOCK TABLES, ...) commit what went before them."""
_ROUTINE = re.compile(r"\s*CREATE\b[^(]*?\b(TRIGGER|PROCEDURE|FUNCTION|EVENT)\b", re.IGNORECASE)
_BLOCK_BEGIN = re.compile(r"\bBEGIN\b", re.IGNORECASE)
_BLOCK_END = re.compile(r"\s*END\b(?!\s+(?:IF|LOOP|CASE|WHILE|REPEAT|FOR)\b)", re.IGNORECASE)
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


def _pieces(sql: str, tokens: re.Pattern[str] = _TOKEN) -> Iterator[tuple[_Kind, str]]:
    """The text cut into pieces; together they are the text."""
    at = 0
    while (match := tokens.search(sql, at)) is not None:
        if match.start() > at:
            yield _Kind.CODE, sql[at : match.start()]
        kind, end = _kind(match), match.end()
        if match["block_comment"] == "/*":
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
    return _formatted(sql, _TOKEN)


@lru_cache(maxsize=512)
def placeholders_for_pymysql(sql: str) -> str:
    """The same for PyMySQL, which formats the text itself. `??` stands for one question mark here too."""
    return _formatted(sql, _MARIADB_TOKEN)


def _formatted(sql: str, tokens: re.Pattern[str]) -> str:
    out = []
    for kind, text in _pieces(sql, tokens):
        if kind is _Kind.PLACEHOLDER:
            out.append("%s")
        elif kind is _Kind.QUESTION:
            out.append("?")
        else:
            out.append(text.replace("%", "%%"))
    return "".join(out)


def split_statements(sql: str) -> list[str]:
    """The statements of a script, without their semicolons; comments stay with the statement that they precede."""
    return _split(sql, _TOKEN)


def split_statements_for_mariadb(sql: str) -> list[str]:
    """The same by MariaDB's rules; a trigger or routine whose body is BEGIN ... END stays in one piece."""
    statements: list[str] = []
    current, depth = "", 0
    for piece in _split(sql, _MARIADB_TOKEN):
        code = _code(piece, _MARIADB_TOKEN)
        current = f"{current};\n{piece}" if depth else piece
        if depth or _ROUTINE.match(code):
            depth += len(_BLOCK_BEGIN.findall(code)) - bool(_BLOCK_END.match(code))
        if depth <= 0:
            statements.append(current)
            depth = 0
    return [*statements, current] if depth else statements


def _code(sql: str, tokens: re.Pattern[str]) -> str:
    """The text without comments, literals and quoted names."""
    return "".join(text for kind, text in _pieces(sql, tokens) if kind not in (_Kind.COMMENT, _Kind.LITERAL))


def _split(sql: str, tokens: re.Pattern[str]) -> list[str]:
    statements, current, has_code = [], "", False
    for kind, text in _pieces(sql, tokens):
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


@lru_cache(maxsize=512)
def check_handler_statement_for_mariadb(sql: str) -> None:
    """The same for MariaDB, where most statements but reads and changes of rows commit without being asked to."""
    if len(_split(sql, _MARIADB_TOKEN)) > 1:
        raise StatementRefused(f"one call takes one statement, this has several: {sql!r:.200}. Call once for each.")
    for kind, text in _pieces(sql, _MARIADB_TOKEN):
        if kind is _Kind.COMMENT and text.startswith(("/*!", "/*M!")):
            raise StatementRefused(f"MariaDB executes what is in the comment {text!r:.100}: write it as a statement.")
    keyword = _KEYWORD.match(_code(sql, _MARIADB_TOKEN))
    if keyword is None or keyword[1].upper() not in _MARIADB_STATEMENTS:
        raise StatementRefused(
            f"{keyword[1].upper() if keyword else repr(sql[:40])} is not for handlers: MariaDB may commit at it, "
            "and the position in the topic is in the same transaction. A handler on MariaDB runs "
            f"{', '.join(sorted(_MARIADB_STATEMENTS))}; tables and the like belong in the database's schema."
        )
