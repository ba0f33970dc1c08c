"""Where an Island stands, by how fast it answers.

A vantage point at a known place that measures a round trip of `t` knows that the Island is within `t / 2` times
the speed of light. Several such caps intersect in an area. If all of it lies in a jurisdiction's inner
shape the claim is PROVEN; if none of it touches the outer shape the claim is IMPOSSIBLE; else UNPROVEN. Up
to `liars` vantage points (by operator) may say anything: a verdict must stand whichever of them are left out.

What it proves: whoever held the Island's key and answered the pings stood there then. An Island can
delay its answers, which only widens its caps: it makes proofs fail and never makes one. It can not answer
sooner, as long as what it must answer is unpredictable (ping numbers must be random: whoever can guess them
answers before the question came). What it does not prove: that the work is done there. A proxy that stands
near the vantage points, holds the key and passes prompts on to a machine elsewhere looks the same. Nor who
owns the machine, nor whose law reaches it. It makes a false claim cost a machine inside; combine it with
karma and audits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import Final

from protocol.instants import MICROSECOND_NS, SECOND_NS, Instant
from routing.geography import Cap, Place, Territory, Vector, reach_km, separation_km, union

#: Vantage points that are taken into account, the nearest first: more than enough to bound an area, and it
#: bounds the subsets that `liars` makes.
MAX_SIGHTINGS: Final = 12
MAX_LIARS: Final = 3
MAX_PER_OPERATOR: Final = 3

#: Round trips are rounded up to this (15 km), so that small changes do not cost a new judgement.
RTT_STEP_NS: Final = 100 * MICROSECOND_NS

#: The area is cut into triangles down to edges of 10,000 km / 2**10 = 10 km; and work is bounded. What is
#: undecided then is UNPROVEN.
MAX_DEPTH: Final = 10
MAX_CELLS: Final = 20_000

#: Rounding errors of distances are far below a metre.
SLACK_KM: Final = 0.001

#: A machine may move. A round trip counts for at least this long and at most twice as long.
SIGHTING_PERIOD_NS: Final = 600 * SECOND_NS


_Seen = tuple[int, str, float, float]
"""Round trip in steps, operator, latitude, longitude."""


class Verdict(Enum):
    IMPOSSIBLE = "impossible"
    UNPROVEN = "unproven"
    PROVEN = "proven"


@dataclass(frozen=True, slots=True)
class Sighting:
    """The smallest round trip that a vantage point measured lately. `operator`: who runs it; one operator
    with many vantage points is one voice. `place` is known to the evaluator, not claimed by the vantage point.
    """

    operator: str
    place: Place
    rtt_ns: int


@dataclass(frozen=True, slots=True)
class Residency:
    """A job may run in any of these jurisdictions (names in geography.JURISDICTIONS). `liars`: operators of
    vantage points that may lie without making a proof; so a proof needs at least one operator more.
    """

    jurisdictions: tuple[str, ...]
    liars: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.liars <= MAX_LIARS:
            raise ValueError(f"liars must lie between 0 and {MAX_LIARS}, not {self.liars}")


EU_ONLY: Final = Residency(("EU",))
SWISS: Final = Residency(("CH",))


class LeastRoundTrip:
    """The smallest round trip of the last one or two periods."""

    __slots__ = ("_before", "_least", "_since")

    def __init__(self) -> None:
        self._before: int | None = None
        self._least: int | None = None
        self._since = Instant(0)

    def add(self, now: Instant, rtt_ns: int) -> None:
        if self._least is None or now - self._since >= SIGHTING_PERIOD_NS:
            fresh = now - self._since < 2 * SIGHTING_PERIOD_NS
            self._before = self._least if fresh else None
            self._least, self._since = rtt_ns, now
        else:
            self._least = min(self._least, rtt_ns)

    def value(self, now: Instant) -> int | None:
        if self._least is None or now - self._since >= 2 * SIGHTING_PERIOD_NS:
            return None
        return self._least if self._before is None else min(self._least, self._before)


def resides(residency: Residency, sightings: Sequence[Sighting]) -> bool:
    """Whether the job may run there. Fails closed: only what is proven passes."""
    territory = union(residency.jurisdictions)
    return territory is not None and judge(territory, sightings, liars=residency.liars) is Verdict.PROVEN


def judge(territory: Territory, sightings: Sequence[Sighting], *, liars: int = 1) -> Verdict:
    """Is the peer that these vantage points saw in the territory? Order and repetition do not matter."""
    nearest: dict[tuple[str, Place], int] = {}
    for sighting in sightings:
        if sighting.rtt_ns < 0:
            continue
        key = sighting.operator, sighting.place
        steps = -(-sighting.rtt_ns // RTT_STEP_NS)
        nearest[key] = min(nearest.get(key, steps), steps)
    rows = sorted((steps, who, place.latitude, place.longitude) for (who, place), steps in nearest.items())
    seen: list[_Seen] = []
    for row in rows:
        # The nearest first, but no operator crowds out the others.
        if sum(other[1] == row[1] for other in seen) < MAX_PER_OPERATOR:
            seen.append(row)
    return _judge(territory, tuple(seen[:MAX_SIGHTINGS]), liars)


@lru_cache(maxsize=4096)
def _judge(territory: Territory, seen: tuple[_Seen, ...], liars: int) -> Verdict:
    operators = sorted({operator for _, operator, _, _ in seen})
    if len(operators) <= liars:
        return Verdict.UNPROVEN
    verdicts: set[Verdict] = set()
    for left_out in itertools.combinations(operators, liars):
        caps = [
            Cap(Place(latitude, longitude).vector, reach_km(steps * RTT_STEP_NS))
            for steps, operator, latitude, longitude in seen
            if operator not in left_out
        ]
        verdicts.add(_judge_area(territory, caps))
        if len(verdicts) > 1 or Verdict.UNPROVEN in verdicts:
            return Verdict.UNPROVEN
    return verdicts.pop()


_Triangle = tuple[Vector, Vector, Vector]


def _octahedron() -> tuple[_Triangle, ...]:
    faces: list[_Triangle] = []
    for x, y, z in itertools.product((1.0, -1.0), repeat=3):
        faces.append(((x, 0.0, 0.0), (0.0, y, 0.0), (0.0, 0.0, z)))
    return tuple(faces)


_FACES: Final = _octahedron()


def _judge_area(territory: Territory, caps: list[Cap]) -> Verdict:
    smallest = min(caps, key=lambda c: c.radius_km)
    inside = [c for c in territory.inside if _touch(c, smallest)]
    cover = [c for c in territory.cover if _touch(c, smallest)]
    if inside and _all(caps, lambda cell: any(_within(cell, c) for c in inside)):
        return Verdict.PROVEN
    if _all(caps, lambda cell: not any(_touch(cell, c) for c in cover)):
        return Verdict.IMPOSSIBLE
    return Verdict.UNPROVEN


def _all(caps: list[Cap], holds: Callable[[Cap], bool]) -> bool:
    """Whether the area in which all caps meet can be cut into triangles of which it holds. Each triangle is
    taken for the cap around it, which errs on the safe side. False if the caps do not meet: then somebody
    lies, or one key answers from several places.
    """
    met, cells = False, 0
    open_cells: list[tuple[int, _Triangle]] = [(0, face) for face in _FACES]
    while open_cells:
        depth, triangle = open_cells.pop()
        cells += 1
        cell = _around(triangle)
        if not all(_touch(cell, c) for c in caps):
            continue
        if holds(cell):
            met = True
        elif depth == MAX_DEPTH or cells > MAX_CELLS:
            return False
        else:
            open_cells += [(depth + 1, part) for part in _quarters(triangle)]
    return met


def _touch(one: Cap, other: Cap) -> bool:
    """Whether they may have a point in common."""
    return separation_km(one.centre, other.centre) <= one.radius_km + other.radius_km + SLACK_KM


def _within(inner: Cap, outer: Cap) -> bool:
    """Whether all of `inner` surely lies in `outer`."""
    return separation_km(inner.centre, outer.centre) + inner.radius_km <= outer.radius_km - SLACK_KM


def _around(triangle: _Triangle) -> Cap:
    """A triangle smaller than a hemisphere lies in the cap around its middle through its farthest corner."""
    (ax, ay, az), (bx, by, bz), (cx, cy, cz) = triangle
    middle = _unit((ax + bx + cx, ay + by + cy, az + bz + cz))
    return Cap(middle, max(separation_km(middle, corner) for corner in triangle))


def _quarters(triangle: _Triangle) -> tuple[_Triangle, ...]:
    a, b, c = triangle
    ab, bc, ca = _between(a, b), _between(b, c), _between(c, a)
    return (a, ab, ca), (ab, b, bc), (ca, bc, c), (ab, bc, ca)


def _between(one: Vector, other: Vector) -> Vector:
    return _unit((one[0] + other[0], one[1] + other[1], one[2] + other[2]))


def _unit(vector: Vector) -> Vector:
    length = math.hypot(*vector)
    return vector[0] / length, vector[1] / length, vector[2] / length
