"""A scenario from file to result: `Scenario.load`, `run`, `Result.save`."""

from __future__ import annotations

import gzip
import hashlib
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from io import TextIOWrapper
from pathlib import Path
from typing import Any, Protocol

import psutil

from sim.build import Progress, calm_collector
from sim.config import ScenarioSettings
from sim.event_log import Rows
from sim.facts import FORMAT, Figure, RunFacts, Traffic, VariantFacts, write_facts
from sim.record import Recorder, write_tables
from sim.settings import ScenarioError, Tree, find_scenario, read_tree, variants_of, with_changes
from sim.world import World


class Study(Protocol):
    """What `run` drives."""

    world: World

    def run(self) -> None: ...

    def sum_up(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Scenario:
    """A scenario's plain values, checked. `folder`: where the files that it names are."""

    name: str
    tree: Tree
    folder: Path
    variants: tuple[tuple[str, ScenarioSettings], ...]

    @staticmethod
    def load(
        scenario: str | Path,
        *,
        nodes: int | None = None,
        seed: int | None = None,
        changes: Mapping[str, object] | None = None,
    ) -> Scenario:
        """A scenario file, a shipped scenario's name, or the run.json of an earlier run; with changes by dotted
        name (which override variants too). Raises ScenarioError.
        """
        file = find_scenario(str(scenario))
        return Scenario.of(read_tree(file), file.stem, file.parent, nodes=nodes, seed=seed, changes=changes)

    @staticmethod
    def of(
        tree: Tree,
        name: str = "scenario",
        folder: Path | None = None,
        *,
        nodes: int | None = None,
        seed: int | None = None,
        changes: Mapping[str, object] | None = None,
    ) -> Scenario:
        """The same from plain values, as a TOML file would give them. Raises ScenarioError."""
        wanted = dict(changes or {})
        if nodes is not None:
            wanted["world.nodes"] = nodes
        if seed is not None:
            wanted["world.seed"] = seed
        changed = with_changes(tree, wanted)
        folder = folder or Path.cwd()
        return Scenario(name, changed, folder, tuple(variants_of(changed, name, frozenset(wanted))))

    @property
    def title(self) -> str:
        return self.variants[0][1].title

    @property
    def summary(self) -> str:
        return self.variants[0][1].summary


@dataclass(slots=True)
class Timing:
    """What a variant cost this machine: not part of the history. `us_per_event`: CPU time."""

    wall_s: float = 0.0
    cpu_s: float = 0.0
    events: int = 0
    nodes: int = 0
    grown_bytes: int = 0

    @property
    def us_per_event(self) -> float:
        return 1e6 * self.cpu_s / max(1, self.events)

    @property
    def bytes_per_node(self) -> float:
        return self.grown_bytes / max(1, self.nodes)


@dataclass(slots=True)
class Result:
    """What came out. `complete`: False if it was interrupted."""

    scenario: Scenario
    recorders: list[Recorder] = field(default_factory=list[Recorder])
    digests: dict[str, str] = field(default_factory=dict[str, str])
    timings: dict[str, Timing] = field(default_factory=dict[str, Timing])
    messages: dict[str, dict[str, tuple[int, int]]] = field(
        default_factory=dict[str, dict[str, tuple[int, int]]]
    )
    complete: bool = False

    @property
    def events(self) -> int:
        return sum(timing.events for timing in self.timings.values())

    @property
    def sha256(self) -> str:
        """Over the event logs of all variants: of one, its own; of several, over "name digest" lines."""
        if len(self.digests) == 1:
            return next(iter(self.digests.values()))
        lines = "".join(f"{name} {digest}\n" for name, digest in self.digests.items())
        return hashlib.sha256(lines.encode()).hexdigest()

    def metric(self, name: str, variant: str | None = None) -> float:
        """A figure by name, of a variant (else the first). Raises KeyError."""
        recorder = next(r for r in self.recorders if variant is None or r.variant == variant)
        return recorder.metrics[name].value

    def table(self, name: str, variant: str | None = None) -> list[dict[str, Any]]:
        """A table's rows as dictionaries (a data frame's food). Raises KeyError."""
        recorder = next(r for r in self.recorders if variant is None or r.variant == variant)
        table = recorder.tables[name]
        return [dict(zip(table.columns, row, strict=True)) for row in table.rows]

    def save(self, folder: str | Path) -> Path:
        """Write run.json, tables, series and the report; gives the report's path."""
        from sim.report import render_report  # noqa: PLC0415 - only a saved run needs it

        to = Path(folder)
        to.mkdir(parents=True, exist_ok=True)
        files = write_tables(to, self.recorders)
        write_facts(to / "run.json", self.facts(files))
        report = to / "report.html"
        report.write_text(render_report(self), encoding="utf-8")
        return report

    def facts(self, files: list[str]) -> RunFacts:
        """What run.json holds."""
        return RunFacts(
            FORMAT,
            self.scenario.name,
            self.scenario.tree,
            self.complete,
            self.events,
            self.sha256,
            [self._variant_facts(recorder) for recorder in self.recorders],
            files,
            {
                "archipelag": version("archipelag"),
                "python": platform.python_version(),
                "machine": f"{platform.system()} {platform.machine()}",
            },
        )

    def _variant_facts(self, recorder: Recorder) -> VariantFacts:
        name = recorder.variant
        timing = self.timings[name]
        return VariantFacts(
            name,
            self.digests[name],
            timing.events,
            {metric: Figure(m.value, m.unit, m.better) for metric, m in recorder.metrics.items()},
            recorder.notes,
            {kind: Traffic(count, size) for kind, (count, size) in self.messages[name].items()},
            round(timing.wall_s, 3),
            round(timing.cpu_s, 3),
            round(timing.us_per_event, 3),
            round(timing.bytes_per_node),
        )


def run(
    scenario: Scenario | str | Path,
    *,
    out: str | Path | None = None,
    progress: Progress | None = None,
    **changes: Any,  # noqa: ANN401 - nodes, seed, changes of Scenario.load
) -> Result:
    """Run all variants. `out`: a folder to write to. `progress`: called with (what, share done).

    Other arguments are those of `Scenario.load`: nodes, seed, changes. Raises ScenarioError. An interrupt
    (Ctrl-C) ends the run early; the result says so and holds what there is.
    """
    if not isinstance(scenario, Scenario):
        scenario = Scenario.load(scenario, **changes)
    elif changes:
        raise TypeError("nodes, seed and changes belong to Scenario.load")
    result = Result(scenario)
    tell = progress or _silent
    events_to = Path(out) if out is not None else None
    try:
        for number, (name, settings) in enumerate(scenario.variants):
            count = len(scenario.variants)

            def within(
                what: str, share: float, name: str = name, number: int = number, count: int = count
            ) -> None:
                tell(f"{name}: {what}" if count > 1 else what, (number + share) / count)

            _run_variant(result, name, settings, within, events_to)
        result.complete = True
    except KeyboardInterrupt:
        result.complete = False
    if out is not None:
        result.save(out)
    return result


def _run_variant(
    result: Result, name: str, settings: ScenarioSettings, progress: Progress, events_to: Path | None
) -> None:
    recorder, timing = Recorder(name), Timing()
    process = psutil.Process()
    before, started, cpu = process.memory_info().rss, time.perf_counter(), time.process_time()
    with calm_collector():
        study = _study(settings, result.scenario.folder, recorder, progress)
        log = study.world.log
        writer = _EventWriter(events_to, name, log.names) if settings.world.events and events_to else None
        if writer is not None:
            log.sinks.append(writer.write)
        try:
            study.run()
        finally:  # also after Ctrl-C: what there is counts
            timing.wall_s = time.perf_counter() - started
            timing.cpu_s = time.process_time() - cpu
            timing.grown_bytes = max(0, process.memory_info().rss - before)
            result.digests[name] = study.world.digest()
            timing.events, timing.nodes = log.events, study.world.nodes
            result.timings[name] = timing
            result.messages[name] = log.counts()
            study.sum_up()
            result.recorders.append(recorder)
            if writer is not None:
                writer.close()


def _silent(what: str, share: float) -> None:
    """Nobody watches."""


def _study(settings: ScenarioSettings, folder: Path, recorder: Recorder, progress: Progress) -> Study:
    from sim.studies.chains import ChainStudy  # noqa: PLC0415 - a study imports what it simulates
    from sim.studies.dht import DhtStudy  # noqa: PLC0415
    from sim.studies.jobs import JobStudy  # noqa: PLC0415
    from sim.studies.karma import KarmaStudy  # noqa: PLC0415

    studies: dict[str, Callable[..., Study]] = {
        "dht": DhtStudy,
        "jobs": JobStudy,
        "karma": KarmaStudy,
        "chains": ChainStudy,
    }
    return studies[settings.study](settings, folder, recorder, progress)


class _EventWriter:
    """Every event as a line of events-<variant>.csv.gz, block by block."""

    def __init__(self, folder: Path, variant: str, names: Mapping[int, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._names = names
        raw = gzip.GzipFile(folder / f"events-{variant}.csv.gz", "wb", 6, mtime=0)
        self._file = TextIOWrapper(raw, encoding="ascii", newline="\n")  # type: ignore[arg-type]
        self._file.write("time_ns,source,target,kind,bytes\n")

    def write(self, rows: Rows) -> None:
        names = self._names
        for at, source, target, kind, size in rows.tolist():
            self._file.write(f"{at},{source},{target},{names[kind]},{max(size, 0)}\n")

    def close(self) -> None:
        self._file.close()


__all__ = ["Result", "Scenario", "ScenarioError", "run"]
