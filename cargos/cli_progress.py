"""Fetch progress for people: a bar in a terminal, a few lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Final, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from cargos.progress import FetchProgress, FetchState, ProgressCallback
from protocol.limits import MIB

_WORDS: Final[dict[FetchState, str]] = {
    "waiting": "waiting for another process",
    "checking": "checking",
    "downloading": "downloading",
    "copying": "copying",
    "extracting": "extracting",
    "rewriting": "rewriting as F16",
    "cutting": "cutting",
    "retrying": "connection lost, trying again",
    "done": "verified",
}
#: Without a terminal a line is printed per state and per this share of the file.
_LINE_PERCENT: Final = 25


@contextmanager
def show_progress(stream: TextIO | None = None) -> Generator[ProgressCallback]:
    """A callback for `CargoStore.ensure` that draws on `stream` (default: stderr) until the block ends."""
    console = Console(file=stream or sys.stderr)
    if not console.is_terminal:
        yield _lines(console)
        return
    columns = (
        TextColumn("{task.fields[file]}", markup=False),
        TextColumn("{task.description}", style="cyan", markup=False),
        BarColumn(bar_width=24),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console) as bars:
        yield _bars(bars)


def _bars(bars: Progress) -> ProgressCallback:
    tasks: dict[str, tuple[TaskID, FetchState]] = {}

    def show(step: FetchProgress) -> None:
        known = tasks.get(step.file)
        if known is None:
            task = bars.add_task(_WORDS[step.state], total=step.total_bytes, file=step.file)
        else:
            task = known[0]
            if known[1] != step.state and step.state != "done":
                bars.reset(task)  # another stage has another speed
        tasks[step.file] = (task, step.state)
        bars.update(task, description=_WORDS[step.state], completed=step.done_bytes, total=step.total_bytes)

    return show


def _lines(console: Console) -> ProgressCallback:
    last: dict[str, tuple[FetchState, int]] = {}

    def show(step: FetchProgress) -> None:
        share = 100 * step.done_bytes // step.total_bytes // _LINE_PERCENT if step.total_bytes else 0
        if last.get(step.file) == (step.state, share):
            return
        last[step.file] = (step.state, share)
        size = f"{step.done_bytes // MIB}" + (f"/{step.total_bytes // MIB}" if step.total_bytes else "")
        console.print(f"{step.file}: {_WORDS[step.state]} ({size} MiB)", markup=False, highlight=False)

    return show
