"""The SQL that the sink and its handlers speak, read into values: enough of PostgreSQL's, nothing else."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

__all__ = ["Control", "Create", "Delete", "Expression", "Insert", "Select", "Statement", "Update", "parse"]

Values = Mapping[str, Any]
Expression = Callable[[Values, Values, Sequence[Any]], Any]
"""(row, the row that an INSERT proposed, parameters) -> value; NULL is None."""

_TOKEN = re.compile(
    r"""\s+ | --[^\n]* | (?P<word>[A-Za-z_]\w*) | (?P<number>\d+) | '(?P<text>[^']*)'
    | (?P<mark>%s|<>|<=|>=|[(),.;=<>*+-])""",
    re.VERBOSE,
)


class Control(NamedTuple):
    """BEGIN, COMMIT, ROLLBACK, SAVEPOINT x, ROLLBACK TO x, RELEASE x; NOTHING for what changes nothing here."""

    verb: str
    name: str = ""


class Create(NamedTuple):
    table: str
    columns: tuple[str, ...]
    required: frozenset[str]
    key: tuple[str, ...]
    defaults: dict[str, int]


@dataclass
class Insert:
    table: str
    columns: tuple[str, ...]
    values: tuple[Expression, ...]
    on_conflict: str = ""
    """`nothing`, `update`, or empty: an error."""
    changes: dict[str, Expression] = field(default_factory=dict)
    returning: tuple[str, ...] = ()


class Update(NamedTuple):
    table: str
    changes: dict[str, Expression]
    where: Expression


class Delete(NamedTuple):
    table: str
    where: Expression


@dataclass
class Select:
    """`outputs` are columns, or ("count", ""), ("sum", column)."""

    table: str
    outputs: tuple[tuple[str, str], ...]
    where: Expression
    is_distinct: bool = False
    order: tuple[str, ...] = ()
    limit: int | None = None
    for_update: bool = False


Statement = Control | Create | Insert | Update | Delete | Select


@lru_cache(maxsize=512)
def parse(sql: str) -> list[Statement]:
    """The statements of a script. Raises `ValueError` for what the model does not know."""
    return _Parser(sql).script()


class _Parser:
    def __init__(self, sql: str) -> None:
        self._sql = sql
        self._tokens: list[tuple[str, str]] = []
        at = 0
        while at < len(sql):
            match = _TOKEN.match(sql, at)
            if match is None:
                raise ValueError(f"the model does not know {sql[at:]!r:.40} in {sql!r:.200}")
            if match.lastgroup is not None:
                self._tokens.append((match.lastgroup, match[match.lastgroup]))
            at = match.end()
        self._at = 0
        self._parameters = 0

    # --- Tokens ---

    def _peek(self) -> str:
        if self._at >= len(self._tokens):
            return ""
        kind, text = self._tokens[self._at]
        return text.upper() if kind in ("word", "mark") else f"{kind}:{text}"

    def _take(self, *wanted: str) -> bool:
        """Whether these words come next; they are passed."""
        start = self._at
        for word in wanted:
            if self._peek() != word:
                self._at = start
                return False
            self._at += 1
        return True

    def _need(self, *wanted: str) -> None:
        if not self._take(*wanted):
            raise ValueError(f"the model expects {wanted} at {self._tokens[self._at :][:4]} of {self._sql!r:.300}")

    def _name(self) -> str:
        kind, text = self._tokens[self._at]
        if kind != "word":
            raise ValueError(f"{text!r} is no name in {self._sql!r:.300}")
        self._at += 1
        return text.lower()

    def _names(self) -> tuple[str, ...]:
        self._need("(")
        names = [self._name()]
        while self._take(","):
            names.append(self._name())
        self._need(")")
        return tuple(names)

    # --- Statements ---

    def script(self) -> list[Statement]:
        found: list[Statement] = []
        while self._peek():
            if not self._take(";"):
                found.append(self._statement())
        return found

    def _statement(self) -> Statement:
        for verb in ("BEGIN", "COMMIT"):
            if self._take(verb):
                return Control(verb)
        if self._take("SAVEPOINT"):
            return Control("SAVEPOINT", self._name())
        if self._take("RELEASE", "SAVEPOINT"):
            return Control("RELEASE", self._name())
        if self._take("ROLLBACK", "TO", "SAVEPOINT"):
            return Control("ROLLBACK TO", self._name())
        if self._take("ROLLBACK"):
            return Control("ROLLBACK")
        if self._take("SET", "CONSTRAINTS", "ALL", "IMMEDIATE"):
            return Control("NOTHING")
        if self._take("CREATE", "TABLE", "IF", "NOT", "EXISTS"):
            return self._create()
        if self._take("INSERT", "INTO"):
            return self._insert()
        if self._take("UPDATE"):
            table = self._name()
            self._need("SET")
            return Update(table, self._changes(), self._where())
        if self._take("DELETE", "FROM"):
            return Delete(self._name(), self._where())
        self._need("SELECT")
        return self._select()

    def _create(self) -> Create:
        table = self._name()
        self._need("(")
        columns: list[str] = []
        required: set[str] = set()
        key: tuple[str, ...] = ()
        defaults: dict[str, int] = {}
        while not self._take(")"):
            if self._take("PRIMARY", "KEY"):
                key = self._names()
            else:
                column = self._name()
                columns.append(column)
                self._name()
                if self._take("NOT", "NULL"):
                    required.add(column)
                if self._take("PRIMARY", "KEY"):
                    key = (column,)
                if self._take("DEFAULT"):
                    sign = -1 if self._take("-") else 1
                    defaults[column] = sign * int(self._tokens[self._at][1])
                    self._at += 1
            self._take(",")
        if self._take("PARTITION", "BY", "RANGE"):
            self._names()  # Where the rows lie changes nothing of what a statement finds.
        return Create(table, tuple(columns), frozenset(required) | set(key), key, defaults)

    def _insert(self) -> Insert:
        table, columns = self._name(), self._names()
        self._need("VALUES", "(")
        values = [self._expression()]
        while self._take(","):
            values.append(self._expression())
        self._need(")")
        insert = Insert(table, columns, tuple(values))
        if self._take("ON", "CONFLICT"):
            self._names()
            self._need("DO")
            if self._take("NOTHING"):
                insert.on_conflict = "nothing"
            else:
                self._need("UPDATE", "SET")
                insert.on_conflict, insert.changes = "update", self._changes()
        if self._take("RETURNING"):
            insert.returning = tuple(self._listed())
        return insert

    def _listed(self) -> list[str]:
        names = [self._name()]
        while self._take(","):
            names.append(self._name())
        return names

    def _changes(self) -> dict[str, Expression]:
        changes = {}
        while True:
            column = self._name()
            self._need("=")
            changes[column] = self._expression()
            if not self._take(","):
                return changes

    def _select(self) -> Select:
        is_distinct = self._take("DISTINCT")
        outputs: list[tuple[str, str]] = []
        while True:
            if self._take("COUNT", "(", "*", ")"):
                outputs.append(("count", ""))
            elif self._take("SUM", "("):
                outputs.append(("sum", self._name()))
                self._need(")")
            elif self._peek().startswith("number:"):
                outputs.append(("one", ""))
                self._at += 1
            else:
                outputs.append(("column", self._name()))
            if not self._take(","):
                break
        self._need("FROM")
        found = Select(self._name(), tuple(outputs), self._where(), is_distinct)
        if self._take("ORDER", "BY"):
            found.order = tuple(self._listed())
        if self._take("LIMIT"):
            found.limit = int(self._tokens[self._at][1])
            self._at += 1
        found.for_update = self._take("FOR", "UPDATE")
        return found

    # --- Expressions ---

    def _where(self) -> Expression:
        if not self._take("WHERE"):
            return lambda row, new, parameters: True
        parts = [self._condition()]
        while self._take("AND"):
            parts.append(self._condition())
        return lambda row, new, parameters: all(part(row, new, parameters) for part in parts)

    def _condition(self) -> Expression:
        left = self._expression()
        if self._take("IS", "NOT", "NULL"):
            return lambda row, new, parameters: left(row, new, parameters) is not None
        if self._take("IS", "NULL"):
            return lambda row, new, parameters: left(row, new, parameters) is None
        sign = self._peek()
        self._at += 1
        right = self._expression()
        compare = {
            "=": lambda a, b: a == b,
            "<>": lambda a, b: a != b,
            "<": lambda a, b: a < b,
            ">": lambda a, b: a > b,
            "<=": lambda a, b: a <= b,
            ">=": lambda a, b: a >= b,
        }[sign]

        def test(row: Values, new: Values, parameters: Sequence[Any]) -> bool:
            one, other = left(row, new, parameters), right(row, new, parameters)
            return one is not None and other is not None and bool(compare(one, other))

        return test

    def _expression(self) -> Expression:
        left = self._operand()
        while self._peek() in ("+", "-", "*"):
            sign = self._peek()
            self._at += 1
            left = _combined(sign, left, self._operand())
        return left

    def _operand(self) -> Expression:
        kind, text = self._tokens[self._at]
        self._at += 1
        if text == "%s":
            number = self._parameters
            self._parameters += 1
            return lambda row, new, parameters: parameters[number]
        if kind == "number":
            return lambda row, new, parameters: int(text)
        if kind == "text":
            return lambda row, new, parameters: text
        if kind != "word":
            raise ValueError(f"{text!r} is no operand in {self._sql!r:.300}")
        name, owner = text.lower(), ""
        if name == "null":
            return lambda row, new, parameters: None
        if self._take("."):
            owner, name = name, self._name()
        if owner == "excluded":
            return lambda row, new, parameters: new[name]
        return lambda row, new, parameters: row[name]


def _combined(sign: str, left: Expression, right: Expression) -> Expression:
    def value(row: Values, new: Values, parameters: Sequence[Any]) -> Any:
        one, other = left(row, new, parameters), right(row, new, parameters)
        if one is None or other is None:
            return None
        return one + other if sign == "+" else one - other if sign == "-" else one * other

    return value
