"""Opening hours as people write them."""

from __future__ import annotations

import pytest

from node.schedule import windows_of
from node.settings import SettingsError
from protocol.adverts import WEEK_MINUTES, Window
from protocol.instants import SECOND_NS, UnixNs
from routing.requirements import is_open

DAY = 24 * 60


@pytest.mark.parametrize(
    ("line", "windows"),
    [
        ("mon 18:00-23:30", [Window(18 * 60, 330)]),
        ("sat-sun 9:00-10:00", [Window(5 * DAY + 540, 60), Window(6 * DAY + 540, 60)]),
        ("sun-mon 00:00-01:00 utc", [Window(0, 60), Window(6 * DAY, 60)]),
        ("sun 22:00-06:00", [Window(6 * DAY + 22 * 60, 8 * 60)]),
        ("mon 01:00-02:00 +02:00", [Window(WEEK_MINUTES - 60, 60)]),
        ("SUN 23:00-24:00 -0130", [Window(30, 60)]),
        ("daily 00:00-24:00", [Window(day * DAY, DAY) for day in range(7)]),
    ],
)
def test_what_lines_mean(line: str, windows: list[Window]) -> None:
    assert windows_of([line]) == tuple(windows)


def test_placement_reads_them_alike() -> None:
    windows = windows_of(["thu 00:00-00:10 +01:00"])
    thursday = UnixNs(0)  # 1970-01-01 was one
    assert not is_open(windows, thursday)
    assert is_open(windows, UnixNs(thursday - 55 * 60 * SECOND_NS + 7 * 24 * 3600 * SECOND_NS))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "form"),
        ("mon", "form"),
        ("mon 9-10", "form"),
        ("monday 09:00-10:00", "form"),
        ("foo 09:00-10:00", "'foo' is no day"),
        ("mon-foo 09:00-10:00", "'foo' is no day"),
        ("mon 09:00-10:75", "no time of day"),
        ("mon 09:00-25:00", "no time of day"),
        ("mon 09:00-09:00", "at no time"),
        ("mon 24:00-09:00", "at no time"),
        ("mon 09:00-10:00 +15:00", "offset"),
        ("mon 09:00-10:00 +01:99", "offset"),
    ],
)
def test_what_is_wrong_is_said(line: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        windows_of([line])


def test_windows_are_as_many_as_an_advert_holds() -> None:
    hours = [f"daily {hour:02}:00-{hour:02}:30" for hour in range(4)]
    assert len(windows_of(hours[:3] * 2)) == 21
    with pytest.raises(SettingsError, match="21 are the most"):
        windows_of(hours)
