"""The live table of `archi-node status`: peers, round-trip times, jobs, tokens/s."""

from __future__ import annotations

from pathlib import Path

import trio
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from node.control import ask_status
from node.snapshot import CargoSnapshot, OverlaySnapshot, PiecesSnapshot, Snapshot
from protocol.codec import excerpt

_REFRESH_S = 0.5
_STATE_STYLE = {"ready": "green", "connected": "green", "failed": "red"}


async def show_status(data_dir: Path, once: bool) -> None:  # noqa: FBT001 - passed through trio.run
    """Print one snapshot, or keep a live table until Ctrl-C. Raises NotRunning."""
    console = Console()
    before = await ask_status(data_dir)
    if once:
        console.print(render_status(before, None, 0.0))
        return
    with Live(render_status(before, None, 0.0), console=console, auto_refresh=False, screen=False) as live:
        asked = trio.current_time()
        while True:
            await trio.sleep(_REFRESH_S)
            snapshot, now = await ask_status(data_dir), trio.current_time()
            live.update(render_status(snapshot, before, now - asked), refresh=True)
            before, asked = snapshot, now


def render_status(now: Snapshot, before: Snapshot | None, elapsed_s: float) -> RenderableType:
    """The snapshot as tables. `before` and `elapsed_s` give the tokens/s in between."""
    head = Text.assemble(
        (now.name, "bold"),
        f"  {now.peer}  up {now.uptime_s:.0f} s",
        ("  shutting down" if now.draining else "", "yellow"),
    )
    counts = now.counters
    totals = (
        f"{counts.accepted} jobs accepted, {counts.done} done, {counts.cancelled} cancelled, "
        f"{counts.failed} failed, {counts.rejected} rejected, {counts.tokens} tokens"
    )
    parts: list[RenderableType] = [head, _cargos(now, before, elapsed_s)]
    parts += [Text(f"{cargo.name}: {cargo.detail}", style="red") for cargo in now.cargos if cargo.detail]
    if now.overlay is not None:
        parts += ["", render_overlay(now.overlay)]
    if now.pieces is not None:
        parts.append(_pieces(now.pieces))
    parts.append(_coordinators(now))
    parts.append("")
    parts.append(_peers(now) if now.peers else Text("no peers: is a coordinator configured?", style="yellow"))
    parts += ["", Text(totals)]
    if now.jobs:
        parts.append(_jobs(now))
    return Group(*parts)


def render_overlay(overlay: OverlaySnapshot) -> Text:
    """How the node stands in the overlay, in one or two lines."""
    state = ("in the overlay", "green") if overlay.joined else ("not in the overlay", "yellow")
    size = f"about {overlay.network_size}" if overlay.network_size else "an unknown number of"
    place = ", ".join(f"{part:.1f}" for part in overlay.coordinate_ms)
    return Text.assemble(
        state,
        "" if overlay.reachable else (" as a client: others can not dial it", "yellow"),
        f"  table {overlay.table} of {size} peers, {overlay.links} links, stores {overlay.records} records "
        f"and {overlay.providers} provider records\n"
        f"place {f'({place}) ms' if place else 'unknown'}  messages {overlay.messages_sent} out, "
        f"{overlay.messages_received} in, {overlay.messages_refused} refused",
    )


def _pieces(pieces: PiecesSnapshot) -> Text:
    return Text.assemble(
        f"files of Cargos: {pieces.files} offered to peers, {pieces.given_bytes / 1e6:.0f} MB given "
        f"({pieces.streams} fetch now), {pieces.got_bytes / 1e6:.0f} MB got",
        (f", {pieces.wrong_pieces} wrong pieces refused" if pieces.wrong_pieces else "", "yellow"),
    )


def _coordinators(now: Snapshot) -> Text:
    names = {peer.peer: peer.name for peer in now.peers}
    told = excerpt(", ".join(names.get(peer) or peer[-12:] for peer in now.coordinators))
    return Text(f"coordinators: {told}") if told else Text("no coordinator yet: no jobs come", style="yellow")


def _cargos(now: Snapshot, before: Snapshot | None, elapsed_s: float) -> Table:
    table = _table("Cargo", "state", "active", "waiting", "tokens/s", "alone", "prompt", "restarts")
    made_before = (
        {cargo.digest: cargo.load.tokens_total for cargo in before.cargos if cargo.load} if before else {}
    )
    for cargo in now.cargos:
        name, state = (
            f"{cargo.name}@{cargo.version}",
            Text(cargo.state, _STATE_STYLE.get(cargo.state, "yellow")),
        )
        load = cargo.load
        if cargo.shard is not None:
            _shard_row(table, f"{cargo.name} {cargo.shard.words}", state, cargo)
        elif load is None:
            if cargo.total_bytes:
                state.append(f" {100 * cargo.done_bytes // cargo.total_bytes} %")
            table.add_row(name, state)
        else:
            made = load.tokens_total - made_before.get(cargo.digest, load.tokens_total)
            table.add_row(
                name,
                state,
                f"{load.active}/{load.slots}",
                str(load.queued),
                f"{made / elapsed_s:.0f}" if elapsed_s else "-",
                f"{load.decode_tps:.0f}",
                f"{load.prefill_tps:.0f}",
                str(load.restarts),
            )
    return table


def _shard_row(table: Table, name: str, state: Text, cargo: CargoSnapshot) -> None:
    """In the column of speeds: one row through one layer, alone."""
    shard = cargo.shard
    if shard is None or not shard.slots:
        if cargo.state == "fetching" and cargo.total_bytes:
            state.append(f" {100 * cargo.done_bytes // cargo.total_bytes} %")
        table.add_row(name, state)
        return
    active, per_layer = f"{shard.active}/{shard.slots}", f"{shard.layer_us:.0f} µs"
    table.add_row(name, state, active, "-", "-", per_layer, "-", str(shard.restarts))


def _peers(now: Snapshot) -> Table:
    table = _table("Peer", "roles", "state", "RTT ms", "address")
    for peer in now.peers:
        table.add_row(
            _said(peer.name) if peer.name else peer.peer[-12:] or "?",
            _said(", ".join(peer.roles)),
            Text(peer.state, style=_STATE_STYLE.get(peer.state, "yellow")),
            "-" if peer.rtt_ms is None else f"{peer.rtt_ms:.2f}",
            peer.address.partition("/p2p/")[0] or "inbound",  # who it is stands in front
        )
    return table


def _said(text: str) -> Text:
    """A peer's own words: no markup of ours, and nothing that steers the terminal."""
    return Text(excerpt(text))


def _jobs(now: Snapshot) -> Table:
    table = _table("Job", "consumer", "state", "tokens", "age s")
    for job in now.jobs:
        table.add_row(job.job[:8], job.consumer[-12:], job.state, str(job.tokens), f"{job.age_s:.1f}")
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    return table
