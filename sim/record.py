"""What a run leaves: tables of single happenings, series over time, and figures that sum it up."""

from __future__ import annotations

import csv
import gzip
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, TypeAlias

from protocol.instants import SECOND_NS

Cell: TypeAlias = int | float | str
Better: TypeAlias = Literal["lower", "higher", ""]

#: Significant digits of floats in files: what a reader can use, and the same text on every machine.
DIGITS: Final = 9


@dataclass(slots=True)
class Table:
    """Rows of one kind."""

    columns: tuple[str, ...]
    rows: list[tuple[Cell, ...]] = field(default_factory=list[tuple[Cell, ...]])

    def column(self, name: str) -> list[Cell]:
        at = self.columns.index(name)
        return [row[at] for row in self.rows]

    def numbers(self, name: str) -> list[float]:
        """A column's numbers."""
        return [float(cell) for cell in self.column(name) if not isinstance(cell, str)]


@dataclass(frozen=True, slots=True)
class Metric:
    """A figure. `better`: which way is good, where that is plain."""

    value: float
    unit: str
    better: Better = ""


class Recorder:
    """Everything recorded of one variant of a scenario."""

    def __init__(self, variant: str) -> None:
        self.variant = variant
        self.tables: dict[str, Table] = {}
        self.series: dict[str, list[tuple[float, float]]] = {}
        self.metrics: dict[str, Metric] = {}
        self.notes: list[str] = []

    def table(self, name: str, *columns: str) -> Table:
        """The table of this name, made on first use."""
        if name not in self.tables:
            self.tables[name] = Table(columns)
        return self.tables[name]

    def point(self, series: str, at_ns: int, value: float) -> None:
        """One more value of a series over time."""
        self.series.setdefault(series, []).append((at_ns / SECOND_NS, value))

    def measure(self, name: str, value: float, unit: str, better: Better = "") -> None:
        """A figure that sums up. Not a number (nothing happened) is left out."""
        if not math.isnan(value):
            self.metrics[name] = Metric(value, unit, better)

    def measure_spread(self, name: str, values: Iterable[float], unit: str, better: Better = "lower") -> None:
        """p50, p90 and p99 of values."""
        ordered = sorted(values)
        for percent in (50, 90, 99):
            self.measure(f"{name} p{percent}", quantile(ordered, percent / 100), unit, better)

    def note(self, text: str) -> None:
        """A sentence for the report: how this variant was made, what to be careful of."""
        self.notes.append(text)


def quantile(ordered: Sequence[float], share: float) -> float:
    """The value below which `share` of the sorted values lie (nearest rank); NaN of none."""
    if not ordered:
        return math.nan
    return ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))]


def mean(values: Sequence[float]) -> float:
    """NaN of none. Summed exactly (fsum), so that no order matters."""
    return math.fsum(values) / len(values) if values else math.nan


def text_of(cell: Cell) -> str:
    """As it stands in files."""
    return f"{cell:.{DIGITS}g}" if isinstance(cell, float) else str(cell)


def write_csv(file: Path, columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> None:
    """CSV, gzipped if the name ends so; the same rows give the same bytes."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([text_of(cell) for cell in row] for row in rows)
    data = text.getvalue().encode()
    file.write_bytes(gzip.compress(data, 6, mtime=0) if file.suffix == ".gz" else data)


def write_tables(folder: Path, recorders: Sequence[Recorder]) -> list[str]:
    """All tables and series of all variants; gives the files' names."""
    written: list[str] = []
    names = list(dict.fromkeys(name for recorder in recorders for name in recorder.tables))
    for name in names:
        parts = [(r.variant, r.tables[name]) for r in recorders if name in r.tables]
        rows = ((variant, *row) for variant, table in parts for row in table.rows)
        write_csv(folder / f"{name}.csv.gz", ("variant", *parts[0][1].columns), rows)
        written.append(f"{name}.csv.gz")
    series = (
        (r.variant, name, at_s, value)
        for r in recorders
        for name, points in r.series.items()
        for at_s, value in points
    )
    write_csv(folder / "series.csv.gz", ("variant", "series", "time_s", "value"), series)
    metrics = ((r.variant, name, m.value, m.unit) for r in recorders for name, m in r.metrics.items())
    write_csv(folder / "metrics.csv", ("variant", "metric", "value", "unit"), metrics)
    return [*written, "series.csv.gz", "metrics.csv"]
