"""Opening hours as people write them, made into the windows that adverts carry.
`mon-fri 18:00-23:30` is every weekday evening in UTC, `sat 22:00-06:00 +02:00` lasts from Saturday evening into
Sunday in a zone two hours east, `daily 00:00-24:00` is always.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from node.settings import SettingsError
from protocol.adverts import MAX_WINDOWS, WEEK_MINUTES, Window

DAY_MINUTES: Final = 24 * 60

_DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_LINE: Final = re.compile(
    r"(?P<days>[a-z]{3,5}(?:-[a-z]{3})?)\s+(?P<start>\d{1,2}:\d{2})-(?P<end>\d{1,2}:\d{2})"
    r"(?:\s*(?P<zone>utc|z|[+-]\d{2}:?\d{2}))?\Z"
)
_FORM: Final = (
    "DAYS HH:MM-HH:MM [ZONE], such as 'mon-fri 18:00-23:30', 'sat 22:00-06:00 +02:00', 'daily 00:00-24:00'"
)

#: No zone on earth is farther from UTC.
_MAX_ZONE_MINUTES: Final = 14 * 60


def windows_of(lines: Iterable[str], setting: str = "schedule") -> tuple[Window, ...]:
    """The windows that these lines mean, in the order of the week. Raises SettingsError."""
    windows = {window for line in lines for window in _windows(line, setting)}
    if len(windows) > MAX_WINDOWS:
        raise SettingsError(
            f"{setting}: {len(windows)} windows a week, {MAX_WINDOWS} are the most; "
            f"each day of a line counts as one"
        )
    return tuple(sorted(windows, key=lambda window: (window.start, window.minutes)))


def _windows(line: str, setting: str) -> list[Window]:
    found = _LINE.match(line.strip().lower())
    if found is None:
        raise SettingsError(f"{setting}: {line!r} is not of the form {_FORM}")
    start = _minutes(found["start"], line, setting)
    end = _minutes(found["end"], line, setting)
    length = end - start if end > start else end - start + DAY_MINUTES
    if start in {DAY_MINUTES, end}:
        raise SettingsError(f"{setting}: {line!r} is open at no time; from midnight to midnight is 00:00-24:00")
    zone = _zone(found["zone"] or "utc", line, setting)
    return [
        Window((day * DAY_MINUTES + start - zone) % WEEK_MINUTES, length)
        for day in _days(found["days"], line, setting)
    ]


def _minutes(clock: str, line: str, setting: str) -> int:
    hours, minutes = map(int, clock.split(":"))
    total = 60 * hours + minutes
    if minutes > 59 or total > DAY_MINUTES:
        raise SettingsError(f"{setting}: {line!r}: {clock!r} is no time of day (00:00 to 24:00)")
    return total


def _days(text: str, line: str, setting: str) -> list[int]:
    if text == "daily":
        return list(range(7))
    first, _, last = text.partition("-")
    for name in (first, last or first):
        if name not in _DAYS:
            raise SettingsError(f"{setting}: {line!r}: {name!r} is no day ({', '.join(_DAYS)}, daily)")
    start, end = _DAYS.index(first), _DAYS.index(last or first)
    return [day % 7 for day in range(start, (end if end >= start else end + 7) + 1)]


def _zone(text: str, line: str, setting: str) -> int:
    """Minutes east of UTC."""
    if text in {"utc", "z"}:
        return 0
    digits = text[1:].replace(":", "")
    hours, minutes = int(digits[:2]), int(digits[2:])
    total = 60 * hours + minutes
    if minutes > 59 or total > _MAX_ZONE_MINUTES:
        raise SettingsError(f"{setting}: {line!r}: {text!r} is no offset from UTC (-14:00 to +14:00)")
    return -total if text[0] == "-" else total
