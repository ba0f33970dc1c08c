"""Scenario files, what they run, and that the same run is the same history everywhere."""

from __future__ import annotations

import csv
import gzip
import json
import subprocess
import sys

import pytest

from sim import Scenario, ScenarioError, run
from sim.arrivals import Span, arrivals, zipf_weights
from sim.churn import turns
from sim.config import ArrivalSettings, ChurnSettings
from sim.draws import Draws
from sim.settings import shipped_scenarios

SECOND = 1_000_000_000

#: What makes a shipped scenario tiny.
TINY = {"world.duration_s": 12, "world.slices": 4, "arrivals.per_s": 2}


def tiny(name, **changes):
    scenario = Scenario.load(name)
    own = dict(TINY)
    tree = scenario.tree
    if tree.get("study") == "jobs":
        own |= {"jobs.coordinators": 3, "jobs.gateways": 2, "jobs.settle_s": 5}
    if tree.get("study") == "karma":
        own["world.duration_s"] = 12 * 3600
    for what in ("kill", "storm", "partition"):
        for number, _ in enumerate(tree.get(what, ())):
            own[f"{what}.{number}.at_s"] = 4
    for number, _ in enumerate(tree.get("partition", ())):
        own[f"partition.{number}.heal_s"] = 8
    for number, _ in enumerate(tree.get("storm", ())):
        own[f"storm.{number}.nodes"] = 5
    if "dht" in tree:
        own["dht.settle_s"] = 2
    return Scenario.load(name, nodes=24, changes={**own, **changes})


@pytest.mark.parametrize("file", shipped_scenarios(), ids=lambda file: file.stem)
def test_every_shipped_scenario_runs(file, tmp_path):
    result = run(tiny(file), out=tmp_path)
    assert result.complete
    assert result.events > 100
    assert (tmp_path / "report.html").stat().st_size > 5000
    for recorder in result.recorders:
        assert recorder.metrics


def test_lookups_find_the_truth():
    result = run(tiny("dht-rtt"))
    for variant in ("plain", "rtt-aware"):
        assert result.metric("lookups right", variant) > 95
        assert result.metric("lookups unfinished", variant) == 0
        assert result.metric("lookups done", variant) == len(result.table("lookups", variant))


def test_the_codec_changes_nothing_but_sizes():
    plain = run(tiny("dht-churn"))
    coded = run(tiny("dht-churn", **{"world.codec": True}))
    assert coded.recorders[0].metrics == plain.recorders[0].metrics
    assert coded.table("lookups") == plain.table("lookups")
    kinds = [kind for kind in plain.messages["base"] if plain.messages["base"][kind][1]]
    assert kinds
    for kind in kinds:
        (count, guessed), (same, real) = plain.messages["base"][kind], coded.messages["base"][kind]
        assert count == same
        assert 0.5 < guessed / real < 2, kind


@pytest.mark.parametrize("name", ["coordinator-loss", "karma-attacks"])
def test_coordination_and_gossip_go_through_their_codecs(name):
    plain, coded = run(tiny(name)), run(tiny(name, **{"world.codec": True}))
    assert [r.metrics for r in coded.recorders] == [r.metrics for r in plain.recorders]
    assert sum(size for counts in coded.messages.values() for _, size in counts.values()) > 1000


def test_another_process_with_another_hash_seed_comes_to_the_same_history(request):
    code = (
        "from sim import run, Scenario; import sys; "
        f"changes={ {**TINY, 'dht.settle_s': 2, 'links.loss': 0.02, 'links.jitter_ms': 3}!r}; "
        "print(run(Scenario.load('dht-attacks', nodes=16, changes=changes)).sha256)"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(request.config.rootpath), "PATH": ""},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "99")
    }
    assert len(digests) == 1


def test_seed_and_nodes_change_the_history():
    digests = {run(tiny("dht-rtt", **{"world.seed": seed})).sha256 for seed in (1, 2)}
    assert len(digests) == 2


def test_a_run_is_repeated_from_its_run_json(tmp_path):
    first = run(tiny("dht-churn"), out=tmp_path)
    again = run(Scenario.load(tmp_path / "run.json"))
    assert again.sha256 == first.sha256
    facts = json.loads((tmp_path / "run.json").read_text())
    assert facts["sha256"] == first.sha256
    assert facts["complete"] is True


def test_files_hold_what_happened(tmp_path):
    result = run(tiny("dht-churn", **{"world.events": True}), out=tmp_path)
    with gzip.open(tmp_path / "events-base.csv.gz", "rt") as file:
        events = list(csv.DictReader(file))
    assert len(events) == result.events
    assert {"dht.FindNode", "dht.Nodes", "dht.Woken"} <= {event["kind"] for event in events}
    assert [int(e["time_ns"]) for e in events] == sorted(int(e["time_ns"]) for e in events)
    with gzip.open(tmp_path / "lookups.csv.gz", "rt") as file:
        assert len(list(csv.DictReader(file))) == len(result.table("lookups"))
    again = tmp_path / "again"
    run(tiny("dht-churn"), out=again)
    assert (again / "lookups.csv.gz").read_bytes() == (tmp_path / "lookups.csv.gz").read_bytes()


def test_the_report_stands_alone(tmp_path):
    run(tiny("dht-rtt"), out=tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "prefers-color-scheme: dark" in page
    assert page.count('<svg class="chart"') >= 6
    for outside in ("http://", "https://", "src=", "@import", "url("):
        assert outside not in page


def test_an_interrupt_keeps_what_there_is(tmp_path):
    def impatient(what, share):
        if share > 0.7:
            raise KeyboardInterrupt

    result = run(tiny("dht-churn"), out=tmp_path, progress=impatient)
    assert not result.complete
    assert result.table("lookups")
    assert "interrupted" in (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "run.json").read_text())["complete"] is False


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"links.los": 0.1}, "did you mean 'links.loss'"),
        ({"links.loss": 1.5}, "links.loss"),
        ({"links.model": "ring"}, "links.model"),
        ({"dht.policy.alfa": 4}, "did you mean 'alpha'"),
        ({"dht.policy.alpha": 400}, "alpha"),
        ({"dht.policy.rtt_aware": 3}, "true or false"),
        ({"world.seed": "many"}, "world.seed"),
        ({"connections.nat_share": 0.5}, "connections.kept"),
        ({"links.model": "matrix", "links.file": "none.csv"}, "none.csv"),
        ({"churn.model": "trace", "churn.file": "none.csv"}, "none.csv"),
        ({"kill.7.share": 0.5}, "counted from 0"),
        ({"attack.0.share": 0.5}, "no list"),
    ],
)
def test_wrong_settings_are_explained(change, complaint):
    with pytest.raises(ScenarioError) as caught:
        run(tiny("dht-churn", **change))
    assert complaint in str(caught.value)


def test_nat_and_connections_work_in_a_network():
    changes = {"connections.kept": 64, "connections.nat_share": 0.4, "connections.unreachable_share": 0.2}
    result = run(tiny("dht-rtt", **changes))
    assert result.metric("lookups right", "plain") > 90


def test_arrivals_keep_their_rates(tmp_path):
    span = Span(0, 1000 * SECOND)
    for process in ("poisson", "regular"):
        found = list(arrivals(ArrivalSettings(process=process, per_s=3), Draws(1, 1), span, tmp_path))
        assert 2800 < len(found) < 3200
    bursts = list(arrivals(ArrivalSettings(process="bursts", burst_size=7), Draws(1, 1), span, tmp_path))
    assert len(bursts) % 7 == 0
    assert 60 * 7 < len(bursts) < 140 * 7


def test_arrivals_from_a_gateways_log(tmp_path):
    (tmp_path / "log.csv").write_text(
        "time_s,model,prompt_tokens,output_tokens\n0.5,small,100,20\n2,large,7,8\n99,x,1,1\n"
    )
    settings = ArrivalSettings(process="trace", file="log.csv")
    found = list(arrivals(settings, Draws(1, 1), Span(SECOND, 50 * SECOND), tmp_path))
    assert found == [(1_500_000_000, "small", 100, 20), (3_000_000_000, "large", 7, 8)]
    (tmp_path / "log.csv").write_text("0.5,small,100\n")
    with pytest.raises(ScenarioError, match="line 1"):
        list(arrivals(settings, Draws(1, 1), Span(SECOND, 50 * SECOND), tmp_path))


def test_zipf_prefers_the_first():
    dice, weights = Draws(1, 1), zipf_weights(10, 1.0)
    drawn = [dice.weighted(weights) for _ in range(5000)]
    assert drawn.count(0) > 1.6 * drawn.count(1) > 1.6 * 0.8 * drawn.count(2)
    assert set(drawn) == set(range(10))


@pytest.mark.parametrize("model", ["exponential", "weibull", "diurnal"])
def test_churn_keeps_its_share_of_time(model, tmp_path):
    settings = ChurnSettings(model=model, session_s=3600, downtime_s=1800, day_s=5400)
    span = Span(0, 100 * 5400 * SECOND)
    up = 0
    nodes = 200
    state = dict.fromkeys(range(nodes), 0)
    for turn in turns(settings, 1, [(n, "London") for n in range(nodes)], span, tmp_path):
        if turn.up:
            assert state[turn.node] is None
            state[turn.node] = turn.at_ns
        else:
            up += turn.at_ns - state[turn.node]
            state[turn.node] = None
    up += sum(span.end_ns - since for since in state.values() if since is not None)
    assert up / nodes / span.end_ns == pytest.approx(2 / 3, rel=0.1)


def test_churn_from_a_trace(tmp_path):
    (tmp_path / "turns.csv").write_text("time_s,node,state\n1,3,down\n2.5,3,up\n")
    settings = ChurnSettings(model="trace", file="turns.csv")
    found = list(turns(settings, 1, [], Span(10 * SECOND, 20 * SECOND), tmp_path))
    assert found == [(11 * SECOND, 3, False), (12_500_000_000, 3, True)]
