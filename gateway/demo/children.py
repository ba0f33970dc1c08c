"""The demo's processes: what became of them, and what they say of themselves."""

from __future__ import annotations

import signal
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final

import trio

from gateway.demo.screen import IslandRow, readable_untrusted
from node.control import NotRunning, Snapshot, ask_status
from node.snapshot import ShardSnapshot

#: A child's last words, kept for the error message.
LAST_LINES: Final = 30

#: An Island that takes longer to say how it is gets shown as silent.
STATUS_PATIENCE_S: Final = 0.4


@dataclass(slots=True)
class Child:
    """One process of the demo."""

    label: str
    process: trio.Process
    data_dir: Path
    log: BinaryIO | None = None
    last_lines: deque[str] = field(default_factory=lambda: deque[str](maxlen=LAST_LINES))
    read: trio.Event = field(default_factory=trio.Event)
    """All that it wrote to its log was read: it has ended."""

    stopping: bool = False
    tokens: int = 0
    asked: float = 0.0

    @property
    def fate(self) -> str | None:
        """How it ended, or None while it runs."""
        code = self.process.returncode
        if code is None:
            return None
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


async def row_of(child: Child) -> IslandRow:
    name, pid = child.label, child.process.pid
    if child.fate is not None:
        return IslandRow(name, pid, child.fate, "bold red")
    snapshot: Snapshot | None = None
    try:
        with trio.move_on_after(STATUS_PATIENCE_S):
            snapshot = await ask_status(child.data_dir)
    except NotRunning:
        pass
    if snapshot is None or not snapshot.cargos:
        return IslandRow(name, pid, "silent", "yellow")
    cargo, load = snapshot.cargos[0], snapshot.cargos[0].load
    rtt_ms = next((peer.rtt_ms for peer in snapshot.peers if peer.rtt_ms is not None), None)
    jobs = len(snapshot.jobs)
    if (shard := cargo.shard) is not None:
        return _row_of_layers(child, cargo.state, shard, rtt_ms)
    if cargo.state != "ready" or load is None:
        return IslandRow(name, pid, cargo.state, "yellow", rtt_ms, jobs)
    now = trio.current_time()
    speed = (load.tokens_total - child.tokens) / (now - child.asked) if child.asked else None
    child.tokens, child.asked = load.tokens_total, now
    state, style = ("answering", "bold green") if jobs else ("ready", "green")
    return IslandRow(name, pid, state, style, rtt_ms, jobs, load.tokens_total, speed, load.decode_tps)


def _row_of_layers(child: Child, state: str, shard: ShardSnapshot, rtt_ms: float | None) -> IslandRow:
    """Of an Island that holds layers: rows through them are what tokens are elsewhere."""
    name, pid = child.label, child.process.pid
    if state != "ready":
        return IslandRow(name, pid, state, "yellow", rtt_ms, shard.active)
    now = trio.current_time()
    speed = (shard.rows - child.tokens) / (now - child.asked) if child.asked else None
    child.tokens, child.asked = shard.rows, now
    style = "bold green" if shard.active else "green"
    return IslandRow(
        name, pid, "computing" if shard.active else "ready", style, rtt_ms, shard.active, shard.rows, speed
    )


def last_words(child: Child) -> str:
    return "\n".join(f"  {child.label}: {readable_untrusted(line)}" for line in list(child.last_lines)[-5:])
