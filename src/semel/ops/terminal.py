"""Progress on stderr: one line that is written over on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys

import click

__all__ = ["Terminal"]


class Terminal:
    """What a long run tells people meanwhile. `interval` is seconds between two progress lines."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self.interval = 0.5 if self._live else 5.0

    def line(self, text: str) -> None:
        """Something that stays."""
        click.echo(f"\r\x1b[K{text}" if self._live else text, err=True)

    def progress(self, text: str) -> None:
        """Something that the next one replaces."""
        click.echo(f"\r\x1b[K{text}" if self._live else text, err=True, nl=not self._live)
