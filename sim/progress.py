"""A line of progress with the time left, for whatever takes longer than two seconds."""

from __future__ import annotations

import sys
import time
from typing import Final, TextIO

#: Nothing is shown before this, seconds: short runs stay silent.
QUIET_S: Final = 2.0

#: Between two lines: often in a terminal, where a line replaces the one before; seldom in a log.
_TERMINAL_S: Final = 0.2
_LOG_S: Final = 10.0


class ProgressLine:
    """Call it with (what, share done); `close` ends the line."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._started = time.monotonic()
        self._next = self._started + QUIET_S
        self._shown = 0

    def __call__(self, what: str, share: float) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + (_TERMINAL_S if self._live else _LOG_S)
        spent = now - self._started
        left = f", about {span_text(spent * (1.0 - share) / share)} left" if share > 0.005 else ""
        line = f"{share * 100:3.0f} %  {what}  {span_text(spent)}{left}"
        if self._live:
            self._stream.write("\r" + line.ljust(self._shown))
            self._shown = len(line)
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Clear the line."""
        if self._live and self._shown:
            self._stream.write("\r" + " " * self._shown + "\r")
            self._stream.flush()
        self._shown = 0


def span_text(seconds: float) -> str:
    """A span of time for people: 45 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 2 * 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86_400} days {whole % 86_400 // 3600} h"
