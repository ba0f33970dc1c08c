"""When things are asked for: Poisson, regular, bursts, or a gateway's own log; and which, by Zipf."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Final, NamedTuple

from protocol.instants import SECOND_NS
from sim import portable
from sim.config import ArrivalSettings
from sim.draws import Draws
from sim.settings import ScenarioError

#: Weights of Zipf's law are integers of this scale, so that no sum of floats decides.
_ZIPF_SCALE: Final = 1 << 32

#: Lines of a trace: a busy gateway's month.
MAX_TRACE_LINES: Final = 10_000_000


class Span(NamedTuple):
    """From an instant to before another."""

    start_ns: int
    end_ns: int


class Arrival(NamedTuple):
    """`model`, tokens: of a trace; else "" and 0 (the study draws them)."""

    at_ns: int
    model: str = ""
    prompt_tokens: int = 0
    output_tokens: int = 0


def arrivals(settings: ArrivalSettings, dice: Draws, span: Span, folder: Path) -> Iterator[Arrival]:
    """In order of time. `folder`: where a trace's name is looked up."""
    if settings.process == "trace":
        yield from _trace(folder / settings.file, span)
        return
    bursts = settings.process == "bursts"
    per_s = 1.0 / settings.burst_every_s if bursts else settings.per_s
    if per_s <= 0.0:
        return
    gap_ns = SECOND_NS / per_s
    at = span.start_ns
    while True:
        at += round(gap_ns if settings.process == "regular" else dice.exponential(gap_ns))
        if at >= span.end_ns:
            return
        for _ in range(settings.burst_size if bursts else 1):
            yield Arrival(at)


def zipf_weights(count: int, exponent: float) -> list[int]:
    """Cumulative integer weights of ranks 1 ... count, for `Draws.weighted`."""
    weights = (
        max(1, round(_ZIPF_SCALE / portable.power(float(rank), exponent))) for rank in range(1, count + 1)
    )
    return list(accumulate(weights))


def _trace(file: Path, span: Span) -> Iterator[Arrival]:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ScenarioError(f"arrivals.file: {file}: {error.strerror}") from error
    last = 0
    for number, row in enumerate(csv.reader(io.StringIO(text)), 1):
        if not row or row[0].strip() == "time_s":
            continue
        if number > MAX_TRACE_LINES:
            raise ScenarioError(f"{file}: more than {MAX_TRACE_LINES} lines")
        try:
            time_s, model, prompt, output = row
            at = round(float(time_s) * SECOND_NS)
            arrival = Arrival(span.start_ns + at, model.strip(), int(prompt), int(output))
        except ValueError as error:
            raise ScenarioError(
                f"{file}: line {number}: time_s,model,prompt_tokens,output_tokens was expected: {error}"
            ) from error
        if at < last:
            raise ScenarioError(f"{file}: line {number} is earlier than the one before; sort by time")
        last = at
        if arrival.at_ns >= span.end_ns:
            return
        yield arrival
