"""The command `archi-sim`, as a process."""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
import time

import pytest

TINY = ["--nodes", "20", "--set", "world.duration_s=6", "--set", "world.slices=3", "--set", "dht.settle_s=1"]


@pytest.fixture
def archi_sim(request):
    def call(*arguments, expect=0):
        done = subprocess.run(
            [sys.executable, "-m", "sim.cli", *map(str, arguments)],
            cwd=request.config.rootpath,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == expect, done.stderr
        return done

    return call


def test_run_ends_with_its_name(archi_sim, tmp_path):
    runs = [archi_sim("run", "dht-rtt", *TINY, "--seed", 3, "--out", tmp_path / str(n)) for n in range(2)]
    last = [done.stdout.splitlines()[-1] for done in runs]
    assert re.fullmatch(r"events \d+ sha256 [0-9a-f]{64}", last[0])
    assert last[0] == last[1]
    assert (tmp_path / "0" / "report.html").exists()
    assert "lookup latency p50" in runs[0].stdout
    compared = archi_sim("compare", tmp_path / "0", tmp_path / "1")
    assert "the same history" in compared.stdout


def test_compare_shows_ratios(archi_sim, tmp_path):
    for name, way in (("a", 10), ("b", 20)):
        archi_sim(
            *("run", "dht-rtt", *TINY, "--set", 'links.model="uniform"', "--set", f"links.one_way_ms={way}"),
            *("--out", tmp_path / name),
        )
    shown = archi_sim("compare", tmp_path / "a", tmp_path / "b").stdout
    line = next(line for line in shown.splitlines() if "lookup latency p50" in line)
    assert re.search(r"[12]\.\d\d\d-", line), line
    assert "error" in archi_sim("compare", tmp_path / "a", tmp_path, expect=2).stderr


def test_sweep_runs_a_grid(archi_sim, tmp_path):
    done = archi_sim(
        *("sweep", "dht-churn", *TINY, "--set", "kill.0.at_s=2", "--set", "dht.join_every_ms=20"),
        *("--grid", "dht.policy.alpha=1,3", "--grid", "world.seed=1,2", "--out", tmp_path, "--jobs", 2),
    )
    assert "4 of 4 runs" in done.stdout
    with (tmp_path / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    points = {(row["dht.policy.alpha"], row["world.seed"]) for row in rows}
    assert points == {("1", "1"), ("1", "2"), ("3", "1"), ("3", "2")}
    assert len({row["sha256"] for row in rows}) == 4


def test_list_and_help_teach(archi_sim):
    assert "dht-rtt" in archi_sim("list").stdout
    helped = archi_sim("--help").stdout
    assert "examples:" in helped
    assert "docs/simulator.md" in helped


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["run", "dht-rt"], "did you mean 'dht-rtt'"),
        (["run", "nowhere/none.toml"], "archi-sim list"),
        (["run", "dht-rtt", "--set", "loss"], "NAME=VALUE"),
        (["run", "dht-rtt", "--set", "links.loss=much"], "links.loss"),
        (["run", "dht-rtt", "--nodes", "1"], "world.nodes"),
        (["sweep", "dht-rtt", "--grid", "links.loss", "--out", "x"], "axis"),
        (["sweep", "dht-rtt", "--grid", "links.los=1", "--out", "x"], "did you mean"),
        (["sweep", "dht-rtt", "--grid", "links.loss=0", "--out", "x", "--jobs", "-3"], "--jobs"),
        (["run", "dht-rtt", "--set", "links.model=fast"], "one of cities, uniform, matrix, not 'fast'"),
        (["run", "dht-rtt", "--set", "links.model=matrix"], "links.file"),
    ],
)
def test_mistakes_are_explained(archi_sim, arguments, complaint):
    done = archi_sim(*arguments, expect=2)
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr


def test_a_broken_file_is_named(archi_sim, tmp_path):
    (tmp_path / "bad.toml").write_text("title = \n")
    assert "not valid TOML" in archi_sim("run", tmp_path / "bad.toml", expect=2).stderr
    (tmp_path / "untitled.toml").write_text("[world]\nnodes = 5\n")
    assert "title" in archi_sim("run", tmp_path / "untitled.toml", expect=2).stderr


def test_ctrl_c_ends_cleanly_and_keeps_files(request, tmp_path):
    running = subprocess.Popen(
        [sys.executable, "-m", "sim.cli", "run", "dht-churn", "--nodes", "200", "--out", str(tmp_path / "out")],
        cwd=request.config.rootpath,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert running.stderr is not None
    line = running.stderr.readline()  # progress shows after two seconds
    assert "%" in line
    time.sleep(0.2)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "interrupted" in err
    assert "Traceback" not in err
    assert "sha256" not in out.splitlines()[-1]
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_sweep_leaves_no_process(request, tmp_path, sent):
    running = subprocess.Popen(
        [
            *(sys.executable, "-m", "sim.cli", "sweep", "dht-churn", "--nodes", "200", "--jobs", "2"),
            *("--grid", "world.seed=1,2,3", "--out", str(tmp_path / "out")),
        ],
        cwd=request.config.rootpath,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert running.stderr is not None
    assert "0 of 3 runs" in running.stderr.readline()  # shown although no run has ended
    running.send_signal(sent)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "Traceback" not in err
    assert (tmp_path / "out" / "sweep.csv").exists()
    with pytest.raises(ProcessLookupError):  # nobody is left in its session
        os.killpg(running.pid, 0)
