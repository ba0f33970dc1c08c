"""What a token costs the processes of a chain, beside its computing: CPU time, and how often somebody is woken.

    python -m bench chain_cost [--stages 3] [--rtt MS] [--rounds N]

A chain without drafts and one Island with the whole model answer in turns. For each process group: CPU
milliseconds a token, and how often one of its threads slept and was woken. The CPU time of the chain's workers
beyond the whole model's worker is what slicing and passing on cost there. CPU time is less noisy on a busy
machine than the clock on the wall.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from bench.chain_client import Answer, checked
from bench.chain_latency import ORDINARY, delays
from bench.chain_mesh import CARGO, Mesh, open_chain, open_whole
from bench.figures import header, median, row
from bench.lab import Lab, why_unavailable

TOKENS = 128

#: Linux: the clock that counts a process's CPU time, by its number (clock_getcpuclockid(3)).
_PROCESS_CLOCK = 2


@dataclass(frozen=True)
class Use:
    """CPU seconds and wake-ups so far."""

    cpu_s: float = 0.0
    wakes: int = 0

    def __add__(self, other: Use) -> Use:
        return Use(self.cpu_s + other.cpu_s, self.wakes + other.wakes)

    def __sub__(self, other: Use) -> Use:
        return Use(self.cpu_s - other.cpu_s, self.wakes - other.wakes)


def use_of(pid: int) -> Use:
    """Of a process with all its threads; nothing if it has ended."""
    wakes = 0
    try:
        cpu_s = time.clock_gettime(~pid << 3 | _PROCESS_CLOCK)
    except OSError:
        return Use()
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        with suppress(OSError):  # a thread that has just ended
            for line in status.read_text().splitlines():
                if line.startswith("voluntary_ctxt_switches"):
                    wakes += int(line.split()[1])
    return Use(cpu_s, wakes)


def children_of(pid: int) -> list[int]:
    """Processes that it has started."""
    found: list[int] = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += [int(child) for child in children.read_text().split()]
    return found


def pids_of(mesh: Mesh) -> dict[str, list[int]]:
    """By group."""
    islands = [i.process.pid for i in mesh.islands.values() if i.process is not None]
    gateway = mesh.gateway.process
    return {
        "gateway": [] if gateway is None else [gateway.pid],
        "Islands": islands,
        "workers": [child for pid in islands for child in children_of(pid)],
    }


def measure(mesh: Mesh, prompt: str, tokens: int) -> dict[str, tuple[float, float]]:
    """By group: CPU ms and wake-ups a token; and how long a token took."""
    groups = pids_of(mesh)

    def now() -> dict[str, Use]:
        return {name: sum(map(use_of, pids), Use()) for name, pids in groups.items()}

    begun: list[dict[str, Use]] = []

    def first(_: Answer) -> None:
        if not begun:
            begun.append(now())

    answer = checked(mesh.ask(prompt, tokens, at=first, temperature=0.8, ignore_eos=True))
    ended, made = now(), answer.tokens - 1
    spent = {name: ended[name] - begun[0][name] for name in groups}
    figures = {name: (1e3 * used.cpu_s / made, used.wakes / made) for name, used in spent.items()}
    return {**figures, "wall": (1e3 / answer.decode_tps, 0.0)}


@contextmanager
def opened(cargo: str, stages: int, rtt_ms: float) -> Generator[tuple[Mesh, Mesh]]:
    """The whole model, and a chain; with a distance in a laboratory."""
    with ExitStack() as stack:
        lab = stack.enter_context(Lab(delays(stages, 0))) if rtt_ms else None
        whole = stack.enter_context(open_whole(cargo))
        chain = stack.enter_context(open_chain(cargo, stages, lab=lab, drafts=False))
        if lab is not None:
            lab.set_delays(delays(stages, rtt_ms))
            checked(chain.ask("Count to ten.", 16))
        yield whole, chain


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench chain_cost", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--rtt", type=float, default=0.0, metavar="MS")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--cargo", default=CARGO)
    parser.add_argument("--quick", action="store_true", help="one round, to see that it runs")
    arguments = parser.parse_args(argv)
    if arguments.rtt and (reason := why_unavailable()):
        print(f"no delay laboratory here: {reason}", file=sys.stderr)
        return 0
    rounds = 1 if arguments.quick else arguments.rounds
    header(f"what a token costs a chain of {arguments.stages}, {arguments.cargo}")
    seen: dict[tuple[str, str], list[tuple[float, float]]] = {}
    with opened(arguments.cargo, arguments.stages, arguments.rtt) as (whole, chain):
        for number in range(rounds):
            for side, mesh in (("whole", whole), ("chain", chain)):
                prompt = f"{ORDINARY[number % len(ORDINARY)]} ({number})"
                for name, figures in measure(mesh, prompt, arguments.tokens).items():
                    seen.setdefault((name, side), []).append(figures)
    row(f"a token, {rounds} rounds", "whole, ms", "chain, ms", "whole, wakes", "chain, wakes")
    for name in ("gateway", "Islands", "workers", "wall"):
        pairs = [seen[name, side] for side in ("whole", "chain")]
        cells = [f"{median([each[0] for each in figures]):.2f}" for figures in pairs]
        if name != "wall":
            cells += [f"{median([each[1] for each in figures]):.1f}" for figures in pairs]
        row(name, *cells)
    shares = [a[0] / b[0] for a, b in zip(seen["wall", "whole"], seen["wall", "chain"], strict=True)]
    bound = [
        (a[0] + arguments.stages * arguments.rtt / 2) / b[0]
        for a, b in zip(seen["wall", "whole"], seen["wall", "chain"], strict=True)
    ]
    row("tokens/s of the whole model's, and of the bound", f"{median(shares):.2f}", f"{median(bound):.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
