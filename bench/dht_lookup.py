"""What it brings that buckets prefer near peers: time and messages of lookups, against plain Kademlia.

The same network twice in the simulator (same seed: same places, same keys, same lookups). Messages are counted
both per lookup (queries) and in all (lookups and upkeep, per node and second). By default tables are as a
network at rest has them; with --joined every node really joins, and the network lives for a while first.
"""

from __future__ import annotations

import argparse
import sys

from bench.figures import header
from sim import Result, run

#: What RTT-awareness must bring: so much less time at the median, with no more messages. Counting noise of a
#: thousand lookups is about a percent.
GOAL = 0.25
NOISE = 0.01

#: Lookups per second in all of the network. They do not meet: links are as wide as need be.
RATE = 20

_SHOWN = (
    ("lookup latency p50", "p50 ms"),
    ("lookup latency p90", "p90 ms"),
    ("lookup queries", "queries"),
    ("lookup hops", "hops"),
    ("messages", "msgs/node/s"),
    ("lookups right", "right %"),
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench dht_lookup", description=__doc__)
    parser.add_argument("--nodes", type=int, default=10_000, help="nodes of the network (100000 takes 2 GB)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="one network each")
    parser.add_argument("--lookups", type=int, default=1200, help="lookups measured in each")
    parser.add_argument("--joined", action="store_true", help="all nodes really join, then live for a while")
    parser.add_argument("--live", type=float, default=600.0, metavar="S", help="with --joined: for so long")
    arguments = parser.parse_args(argv)
    header(f"DHT lookups: RTT-aware against plain, {arguments.nodes:,} simulated nodes")
    how = "joined, then lived" if arguments.joined else "tables as at rest"
    print(f"{how}; {arguments.lookups} lookups a network\n")
    print(f"{'':24}" + "".join(f"{title:>13}" for _, title in _SHOWN))
    missed = 0
    for seed in arguments.seeds:
        missed += not _network(seed, arguments)
    print(f"goal: at least {GOAL:.0%} lower p50 with no more messages; {'missed' if missed else 'met'}")
    return 0


def _network(seed: int, arguments: argparse.Namespace) -> bool:
    """Both variants of one network; whether the goal is met."""
    changes: dict[str, object] = {
        "world.duration_s": arguments.lookups / RATE,
        "arrivals.per_s": RATE,
        "dht.settle_s": 30,
    }
    if arguments.joined:
        changes |= {"dht.bootstrap": "join", "dht.settle_s": arguments.live}
        changes["dht.join_every_ms"] = 60_000 / arguments.nodes  # all within a minute
    progress = _progress if sys.stderr.isatty() else None
    result = run("dht-rtt", nodes=arguments.nodes, seed=seed, changes=changes, progress=progress)
    for variant in ("plain", "rtt-aware"):
        values = "".join(f"{result.metric(name, variant):>13.2f}" for name, _ in _SHOWN)
        timing = result.timings[variant]
        print(f"seed {seed}, {variant:<15}{values}   ({timing.events:,} events, {timing.wall_s:.0f} s)")
    gain = 1 - _ratio(result, "lookup latency p50")
    queries, messages = _ratio(result, "lookup queries"), _ratio(result, "messages")
    print(
        f"seed {seed}: p50 {gain:.1%} lower, p90 {1 - _ratio(result, 'lookup latency p90'):.1%} lower; "
        f"queries x {queries:.3f}, all messages x {messages:.3f}"
    )
    print(f"seed {seed}: events {result.events} sha256 {result.sha256}", flush=True)
    return gain >= GOAL and messages <= 1 + NOISE


def _ratio(result: Result, name: str) -> float:
    aware, plain = result.metric(name, "rtt-aware"), result.metric(name, "plain")
    return aware / plain


def _progress(what: str, share: float) -> None:
    sys.stderr.write(f"\r\033[K{what} {share:.0%}")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
