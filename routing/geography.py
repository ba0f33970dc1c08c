"""Places on Earth, regions, and how far a round trip can reach.

The Earth is taken as a sphere of its mean radius. The ellipsoid (WGS 84) differs from it by at most 0.56 %
in any distance; `REACH_MARGIN` is more than that. Distances are floats: sine and arc sine may differ in the
last bit between C libraries, which moves a distance by a nanometre; no decision here is that close, because
shapes end a kilometre or more before (inner) or behind (outer) what they stand for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import Final, TypeAlias

from routing.territories import TERRITORY_CAPS

EARTH_RADIUS_KM: Final = 6371.0088

#: Light in vacuum. In fibre it is a third slower (about 200 km/ms), and most links are fibre; but a
#: microwave or a satellite link is not, and one such link would make a false proof, or slander an honest
#: Island. The bound that always holds is this one. What it costs: from 10 ms on, an area half as large
#: again in radius is open.
LIGHT_KM_PER_MS: Final = 299.792458

#: Usual links: for expectations, never for proofs.
FIBRE_KM_PER_MS: Final = 200.0

#: Beyond 0.56 % (ellipsoid) and 100 ppm (a clock's rate); and the extent of a city in which a vantage point
#: stands.
REACH_MARGIN: Final = 1.007
REACH_EXTRA_KM: Final = 1.0

Vector: TypeAlias = tuple[float, float, float]


@dataclass(frozen=True)
class Place:
    """A point: degrees north and east. Raises ValueError if there is no such point."""

    latitude: float
    longitude: float

    def __post_init__(self) -> None:
        if not (-90 <= self.latitude <= 90 and -180 <= self.longitude <= 180):
            raise ValueError(f"no such place: {self.latitude} north, {self.longitude} east")

    @cached_property
    def vector(self) -> Vector:
        """From the Earth's centre, length 1."""
        latitude, longitude = math.radians(self.latitude), math.radians(self.longitude)
        flat = math.cos(latitude)
        return flat * math.cos(longitude), flat * math.sin(longitude), math.sin(latitude)


@dataclass(frozen=True, slots=True)
class Cap:
    """All points at most `radius_km` from `centre` (a unit vector), along the surface."""

    centre: Vector
    radius_km: float


@dataclass(frozen=True, eq=False, slots=True)
class Territory:
    """A jurisdiction as two coarse shapes: `inside` holds no land of anybody else; `cover` leaves out no
    land of it. Sea belongs to neither: a cap of `inside` may reach over water, as far as no other land
    comes near.
    """

    name: str
    inside: tuple[Cap, ...]
    cover: tuple[Cap, ...]


def separation_km(one: Vector, other: Vector) -> float:
    """Along the surface. By the chord, which is exact for near points too."""
    chord = math.dist(one, other)
    return 2 * EARTH_RADIUS_KM * math.asin(min(1.0, chord / 2))


def distance_km(one: Place, other: Place) -> float:
    """Great-circle distance."""
    return separation_km(one.vector, other.vector)


def reach_km(rtt_ns: int) -> float:
    """No peer that answers within this round trip is farther away."""
    return rtt_ns / 2_000_000 * LIGHT_KM_PER_MS * REACH_MARGIN + REACH_EXTRA_KM


def shortest_rtt_ns(one: Place, other: Place) -> int:
    """No round trip between these places is shorter, whatever the link."""
    return math.floor(distance_km(one, other) / LIGHT_KM_PER_MS * 2_000_000)


def usual_rtt_ns(one: Place, other: Place) -> int:
    """Over fibre along the great circle: what good links come near to."""
    return round(distance_km(one, other) / FIBRE_KM_PER_MS * 2_000_000)


def cap(latitude: float, longitude: float, radius_km: float) -> Cap:
    return Cap(Place(latitude, longitude).vector, radius_km)


def _territories() -> Mapping[str, Territory]:
    made = {
        name: Territory(name, tuple(cap(*c) for c in inside), tuple(cap(*c) for c in cover))
        for name, (inside, cover) in TERRITORY_CAPS.items()
    }
    return MappingProxyType(made)


#: By the name that requests use: ISO 3166-1 alpha-2 country codes (UK for GB, as people say), and EU.
JURISDICTIONS: Final[Mapping[str, Territory]] = _territories()


@lru_cache(maxsize=256)
def union(names: tuple[str, ...]) -> Territory | None:
    """One territory of several; names that are not in JURISDICTIONS add nothing. None if none is known."""
    known = [JURISDICTIONS[name] for name in sorted(set(names)) if name in JURISDICTIONS]
    if not known:
        return None
    if len(known) == 1:
        return known[0]
    inside = tuple(c for territory in known for c in territory.inside)
    cover = tuple(c for territory in known for c in territory.cover)
    return Territory("+".join(territory.name for territory in known), inside, cover)


#: ISO codes of the members of the European Union (2020 on).
EU_MEMBERS: Final = frozenset({
    "AT", "BE", "BG", "HR", "CY", "CZ", "DK", "EE", "FI", "FR", "DE", "GR", "HU", "IE",
    "IT", "LV", "LT", "LU", "MT", "NL", "PL", "PT", "RO", "SK", "SI", "ES", "SE",
})  # fmt: skip


def claims(country: str, jurisdictions: tuple[str, ...]) -> bool:
    """Whether a country code says that it lies in one of these: a claim, no proof."""
    name = "UK" if country == "GB" else country
    return bool(name) and (name in jurisdictions or ("EU" in jurisdictions and name in EU_MEMBERS))


# --- regions --------------------------------------------------------------------------------------

#: Regions that Islands name, roughly in the middle of their data centres and people, and their neighbours
#: (fewer than some 60 ms apart by usual links). Both directions are filled in below.
_REGIONS: Final[Mapping[str, tuple[float, float, tuple[str, ...]]]] = {
    "eu-west": (49.0, 1.0, ("eu-central", "eu-north", "eu-south", "uk")),
    "eu-central": (50.1, 10.0, ("eu-north", "eu-south", "eu-east", "uk")),
    "eu-north": (59.5, 17.0, ("eu-east", "uk")),
    "eu-south": (41.0, 9.0, ("eu-east", "af-north")),
    "eu-east": (50.0, 24.0, ("me",)),
    "uk": (52.5, -1.5, ()),
    "us-east": (39.0, -77.0, ("us-central", "ca")),
    "us-central": (37.0, -95.0, ("us-west", "ca")),
    "us-west": (40.0, -120.0, ("ca",)),
    "ca": (45.5, -76.0, ()),
    "sa-east": (-23.0, -47.0, ("sa-west",)),
    "sa-west": (-20.0, -71.0, ()),
    "af-north": (33.0, 5.0, ("me",)),
    "af-south": (-28.0, 27.0, ("af-east",)),
    "af-east": (-1.3, 36.8, ("me",)),
    "me": (26.0, 50.0, ("ap-south",)),
    "ap-south": (19.0, 76.0, ("ap-southeast",)),
    "ap-southeast": (2.0, 104.0, ("ap-east",)),
    "ap-east": (23.0, 115.0, ("ap-northeast",)),
    "ap-northeast": (36.0, 136.0, ()),
    "oceania": (-34.0, 150.0, ()),
}

REGIONS: Final[Mapping[str, Place]] = MappingProxyType(
    {name: Place(latitude, longitude) for name, (latitude, longitude, _) in _REGIONS.items()}
)


def _adjacent() -> Mapping[str, frozenset[str]]:
    pairs = {(name, other) for name, (_, _, others) in _REGIONS.items() for other in others}
    pairs |= {(other, name) for name, other in pairs}
    return MappingProxyType({name: frozenset(b for a, b in pairs if a == name) for name in _REGIONS})


ADJACENT: Final[Mapping[str, frozenset[str]]] = _adjacent()

SAME_REGION, ADJACENT_REGION, ANY_REGION = 0, 1, 2


def region_distance(one: str, other: str) -> int:
    """SAME_REGION, ADJACENT_REGION or ANY_REGION (also if either is unknown)."""
    if not one or not other:
        return ANY_REGION
    if one == other:
        return SAME_REGION
    return ADJACENT_REGION if other in ADJACENT.get(one, frozenset()) else ANY_REGION


def nearest_region(place: Place) -> str:
    """The region whose middle is nearest, by distance and then by name."""
    return min(REGIONS, key=lambda name: (distance_km(place, REGIONS[name]), name))
