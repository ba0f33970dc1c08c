"""A chain with more to do than it has slots for: do others join its layers, and is anything lost meanwhile?

    python -m bench chain_load [--clients 6] [--window 40] [--balance 20] [--quiet 120] [--quick]

A gateway, a chain with a spare for each stage, and clients that ask without a pause. Then as many Islands come
as the chain has stages, empty: they must be sent to the busy layers, and jobs must run over them. Then one that
works is killed. Then the load ends, and nobody may be sent anywhere any more. Throughput of each part against
the first one; on one machine all Islands share the cores, so more of them need not be faster: who is sent
where, and that no job fails, is what this shows. Exit status 1: something of it did not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field

from bench.chain_client import Answer
from bench.chain_mesh import NAMES, READY_S, Mesh, memory_mib, shape_of
from bench.figures import header, row
from cargos.resolve import resolve_cargo
from protocol.dice import Dice

CARGO = "smollm2-135m-f16"

#: Islands: one for each, its spare, and one that comes later.
STAGES = 2

#: Sessions of each Island: few, so that a handful of clients is more than a chain and its spares can take.
ISLAND_SLOTS = 2

TOKENS = 24

#: A job that finds no slot waits for one; on a busy machine its turn may take a while to come.
WAIT_MS = 120_000

QUESTIONS = ("Tell me about the sea.", "What is a harbour?", "Describe a storm.", "How do ropes work?")


@dataclass
class Window:
    """What ended in a while."""

    seconds: float
    answers: list[Answer]

    @property
    def tps(self) -> float:
        return sum(answer.tokens for answer in self.answers) / self.seconds

    @property
    def served(self) -> Counter[str]:
        """Answers by the Islands that had a part in them."""
        stages = [answer.usage.get("archipelag", {}).get("stages", []) for answer in self.answers]
        return Counter(stage["island"] for chain in stages for stage in chain)


@dataclass
class Load:
    """Clients that ask without a pause until `stop` is set."""

    mesh: Mesh
    stop: threading.Event = field(default_factory=threading.Event)
    answers: list[Answer] = field(default_factory=list[Answer])

    def client(self, number: int) -> None:
        dice = Dice(number)
        while not self.stop.is_set():
            answer = Answer(began=time.perf_counter())
            try:
                answer = self.mesh.ask(f"{dice.choice(QUESTIONS)} ({dice.below(10_000)})", TOKENS)
            except OSError as error:  # the gateway is gone, or cut the connection
                answer.error, answer.ended = str(error), time.perf_counter()
            self.answers.append(answer)

    def window(self, seconds: float) -> Window:
        """What ends within the next `seconds`."""
        began = time.perf_counter()
        time.sleep(seconds)
        ended = time.perf_counter()
        return Window(ended - began, [a for a in list(self.answers) if began <= a.ended < ended])

    @property
    def lost(self) -> list[str]:
        """Of those that failed, or are shorter than what was asked for: why."""
        return [
            answer.error or f"{answer.tokens} of {TOKENS} tokens"
            for answer in list(self.answers)
            if answer.error or answer.tokens != TOKENS
        ]


@contextmanager
def under_load(mesh: Mesh, clients: int) -> Generator[Load]:
    load = Load(mesh)
    threads = [threading.Thread(target=load.client, args=(number,), daemon=True) for number in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield load
    finally:
        load.stop.set()
        for thread in threads:
            thread.join(WAIT_MS / 1000)


def orders(mesh: Mesh) -> list[str]:
    """Who was told to hold what, in order."""
    told: list[str] = []
    for line in list(mesh.gateway.lines):
        if line.startswith("{") and '"layers ordered"' in line:
            said = json.loads(line)
            told.append(f"{said['island']} {said['first']}-{said['last'] - 1}")
    return told


def wait_until(true: Callable[[], bool], what: str) -> None:
    """Raises SystemExit if it does not become true."""
    deadline = time.monotonic() + READY_S
    while not true():
        if time.monotonic() > deadline:
            raise SystemExit(f"in vain: {what}")
        time.sleep(0.2)


def tell(words: str, window: Window, base: Window, told: int) -> None:
    served = ", ".join(f"{name} {count}" for name, count in sorted(window.served.items()))
    ratio = f"{window.tps / base.tps:.2f}" if base.tps else "-"
    row(words, f"{window.tps:.1f}", ratio, str(len(window.answers)), str(told))
    print(f"      answers by Island: {served}")
    sys.stdout.flush()


@dataclass
class Plan:
    stages: int
    clients: int
    window_s: float
    quiet_s: float


def run(mesh: Mesh, plan: Plan, start: Callable[[str], None]) -> list[str]:
    """What did not hold."""
    wrong: list[str] = []
    late = NAMES[2 * plan.stages : 3 * plan.stages]
    at_first = len(orders(mesh))
    print(f"  {mesh.layout_words()}")
    row("", "tokens/s", "of the first", "answers", "orders")
    with under_load(mesh, plan.clients) as load:
        load.window(plan.window_s / 4)
        base = load.window(plan.window_s)
        tell("a chain and its spares", base, base, len(orders(mesh)) - at_first)

        for name in late:
            start(name)
        wait_until(lambda: set(late) <= {told.split()[0] for told in orders(mesh)}, "late Islands get layers")
        moving = load.window(plan.window_s)
        tell("Islands come", moving, base, len(orders(mesh)) - at_first)
        wait_until(
            lambda: set(late) <= Window(1, list(load.answers)).served.keys(), "jobs run over late Islands"
        )
        wider = load.window(plan.window_s)
        tell("they work", wider, base, len(orders(mesh)) - at_first)

        victim = (wider.served or Window(1, list(load.answers)).served).most_common(1)[0][0]
        mesh.kill_island(victim)
        killed = load.window(plan.window_s)
        tell(f"{victim} is killed", killed, base, len(orders(mesh)) - at_first)
    told = len(orders(mesh))
    time.sleep(plan.quiet_s)
    after = orders(mesh)[told:]
    row("the load has ended", "", "", "", str(len(after)))
    print(f"  orders: {', '.join(orders(mesh))}")
    print(f"  {len(load.answers)} answers, lost {len(load.lost)}")
    if load.lost:
        wrong.append(f"answers were lost: {Counter(load.lost).most_common(3)}")
    if after:
        wrong.append(f"Islands were sent about without a load: {after}")
    held = Counter(told.split()[1] for told in orders(mesh))
    if len(held) != plan.stages or max(Counter(told.split()[0] for told in orders(mesh)).values()) > 1:
        wrong.append(f"Islands were sent about: {orders(mesh)}")
    return wrong


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench chain_load", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--window", type=float, default=40.0, metavar="S")
    parser.add_argument("--balance", type=float, default=20.0, metavar="S", help="mesh.balance_s")
    parser.add_argument("--quiet", type=float, default=120.0, metavar="S", help="to look on after the load")
    parser.add_argument("--cargo", default=CARGO)
    parser.add_argument("--quick", action="store_true", help="short, to see that it runs")
    arguments = parser.parse_args(argv)
    plan = Plan(STAGES, arguments.clients, arguments.window, arguments.quiet)
    balance_s = arguments.balance
    if arguments.quick:
        plan, balance_s = Plan(STAGES, arguments.clients, 3, 8), 2
    header(f"{plan.clients} clients at a chain of {plan.stages} with {ISLAND_SLOTS} slots, {arguments.cargo}")
    print(f"load {os.getloadavg()[0]:.1f}")
    room_mib = memory_mib(shape_of(arguments.cargo, slots=ISLAND_SLOTS), plan.stages)
    settings = (f"mesh.balance_s={balance_s}", f"jobs.wait_ms={WAIT_MS}")
    with Mesh(arguments.cargo, resolve_cargo(arguments.cargo).manifest.name, settings=settings) as mesh:

        def start(name: str) -> None:
            mesh.start_island(
                name,
                *(f"shards.slots={ISLAND_SLOTS}", f"shards.memory_mib={room_mib}"),
            )

        for name in NAMES[: 2 * plan.stages]:
            start(name)
        mesh.wait_answers()
        mesh.wait_spares()
        wrong = run(mesh, plan, start)
    for words in wrong:
        print(f"  WRONG: {words}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
