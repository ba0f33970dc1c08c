"""Chains in the simulator: production's ring machines on modelled engines, and who plans best."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sim import Scenario, ScenarioError, run
from sim.chain_engine import StageEngine
from sim.studies.chains import ChainStudy

MS = 1_000_000

SMALL = {
    "variant": [],
    "chains.replicas": 4,
    "chains.gateways": 2,
    "world.duration_s": 15,
    "world.slices": 3,
    "arrivals.per_s": 1,
    "chains.output_median": 20,
    "churn.model": "none",
    "kill": [],
}


def small(nodes=60, **changes):
    return Scenario.load("chain-70b", nodes=nodes, changes={**SMALL, **changes})


@pytest.fixture
def asked(monkeypatch):
    """Tokens that each job asked for."""
    wanted = {}
    ask = ChainStudy._ask

    def note(self, place, gateway):
        wanted[place.job] = place.output
        return ask(self, place, gateway)

    monkeypatch.setattr(ChainStudy, "_ask", note)
    return wanted


def test_the_planner_beats_greed_and_chance():
    rates = {
        strategy: run(small(**{"chains.strategy": strategy})).metric("token rate of a job mean")
        for strategy in ("planner", "greedy", "random")
    }
    assert rates["planner"] > 1.2 * rates["greedy"]
    assert rates["planner"] > 1.5 * rates["random"]


def test_alone_a_job_gets_what_the_plan_said():
    result = run(
        small(
            **{"arrivals.per_s": 0.1, "arrivals.process": "regular", "chains.grace_s": 60, "links.up_mbps": 0}
        )
    )
    expected = result.metric("rate that the chain alone would give, mean")
    assert result.metric("token rate of a job mean") == pytest.approx(expected, rel=0.05)


def test_every_token_arrives_once_whoever_dies(asked):
    result = run(
        small(
            **{
                "kill": [{"at_s": 6, "share": 0.1}, {"at_s": 8, "share": 0.1}, {"at_s": 11, "share": 0.1}],
                "chains.grace_s": 150,
                "chains.spares": 2,
            }
        )
    )
    assert result.metric("sessions whose stage died") > 0
    assert result.metric("stages replaced by spares") > 0
    assert result.metric("jobs given up") == 0
    assert result.metric("jobs unfinished") == 0
    tokens = sorted(row["tokens"] for row in result.table("generations"))
    assert tokens == sorted(asked.values())


def test_the_same_seed_is_the_same_history_also_with_another_hash_seed(request):
    brief = {"world.duration_s": 5, "chains.grace_s": 5}
    first = run(small(nodes=30, **brief))
    assert first.events > 500
    code = (
        "from sim import run, Scenario; "
        f"print(run(Scenario.load('chain-70b', nodes=30, changes={ {**SMALL, **brief}!r})).sha256)"
    )
    again = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONHASHSEED": "99", "PYTHONPATH": str(request.config.rootpath), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert again.strip() == first.sha256
    assert run(small(nodes=30, **brief, **{"world.seed": 2})).sha256 != first.sha256


def test_a_model_that_nobody_can_hold_is_not_laid_out():
    result = run(small(nodes=12, **{"chains.layer_mb": 50_000, "world.duration_s": 3, "chains.grace_s": 1}))
    assert result.metric("chains laid out") == 0
    assert result.metric("jobs unfinished") > 0


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"connections.kept": 0}, "connections.kept"),
        ({"chains.gateways": 60}, "world.nodes"),
        ({"chains.strategy": "clever"}, "chains.strategy"),
    ],
)
def test_wrong_settings_are_explained(change, complaint):
    with pytest.raises(ScenarioError) as caught:
        run(small(**change))
    assert complaint in str(caught.value)


def engine(slots=2):
    made = StageEngine(layer_ns=4 * MS, row_ns=MS, head_ns=6 * MS, slots=slots)
    made.hold(10, is_head=False)
    return made


def test_rows_of_sessions_go_through_together():
    made = engine()
    assert made.open("a")
    assert made.open("b")
    assert not made.open("c")
    made.feed(0, "a", 0, 1)
    made.feed(1, "a", 1, 1)
    made.feed(2, "b", 0, 1)
    assert made.ends == 40 * MS
    assert made.finished(39 * MS) == []
    ((piece, took, waited),) = made.finished(40 * MS)
    assert (piece.session, piece.position, piece.rows, took, waited) == ("a", 0, 1, 40 * MS, 0)
    assert made.ends == 40 * MS + 50 * MS  # two rows: the second one costs less
    assert [piece.session for piece, _, _ in made.finished(90 * MS)] == ["a", "b"]
    assert made.ends is None


def test_a_prompt_is_computed_in_steps_of_63_rows():
    made = engine()
    made.open("a")
    made.feed(0, "a", 0, 100)
    now, rows = 0, []
    while made.ends is not None:
        now = made.ends
        rows += [(piece.position, piece.rows) for piece, _, _ in made.finished(now)]
    assert rows == [(0, 63), (63, 37)]
    assert now == 10 * (4 + 62) * MS + 10 * (4 + 36) * MS


def test_what_was_closed_is_not_told():
    made = engine()
    made.open("a")
    made.feed(0, "a", 0, 1)
    made.close("a")
    assert made.finished(40 * MS) == []
    made.hold(10, is_head=True)
    made.open("b")
    made.feed(40 * MS, "b", 0, 1)
    assert made.ends == (40 + 40 + 6) * MS  # the head has the vocabulary beside its layers


def test_busy_ranges_are_joined():
    changes = {
        **SMALL,
        "chains.replicas": 1,
        "arrivals.per_s": 1.5,
        "world.duration_s": 60,
        "chains.fetch_mbps": 20_000,
    }
    fixed, joined = (
        run(Scenario.load("chain-load", nodes=60, changes={**changes, "chains.balance_s": balance_s}))
        for balance_s in (0, 10)
    )
    assert fixed.metric("Islands that joined busy ranges") == 0
    assert joined.metric("Islands that joined busy ranges") > 1
    assert joined.metric("jobs done") > 1.5 * fixed.metric("jobs done")
