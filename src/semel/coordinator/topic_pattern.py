"""Regular expressions for topic names, matched in time linear in the name: a client's pattern cannot stall the broker.

The syntax is what RE2 (which Apache Kafka uses for SubscribedTopicRegex) and other engines have in common: literals,
`.`, classes, `\\d \\w \\s` and their opposites, groups, `|`, the quantifiers `* + ? {n} {n,} {n,m}` (a lazy `?` behind
them changes nothing, because the whole name must match), `^` and `$` at the ends of a branch, and a leading `(?i)`.
Back-references and look-around are refused, as RE2 does.

A pattern becomes a nondeterministic automaton whose states are all followed at once (Thompson, 1968).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

__all__ = ["InvalidPattern", "TopicPattern"]

MAX_PATTERN_LENGTH = 2_000
MAX_STATES = 10_000
"""A quantifier repeats what it stands behind; together they may not make more states than this."""
MAX_DEPTH = 50
"""Groups in groups: each is a few calls deep."""
MAX_REPEAT = 1_000
"""RE2's limit of a counted repeat."""

_Test = Callable[[str], bool]


class InvalidPattern(ValueError):
    """The pattern cannot be read; the text says where."""


class _State(NamedTuple):
    """Goes on to `following` for a character that passes the test; without a test to all of them at once."""

    test: _Test | None
    following: list[int]


class _Piece(NamedTuple):
    """A part of the automaton: where it begins, and the state whose `following` is still open."""

    begin: int
    end: int


def _digit(character: str) -> bool:
    return "0" <= character <= "9"


def _word(character: str) -> bool:
    return character == "_" or (character.isascii() and character.isalnum())


def _space(character: str) -> bool:
    return character in " \t\n\f\r"


def _not(test: _Test) -> _Test:
    return lambda character: not test(character)


_CLASSES: dict[str, _Test] = {
    "d": _digit,
    "D": _not(_digit),
    "w": _word,
    "W": _not(_word),
    "s": _space,
    "S": _not(_space),
}
_CONTROLS = {"t": "\t", "n": "\n", "r": "\r", "f": "\f"}


class TopicPattern:
    """A compiled pattern. Raises `InvalidPattern`."""

    def __init__(self, pattern: str) -> None:
        if len(pattern) > MAX_PATTERN_LENGTH:
            raise InvalidPattern(f"it is longer than {MAX_PATTERN_LENGTH} characters")
        self.pattern = pattern
        self._states: list[_State] = []
        self._depth = 0
        self._ignore_case = pattern.startswith("(?i)")
        self._at = 4 if self._ignore_case else 0
        whole = self._alternatives()
        if self._at < len(pattern):
            raise InvalidPattern(f"unexpected ) at position {self._at}")
        self._accept = self._state(None)
        self._states[whole.end].following.append(self._accept)
        self._start = self._closure([whole.begin])

    def __repr__(self) -> str:
        return f"<TopicPattern {self.pattern!r}, {len(self._states)} states>"

    def matches(self, name: str) -> bool:
        """Whether the whole name is what the pattern describes."""
        states = self._start
        for character in name.lower() if self._ignore_case else name:
            reached = []
            for index in states:
                state = self._states[index]
                if state.test is not None and state.test(character):
                    reached += state.following
            states = self._closure(reached)
            if not states:
                return False
        return self._accept in states

    def _closure(self, states: Iterable[int]) -> set[int]:
        """These states and all that are reached from them without a character."""
        found: set[int] = set()
        waiting = list(states)
        while waiting:
            index = waiting.pop()
            if index not in found:
                found.add(index)
                if self._states[index].test is None:
                    waiting += self._states[index].following
        return found

    # --- Building the automaton ---

    def _state(self, test: _Test | None, *following: int) -> int:
        if len(self._states) >= MAX_STATES:
            raise InvalidPattern(f"it needs more than {MAX_STATES} states")
        self._states.append(_State(test, list(following)))
        return len(self._states) - 1

    def _one(self, test: _Test | None) -> _Piece:
        state = self._state(test)
        return _Piece(state, state)

    def _then(self, first: _Piece, second: _Piece) -> _Piece:
        self._states[first.end].following.append(second.begin)
        return _Piece(first.begin, second.end)

    def _maybe(self, piece: _Piece, *, again: bool) -> _Piece:
        """The piece or nothing; with `again` any number of times."""
        end = self._state(None)
        begin = self._state(None, piece.begin, end)
        self._states[piece.end].following.append(begin if again else end)
        return _Piece(begin, end)

    # --- Reading the pattern ---

    def _peek(self) -> str:
        return self.pattern[self._at : self._at + 1]

    def _take(self) -> str:
        character = self._peek()
        if not character:
            raise InvalidPattern("it ends too early")
        self._at += 1
        return character

    def _alternatives(self) -> _Piece:
        begins, end = [], self._state(None)
        while True:
            branch = self._branch()
            begins.append(branch.begin)
            self._states[branch.end].following.append(end)
            if self._peek() != "|":
                return _Piece(self._state(None, *begins), end)
            self._at += 1

    def _branch(self) -> _Piece:
        branch = self._one(None)
        if self._peek() == "^":
            self._at += 1
        while self._peek() not in ("", "|", ")"):
            if self._peek() == "$":
                self._at += 1
                if self._peek() not in ("", "|", ")"):
                    raise InvalidPattern(f"$ at position {self._at - 1} is not at the end")
                break
            branch = self._then(branch, self._repeated())
        return branch

    def _repeated(self) -> _Piece:
        """An atom and its quantifier. For a counted repeat the atom is read again for every copy."""
        begin = self._at
        piece = self._atom()
        end = self._at
        low, high = self._quantifier()
        if self._peek() and self._peek() in "*+":
            raise InvalidPattern(f"a quantifier behind a quantifier at position {self._at}")
        behind = self._at

        def copy() -> _Piece:
            self._at = begin
            copied = self._atom()
            assert self._at == end
            return copied

        if (low, high) == (1, 1):
            return piece
        whole = self._one(None)
        copies = 0
        for copies in range(1, low + 1):
            whole = self._then(whole, piece if copies == 1 else copy())
        if high is None:
            whole = self._then(whole, self._maybe(piece if copies == 0 else copy(), again=True))
        else:
            for number in range(low, high):
                whole = self._then(whole, self._maybe(piece if number == 0 else copy(), again=False))
        self._at = behind
        return whole

    def _quantifier(self) -> tuple[int, int | None]:
        ranges: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
        found = ranges.get(self._peek())
        if found is not None:
            self._at += 1
        elif self._peek() == "{":
            closing = self.pattern.find("}", self._at)
            low, comma, high = self.pattern[self._at + 1 : closing].partition(",")
            if closing < 0 or not low.isdecimal() or not (high.isdecimal() or not high):
                return (1, 1)  # A brace that counts nothing is a literal, which _atom takes next.
            self._at = closing + 1
            found = (int(low), int(high) if high else (None if comma else int(low)))
        else:
            return (1, 1)
        low_count, high_count = found
        if max(low_count, high_count or 0) > MAX_REPEAT or (high_count is not None and high_count < low_count):
            raise InvalidPattern(f"a bad repeat before position {self._at}")
        if self._peek() == "?":
            self._at += 1
        return found

    def _atom(self) -> _Piece:
        at, character = self._at, self._take()
        if character == "(":
            return self._group()
        if character == "[":
            return self._one(self._class())
        if character == ".":
            return self._one(lambda _: True)
        if character == "\\":
            return self._one(self._escape())
        if character in "*+?^":
            raise InvalidPattern(f"unexpected {character} at position {at}")
        return self._one(self._literal(character))

    def _group(self) -> _Piece:
        if self.pattern.startswith("?:", self._at):
            self._at += 2
        elif self._peek() == "?":
            raise InvalidPattern(f"(?{self.pattern[self._at + 1 : self._at + 2]} at position {self._at - 1}")
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise InvalidPattern(f"groups stand more than {MAX_DEPTH} deep in each other")
        piece = self._alternatives()
        self._depth -= 1
        if self._peek() != ")":
            raise InvalidPattern("missing closing )")
        self._at += 1
        return piece

    def _literal(self, character: str) -> _Test:
        wanted = character.lower() if self._ignore_case else character
        return lambda given: given == wanted

    def _escape(self) -> _Test:
        character = self._take()
        if character in _CLASSES:
            return _CLASSES[character]
        if character.isalnum() and character not in _CONTROLS:
            raise InvalidPattern(f"\\{character} at position {self._at - 2}")
        return self._literal(_CONTROLS.get(character, character))

    def _class(self) -> _Test:
        negated = self._peek() == "^"
        self._at += negated
        tests: list[_Test] = []
        while not tests or self._peek() != "]":
            if not self._peek():
                raise InvalidPattern("missing closing ]")
            low = self._take()
            if low == "\\" and self._peek() in _CLASSES:
                tests.append(_CLASSES[self._take()])
                continue
            low = self._class_character(low)
            high = low
            if self._peek() == "-" and self.pattern[self._at + 1 : self._at + 2] not in ("]", ""):
                self._at += 1
                high = self._class_character(self._take())
                if high < low:
                    raise InvalidPattern(f"a bad range before position {self._at}")
            tests.append(self._range(low, high))
        self._at += 1
        test: _Test = lambda character: any(one(character) for one in tests)  # noqa: E731
        return _not(test) if negated else test

    def _class_character(self, character: str) -> str:
        if character != "\\":
            return character
        escaped = self._take()
        return _CONTROLS.get(escaped, escaped)

    def _range(self, low: str, high: str) -> _Test:
        if not self._ignore_case:
            return lambda character: low <= character <= high
        return lambda character: low <= character <= high or low <= character.upper() <= high
