"""Two runs side by side, and grids of runs."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import active_children
from pathlib import Path
from typing import Any, Final

import msgspec

from sim.facts import RunFacts, VariantFacts
from sim.settings import ScenarioError, parse_value

#: Runs of one sweep: more is a slip in the grid.
MAX_RUNS: Final = 10_000

#: Progress of a sweep is told this often, also while no run ends.
TELL_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Line:
    """One figure of two runs. `better`: "lower", "higher" or ""."""

    variant: str
    metric: str
    unit: str
    a: float | None
    b: float | None
    better: str

    @property
    def ratio(self) -> float | None:
        """`b` over `a`."""
        return self.b / self.a if self.a and self.b is not None else None


def compare(a: RunFacts, b: RunFacts) -> list[Line]:
    """Every figure of both; variants are matched by name, or by place if no name occurs in both."""
    first = {variant.name: variant for variant in a.variants}
    second = {variant.name: variant for variant in b.variants}
    pairs: list[tuple[str, VariantFacts | None, VariantFacts | None]]
    if first.keys() & second.keys():
        pairs = [(name, first.get(name), second.get(name)) for name in dict.fromkeys([*first, *second])]
    else:
        pairs = [(f"{x.name} / {y.name}", x, y) for x, y in zip(a.variants, b.variants, strict=False)]
    lines: list[Line] = []
    for name, x, y in pairs:
        ours = x.metrics if x else {}
        theirs = y.metrics if y else {}
        for metric in dict.fromkeys([*ours, *theirs]):
            left, right = ours.get(metric), theirs.get(metric)
            known = left or right
            if known is not None:
                values = (left.value if left else None, right.value if right else None)
                lines.append(Line(name, metric, known.unit, *values, known.better))
    return lines


def grid_of(axes: Sequence[str]) -> list[dict[str, object]]:
    """All combinations of `name=v1,v2,...` axes. Raises ScenarioError."""
    parsed: list[tuple[str, list[object]]] = []
    for axis in axes:
        name, equals, values = axis.partition("=")
        if not equals or not name.strip() or not values:
            raise ScenarioError(
                f"a grid's axis is NAME=V1,V2,..., not {axis!r}; for example links.loss=0,0.01,0.05"
            )
        parsed.append((name.strip(), [parse_value(value) for value in _split(values)]))
    combinations = [
        dict(zip([name for name, _ in parsed], values, strict=True))
        for values in itertools.product(*(values for _, values in parsed))
    ]
    if len(combinations) > MAX_RUNS:
        raise ScenarioError(f"{len(combinations)} runs; a sweep has at most {MAX_RUNS}")
    return combinations


def _split(values: str) -> list[str]:
    """At commas outside brackets and quotes: lists are values too."""
    parts, depth, quoted, start = list[str](), 0, False, 0
    for at, char in enumerate(values):
        if char == '"':
            quoted = not quoted
        depth += (char in "[{") - (char in "]}")
        if char == "," and not depth and not quoted:
            parts.append(values[start:at])
            start = at + 1
    return [part.strip() for part in (*parts, values[start:])]


def sweep(
    scenario: str,
    grid: Sequence[dict[str, object]],
    options: dict[str, Any],
    out: Path,
    *,
    jobs: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[RunFacts]:
    """Run each point of the grid in a process of its own, at most one per core (or `jobs`); each writes to a
    folder of its own under `out`. Gives their facts in the grid's order; interrupted (KeyboardInterrupt):
    those that were done. `progress` is called with how many are done and how many there are, each second.
    """
    cores = os.cpu_count() or 1
    bound = min(jobs or cores, cores, len(grid)) or 1
    facts: dict[int, RunFacts] = {}
    others = set(active_children())
    with ProcessPoolExecutor(max_workers=bound, initializer=_in_worker) as pool:
        work = {
            pool.submit(_run_point, scenario, point, options, str(out / f"{number:04d}")): number
            for number, point in enumerate(grid)
        }
        pending = set(work)
        try:
            while pending:
                done, pending = wait(pending, timeout=TELL_S, return_when=FIRST_COMPLETED)
                for future in done:
                    facts[work[future]] = future.result()
                if progress is not None:
                    progress(len(facts), len(grid))
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in set(active_children()) - others:
                worker.terminate()
    return [facts[number] for number in sorted(facts)]


class _Interruption:
    """In a worker: whether the sweep is over. Told by SIGTERM from whoever started it, and taken once: a
    terminal's Ctrl-C reaches the workers as well, and a second one would break the writing of what there is.
    """

    def __init__(self) -> None:
        self._told = False
        self._running = False

    def __enter__(self) -> None:
        if self._told:  # the next run was in the queue already
            raise KeyboardInterrupt
        self._running = True

    def __exit__(self, *_: object) -> None:
        self._running = False

    def tell(self, *_: object) -> None:
        """The signal's handler."""
        first, self._told = not self._told, True
        if first and self._running:
            raise KeyboardInterrupt


_INTERRUPTION: Final = _Interruption()


def _in_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _INTERRUPTION.tell)


def _run_point(scenario: str, point: dict[str, object], options: dict[str, Any], out: str) -> RunFacts:
    from sim.scenario import Scenario, run  # noqa: PLC0415 - in the worker

    changes = {**options.get("changes", {}), **point}
    loaded = Scenario.load(scenario, nodes=options.get("nodes"), seed=options.get("seed"), changes=changes)
    with _INTERRUPTION:
        result = run(loaded, out=out)
    if not result.complete:
        raise KeyboardInterrupt
    return msgspec.structs.replace(result.facts([]), point=point)
