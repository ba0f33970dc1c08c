"""What the demo shows: lines that stay, and on a terminal a live part below them.

The live part holds the answer that is being written and the table of Islands; events appear above it, so that
they never break into a sentence. Without a terminal an answer is printed line by line, for the same reason.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

#: Rows of the terminal that the answer leaves to table and footer while it is written.
ROWS_BELOW_ANSWER: Final = 14
MIN_ANSWER_ROWS: Final = 3


@dataclass(frozen=True, slots=True)
class IslandRow:
    """One Island in the table. Figures are None while it does not say."""

    name: str
    pid: int
    state: str
    style: str
    rtt_ms: float | None = None
    jobs: int | None = None
    tokens: int | None = None
    tokens_per_s: float | None = None
    alone_tokens_per_s: float | None = None
    layers: str = ""


@dataclass(frozen=True, slots=True)
class ChainShown:
    """Who holds which layers of a model that no Island holds whole: name -> (first, last), inclusive."""

    layers: int
    stages: dict[str, tuple[int, int]]
    spares: dict[str, tuple[int, int]]

    def of(self, name: str) -> str:
        """For the table."""
        first, last = self.stages.get(name) or self.spares.get(name) or (0, -1)
        return "" if last < first else f"{first}-{last}{'' if name in self.stages else ' spare'}"

    def lines(self) -> list[str]:
        """For scripts: one Island a line, in the order of layers, spares last."""
        rows = [(name, span, "") for name, span in self.stages.items()]
        rows += [(name, span, " spare") for name, span in self.spares.items()]
        return [
            f"island {name} layers {first}-{last} of {self.layers}{spare}"
            for name, (first, last), spare in rows
        ]


@dataclass(frozen=True, slots=True)
class NoChainShown:
    """The Islands that are here have too little memory together. What would do is None if nothing would."""

    reason: str
    islands: int
    room_mib: int
    enough_islands: int | None
    enough_room_mib: int | None


@dataclass(slots=True)
class Tally:
    """What the gateway reported so far."""

    answers: int = 0
    hand_overs: int = 0
    failures: int = 0

    def __str__(self) -> str:
        return f"answered {self.answers}, handed over {self.hand_overs}, failed {self.failures}"


class Screen:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._answer: Text | None = None
        self._unfinished_line = ""
        self._below: RenderableType = ""
        self._changed = False

    @property
    def is_terminal(self) -> bool:
        return self._console.is_terminal

    def line(self, text: str, *, style: str = "") -> None:
        """Text that stays; without the live part it is written as it is, not wrapped, in no colour of ours."""
        self._console.print(Text(text, style=style), soft_wrap=self._live is None)
        self._console.file.flush()

    def verbatim(self, text: str) -> None:
        """As `line`, and never wrapped: for what is there to be copied."""
        was_live = self._live is not None
        self._stop_live()
        self._console.print(Text(text), soft_wrap=True)
        self._console.file.flush()
        if was_live:
            self._start_live()

    # --- the answer ---------------------------------------------------------------------------------

    def answer_begins(self) -> None:
        self._answer, self._unfinished_line = Text(), ""

    def answer_piece(self, text: str, *, style: str = "") -> None:
        if self._answer is None:
            self.answer_begins()
        assert self._answer is not None  # noqa: S101 - just made
        self._answer.append(text, style=style)
        self._changed = True
        if self._live is None:
            *lines, self._unfinished_line = (self._unfinished_line + text).split("\n")
            for line in lines:
                self.line(line)

    def answer_ends(self) -> None:
        """What came stays on the screen, whole or not."""
        answer, self._answer, self._changed = self._answer, None, True
        if self._live is None:
            if self._unfinished_line:
                self.line(self._unfinished_line)
                self._unfinished_line = ""
        elif answer:
            self._console.print(answer)
            self.draw()

    # --- the live part ------------------------------------------------------------------------------

    @contextmanager
    def live(self) -> Generator[None]:
        """The live part is there until the block ends; then the terminal is as if it had never been."""
        self._start_live()
        try:
            yield
        finally:
            self._stop_live()
            if self._answer:
                self._console.print(self._answer)
            self._answer, self._below = None, ""

    def _start_live(self) -> None:
        # A new one each time: one that was stopped still believes that its lines are on the screen.
        self._live = Live(
            Group(),
            console=self._console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live.start()
        self._changed = True
        self.draw()

    def _stop_live(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def below(self, what: RenderableType) -> None:
        self._below, self._changed = what, True

    def draw(self) -> None:
        """Bring the live part up to date, if something changed."""
        if self._live is None or not self._changed:
            return
        self._changed = False
        parts: list[RenderableType] = []
        if self._answer:
            rows = max(MIN_ANSWER_ROWS, self._console.height - ROWS_BELOW_ANSWER)
            parts += [Text("\n").join(self._answer.wrap(self._console, self._console.width)[-rows:]), ""]
        self._live.update(Group(*parts, self._below), refresh=True)


def islands_table(rows: Sequence[IslandRow], tally: Tally) -> RenderableType:
    table = Table(box=None, header_style="dim", pad_edge=False)
    in_parts = any(row.layers for row in rows)
    columns = ["Island", "pid", "state", "RTT ms", "jobs", "tokens", "tokens/s", "alone"]
    for column in [*columns, "layers"] if in_parts else columns:
        left = column in {"Island", "state", "layers"}
        table.add_column(column, justify="left" if left else "right", no_wrap=True)

    def figure(value: float | None, digits: int = 0) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    for row in rows:
        table.add_row(
            row.name,
            str(row.pid),
            Text(row.state, style=row.style),
            figure(row.rtt_ms, 2),
            figure(row.jobs),
            figure(row.tokens),
            figure(row.tokens_per_s),
            figure(row.alone_tokens_per_s),
            *([row.layers] if in_parts else []),
        )
    return Group(table, Text(f"{tally}. Ctrl-C stops all.", style="dim"))


def told_untrusted(label: str, line: str, tally: Tally) -> tuple[str, str] | None:
    """A log line of a child as (text, style) for the spectator, or None if it is of no interest to her."""
    try:
        record = msgspec.json.decode(line, type=dict[str, Any])
        teller = _TOLD.get(record["event"])
        return teller(label, record, tally) if teller is not None else None
    except (msgspec.DecodeError, KeyError, TypeError):
        return None  # not ours, or of another version


def chain_untrusted(line: str) -> ChainShown | NoChainShown | None:
    """What a log line of the gateway says of a chain, if that is what it is about."""
    if '"chain ready"' not in line and '"no chain"' not in line:
        return None  # nearly all are about something else
    try:
        record = msgspec.json.decode(line, type=dict[str, Any])
        if record["event"] == "chain ready":
            rows = msgspec.convert((record["stages"], record["spares"]), tuple[_Rows, _Rows])
            stages, spares = ({name: (first, last - 1) for name, first, last in each} for each in rows)
            return ChainShown(msgspec.convert(record["layers"], int), stages, spares)
        if record["event"] == "no chain":
            return msgspec.convert(record, NoChainShown)
    except (msgspec.DecodeError, msgspec.ValidationError, KeyError):
        pass  # of another version
    return None


def readable_untrusted(line: str) -> str:
    """A log line for a person: JSON becomes `event: detail`."""
    try:
        record = msgspec.json.decode(line, type=dict[str, Any])
    except msgspec.DecodeError:
        return line
    rest = {name: value for name, value in record.items() if name not in {"event", "level", "timestamp"}}
    return f"{record.get('event')}: " + ", ".join(f"{name} {value}" for name, value in rest.items())


_Told = tuple[str, str]
_Rows = list[tuple[str, int, int]]


def _placed(_label: str, record: dict[str, Any], tally: Tally) -> _Told:
    job, island = record["job"][:4], record["island"]
    if not record["hand_over"]:
        where = f"over layers of {record['layers']}" if "layers" in record else f"at {island}"
        return f"  job {job} runs {where} (RTT {record['rtt_ms']} ms)", "dim"
    tally.hand_overs += 1
    return f"  job {job} goes on at {island} from token {record['tokens']}", "bold cyan"


def _completed(_label: str, record: dict[str, Any], tally: Tally) -> _Told:
    tally.answers += 1
    count = record["hand_overs"]
    moved = f", {count} hand-over{'s' if count > 1 else ''}" if count else ""
    lost = record.get("lost", 0)
    moved += f", {lost} stage{'s' if lost > 1 else ''} replaced" if lost else ""
    return f"  job {record['job'][:4]} done: {record['tokens']} tokens{moved}", "dim"


def _failed(_label: str, record: dict[str, Any], tally: Tally) -> _Told:
    tally.failures += 1
    return f"  job {record['job'][:4]} failed: {record['detail']}", "red"


def _loaded(label: str, record: dict[str, Any], _tally: Tally) -> _Told | None:
    if record["state"] != "ready":
        return None
    return f"  {label} has loaded the model: {record['decode_tps']} tokens/s", "dim"


_TOLD: Final[dict[str, Callable[[str, dict[str, Any], Tally], _Told | None]]] = {
    "island": lambda _label, record, _tally: (f"  {record['name']} has joined", "dim"),
    "island lost": lambda _label, record, _tally: (
        f"  the gateway lost {record['name']}: {record['reason']}",
        "yellow",
    ),
    "stage failed": lambda _label, record, _tally: (f"  {record['island']} failed its chain", "yellow"),
    "chain incomplete": lambda _label, record, _tally: (
        f"  some layers of {record['cargo']} are missing; others are asked to load them",
        "yellow",
    ),
    "job placed": _placed,
    "job completed": _completed,
    "job failed": _failed,
    "cargo state": _loaded,
}
