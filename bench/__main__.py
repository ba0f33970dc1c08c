"""`python -m bench [NAME]`: run one benchmark, or all of them."""

from __future__ import annotations

import importlib
import sys

BENCHMARKS = {
    "kept_stream": "RPC echo on a kept stream against raw TCP; opening a stream; bulk",
    "gateway_stream": "streamed chunks/s of the HTTP side against bare hypercorn-trio",
    "mesh_stream": "streamed chunks/s of gateway + scripted Islands against bare hypercorn-trio",
    "engine": "an Island's tokens/s at 1, 4, 8 streams against bare llama.cpp",
    "latency": "how much later a token arrives because of a gateway: ours and LiteLLM",
    "overhead": "what gateway and mesh add to an answer, beside what LiteLLM adds",
    "gossip": "delivery, latency and cost of our gossip against gossipsub while 30 % of the nodes die",
    "attacks": "what each attack on karma brings, against honest work",
    "lab": "how exactly the delay laboratory delays, beside the kernel's own path",
    "validation": "the simulator against 30 real nodes: the same lookups, p50 and p90 of both",
    "dht": "45 real peers, 90 lookups at once: our DHT against py-libp2p's kad_dht",
    "dht_lookup": "lookups in a simulated network: RTT-aware buckets against plain ones",
    "sim_events": "events/s of the simulator's world against SimPy on the same toy",
    "chain": "chains of 2 and 3 Islands against one with the whole model, 1 and 8 sessions",
    "chain_equality": "do chains of 2, 3 and 4 Islands say what the whole model says, token for token",
    "chain_cost": "CPU time and wake-ups that a token costs the processes of a chain, beside its computing",
    "chain_latency": "a chain with distance between its stages: share of the bound, with and without drafts",
    "chain_draft": "what the small model that a Cargo names for drafts brings, by distance",
    "chain_load": "a chain under load: others join its busy layers, one dies, and no answer is lost",
    "chain_recovery": "stages killed in mid-answer: how long the pause, and is the text the same",
    "pieces": "a file in pieces from 1 and 3 peers, beside one bare TCP stream",
    "continuation": "how often a continuation equals the undisturbed run",
}


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] in {"-h", "--help"}:
        print("usage: python -m bench NAME [OPTIONS] | all\n")
        for name, text in BENCHMARKS.items():
            print(f"  {name:<16}{text}")
        return 0 if len(sys.argv) > 1 else 2
    names = list(BENCHMARKS) if sys.argv[1] == "all" else [sys.argv[1]]
    arguments = sys.argv[2:]
    for name in names:
        if name not in BENCHMARKS:
            print(f"there is no benchmark {name!r}; there are: {', '.join(BENCHMARKS)}", file=sys.stderr)
            return 2
        code = importlib.import_module(f"bench.{name}").main(arguments)
        if code:
            return int(code)
        print(flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
