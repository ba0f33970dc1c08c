"""When nodes are up: session by session, drawn or read. Each node has dice of its own."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from heapq import merge
from pathlib import Path
from typing import NamedTuple

from protocol.instants import SECOND_NS
from sim import portable
from sim.arrivals import Span
from sim.cities import CITIES
from sim.config import ChurnSettings
from sim.draws import Draws, Stream
from sim.settings import ScenarioError

#: Draws of one node's sessions never meet those of another.
_PER_NODE = 1 << 20


class Turn(NamedTuple):
    """A node goes up or down."""

    at_ns: int
    node: int
    up: bool


def turns(
    settings: ChurnSettings, seed: int, nodes: Iterable[tuple[int, str]], span: Span, folder: Path
) -> Iterator[Turn]:
    """All comings and goings in order of time. `nodes`: (number, site's name); all are up at the start."""
    if settings.model == "none":
        return iter(())
    if settings.model == "trace":
        return _trace(folder / settings.file, span)
    return merge(*(_of_node(settings, seed, node, site, span) for node, site in nodes))


def _of_node(settings: ChurnSettings, seed: int, node: int, site: str, span: Span) -> Iterator[Turn]:
    dice = Draws(seed, Stream.CHURN, node * _PER_NODE)
    if dice.unit() >= settings.share:
        return
    if settings.model == "diurnal":
        yield from _days(settings, dice, node, site, span)
        return
    at = span.start_ns
    first = True
    while True:
        session = _session_s(settings, dice)
        # At the start a node is somewhere within its session: what is left of it, not all.
        at += round((session * dice.unit() if first else session) * SECOND_NS)
        first = False
        if at >= span.end_ns:
            return
        yield Turn(at, node, up=False)
        at += round(dice.exponential(settings.downtime_s) * SECOND_NS)
        if at >= span.end_ns:
            return
        yield Turn(at, node, up=True)


def _session_s(settings: ChurnSettings, dice: Draws) -> float:
    if settings.model == "exponential":
        return dice.exponential(settings.session_s)
    # `scale` such that the mean is about session_s: mean = scale * gamma(1 + 1/shape).
    return dice.weibull(settings.session_s / _gamma(1.0 + 1.0 / settings.shape), settings.shape)


def _gamma(x: float) -> float:
    """The gamma function for x >= 1, by Lanczos (g = 5, n = 6; error below 2e-10), portable."""
    tops = (76.18009172947146, -86.50532032941677, 24.01409824083091)
    more = (-1.231739572450155, 0.1208650973866179e-2, -0.5395239384953e-5)
    total = 1.000000000190015
    for n, top in enumerate((*tops, *more), 1):
        total += top / (x + n)
    log = (x + 0.5) * portable.ln(x + 5.5) - (x + 5.5) + portable.ln(2.5066282746310005 * total / x)
    return portable.exp(log)


def _days(settings: ChurnSettings, dice: Draws, node: int, site: str, span: Span) -> Iterator[Turn]:
    """Up `session_s` a day around 20:00 local time, some hours earlier or later by person."""
    day_s = settings.day_s
    up_s = min(settings.session_s, day_s)
    longitude = next((city.longitude for city in CITIES if city.name == site), 0.0)
    evening_s = day_s * (20.0 / 24.0 - longitude / 360.0) + dice.normal() * day_s / 16.0
    day = -2
    up = True
    while True:
        opens = span.start_ns + round((day * day_s + evening_s - up_s / 2.0) * SECOND_NS)
        closes = opens + round(up_s * SECOND_NS)
        day += 1
        if opens >= span.end_ns:
            return
        if closes <= span.start_ns:
            continue
        if opens > span.start_ns:
            if up:  # the night before the first evening
                yield Turn(span.start_ns, node, up=False)
            yield Turn(opens, node, up=True)
        up = False
        if closes < span.end_ns:
            yield Turn(closes, node, up=False)


def _trace(file: Path, span: Span) -> Iterator[Turn]:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ScenarioError(f"churn.file: {file}: {error.strerror}") from error
    for number, row in enumerate(csv.reader(io.StringIO(text)), 1):
        if not row or row[0].strip() == "time_s":
            continue
        try:
            time_s, node, state = row
            turn = Turn(span.start_ns + round(float(time_s) * SECOND_NS), int(node), up=state.strip() == "up")
        except ValueError as error:
            raise ScenarioError(f"{file}: line {number}: time_s,node,up|down was expected: {error}") from error
        if turn.at_ns < span.end_ns:
            yield turn
