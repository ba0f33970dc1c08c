"""The benchmarks of chains: what they read from logs, how they force a number of stages, and that they run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.__main__ import BENCHMARKS
from bench.chain_client import Answer
from bench.chain_latency import delays
from bench.chain_mesh import layout_of, memory_mib, serving_of
from bench.chain_recovery import Deaths
from bench.lab import why_unavailable
from cargos.resolve import resolve_cargo
from protocol.limits import MIB
from routing.chains.plan import ModelShape

ROOT = Path(__file__).parents[2]


def least_stages(shape: ModelShape, room_bytes: int) -> int:
    """By trying all cuts: the fewest stages that each fit."""
    fewest = {0: 0}
    for last in range(1, shape.layers + 1):
        before = [
            fewest[first]
            for first in range(last)
            if shape.bytes_of(first, last) <= room_bytes and first in fewest
        ]
        if before:
            fewest[last] = 1 + min(before)
    return fewest.get(shape.layers, shape.layers + 1)


@pytest.mark.parametrize("stages", [2, 3, 4, 6])
@pytest.mark.parametrize("ends", [(0, 0), (30 * MIB, 30 * MIB), (5 * MIB, 60 * MIB)])
def test_memory_forces_the_number_of_stages(stages: int, ends: tuple[int, int]) -> None:
    shape = ModelShape([9 * MIB + i * 1000 for i in range(30)], *ends)
    assert least_stages(shape, memory_mib(shape, stages) * MIB) == stages


def test_too_many_stages_are_refused() -> None:
    with pytest.raises(SystemExit, match="no cut"):
        memory_mib(ModelShape([10 * MIB] * 2, 0, 100 * MIB), 3)


def log(event: str, **fields: object) -> str:
    return json.dumps({**fields, "event": event})


def test_the_layout_is_what_the_log_said_last() -> None:
    ready = log("chain ready", stages=[["coral", 0, 14], ["atoll", 14, 30]], spares=[["reef", 0, 14]])
    lines = ["listening http://127.0.0.1:1", ready, log("peer up", name="x")]
    assert layout_of(lines) == ([("coral", 0, 14), ("atoll", 14, 30)], [("reef", 0, 14)])
    assert layout_of([*lines, log("chain incomplete")]) == ([], [])
    assert layout_of([]) == ([], [])


def test_who_serves_is_what_the_last_job_s_line_says() -> None:
    chain = log("job", queue_ms=0, layers="coral 0-13, my isle 14-29")
    assert serving_of([chain, log("peer up", name="x")]) == ["coral", "my isle"]
    for lines in ([], [chain, log("job", queue_ms=0)]):
        with pytest.raises(SystemExit, match="no chain"):
            serving_of(lines)


def test_delays_are_between_islands_only() -> None:
    matrix = delays(3, 50)
    assert matrix.shape == (4, 4)
    assert (matrix[0] == 0).all()
    assert (matrix[:, 0] == 0).all()
    assert matrix[1, 2] == matrix[3, 1] == 25


def test_figures_of_an_answer() -> None:
    answer = Answer(began=1.0, arrivals=[2.0, 2.5, 5.0], pieces=["a", "b", "c"], usage={"completion_tokens": 7})
    assert (answer.ttft_s, answer.decode_tps, answer.longest_gap_s, answer.text) == (1.0, 2.0, 2.5, "abc")


def test_deaths_are_told_by_place(capsys: pytest.CaptureFixture[str]) -> None:
    deaths = Deaths()
    calm = Answer(arrivals=[0.0, 0.1], pieces=["a", "b"], usage={"completion_tokens": 2})
    struck = Answer(arrivals=[0.0, 1.5], pieces=["a", "b"], usage={"completion_tokens": 2})
    broken = Answer(arrivals=[0.0, 0.7], pieces=["a", "x"], usage={"completion_tokens": 2}, error="gone")
    deaths.note("head", calm, struck)
    deaths.note("first stage", calm, broken)
    deaths.tell()
    out = capsys.readouterr().out
    assert "1 of 2" in out
    assert "1.50" in out
    assert out.count("1 of 2") == 2


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "arguments",
    [
        ("chain", "--quick", "--stages", "2"),
        ("chain_recovery", "--quick"),
        ("chain_load", "--quick"),
        pytest.param(
            ("chain_latency", "--quick", "--stages", "2"),
            marks=pytest.mark.skipif(why_unavailable() is not None, reason=why_unavailable() or ""),
        ),
    ],
)
def test_it_runs(arguments: tuple[str, ...]) -> None:
    assert arguments[0] in BENCHMARKS
    if resolve_cargo("smollm2-135m").manifest.sharding is None:
        pytest.fail("the demo's Cargo says no more how it can be spread")
    done = subprocess.run(
        [sys.executable, "-m", "bench", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
