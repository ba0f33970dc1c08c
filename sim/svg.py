"""Charts as SVG text: curves, bars, axes with units. No library, no script, nothing loaded from anywhere.

Colours are CSS variables of the page (`--c0` ...), so that one drawing serves light and dark. Every mark has a
`<title>`, which browsers show on hover.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Final, TypeAlias

WIDTH: Final = 500
HEIGHT: Final = 290
LEFT: Final = 62
RIGHT: Final = 16
TOP: Final = 14
BOTTOM: Final = 46

#: Colours there are. Each curve has a dash of its own, too, so that one that lies on another does not hide it.
COLOURS: Final = 8
DASHES: Final = ("", "7 4", "2 3", "9 3 2 3")

#: Points drawn of one curve: more than pixels across only make the file large.
MAX_POINTS: Final = 400

Point: TypeAlias = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Curve:
    """A named line."""

    name: str
    points: Sequence[Point]


@dataclass(frozen=True, slots=True)
class Axis:
    """What is drawn along it. `low`, `high`: fixed ends, else from the data."""

    label: str
    low: float | None = None
    high: float | None = None
    log: bool = False


class _Scale:
    """Data to pixels."""

    def __init__(self, axis: Axis, values: Sequence[float], start: float, end: float) -> None:
        low = axis.low if axis.low is not None else min(values, default=0.0)
        high = axis.high if axis.high is not None else max(values, default=1.0)
        if axis.log:
            low = max(low, 1e-9)
            self.ticks = _log_ticks(low, max(high, low * 1.01))
            low, high = min(low, self.ticks[0]), max(high, self.ticks[-1])
        else:
            if high <= low:
                low, high = (low - 1.0, low + 1.0) if low else (0.0, 1.0)
            self.ticks = _ticks(low, high)
            if axis.low is None:
                low = min(low, self.ticks[0])
            if axis.high is None:
                high = max(high, self.ticks[-1])
        self._log = axis.log
        self._low = math.log10(low) if axis.log else low
        self._high = math.log10(high) if axis.log else high
        self._start, self._end = start, end
        self._least = low

    def __call__(self, value: float) -> float:
        if self._log:
            value = math.log10(max(value, self._least))
        share = (value - self._low) / (self._high - self._low)
        return self._start + (self._end - self._start) * min(max(share, 0.0), 1.0)


def lines(x: Axis, y: Axis, curves: Sequence[Curve], *, steps: bool = False) -> str:
    """Curves over common axes. `steps`: hold each value until the next point (distribution functions)."""
    drawn = [Curve(curve.name, _thinned(curve.points)) for curve in curves if curve.points]
    if not drawn:
        return '<p class="none">nothing happened</p>'
    scale_x = _Scale(x, [p[0] for c in drawn for p in c.points], LEFT, WIDTH - RIGHT)
    scale_y = _Scale(y, [p[1] for c in drawn for p in c.points], HEIGHT - BOTTOM, TOP)
    body = [_frame(x, y, scale_x, scale_y)]
    for number, curve in enumerate(drawn):
        path = _path([(scale_x(px), scale_y(py)) for px, py in curve.points], steps=steps)
        style = f"stroke:var(--c{number % COLOURS});stroke-dasharray:{_dash(number) or 'none'}"
        title = f"<title>{escape(curve.name)}</title>"
        body.append(f'<path class="curve" style="{style}" d="{path}">{title}</path>')
    return _svg("".join(body)) + legend([curve.name for curve in drawn])


def bars(y: Axis, groups: Sequence[str], values: Sequence[tuple[str, Sequence[float]]]) -> str:
    """Bars side by side: `values` holds (name, one value per group)."""
    known = [v for _, row in values for v in row if not math.isnan(v)]
    if not known:
        return '<p class="none">nothing happened</p>'
    low = y.low if y.low is not None or min(known) < 0.0 else 0.0
    fixed = Axis(y.label, low, y.high)
    scale_y = _Scale(fixed, [*known, 0.0], HEIGHT - BOTTOM, TOP)
    span = (WIDTH - LEFT - RIGHT) / max(1, len(groups))
    wide = min(56.0, span * 0.8 / max(1, len(values)))
    body = [_y_axis(fixed, scale_y)]
    zero = scale_y(0.0)
    for at, group in enumerate(groups):
        middle = LEFT + span * (at + 0.5)
        for number, (name, row) in enumerate(values):
            if math.isnan(row[at]):
                continue
            left = middle + (number - len(values) / 2) * wide
            top, bottom = sorted((scale_y(row[at]), zero))
            title = f"<title>{escape(name)}, {escape(group)}: {row[at]:.4g} {escape(y.label)}</title>"
            box = (
                f'x="{left + 1:.1f}" y="{top:.1f}" width="{wide - 2:.1f}" height="{max(0.5, bottom - top):.1f}"'
            )
            body.append(f'<rect {box} rx="2" style="fill:var(--c{number % COLOURS})">{title}</rect>')
        label = f'<text class="tick" x="{middle:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">'
        body.append(f"{label}{escape(group)}</text>")
    body.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{zero:.1f}" y2="{zero:.1f}"/>')
    return _svg("".join(body)) + (legend([name for name, _ in values]) if len(values) > 1 else "")


def distribution(values: Sequence[float]) -> list[Point]:
    """The empirical distribution function's points: (value, share of values up to it in %)."""
    ordered = sorted(values)
    points = [(value, 100.0 * (at + 1) / len(ordered)) for at, value in enumerate(ordered)]
    return [(ordered[0], 0.0), *points] if ordered else []


def legend(names: Sequence[str]) -> str:
    """Colours and dashes by name."""
    items: list[str] = []
    for number, name in enumerate(names):
        style = f"stroke:var(--c{number % COLOURS});stroke-dasharray:{_dash(number) or 'none'}"
        line = f'<line x1="1" x2="25" y1="5" y2="5" style="{style}"/>'
        items.append(f'<span><svg width="26" height="10" aria-hidden="true">{line}</svg>{escape(name)}</span>')
    return f'<div class="legend">{"".join(items)}</div>'


def _dash(number: int) -> str:
    return DASHES[number % len(DASHES)]


def _thinned(points: Sequence[Point]) -> list[Point]:
    if len(points) <= MAX_POINTS:
        return list(points)
    step = (len(points) - 1) / (MAX_POINTS - 1)
    return [points[round(n * step)] for n in range(MAX_POINTS)]


def _path(points: Sequence[Point], *, steps: bool) -> str:
    parts = [f"M{points[0][0]:.1f} {points[0][1]:.1f}"]
    for x, y in points[1:]:
        parts.append(f"H{x:.1f}V{y:.1f}" if steps else f"L{x:.1f} {y:.1f}")
    return "".join(parts)


def _frame(x: Axis, y: Axis, scale_x: _Scale, scale_y: _Scale) -> str:
    body = [_y_axis(y, scale_y)]
    base = HEIGHT - BOTTOM
    body.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    for tick in scale_x.ticks:
        at = scale_x(tick)
        body.append(f'<line class="axis" x1="{at:.1f}" x2="{at:.1f}" y1="{base}" y2="{base + 4}"/>')
        text = (
            f'<text class="tick" x="{at:.1f}" y="{base + 18}" text-anchor="middle">{number_text(tick)}</text>'
        )
        body.append(text)
    middle = (LEFT + WIDTH - RIGHT) / 2
    body.append(
        f'<text class="label" x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x.label)}</text>'
    )
    return "".join(body)


def _y_axis(y: Axis, scale: _Scale) -> str:
    body: list[str] = []
    for tick in scale.ticks:
        at = scale(tick)
        body.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        text = (
            f'<text class="tick" x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{number_text(tick)}</text>'
        )
        body.append(text)
    middle = (TOP + HEIGHT - BOTTOM) / 2
    turn = f'transform="translate(14 {middle}) rotate(-90)"'
    body.append(f'<text class="label" {turn} text-anchor="middle">{escape(y.label)}</text>')
    return "".join(body)


def _svg(body: str) -> str:
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{body}</svg>'


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers that cover the range, about six of them."""
    rough = (high - low) / 5
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    return [10.0**n for n in range(first, max(last, first + 1) + 1)]


def number_text(value: float) -> str:
    """A number for a reader: 4 digits, thousands parted by a thin space."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 10_000:
        return f"{value:,.0f}".replace(",", "\N{THIN SPACE}")
    if size >= 1000:
        return f"{value:.0f}"
    return f"{value:.4g}" if size >= 0.001 else f"{value:.2g}"
