"""`archi-node karma [PEER]`: what coordinators state about a peer, and what that is worth to the node asked."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import trio
from rich.console import Console
from rich.table import Table

from node.control import ControlRefused, NotRunning, ask
from node.coordination.karma_views import KarmaParams, KarmaView


def show_karma(data_dir: Path, peer: str, *, as_json: bool) -> int:
    """The exit code. 1: the node does not run, or the name is none."""

    async def asking() -> KarmaView:
        return await ask(data_dir, "karma", KarmaParams(peer), result=KarmaView)

    try:
        view = trio.run(asking)
    except (NotRunning, ControlRefused) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    if as_json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(view)).decode() + "\n")
        return 0
    console = Console()
    console.print(f"{view.peer}\n[bold]{view.points:+.3f} points[/bold], paid from {view.threshold:+g} on")
    if not view.statements:
        console.print(
            "Nobody states anything about it in the overlay. Coordinators do so a minute or so after work."
        )
        return 0
    table = Table(box=None, header_style="dim", pad_edge=False)
    for column in ("stated by", "believed", "net work", "lately", "failures", "timeouts", "lies", "audits"):
        table.add_column(column, justify="left" if column == "stated by" else "right", no_wrap=True)
    for one in view.statements:
        table.add_row(
            one.issuer[-12:],
            "yes" if one.believed else "no",
            _duration(one.hours),
            _duration(one.work_hours),
            str(one.failures),
            str(one.timeouts),
            str(one.lies),
            f"{one.audits_passed}/{one.audits_passed + one.audits_failed}",
        )
    console.print(table)
    return 0


def _duration(hours: float) -> str:
    """Work of the reference machine, as people say it."""
    seconds = hours * 3600
    if abs(seconds) < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if abs(hours) < 2 else f"{hours:.1f} h"
