"""Why a record could not be processed, as it is kept beside it: what was raised, where, and by which build."""

from __future__ import annotations

import traceback
from hashlib import blake2b
from itertools import dropwhile, groupby
from pathlib import PurePath

import msgspec

__all__ = ["FRAMES_MAX", "MESSAGE_CHARACTERS_MAX", "Fault", "build_at_least"]

MESSAGE_CHARACTERS_MAX = 2_000
"""An error message may quote the whole record; its beginning says what was wrong."""
SHORT_CHARACTERS_MAX = 200
"""What is held in memory of a message, for each parked key."""
FRAMES_MAX = 3
"""The innermost frames, which tell one mistake from another."""
_OURS = PurePath(__file__).parents[1]


class Fault(msgspec.Struct, frozen=True, omit_defaults=True):
    """One failure. Failures of one `group` have one cause: the same exception from the same place of one build."""

    error: str = ""
    message: str = ""
    frames: str = ""
    group: str = ""
    build: str = ""

    @classmethod
    def of(cls, error: BaseException, build: str) -> Fault:
        """What is kept of an exception."""
        kind = type(error)
        name = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
        message = (str(error) or repr(error))[:MESSAGE_CHARACTERS_MAX].replace("\0", "\\0")
        text = message.encode("utf-8", "backslashreplace").decode()
        frames = " < ".join(_frames(error))
        return cls(name, text, frames, group_of(name, frames, build), build)

    def short(self) -> Fault:
        """With only the beginning of the message."""
        return Fault(self.error, self.message[:SHORT_CHARACTERS_MAX], self.frames, self.group, self.build)


def group_of(error: str, frames: str, build: str) -> str:
    """Eight hex digits for exception type, top frames and build id."""
    return blake2b("\0".join((error, frames, build)).encode(errors="replace"), digest_size=4).hexdigest()


def _frames(error: BaseException) -> list[str]:
    """`file:function`, the innermost first. Line numbers are left out: they move with every edit.

    What is around the user's own code is the engine's, which has more than one way to a handler: it is left out, or one
    mistake would be of two groups.
    """
    frames = traceback.extract_tb(error.__traceback__)
    kept = list(dropwhile(lambda frame: _is_ours(PurePath(frame.filename)), frames)) or frames[-1:]
    return [f"{PurePath(frame.filename).name}:{frame.name}" for frame in reversed(kept[-FRAMES_MAX:])]


def _is_ours(file: PurePath) -> bool:
    return file.is_relative_to(_OURS) and not file.is_relative_to(_OURS / "examples")


def build_at_least(build: str, least: str) -> bool:
    """Whether `build` is `least` or a later one: runs of digits count as numbers, everything else as text."""
    return not least or _pieces(build) >= _pieces(least)


def _pieces(build: str) -> list[tuple[int, int, str]]:
    found = (
        "".join(piece) for _, piece in groupby(build, key=lambda character: character.isascii() and character.isdigit())
    )
    return [(1, int(piece), "") if piece.isascii() and piece.isdigit() else (0, 0, piece) for piece in found]
