"""Events a second of the simulator's world against SimPy, on the same toy: 2,000 messages hop among 10,000
nodes, each hop 50 ms of virtual time.

SimPy twice: bare time-outs, a process per message, which is the least it can do and has no messages, nodes
or log; and nodes with mailboxes, which is what a network needs. Ours has links, machines, effects and the
hash of the history. CPU time, the sides in turns.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Generator
from types import ModuleType
from typing import Any

import msgspec

from bench.figures import header, median, row
from protocol.instants import Instant
from protocol.machine import Received, Send
from sim.links import Links
from sim.world import World

NODES = 10_000
MESSAGES = 2_000
HOP_NS = 50_000_000


class Hop(msgspec.Struct, frozen=True, gc=False):
    """A message without content."""


HOP = Hop()


def _next(state: int) -> int:
    return (state * 1103515245 + 12345) & 0x7FFFFFFF


class Relay:
    """Passes each message on to a node that it draws."""

    __slots__ = ("state",)

    def __init__(self, me: int) -> None:
        self.state = me * 2654435761 & 0xFFFFFFFF

    def receive(self, _now: Instant, what: object) -> tuple[Send[int, Hop]]:
        self.state = _next(self.state)
        if isinstance(what, Received):
            return (Send((self.state >> 8) % NODES, what.message),)
        return (Send((self.state >> 8) % NODES, HOP),)

    def next_wake(self) -> None:
        return None


def ours(events: int) -> float:
    """Events a second of CPU."""
    world = World(1, Links.uniform(HOP_NS))
    for _ in range(NODES):
        node = world.add_node()
        world.install(node, "toy", Relay(node))
    for node in range(MESSAGES):
        world.order(node, "toy", HOP, at=Instant(node * (HOP_NS // MESSAGES)))
    began = time.process_time()
    world.run_until(Instant(HOP_NS * events // MESSAGES))
    return world.log.events / (time.process_time() - began)


def simpy_timeouts(simpy: ModuleType, events: int) -> float:
    env, count = simpy.Environment(), 0

    def message(node: int) -> Generator[Any, Any, None]:
        nonlocal count
        state = node * 2654435761 & 0xFFFFFFFF
        while True:
            yield env.timeout(0.05)
            count += 1
            state = _next(state)

    for node in range(MESSAGES):
        env.process(message(node))
    began = time.process_time()
    env.run(until=0.05 * events / MESSAGES)
    return count / (time.process_time() - began)


def simpy_mailboxes(simpy: ModuleType, events: int) -> float:
    env, count = simpy.Environment(), 0
    boxes = [simpy.Store(env) for _ in range(NODES)]

    def deliver(node: int, message: Hop) -> Generator[Any, Any, None]:
        yield env.timeout(0.05)
        boxes[node].put(message)

    def live(node: int) -> Generator[Any, Any, None]:
        nonlocal count
        state = node * 2654435761 & 0xFFFFFFFF
        while True:
            message = yield boxes[node].get()
            count += 1
            state = _next(state)
            env.process(deliver((state >> 8) % NODES, message))

    for node in range(NODES):
        env.process(live(node))
    for node in range(MESSAGES):
        boxes[node].put(HOP)
    began = time.process_time()
    env.run(until=0.05 * events / MESSAGES)
    return count / (time.process_time() - began)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench sim_events", description=__doc__)
    parser.add_argument("--events", type=int, default=400_000, help="per round")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args(argv)
    try:
        import simpy  # noqa: PLC0415 - no dependency of ours
    except ModuleNotFoundError:
        print("SimPy is not installed; for this comparison: .venv/bin/python -m pip install simpy==4.1.1")
        return 1
    events = arguments.events
    sides: dict[str, Callable[[], float]] = {
        "archi-sim's world": lambda: ours(events),
        "SimPy, bare time-outs": lambda: simpy_timeouts(simpy, events),
        "SimPy, nodes with mailboxes": lambda: simpy_mailboxes(simpy, events // 10),
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    gc.freeze()
    for _ in range(arguments.rounds):
        for name, side in sides.items():
            rates[name].append(side())
    header("Events a second (CPU) on the same toy")
    row("", "events/s", "of SimPy's bare")
    base = median(rates["SimPy, bare time-outs"])
    for name, found in rates.items():
        row(name, f"{median(found):,.0f}", f"{median(found) / base:.2f} x")
    return 0
