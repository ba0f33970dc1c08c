"""Gossip: our machine over kept links against py-libp2p's gossipsub, when 30 % of the nodes die on the way.

Each swarm is one process; the two run in turns, with the same graph, messages and deaths. What is compared:
delivery to the survivors, how often a payload comes again, latency, and the processor's time per delivery
(all nodes together). Run: python -m bench gossip
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import TypeAlias

from bench.figures import header, median, row

#: Figures by phase.
Run: TypeAlias = dict[str, dict[str, float]]

KINDS = ("ours", "gossipsub")
FIGURES = (
    ("delivery_percent", "delivered, %", "{:.2f}"),
    ("repeats", "payloads beyond the first, per delivery", "{:.2f}"),
    ("p50_ms", "latency p50, ms", "{:.1f}"),
    ("p99_ms", "latency p99, ms", "{:.0f}"),
    ("cpu_ms", "processor time per delivery beyond idle, ms", "{:.2f}"),
)


def run_swarm(kind: str, nodes: int, messages: int, gap_s: float, seed: int) -> Run:
    done = subprocess.run(
        [sys.executable, "-m", "bench.gossip_worlds", kind, str(nodes), str(messages), str(gap_s), str(seed)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if not done.stdout.strip():
        raise SystemExit(f"the {kind} swarm gave no figures:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def idle_of(runs: Sequence[Run]) -> float:
    return median([run["idle"]["cpu_percent"] for run in runs])


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench gossip")
    parser.add_argument("--nodes", type=int, default=32)
    parser.add_argument("--messages", type=int, default=25)
    parser.add_argument("--gap", type=float, default=2.0, help="seconds between two messages")
    parser.add_argument("--rounds", type=int, default=2)
    chosen = parser.parse_args(arguments)
    header("gossip among coordinators, 30 % of the nodes die while messages are published")
    runs: dict[str, list[Run]] = {kind: [] for kind in KINDS}
    for seed in range(1, chosen.rounds + 1):
        for kind in KINDS:
            runs[kind].append(run_swarm(kind, chosen.nodes, chosen.messages, chosen.gap, seed))
    print(
        f"{chosen.nodes} nodes, {chosen.messages} messages, one each {chosen.gap} s, "
        f"{chosen.rounds} rounds in turns"
    )
    for phase in ("calm", "churn"):
        row(phase, *KINDS, "ratio")
        for key, label, form in FIGURES:
            ours, theirs = (median([figures[phase][key] for figures in runs[kind]]) for kind in KINDS)
            ratio = f"{theirs / ours:.1f}" if ours and key != "delivery_percent" else ""
            row(label, form.format(ours), form.format(theirs), ratio)
    row("idle: processor, % of a core, all nodes", *(f"{idle_of(runs[kind]):.1f}" for kind in KINDS))
    worst = min(figures["churn"]["delivery_percent"] for figures in runs["ours"])
    print(f"  delivered by ours in the worst round of churn: {worst:.3f} %")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
