"""Delays: geography, matrices, portable arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sim import portable
from sim.cities import CITIES
from sim.draws import Draws, Stream
from sim.links import Links, LinksError

MS = 1_000_000


def between(links: Links, a: str, b: str) -> float:
    """One way in ms, without access lines."""
    return links.table[links.names.index(a) * links.sites + links.names.index(b)] / MS


def test_distances_on_earth_are_light_in_fibre_times_a_detour():
    straight = Links.geography(1, inflation_pm=(1000, 1000))
    assert between(straight, "London", "New York") == pytest.approx(5570 / 204.2, rel=0.01)
    assert between(straight, "Sydney", "London") == pytest.approx(16990 / 204.2, rel=0.01)
    routed = Links.geography(1)
    ratio = between(routed, "Sydney", "London") / between(straight, "Sydney", "London")
    assert 1.3 <= ratio <= 2.3
    assert between(routed, "London", "Sydney") == between(routed, "Sydney", "London")


def test_the_same_seed_gives_the_same_world_and_another_another():
    assert Links.geography(5).table == Links.geography(5).table
    assert Links.geography(5).table != Links.geography(6).table
    assert sum(Links.geography(5).table) == 2_039_504_323_098  # as on the machine where it was first computed


def test_there_are_enough_places():
    assert len(CITIES) >= 150
    assert len({city.name for city in CITIES}) == len(CITIES)


def test_access_lines_have_the_tables_spread():
    links, dice = Links.geography(1), Draws(1, Stream.PLACES)
    drawn = sorted(links.draw_access_ns(dice) / MS for _ in range(4000))
    assert drawn[0] >= 0.3
    assert drawn[-1] <= 45
    assert drawn[2000] == pytest.approx(4.5, rel=0.1)


@pytest.mark.parametrize(
    "text",
    [
        "0,20,90\n20,0,80\n90,80,0\n",
        "a,b,c\n0,20,90\n20,0,80\n90,80,0\n",
        ",a,b,c\na,0,20,90\nb,20,0,80\nc,90,80,0\n",
    ],
)
def test_a_matrix_from_csv(tmp_path, text):
    (tmp_path / "rtt.csv").write_text(text)
    links = Links.from_matrix(tmp_path / "rtt.csv")
    assert [n / MS for n in links.table] == [0, 10, 45, 10, 0, 40, 45, 40, 0]


def test_a_matrix_from_npz(tmp_path):
    np.savez(tmp_path / "rtt.npz", rtt_ms=np.array([[0.0, 30.0], [50.0, 0.0]]))
    assert [n / MS for n in Links.from_matrix(tmp_path / "rtt.npz").table] == [0, 15, 25, 0]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "empty"),
        ("1,2\n3,4\n5,6\n", "square"),
        ("1,x\n3,4\n", "no number"),
        ("a,b\n0,1\n2,x\n", "line 3"),
        ("0,-1\n2,0\n", "from site 0 to site 1: a round trip of -1 ms"),
        ("a,b,c\n0,1\n2,0\n", "3 names for 2 sites"),
        ("0,30000\n30000,0\n", "milliseconds"),
    ],
)
def test_a_bad_matrix_is_explained(tmp_path, text, complaint):
    (tmp_path / "rtt.csv").write_text(text)
    with pytest.raises(LinksError, match=complaint):
        Links.from_matrix(tmp_path / "rtt.csv")


def test_a_sites_distance_to_itself_may_be_no_figure(tmp_path):
    (tmp_path / "rtt.csv").write_text("-1,20\n20,-1\n")
    assert [n / MS for n in Links.from_matrix(tmp_path / "rtt.csv").table] == [0, 10, 10, 0]


def test_a_damaged_array_is_explained(tmp_path):
    np.savez(tmp_path / "rtt.npz", rtt_ms=np.array([[0.0, np.inf], [50.0, 0.0]]))
    with pytest.raises(LinksError, match="a round trip of inf ms"):
        Links.from_matrix(tmp_path / "rtt.npz")
    whole = (tmp_path / "rtt.npz").read_bytes()
    for damaged in (b"", b"no archive", whole[: len(whole) // 2], "ä".encode("latin-1")):
        (tmp_path / "rtt.npz").write_bytes(damaged)
        with pytest.raises(LinksError, match="an array 'rtt_ms' was expected"):
            Links.from_matrix(tmp_path / "rtt.npz")
    (tmp_path / "rtt.csv").write_bytes(b"\xff\xfe0")
    with pytest.raises(LinksError, match="UTF-8"):
        Links.from_matrix(tmp_path / "rtt.csv")


def test_portable_functions_agree_with_the_library():
    dice = Draws(3, 0)
    for _ in range(2000):
        x = (dice.unit() - 0.5) * 20
        assert portable.sin(x) == pytest.approx(math.sin(x), abs=1e-14)
        assert portable.cos(x) == pytest.approx(math.cos(x), abs=1e-14)
        assert portable.exp(x) == pytest.approx(math.exp(x), rel=1e-13)
        assert portable.arcsin(x / 10) == pytest.approx(math.asin(x / 10), abs=1e-14)
        assert portable.ln(abs(x) + 1e-9) == pytest.approx(math.log(abs(x) + 1e-9), abs=1e-13)
        assert portable.power(abs(x), 0.37) == pytest.approx(abs(x) ** 0.37, rel=1e-12)


def test_distributions_have_their_means():
    dice = Draws(4, 0)
    count = 20_000
    assert sum(dice.exponential(7.0) for _ in range(count)) / count == pytest.approx(7.0, rel=0.03)
    scale = 5.0 / math.gamma(1 + 1 / 0.6)
    assert sum(dice.weibull(scale, 0.6) for _ in range(count)) / count == pytest.approx(5.0, rel=0.05)
    values = [dice.normal() for _ in range(count)]
    assert sum(values) / count == pytest.approx(0.0, abs=0.03)
    assert sum(v * v for v in values) / count == pytest.approx(1.0, rel=0.03)
