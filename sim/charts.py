"""Which charts a study's records make. A chart is made where its data is; the report draws all there are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from sim import svg
from sim.record import Recorder


class Chart(NamedTuple):
    title: str
    caption: str
    picture: str


class _Cdf(NamedTuple):
    """A distribution of a table's column."""

    title: str
    table: str
    column: str
    unit: str
    caption: str
    log: bool = False


class _Bars(NamedTuple):
    """Metrics side by side, one group each, one bar per variant."""

    title: str
    unit: str
    metrics: tuple[tuple[str, str], ...]
    caption: str


class _Lines(NamedTuple):
    """Series over time; names that begin with `series` are drawn together."""

    title: str
    series: str
    unit: str
    caption: str


Spec = _Cdf | _Bars | _Lines

#: Units of time axes: from so many seconds on, divided by, named.
_TIMES: Final = (
    (2 * 86_400.0, 86_400.0, "days"),
    (3 * 3600.0, 3600.0, "h"),
    (600.0, 60.0, "min"),
    (0.0, 1.0, "s"),
)

CHARTS: Final[tuple[Spec, ...]] = (
    _Cdf("Lookup latency", "lookups", "latency_ms", "ms", "Share of lookups that ended within this time."),
    _Bars(
        "Lookup latency by percentile",
        "ms",
        (("p50", "lookup latency p50"), ("p90", "lookup latency p90"), ("p99", "lookup latency p99")),
        "Nearest rank.",
    ),
    _Cdf("Hops", "lookups", "hops", "hops", "The longest chain of referrals that led to a result."),
    _Cdf("Queries per lookup", "lookups", "queries", "queries", "Asked peers per lookup, failures included."),
    _Lines(
        "Lookup latency over time",
        "lookup p50 over time (ms)",
        "ms, median of the slice",
        "Lookups that ended in each slice of time.",
    ),
    _Lines(
        "Table health", "dead table entries (%)", "% of entries", "Entries that point to nodes that are down."
    ),
    _Lines("Table size", "table entries per node", "entries", "Mean over a sample of nodes."),
    _Lines("Nodes up", "nodes up", "nodes", "Who is there to be found."),
    _Lines("Attackers in tables", "attackers in tables (%)", "% of entries", "In tables of nodes that are up."),
    _Cdf(
        "Messages received per node",
        "nodes",
        "received",
        "messages",
        "Over the whole run. A long tail is an uneven load.",
        log=True,
    ),
    _Cdf("Job latency", "jobs", "latency_s", "s", "From the request to its last token.", log=True),
    _Cdf(
        "Placement regret", "jobs", "regret_s", "s", "Beyond the best that one who knew all could have chosen."
    ),
    _Cdf("Price per job", "jobs", "price_ucr", "micro-credits", "At the Islands' asking prices."),
    _Cdf("Token rate of jobs", "generations", "tokens_per_s", "tokens/s", "From the first token to the last."),
    _Cdf("First token", "generations", "first_token_s", "s", "From the request on."),
    _Cdf("Gaps after a loss", "gaps", "gap_s", "s", "Between two tokens, where a stage or a head died."),
    _Lines("Ranges without a holder", "ranges without a holder", "ranges", "Places of the chains laid out."),
    _Lines("Islands that joined", "Islands that joined busy ranges", "Islands", "Because sessions were many."),
    _Lines("Karma of attackers", "karma: attackers", "points, median", "By honest coordinators; +10 is paid."),
    _Lines("Karma of the honest", "karma: honest", "points, median", "By honest coordinators; +10 is paid."),
    _Bars(
        "What attacking pays",
        "hours' prices",
        (("honest", "income of an honest machine"), ("attacker", "income of an attacking machine")),
        "Income of one machine over the whole run: paid work less the cost of what was computed.",
    ),
    _Lines("Jobs open", "jobs open", "jobs", "Running or queued, all gateways together."),
    _Lines("Jobs waiting", "jobs waiting for an Island", "jobs", "Nobody known can take them now."),
    _Lines(
        "Islands with fewer than two coordinators",
        "Islands with fewer than two coordinators",
        "Islands",
        "Counted in the books of coordinators that live.",
    ),
    _Lines("Islands known to gateways", "Islands known per gateway", "Islands", "Mean over gateways."),
    _Cdf("Joining", "joins", "took_ms", "ms", "From the order to join to the table standing."),
)


def draw(recorders: Sequence[Recorder]) -> list[Chart]:
    """All charts that the records have data for, in order."""
    makers: dict[type, Callable[..., str | None]] = {_Cdf: _cdf, _Bars: _bars, _Lines: _lines}
    charts: list[Chart] = []
    for spec in CHARTS:
        picture = makers[type(spec)](spec, recorders)
        if picture is not None:
            charts.append(Chart(spec.title, spec.caption, picture))
    return charts


def _cdf(spec: _Cdf, recorders: Sequence[Recorder]) -> str | None:
    curves: list[svg.Curve] = []
    for recorder in recorders:
        table = recorder.tables.get(spec.table)
        values = table.numbers(spec.column) if table is not None else []
        if values:
            curves.append(svg.Curve(recorder.variant, svg.distribution(values)))
    if not curves:
        return None
    low = None if spec.log else 0.0
    what = spec.title.lower()
    x = svg.Axis(spec.unit if spec.unit in what else f"{what} ({spec.unit})", low=low, log=spec.log)
    return svg.lines(x, svg.Axis("share (%)", 0.0, 100.0), curves, steps=True)


def _bars(spec: _Bars, recorders: Sequence[Recorder]) -> str | None:
    rows: list[tuple[str, list[float]]] = []
    for recorder in recorders:
        found = [recorder.metrics.get(metric) for _, metric in spec.metrics]
        rows.append((recorder.variant, [math.nan if m is None else m.value for m in found]))
    if all(math.isnan(value) for _, values in rows for value in values):
        return None
    return svg.bars(svg.Axis(spec.unit), [label for label, _ in spec.metrics], rows)


def _lines(spec: _Lines, recorders: Sequence[Recorder]) -> str | None:
    curves: list[svg.Curve] = []
    for recorder in recorders:
        for name, points in recorder.series.items():
            if name.startswith(spec.series) and len(points) > 1:
                rest = name.removeprefix(spec.series).strip(" :")
                label = f"{recorder.variant}, {rest}" if rest else recorder.variant
                curves.append(svg.Curve(label, points))
    values = [value for curve in curves for _, value in curve.points]
    if not any(values):
        return None  # all zero: what this would show did not happen
    last = max(at for curve in curves for at, _ in curve.points)
    scale, unit = next((scale, unit) for least, scale, unit in _TIMES if last >= least)
    scaled = [svg.Curve(curve.name, [(at / scale, value) for at, value in curve.points]) for curve in curves]
    y = svg.Axis(spec.unit, low=0.0 if min(values) >= 0.0 else None)
    return svg.lines(svg.Axis(f"time since the measuring began ({unit})", low=0.0), y, scaled)
