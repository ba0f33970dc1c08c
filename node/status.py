"""The live table of `archi-node status`: peers, round-trip times, jobs, tokens/s."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import trio
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from node.control import ask_status

_REFRESH_S = 0.5
_STATE_STYLE = {"ready": "green", "up": "green", "failed": "red", "down": "red"}


async def show_status(data_dir: Path, once: bool) -> None:  # noqa: FBT001 - passed through trio.run
    """Print one snapshot, or keep a live table until Ctrl-C. Raises NotRunning."""
    console = Console()
    before = await ask_status(data_dir)
    if once:
        console.print(render_status(before, None, 0.0))
        return
    with Live(render_status(before, None, 0.0), console=console, auto_refresh=False, screen=False) as live:
        while True:
            await trio.sleep(_REFRESH_S)
            snapshot = await ask_status(data_dir)
            live.update(render_status(snapshot, before, _REFRESH_S), refresh=True)
            before = snapshot


def render_status(snapshot: dict[str, Any], before: dict[str, Any] | None, elapsed_s: float) -> RenderableType:
    """The snapshot as tables. `before` and `elapsed_s` give the tokens/s in between."""
    head = Text.assemble(
        (snapshot["name"], "bold"),
        f"  {snapshot['peer']}  up {snapshot['uptime_s']:.0f} s",
        ("  shutting down" if snapshot["draining"] else "", "yellow"),
    )
    return Group(head, _cargos(snapshot, before, elapsed_s), _peers(snapshot), _jobs(snapshot))


def _cargos(snapshot: dict[str, Any], before: dict[str, Any] | None, elapsed_s: float) -> Table:
    table = _table("Cargo", "state", "active", "waiting", "tokens/s now", "alone", "prompt", "restarts")
    made_before = {
        cargo["digest"]: (cargo["load"] or {}).get("tokens_total", 0)
        for cargo in (before or {}).get("cargos", ())
    }
    for cargo in snapshot["cargos"]:
        load = cargo["load"] or {}
        made = load.get("tokens_total", 0) - made_before.get(cargo["digest"], load.get("tokens_total", 0))
        state = cargo["state"]
        if state == "fetching" and cargo["total_bytes"]:
            state = f"fetching {100 * cargo['done_bytes'] // cargo['total_bytes']} %"
        table.add_row(
            f"{cargo['name']}@{cargo['version']}",
            Text(state, style=_STATE_STYLE.get(cargo["state"], "yellow")),
            f"{load.get('active', 0)}/{load.get('slots', 0)}",
            str(load.get("queued", 0)),
            f"{made / elapsed_s:.0f}" if elapsed_s else "-",
            f"{load.get('decode_tps', 0):.0f}",
            f"{load.get('prefill_tps', 0):.0f}",
            str(load.get("restarts", 0)),
        )
        if cargo["detail"]:
            table.add_row(Text(str(cargo["detail"]), style="red"))
    return table


def _peers(snapshot: dict[str, Any]) -> Table:
    table = _table("Peer", "roles", "state", "RTT ms", "address")
    for peer in snapshot["peers"]:
        rtt = peer["rtt_ms"]
        state = str(peer["state"])
        table.add_row(
            peer["name"] or str(peer["peer"] or "?")[-12:],
            ", ".join(peer["roles"]),
            Text(state, style=_STATE_STYLE.get(state, "yellow")),
            "-" if rtt is None else f"{rtt:.2f}",
            peer["address"] or "inbound",
        )
    return table


def _jobs(snapshot: dict[str, Any]) -> Table:
    counters = snapshot["counters"]
    summary = ", ".join(f"{value} {name}" for name, value in counters.items() if value)
    table = _table("Job", "consumer", "state", "tokens", "age s", title=summary or "no jobs yet")
    for job in snapshot["jobs"]:
        table.add_row(
            job["job"][:8], job["consumer"][-12:], job["state"], str(job["tokens"]), f"{job['age_s']:.1f}"
        )
    return table


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="", box=None, header_style="dim", pad_edge=False
    )
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    return table
