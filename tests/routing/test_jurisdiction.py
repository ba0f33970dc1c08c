"""Places, and what round trips prove of them."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from protocol.instants import MILLISECOND_NS, SECOND_NS, Instant
from routing.geography import (
    ADJACENT,
    ANY_REGION,
    JURISDICTIONS,
    REGIONS,
    SAME_REGION,
    Place,
    claims,
    distance_km,
    nearest_region,
    reach_km,
    region_distance,
    separation_km,
    shortest_rtt_ns,
    union,
    usual_rtt_ns,
)
from routing.jurisdiction import (
    EU_ONLY,
    SIGHTING_PERIOD_NS,
    SWISS,
    LeastRoundTrip,
    Residency,
    Sighting,
    Verdict,
    judge,
    resides,
)

#: Places and where they lie, from an atlas: also near borders, on islands, and overseas.
CITIES = {
    "Paris": (48.857, 2.352, "FR EU"), "Marseille": (43.296, 5.370, "FR EU"),
    "Strasbourg": (48.573, 7.752, "FR EU"), "Cayenne": (4.922, -52.313, "FR EU"),
    "Saint-Denis de la Reunion": (-20.882, 55.450, "FR EU"), "Berlin": (52.520, 13.405, "DE EU"),
    "Frankfurt": (50.110, 8.682, "DE EU"), "Munich": (48.137, 11.575, "DE EU"),
    "Konstanz": (47.660, 9.175, "DE EU"), "Freiburg": (47.999, 7.842, "DE EU"),
    "Madrid": (40.417, -3.703, "EU"), "Las Palmas": (28.124, -15.430, "EU"),
    "Ponta Delgada": (37.741, -25.668, "EU"), "Lisbon": (38.722, -9.139, "EU"),
    "Rome": (41.903, 12.496, "EU"), "Athens": (37.984, 23.728, "EU"), "Nicosia": (35.145, 33.36, "EU"),
    "Valletta": (35.899, 14.514, "EU"), "Dublin": (53.350, -6.260, "EU"), "Warsaw": (52.230, 21.012, "EU"),
    "Tallinn": (59.437, 24.754, "EU"), "Kiruna": (67.856, 20.225, "EU"), "Bucharest": (44.427, 26.103, "EU"),
    "Zurich": (47.377, 8.542, "CH"), "Geneva": (46.204, 6.143, "CH"), "Basel": (47.560, 7.588, "CH"),
    "Bern": (46.948, 7.447, "CH"), "Lugano": (46.004, 8.951, "CH"), "London": (51.507, -0.128, "UK"),
    "Belfast": (54.597, -5.930, "UK"), "Lerwick": (60.155, -1.145, "UK"), "Oslo": (59.914, 10.752, "NO"),
    "Tromso": (69.649, 18.956, "NO"), "New York": (40.713, -74.006, "US"),
    "Honolulu": (21.307, -157.858, "US"), "Anchorage": (61.218, -149.900, "US"),
    "San Juan": (18.466, -66.106, "US"), "Detroit": (42.331, -83.046, "US"),
    "San Diego": (32.716, -117.161, "US"), "Toronto": (43.653, -79.383, "CA"),
    "Vancouver": (49.283, -123.121, "CA"), "Tokyo": (35.677, 139.650, "JP"), "Naha": (26.212, 127.679, "JP"),
    "Sydney": (-33.869, 151.209, "AU"), "Perth": (-31.952, 115.861, "AU"), "Mumbai": (19.076, 72.878, "IN"),
    "Sao Paulo": (-23.551, -46.633, "BR"), "Manaus": (-3.119, -60.022, "BR"), "Kyiv": (50.450, 30.523, ""),
    "Istanbul": (41.008, 28.978, ""), "Vaduz": (47.141, 9.521, ""), "Monaco": (43.738, 7.424, ""),
    "Andorra": (42.506, 1.522, ""), "San Marino": (43.942, 12.458, ""), "Vatican": (41.903, 12.453, ""),
    "Gibraltar": (36.140, -5.353, ""), "Sarajevo": (43.856, 18.413, ""), "Kaliningrad": (54.710, 20.452, ""),
    "Tijuana": (32.515, -117.038, ""), "Mexico City": (19.433, -99.133, ""),
    "Singapore": (1.352, 103.820, ""), "Moscow": (55.756, 37.617, ""), "Douglas": (54.152, -4.486, ""),
    "Saint Helier": (49.187, -2.107, ""), "Reykjavik": (64.147, -21.943, ""),
    "Marigot": (18.07, -63.08, "FR EU"), "Mamoudzou": (-12.78, 45.23, "FR EU"),
    "Mariehamn": (60.10, 19.93, "EU"), "Ceuta": (35.89, -5.31, "EU"), "Longyearbyen": (78.22, 15.65, "NO"),
    "Norfolk": (-29.04, 167.95, "AU"), "Cocos": (-12.19, 96.83, "AU"), "Port Blair": (11.67, 92.74, "IN"),
    "Guam": (13.47, 144.75, "US"),
    "Iqaluit": (63.75, -68.52, "CA"), "Noronha": (-3.85, -32.42, "BR"), "Tangier": (35.77, -5.80, ""),
}  # fmt: skip
NAMES = sorted(CITIES)
PLACES = {name: Place(latitude, longitude) for name, (latitude, longitude, _) in CITIES.items()}


def lies_in(city: str, jurisdiction: str) -> bool:
    return jurisdiction in CITIES[city][2].split()


def sightings(at: Place, vantages: list[str], extra_ns: list[int] | None = None) -> list[Sighting]:
    """As physics has it: no round trip is shorter than light in vacuum allows, each may be longer."""
    extra = extra_ns or [0] * len(vantages)
    return [
        Sighting(city, PLACES[city], shortest_rtt_ns(at, PLACES[city]) + more)
        for city, more in zip(vantages, extra, strict=True)
    ]


def test_distances() -> None:
    assert distance_km(PLACES["London"], PLACES["New York"]) == pytest.approx(5570, rel=0.006)
    assert distance_km(PLACES["Sydney"], PLACES["Sao Paulo"]) == pytest.approx(13_390, rel=0.006)
    assert distance_km(Place(90, 0), Place(-90, 17)) == pytest.approx(math.pi * 6371.0088)
    assert distance_km(Place(0, 179.9), Place(0, -179.9)) == pytest.approx(22.24, rel=0.01)
    assert usual_rtt_ns(PLACES["London"], PLACES["New York"]) == pytest.approx(55.7 * MILLISECOND_NS, rel=0.006)
    for latitude, longitude in ((91, 0), (0, 181), (math.nan, 0)):
        with pytest.raises(ValueError, match="no such place"):
            Place(latitude, longitude)


def test_regions() -> None:
    assert nearest_region(PLACES["Zurich"]) == "eu-central"
    assert nearest_region(PLACES["Tokyo"]) == "ap-northeast"
    assert region_distance("eu-west", "eu-west") == SAME_REGION
    assert region_distance("", "") == region_distance("moon", "eu-west") == ANY_REGION
    for name, others in ADJACENT.items():
        assert others <= REGIONS.keys()
        assert name not in others
        for other in others:
            assert name in ADJACENT[other]
            assert region_distance(name, other) == region_distance(other, name) == 1


@pytest.mark.parametrize("name", sorted(JURISDICTIONS))
def test_shapes_hold_what_they_say(name: str) -> None:
    """No city elsewhere lies inside, none of its own lies outside the cover; and inside lies within the
    cover's land.
    """
    territory = JURISDICTIONS[name]
    own = [city for city in NAMES if lies_in(city, name)]
    assert own
    for city in NAMES:
        place = PLACES[city].vector
        inside = any(separation_km(place, cap.centre) <= cap.radius_km for cap in territory.inside)
        covered = any(separation_km(place, cap.centre) <= cap.radius_km for cap in territory.cover)
        assert covered if lies_in(city, name) else not inside, city
    for cap in territory.inside:  # each is round a point of its own land
        assert any(separation_km(cap.centre, c.centre) <= c.radius_km for c in territory.cover)


def test_claimed_countries() -> None:
    assert claims("FR", ("EU",))
    assert claims("GB", ("UK",))
    assert claims("CH", ("EU", "CH"))
    assert not claims("CH", ("EU",))
    assert not claims("", ("EU",))
    assert union(()) is None
    assert union(("nowhere",)) is None
    assert union(("EU", "EU")) is JURISDICTIONS["EU"]


def test_three_near_vantage_points_prove_a_country() -> None:
    madrid = Place(40.4, -3.7)
    around = [
        Sighting("a", Place(40.3, -3.8), 900_000),
        Sighting("b", Place(40.5, -3.6), 1_000_000),
        Sighting("c", PLACES["Lisbon"], 8 * MILLISECOND_NS),
    ]
    assert distance_km(madrid, around[0].place) < reach_km(around[0].rtt_ns)
    assert judge(JURISDICTIONS["EU"], around) is Verdict.PROVEN
    assert resides(EU_ONLY, around)
    assert judge(JURISDICTIONS["CH"], around) is Verdict.IMPOSSIBLE
    assert not resides(SWISS, around)
    assert judge(JURISDICTIONS["EU"], around[:1]) is Verdict.UNPROVEN  # one voice may lie
    assert judge(JURISDICTIONS["EU"], around[:1], liars=0) is Verdict.PROVEN
    twice = [around[0], Sighting("a", Place(40.5, -3.6), 1_000_000)]
    assert judge(JURISDICTIONS["EU"], twice) is Verdict.UNPROVEN  # one operator is one voice
    assert judge(JURISDICTIONS["EU"], around[::-1] + around) is Verdict.PROVEN


def test_one_liar_proves_nothing_and_slanders_nobody() -> None:
    """The Island is in Singapore; a friend of it in Madrid claims that it answers at once."""
    true = sightings(PLACES["Singapore"], ["Frankfurt", "London", "Tokyo"], [4 * MILLISECOND_NS] * 3)
    lie = Sighting("friend", PLACES["Madrid"], 100_000)
    assert judge(JURISDICTIONS["EU"], [*true, lie]) is not Verdict.PROVEN
    honest = [Sighting("a", PLACES["Madrid"], 10**6), Sighting("b", Place(40.3, -3.5), 10**6)]
    enemy = Sighting("enemy", PLACES["Tokyo"], 100_000)
    assert judge(JURISDICTIONS["EU"], [*honest, enemy]) is not Verdict.IMPOSSIBLE


def test_one_operator_with_many_vantage_points_crowds_out_nobody() -> None:
    crowd = [Sighting("many", Place(40.3 + n / 100, -3.8), 500_000) for n in range(20)]
    one = Sighting("b", Place(40.5, -3.6), 900_000)
    assert judge(JURISDICTIONS["EU"], crowd) is Verdict.UNPROVEN
    assert judge(JURISDICTIONS["EU"], [*crowd, one]) is Verdict.PROVEN


def test_near_a_border_nothing_is_proven() -> None:
    """Basel lies where three countries meet. Shapes keep away from borders, so that not even two of them
    together are proven there.
    """
    around = [Sighting(o, PLACES["Basel"], 400_000) for o in ("a", "b")]
    for names in (("CH",), ("EU",), ("CH", "EU")):
        assert not resides(Residency(names), around)
    bern = [Sighting(o, PLACES["Bern"], 100_000) for o in ("a", "b")]
    assert resides(Residency(("CH", "EU")), bern)
    assert resides(SWISS, bern)
    assert not resides(EU_ONLY, bern)


def test_fails_closed() -> None:
    assert not resides(EU_ONLY, [])
    assert not resides(Residency(()), sightings(PLACES["Paris"], ["Paris", "Berlin"]))
    assert not resides(Residency(("Atlantis",)), sightings(PLACES["Paris"], ["Paris", "Berlin"]))
    assert not resides(EU_ONLY, [Sighting("a", PLACES["Paris"], -5), Sighting("b", PLACES["Paris"], -5)])
    assert judge(JURISDICTIONS["EU"], [Sighting("x", PLACES["Paris"], 10**12)] * 3) is Verdict.UNPROVEN
    with pytest.raises(ValueError, match="liars"):
        Residency(("EU",), liars=9)


def test_one_key_that_answers_from_two_places_proves_nothing() -> None:
    """Caps that do not meet: the key is in Paris and in Madrid, or somebody lies. Whoever is left out, two
    contradict.
    """
    seen = [Sighting(city, PLACES[city], 500_000) for city in ("Paris", "Madrid", "Rome")]
    assert judge(JURISDICTIONS["EU"], seen) is Verdict.UNPROVEN


cities = st.sampled_from(NAMES)
delays = st.integers(0, 300 * MILLISECOND_NS)
small_delays = st.integers(0, 2 * MILLISECOND_NS)


@settings(max_examples=300, deadline=None)
@given(
    city=cities,
    vantages=st.lists(cities, min_size=1, max_size=8, unique=True),
    extra=st.lists(st.one_of(delays, small_delays), min_size=8, max_size=8),
    jurisdiction=st.sampled_from(sorted(JURISDICTIONS)),
    liars=st.integers(0, 2),
)
@example(city="Basel", vantages=["Basel", "Zurich", "Freiburg"], extra=[0] * 8, jurisdiction="DE", liars=0)
def test_no_true_claim_is_impossible_and_no_false_one_proven(
    city: str, vantages: list[str], extra: list[int], jurisdiction: str, liars: int
) -> None:
    """Whatever delay is added, by the Island or the links, with honest vantage points."""
    seen = sightings(PLACES[city], vantages, extra[: len(vantages)])
    verdict = judge(JURISDICTIONS[jurisdiction], seen, liars=liars)
    if lies_in(city, jurisdiction):
        assert verdict is not Verdict.IMPOSSIBLE
    else:
        assert verdict is not Verdict.PROVEN


@settings(max_examples=150, deadline=None)
@given(
    city=cities,
    honest=st.lists(cities, min_size=2, max_size=5, unique=True),
    lies=st.lists(st.tuples(cities, st.integers(0, 20 * MILLISECOND_NS)), min_size=1, max_size=2),
    jurisdiction=st.sampled_from(["EU", "CH", "DE", "US"]),
)
def test_as_many_liars_as_allowed_change_no_verdict_to_a_false_one(
    city: str, honest: list[str], lies: list[tuple[str, int]], jurisdiction: str
) -> None:
    seen = sightings(PLACES[city], honest, [200_000] * len(honest))
    seen += [Sighting(f"liar {i}", PLACES[where], rtt) for i, (where, rtt) in enumerate(lies)]
    verdict = judge(JURISDICTIONS[jurisdiction], seen, liars=len(lies))
    assert verdict is not (Verdict.IMPOSSIBLE if lies_in(city, jurisdiction) else Verdict.PROVEN)


@settings(max_examples=150, deadline=None)
@given(
    city=cities,
    north=st.floats(-1, 1),
    east=st.floats(-1, 1),
    other=cities,
    extra=st.integers(0, MILLISECOND_NS),
    jurisdiction=st.sampled_from(["EU", "CH", "US", "JP"]),
)
@example(city="Madrid", north=0.1, east=0.1, other="Lisbon", extra=100_000, jurisdiction="EU")
def test_adding_delay_never_makes_a_verdict(
    city: str, north: float, east: float, other: str, extra: int, jurisdiction: str
) -> None:
    there = Place(PLACES[city].latitude + north, PLACES[city].longitude + east)
    territory = JURISDICTIONS[jurisdiction]
    before = judge(territory, sightings(there, [city, other]), liars=0)
    after = judge(territory, sightings(there, [city, other], [extra, extra]), liars=0)
    assert after in {before, Verdict.UNPROVEN}


def test_old_round_trips_are_forgotten() -> None:
    least = LeastRoundTrip()
    assert least.value(Instant(0)) is None
    least.add(Instant(0), 5)
    least.add(Instant(1), 9)
    assert least.value(Instant(SECOND_NS)) == 5
    least.add(Instant(SIGHTING_PERIOD_NS), 8)
    assert least.value(Instant(SIGHTING_PERIOD_NS)) == 5
    least.add(Instant(2 * SIGHTING_PERIOD_NS), 7)
    assert least.value(Instant(2 * SIGHTING_PERIOD_NS)) == 7  # the 5 is more than a period old
    assert least.value(Instant(4 * SIGHTING_PERIOD_NS)) is None
