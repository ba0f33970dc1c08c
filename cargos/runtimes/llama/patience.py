"""Native calls that a hostile request can make endless, watched from another thread.

A grammar may have exponentially many readings. The library can not be interrupted in it, so what remains is
to know whose grammar it is, to refuse that job, and to end the process: the others go on in the next one.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Final

#: Work on one grammar at one token takes milliseconds; memory may grow by gigabytes in tens of seconds.
_PATIENCE_NS: Final = 3_000_000_000


class Patience:
    """What one thread is busy with. Any other thread may ask `overdue`."""

    def __init__(self) -> None:
        self._now: tuple[int, int] | None = None

    @contextmanager
    def on(self, key: int) -> Generator[None]:
        """This thread now does something for this job that must not take long."""
        self._now = (key, time.monotonic_ns())
        try:
            yield
        finally:
            self._now = None

    def overdue(self) -> int | None:
        """The job that has kept the thread busy for too long."""
        now = self._now  # one read: it changes under our feet
        return now[0] if now is not None and time.monotonic_ns() - now[1] > _PATIENCE_NS else None
