"""`archi-sim`: run scenarios, sweep over parameters, compare runs."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from sim.compare import Line
    from sim.facts import RunFacts
    from sim.scenario import Result

#: What a shell reports for a program that Ctrl-C ended.
INTERRUPTED: Final = 130

_EPILOG = """\
examples:
  archi-sim list                                          what is shipped
  archi-sim run dht-rtt                                   one scenario, figures on the screen
  archi-sim run scenarios/dht-churn.toml --nodes 500 --seed 7 --out runs/churn
  archi-sim run dht-churn --set churn.session_s=600 --set dht.policy.alpha=5
  archi-sim run runs/churn/run.json                       the same history again, byte for byte
  archi-sim sweep dht-churn --grid churn.session_s=300,900,3600 --grid world.seed=1,2,3 --out runs/sweep
  archi-sim compare runs/a runs/b                         every figure of two runs, with ratios

The last line of a run, `events N sha256 H`, names its history: the same scenario, seed and version give the
same line on any machine. How to write a scenario, what is modelled and what is not: docs/simulator.md.
"""


class _ShowVersion(argparse.Action):
    """`--version`: what a citation needs beside scenario, seed and hash. Looked up only when asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        from importlib.metadata import version

        print(f"{parser.prog} {version('archipelag')}")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="archi-sim",
        description="Simulate networks of Islands: the protocol code of production in virtual time.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="print the version and leave")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run a scenario")
    _add_scenario(run)
    run.add_argument(
        "--out", metavar="DIR", help="write tables, run.json and report.html here (else only figures)"
    )
    run.set_defaults(handler=_run)

    sweep = commands.add_parser("sweep", help="run a scenario over a grid of parameters, in parallel")
    _add_scenario(sweep)
    sweep.add_argument(
        "--grid",
        metavar="NAME=V1,V2,...",
        action="append",
        required=True,
        help="values of one setting; several --grid give all combinations",
    )
    sweep.add_argument(
        "--out", metavar="DIR", required=True, help="one folder per run, and sweep.csv, are written here"
    )
    sweep.add_argument(
        "--jobs", metavar="N", type=int, default=0, help="runs at a time (default: one per core)"
    )
    sweep.set_defaults(handler=_sweep)

    compare = commands.add_parser("compare", help="two runs side by side: every figure with its ratio")
    compare.add_argument("a", metavar="A", help="a folder that `run --out` wrote")
    compare.add_argument("b", metavar="B", help="another one")
    compare.set_defaults(handler=_compare)

    listing = commands.add_parser("list", help="scenarios that are shipped")
    listing.set_defaults(handler=_list)
    return parser


def _add_scenario(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "scenario",
        metavar="SCENARIO",
        help="a .toml file, a shipped scenario's name, or an earlier run: its folder or its run.json",
    )
    parser.add_argument("--nodes", metavar="N", type=int, help="nodes [world.nodes]")
    parser.add_argument("--seed", metavar="S", type=int, help="seed of all draws [world.seed]")
    parser.add_argument(
        "--set",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        dest="changes",
        help="any setting by its dotted name, value as in TOML; may be repeated; holds in every variant",
    )


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    # A `kill` ends it as Ctrl-C does: what there is gets written, and no worker stays.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    handler: Callable[[argparse.Namespace], int] = arguments.handler
    from sim.settings import ScenarioError

    try:
        code = handler(arguments)
        sys.stdout.flush()
    except ScenarioError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output (head, a pager) is gone; that is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def _changes(arguments: argparse.Namespace) -> dict[str, object]:
    from sim.settings import parse_assignment

    return dict(parse_assignment(text) for text in arguments.changes)


def _run(arguments: argparse.Namespace) -> int:
    from sim.progress import ProgressLine
    from sim.scenario import Scenario, run

    scenario = Scenario.load(
        arguments.scenario, nodes=arguments.nodes, seed=arguments.seed, changes=_changes(arguments)
    )
    _check_out(arguments.out)
    line = ProgressLine()
    try:
        result = run(scenario, out=arguments.out, progress=line)
    finally:
        line.close()
    _print_result(result)
    if arguments.out:
        print(f"\nreport: {Path(arguments.out) / 'report.html'}")
    if not result.complete:
        kept = f"; what there is lies in {arguments.out}" if arguments.out else ""
        print(f"interrupted{kept}", file=sys.stderr)
        return INTERRUPTED
    print(f"events {result.events} sha256 {result.sha256}")
    return 0


def _check_out(out: str | None) -> None:
    """A long run must not end with a folder that can not be written."""
    from sim.settings import ScenarioError

    if out is None:
        return
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ScenarioError(f"--out {out}: {error.strerror}; name a folder that can be made") from error


def _print_result(result: Result) -> None:
    from sim.svg import number_text

    print(result.scenario.title)
    for recorder in result.recorders:
        timing = result.timings[recorder.variant]
        print(f"\n{recorder.variant}: {timing.events} events in {timing.wall_s:.1f} s")
        wide = max((len(name) for name in recorder.metrics), default=0)
        for name, metric in recorder.metrics.items():
            print(f"  {name:<{wide}}  {number_text(metric.value).replace(chr(0x2009), ' '):>12}  {metric.unit}")
        for note in recorder.notes:
            print(f"  note: {note}")


def _sweep(arguments: argparse.Namespace) -> int:
    from sim.compare import grid_of, sweep
    from sim.progress import ProgressLine
    from sim.scenario import Scenario
    from sim.settings import ScenarioError

    if arguments.jobs < 0:
        raise ScenarioError(f"--jobs {arguments.jobs}: at least 1, or 0 for one per core")
    grid = grid_of(arguments.grid)
    changes = _changes(arguments)
    for point in grid:  # a wrong name is told now, not by the last process
        Scenario.load(
            arguments.scenario, nodes=arguments.nodes, seed=arguments.seed, changes={**changes, **point}
        )
    _check_out(arguments.out)
    out = Path(arguments.out)
    line = ProgressLine()
    options: dict[str, Any] = {"nodes": arguments.nodes, "seed": arguments.seed, "changes": changes}
    try:
        done = sweep(
            arguments.scenario,
            grid,
            options,
            out,
            jobs=arguments.jobs,
            progress=lambda some, all_: line(f"{some} of {all_} runs", some / all_),
        )
    finally:
        line.close()
    _write_sweep(done, out)
    print(f"{len(done)} of {len(grid)} runs; figures: {out / 'sweep.csv'}")
    return 0 if len(done) == len(grid) else INTERRUPTED


def _write_sweep(done: list[RunFacts], out: Path) -> None:
    from sim.record import Cell, write_csv

    names = list(dict.fromkeys(name for facts in done for name in facts.point))
    rows: list[tuple[Cell, ...]] = []
    for facts in done:
        point = [str(facts.point.get(name, "")) for name in names]
        for variant in facts.variants:
            for metric, figure in variant.metrics.items():
                rows.append((*point, variant.name, metric, figure.value, figure.unit, facts.sha256))
    write_csv(out / "sweep.csv", (*names, "variant", "metric", "value", "unit", "sha256"), rows)


def _compare(arguments: argparse.Namespace) -> int:
    from sim.compare import compare
    from sim.facts import read_facts

    a, b = read_facts(Path(arguments.a)), read_facts(Path(arguments.b))
    if a.sha256 == b.sha256:
        print("the same history: both runs have one sha256\n")
    lines = compare(a, b)
    wide = max((len(line.metric) for line in lines), default=0)
    variant = None
    for line in lines:
        if line.variant != variant:
            variant = line.variant
            print(f"{variant}\n  {'':<{wide}}  {'A':>12}  {'B':>12}  {'B / A':>7}")
        figures = f"{_figure(line.a):>12}  {_figure(line.b):>12}  {_verdict(line)}"
        print(f"  {line.metric:<{wide}}  {figures}  {line.unit}")
    return 0


def _figure(value: float | None) -> str:
    from sim.svg import number_text

    return "-" if value is None else number_text(value).replace(chr(0x2009), " ")


def _verdict(line: Line) -> str:
    """The ratio, and whether it is an improvement."""
    ratio = line.ratio
    if ratio is None:
        return f"{'':>7} "
    sign = " "
    if line.better and line.a != line.b:
        sign = "+" if (ratio < 1.0) == (line.better == "lower") else "-"
    return f"{ratio:>7.3f}{sign}"


def _list(arguments: argparse.Namespace) -> int:  # noqa: ARG001 - it has none
    from sim.scenario import Scenario
    from sim.settings import shipped_scenarios

    files = shipped_scenarios()
    wide = max((len(file.stem) for file in files), default=0)
    for file in files:
        scenario = Scenario.load(file)
        nodes = scenario.variants[0][1].world.nodes
        count = len(scenario.variants)
        variants = "1 variant" if count == 1 else f"{count} variants"
        print(f"{file.stem:<{wide}}  {scenario.title}  ({nodes} nodes, {variants})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
