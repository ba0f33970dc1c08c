"""One HTML file that tells a run: figures, charts, configuration, how to repeat it. Nothing is loaded from
anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from importlib.metadata import version
from typing import TYPE_CHECKING, Final

from sim.charts import draw
from sim.progress import span_text
from sim.record import Metric, Recorder
from sim.svg import number_text

if TYPE_CHECKING:
    from sim.scenario import Result

_STYLE: Final = """
:root { color-scheme: light dark; --ink: #1b2330; --soft: #5b6675; --line: #d9dee5; --paper: #ffffff; --card:
#f6f8fa;
  --good: #0a7d4f; --c0: #0b6bcb; --c1: #d9480f; --c2: #12805c; --c3: #9c36b5; --c4: #b08900; --c5: #c2255c;
  --c6: #5f3dc4; --c7: #495057; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8ecf1; --soft: #9aa7b6; --line: #333d4a; --paper: #12171e; --card: #1a212a;
    --good: #4cc38a; --c0: #5eb0ff; --c1: #ff9f5a; --c2: #4cc9a0; --c3: #d58bf0; --c4: #e6c34a; --c5: #ff7fa8;
    --c6: #a99bff; --c7: #adb5bd; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1460px; padding: 2rem 1.25rem 4rem; background: var(--paper); color:
var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; letter-spacing: -.01em; } h2 { font-size: 1.15rem; margin: 2.4rem 0
.8rem; } h3 { font-size: 1rem; margin: 0; } p { max-width: 75ch; } .soft, .none { color: var(--soft); }
.facts { display: flex; flex-wrap: wrap; gap: .4rem 1.6rem; color: var(--soft); font-size: .9rem; margin: .8rem
0; } .facts b { color: var(--ink); font-weight: 600; }
code, pre { font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; } code { overflow-wrap:
anywhere; } pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .9rem
1rem; overflow-x: auto; } .wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric:
tabular-nums; font-size: .92rem; } th, td { padding: .36rem .9rem .36rem 0; text-align: right; border-bottom:
1px solid var(--line); white-space: nowrap; } th:first-child, td:first-child { text-align: left; } th { color:
var(--soft); font-weight: 600; } td.unit { color: var(--soft); text-align: left; } td.best { color: var(--good);
font-weight: 650; } .charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 460px),
1fr)); gap: 1.1rem; } figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius:
10px; padding: .9rem 1rem .7rem; } figcaption { margin-bottom: .3rem; } figcaption span { color: var(--soft);
font-size: .85rem; } svg.chart { width: 100%; height: auto; display: block; } .curve { fill: none; stroke-width:
2; stroke-linejoin: round; } .grid { stroke: var(--line); stroke-width: 1; } .axis { stroke: var(--soft);
stroke-width: 1; } .tick { fill: var(--soft); font-size: 11.5px; } .label { fill: var(--soft); font-size:
12.5px; } .legend { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; font-size: .85rem; color: var(--soft);
padding: .2rem 0 0 3.2rem; } .legend svg { vertical-align: middle; margin-right: .35rem; stroke-width: 2.5; }
details { margin-top: .8rem; } summary { cursor: pointer; color: var(--soft); }
.warn { border-left: 3px solid var(--c1); padding: .2rem .8rem; }
@media print { figure { break-inside: avoid; } }
"""

#: Variants up to which each has a column of ratios to the first; more do not fit a page.
MAX_RATIOS: Final = 4


def render_report(result: Result) -> str:
    """The whole page."""
    scenario = result.scenario
    body = [
        f"<h1>{escape(scenario.title)}</h1>",
        f"<p>{escape(scenario.summary)}</p>" if scenario.summary else "",
        _facts(result),
        ""
        if result.complete
        else '<p class="warn">This run was interrupted: it can not be cited or compared.</p>',
        _notes(result.recorders),
        "<h2>Figures</h2>",
        _metrics(result.recorders),
        "<h2>Charts</h2>",
        f'<div class="charts">{_charts(result.recorders)}</div>',
        "<h2>Messages</h2>",
        _messages(result),
        "<h2>What it cost to simulate</h2>",
        _timings(result),
        "<h2>Configuration</h2>",
        _configuration(result),
    ]
    head = f'<meta charset="utf-8"><title>{escape(scenario.title)}</title>'
    head += f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'


def _facts(result: Result) -> str:
    world = result.scenario.variants[0][1].world
    facts = [
        ("seed", str(world.seed)),
        ("nodes", number_text(world.nodes)),
        ("measured", span_text(world.duration_s)),
        ("events", number_text(result.events)),
        ("variants", str(len(result.recorders))),
    ]
    spans = "".join(f"<span>{name} <b>{escape(value)}</b></span>" for name, value in facts)
    return f'<div class="facts">{spans}<span>sha256 <code>{result.sha256}</code></span></div>'


def _notes(recorders: Sequence[Recorder]) -> str:
    notes = dict.fromkeys(note for recorder in recorders for note in recorder.notes)
    return "".join(f'<p class="warn">{escape(note)}</p>' for note in notes)


def _metrics(recorders: Sequence[Recorder]) -> str:
    names = list(dict.fromkeys(name for recorder in recorders for name in recorder.metrics))
    several = len(recorders) > 1
    heads = "".join(f"<th>{escape(r.variant)}</th>" for r in recorders)
    compared = recorders[1:] if len(recorders) <= MAX_RATIOS else recorders[:0]
    ratio = "".join(f"<th>{escape(r.variant)} / {escape(recorders[0].variant)}</th>" for r in compared)
    rows: list[str] = []
    for name in names:
        metrics = [recorder.metrics.get(name) for recorder in recorders]
        best = _best(metrics) if several else None
        cells = "".join(_cell(metric, best) for metric in metrics)
        ratios = "".join(
            f"<td>{ratio_text(metrics[0], metric)}</td>" for metric in metrics[1 : len(compared) + 1]
        )
        unit = next(metric.unit for metric in metrics if metric is not None)
        rows.append(f'<tr><td>{escape(name)}</td>{cells}{ratios}<td class="unit">{escape(unit)}</td></tr>')
    head = f"<tr><th></th>{heads}{ratio}<th></th></tr>"
    return f'<div class="wide"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'


def _best(metrics: Sequence[Metric | None]) -> float | None:
    """The best value, if the figures differ and it is plain which way is good."""
    known = [metric for metric in metrics if metric is not None]
    values = {metric.value for metric in known}
    if len(values) < 2 or not known[0].better:
        return None
    return min(values) if known[0].better == "lower" else max(values)


def _cell(metric: Metric | None, best: float | None) -> str:
    if metric is None:
        return "<td></td>"
    mark = ' class="best"' if metric.value == best else ""
    return f"<td{mark}>{number_text(metric.value)}</td>"


def ratio_text(base: Metric | None, other: Metric | None) -> str:
    """Other over base, "" where that means nothing."""
    if base is None or other is None or base.value == 0:
        return ""
    return f"{other.value / base.value:.2f}"


def _charts(recorders: Sequence[Recorder]) -> str:
    figures = [
        f"<figure><figcaption><h3>{escape(chart.title)}</h3><span>{escape(chart.caption)}</span></figcaption>"
        f"{chart.picture}</figure>"
        for chart in draw(recorders)
    ]
    return "".join(figures) or '<p class="none">Nothing to draw.</p>'


def _messages(result: Result) -> str:
    names = list(dict.fromkeys(name for counts in result.messages.values() for name in counts))
    variants = list(result.messages)
    heads = "".join(f"<th>{escape(v)}</th><th>bytes</th>" for v in variants)
    rows: list[str] = []
    for name in names:
        counts = [result.messages[variant].get(name, (0, 0)) for variant in variants]
        cells = "".join(f"<td>{number_text(value)}</td>" for count in counts for value in count)
        rows.append(f"<tr><td>{escape(name)}</td>{cells}</tr>")
    table = f"<table><thead><tr><th></th>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<p class="soft">Every input that machines got, by kind.</p><div class="wide">{table}</div>'


def _timings(result: Result) -> str:
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{number_text(timing.wall_s)} s</td>"
        f"<td>{number_text(timing.cpu_s)} s</td>"
        f"<td>{number_text(timing.events)}</td>"
        f"<td>{number_text(timing.us_per_event)}</td><td>{number_text(timing.bytes_per_node)}</td></tr>"
        for name, timing in result.timings.items()
    )
    titles = ("", "wall time", "CPU time", "events", "µs of CPU per event", "bytes per node")
    head = "".join(f"<th>{title}</th>" for title in titles)
    note = (
        "On the machine that ran it; not part of the history. Bytes: how much the process grew, over all nodes."
    )
    return f'<p class="soft">{note}</p><table><thead>{head}</thead><tbody>{rows}</tbody></table>'


def _configuration(result: Result) -> str:
    name = result.scenario.name
    text = json.dumps(result.scenario.tree, indent=2, ensure_ascii=False)
    repeat = "archi-sim run run.json        # in this folder: the same history, byte for byte"
    return (
        f"<p>Repeat it:</p><pre>{repeat}</pre>"
        f"<p>Cite it by scenario <code>{escape(name)}</code>, seed, sha256, and archipelag's version, "
        f"{escape(version('archipelag'))}.</p>"
        f"<details><summary>Settings that differ from the defaults</summary><pre>{escape(text)}</pre></details>"
    )
