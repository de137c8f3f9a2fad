"""A progress bar on stderr that needs no package and keeps stdout clean."""

from __future__ import annotations

import sys
from typing import TextIO

_WIDTH = 30


class Progress:
    """Counts steps; draws a bar on a terminal, prints one line per stage elsewhere (a log file, a CI run)."""

    def __init__(self, steps: int, stream: TextIO | None = None) -> None:
        self._steps = max(steps, 1)
        self._done = 0
        self._stream = sys.stderr if stream is None else stream
        self._is_terminal = self._stream.isatty()
        self._stage = ""

    def stage(self, stage: str) -> None:
        """Name what comes next, for instance the problem."""
        self._stage = stage
        if not self._is_terminal:
            print(f"[{100 * self._done // self._steps:3d} %] {stage}", file=self._stream, flush=True)

    def advance(self, label: str, steps: int = 1) -> None:
        """Say that `steps` more steps are done and what is running."""
        self._done = min(self._done + steps, self._steps)
        if self._is_terminal:
            filled = _WIDTH * self._done // self._steps
            bar = "#" * filled + "." * (_WIDTH - filled)
            text = f"[{bar}] {100 * self._done // self._steps:3d} %  {self._stage}  {label}"
            print(f"\r\x1b[K{text[:118]}", end="", file=self._stream, flush=True)

    def close(self) -> None:
        """Wipe the bar."""
        if self._is_terminal:
            print("\r\x1b[K", end="", file=self._stream, flush=True)
