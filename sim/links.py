"""How long a message is under way: sites, distances, access lines. All delays are integer nanoseconds.

A node stands at a site and has an access line. One way from a to b takes

    table[site of a][site of b] + access of a + access of b      (+ jitter, + size / bandwidth)

The table comes from city coordinates, from a matrix of measured round trips, or is one number. Everything
that leads to it is computed portably (`sim.portable`) and rounded to nanoseconds once, when it is built.
"""

from __future__ import annotations

import csv
import io
import math
import zipfile
from collections.abc import Sequence
from functools import cache, cached_property
from itertools import accumulate
from pathlib import Path
from typing import Final

from protocol.instants import MICROSECOND_NS, MILLISECOND_NS
from sim import portable
from sim.cities import CITIES, City
from sim.draws import Draws, Stream

EARTH_RADIUS_KM: Final = 6371.0

#: Light in fibre: c / 1.468 (G.652 fibre's group index at 1550 nm), km per millisecond.
FIBRE_KM_PER_MS: Final = 204.2

#: Cables do not follow great circles and packets do not follow cables: real round trips are 1.3 to 2.5 times
#: what fibre along the great circle would give (median near 1.8, Bozkurt et al., "Why is the Internet so
#: slow?!", PAM 2017, has more for small transfers). Drawn once per pair of sites, per mille.
DEFAULT_INFLATION_PM: Final = (1300, 2300)

#: Between two houses of one city: a metropolitan network.
SAME_SITE_KM: Final = 15.0

#: One-way delay of access lines in microseconds at 0, 10, ... 100 % of households: fibre, cable, DSL, mobile,
#: and a tail of loaded wireless. Last-mile medians of volunteers' probes lie near 5 ms one way.
ACCESS_US: Final = (300, 800, 1_400, 2_200, 3_200, 4_500, 6_000, 8_000, 11_000, 16_000, 45_000)

#: An RTT matrix beyond this many sites is 200 MB of Python integers.
MAX_SITES: Final = 5_000

#: No path on earth takes longer one way, queues included; larger entries in a matrix are typing slips (wrong
#: unit).
MAX_ONE_WAY_NS: Final = 10_000 * MILLISECOND_NS


class LinksError(Exception):
    """A matrix or a setting of links can not be used; the message says what would do."""


class Links:
    """Sites and what lies between them. `one_way_ns` is row-major, `names` and `weights` by site."""

    def __init__(
        self,
        one_way_ns: Sequence[int],
        names: Sequence[str],
        weights: Sequence[int],
        *,
        access_us: Sequence[int] = (0,),
        loss: float = 0.0,
        jitter_ns: int = 0,
    ) -> None:
        """`loss`: probability that a message is lost. `jitter_ns`: mean extra delay, exponential.

        Raises LinksError if sizes do not fit or a value is out of range.
        """
        sites = len(names)
        if not 1 <= sites <= MAX_SITES or len(weights) != sites or len(one_way_ns) != sites * sites:
            raise LinksError(f"links need 1 to {MAX_SITES} sites, a weight for each and a square table")
        if min(one_way_ns) < 0 or max(one_way_ns) > MAX_ONE_WAY_NS:
            raise LinksError("a delay is negative or above 10 s; a matrix holds round trips in milliseconds")
        if not 0.0 <= loss < 1.0:
            raise LinksError(f"loss is a share from 0 to below 1, not {loss}")
        self.table = list(one_way_ns)
        self.names = tuple(names)
        self.weights = tuple(weights)
        self.access_us = tuple(access_us)
        self.loss = loss
        self.jitter_ns = jitter_ns
        self._cumulative = list(accumulate(weights))

    @property
    def sites(self) -> int:
        return len(self.names)

    def draw_site(self, dice: Draws) -> int:
        """A site, by weight."""
        return dice.weighted(self._cumulative) if self.sites > 1 else 0

    def draw_access_ns(self, dice: Draws) -> int:
        """An access line's one-way delay: linear between the table's quantiles."""
        quantiles = self.access_us
        if len(quantiles) == 1:
            return quantiles[0] * MICROSECOND_NS
        place = dice.unit() * (len(quantiles) - 1)
        at = min(math.floor(place), len(quantiles) - 2)
        low, high = quantiles[at], quantiles[at + 1]
        return round((low + (high - low) * (place - at)) * MICROSECOND_NS)

    @cached_property
    def round_trips(self) -> list[int]:
        """There and back between sites, row-major."""
        table, sites = self.table, self.sites
        return [table[a * sites + b] + table[b * sites + a] for a in range(sites) for b in range(sites)]

    @staticmethod
    def uniform(one_way_ns: int, *, loss: float = 0.0, jitter_ns: int = 0) -> Links:
        """The same delay between any two nodes."""
        return Links((one_way_ns,), ("anywhere",), (1,), loss=loss, jitter_ns=jitter_ns)

    @staticmethod
    def geography(
        seed: int,
        *,
        cities: Sequence[City] = CITIES,
        inflation_pm: tuple[int, int] = DEFAULT_INFLATION_PM,
        access_us: Sequence[int] = ACCESS_US,
        loss: float = 0.0,
        jitter_ns: int = 0,
    ) -> Links:
        """A synthetic internet over these cities. The same seed gives the same routes."""
        dice = Draws(seed, Stream.INFLATION)
        count = len(cities)
        distances = _distances_km(tuple(cities))
        table = [0] * (count * count)
        low, high = inflation_pm
        for a in range(count):
            for b in range(a, count):
                km = distances[a * count + b]
                inflation_pm_here = low + dice.below(high - low + 1)
                one_way = round(km / FIBRE_KM_PER_MS * MILLISECOND_NS * inflation_pm_here / 1000.0)
                table[a * count + b] = table[b * count + a] = one_way
        names = [city.name for city in cities]
        weights = [city.weight for city in cities]
        return Links(table, names, weights, access_us=access_us, loss=loss, jitter_ns=jitter_ns)

    @staticmethod
    def from_matrix(file: Path, *, loss: float = 0.0, jitter_ns: int = 0) -> Links:
        """A square matrix of round trips in milliseconds, from .csv (with or without a first line and a first
        column of names) or .npz (array `rtt_ms`). Raises LinksError.
        """
        if not file.is_file():
            raise LinksError(f"model 'matrix' needs links.file, an RTT matrix (.csv, .npz); {file} is no file")
        try:
            names, rows = _read_npz(file) if file.suffix == ".npz" else _read_csv(file)
        except UnicodeDecodeError as error:
            raise LinksError(f"{file}: not text in UTF-8: {error}") from error
        except OSError as error:
            raise LinksError(f"{file}: {error.strerror or error}") from error
        if any(len(row) != len(rows) for row in rows):
            raise LinksError(
                f"{file}: an RTT matrix is square; {len(rows)} lines, {len(rows[0])} columns in the first"
            )
        if len(names) != len(rows):
            raise LinksError(f"{file}: {len(names)} names for {len(rows)} sites")
        for at, row in enumerate(rows):
            for to, cell in enumerate(row):
                if to != at and not 0.0 <= cell < math.inf:
                    raise LinksError(
                        f"{file}: from {names[at]} to {names[to]}: a round trip of {cell:g} ms; fill in what "
                        "was not measured, or leave the site out"
                    )
        # What stands for the distance of a site to itself is often no figure (-1, NaN): then there is none.
        table = [round(cell * MILLISECOND_NS / 2.0) if cell > 0.0 else 0 for row in rows for cell in row]
        return Links(table, names, [1] * len(names), loss=loss, jitter_ns=jitter_ns)


@cache
def _distances_km(cities: tuple[City, ...]) -> list[float]:
    """Between all pairs, row-major; worlds over the same cities share it."""
    places = [_unit_vector(city) for city in cities]
    pairs = ((a, b) for a in range(len(cities)) for b in range(len(cities)))
    known: dict[tuple[int, int], float] = {}
    table: list[float] = []
    for a, b in pairs:
        if b < a:
            table.append(known[b, a])
        else:
            km = SAME_SITE_KM if a == b else _great_circle_km(places[a], places[b])
            known[a, b] = km
            table.append(km)
    return table


def _unit_vector(city: City) -> tuple[float, float, float]:
    latitude, longitude = city.latitude * portable.PI / 180.0, city.longitude * portable.PI / 180.0
    level = portable.cos(latitude)
    return level * portable.cos(longitude), level * portable.sin(longitude), portable.sin(latitude)


def _great_circle_km(a: tuple[float, float, float], b: tuple[float, float, float]) -> float:
    dx, dy, dz = a[0] - b[0], a[1] - b[1], a[2] - b[2]
    chord = math.sqrt(dx * dx + dy * dy + dz * dz)
    return 2.0 * EARTH_RADIUS_KM * portable.arcsin(chord / 2.0)


def _read_csv(file: Path) -> tuple[list[str], list[list[float]]]:
    lines = [line for line in csv.reader(io.StringIO(file.read_text(encoding="utf-8"))) if line]
    skipped = 0
    if not lines:
        raise LinksError(f"{file}: empty; an RTT matrix in milliseconds was expected")
    names: list[str] = []
    if all(_number(cell) is None for cell in lines[0]):
        names = [cell.strip() for cell in lines[0]]
        lines, skipped = lines[1:], 1
        if not lines:
            raise LinksError(f"{file}: names but no numbers")
    if _number(lines[0][0]) is None:  # a first column of names
        names = [line[0].strip() for line in lines]
        lines = [line[1:] for line in lines]
    rows: list[list[float]] = []
    for at, line in enumerate(lines, 1 + skipped):
        row = [_number(cell) for cell in line]
        if any(cell is None for cell in row):
            raise LinksError(f"{file}: line {at} holds something that is no number")
        rows.append([cell for cell in row if cell is not None])
    if len(rows) > MAX_SITES:
        raise LinksError(f"{file}: {len(rows)} sites; at most {MAX_SITES} fit")
    return names or [f"site {n}" for n in range(len(rows))], rows


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _read_npz(file: Path) -> tuple[list[str], list[list[float]]]:
    import numpy as np  # noqa: PLC0415 - a tenth of a second that only this needs

    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as archive:
            matrix = archive["rtt_ms"]
            if matrix.ndim != 2 or matrix.shape[0] > MAX_SITES:
                raise LinksError(f"{file}: 'rtt_ms' must be a square matrix of at most {MAX_SITES} sites")
            rows = [[float(cell) for cell in row] for row in matrix]
    except (KeyError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise LinksError(f"{file}: an .npz with an array 'rtt_ms' was expected: {error}") from error
    return [f"site {n}" for n in range(len(rows))], rows
