"""What a job asks of an Island beyond running it, and what the evaluator knows beyond adverts. Everything is
permissive by default: without requirements, any Island that has the Cargo may run the job.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from protocol.adverts import ASK_TOKENS, WEEK_MINUTES, OfferedCargo, Window
from protocol.instants import SECOND_NS, UnixNs
from routing.jurisdiction import Residency, Sighting

P = TypeVar("P")

_MINUTE_NS: Final = 60 * SECOND_NS

#: 1 January 1970 was a Thursday; the week of schedules begins on Monday.
_EPOCH_WEEK_MINUTE: Final = 3 * 24 * 60


@dataclass(frozen=True, slots=True)
class Requirements:
    """`residency`: where the Island must be proven to stand. `karma_floor_milli`: thousandths of a point
    that it must have. `max_price_ucr`: what the job may cost at the Island's asking prices, micro-credits.
    `gpu`: it must have one. `region`: preferred on a tie, as the evaluator's own.
    """

    residency: Residency | None = None
    karma_floor_milli: int | None = None
    max_price_ucr: int | None = None
    gpu: bool = False
    region: str = ""


ANYTHING: Final = Requirements()


def _unknown(_peer: object) -> None:
    return None


def _unmoved(_coordinate: int) -> None:
    return None


def _no_karma(_peer: object) -> int:
    return 0


def _unseen(_peer: object) -> tuple[Sighting, ...]:
    return ()


@dataclass(frozen=True, slots=True)
class Outlook(Generic[P]):
    """What the evaluator knows of peers. `rtt_of`: measured, nanoseconds; `estimate_of`: from a packed network
    coordinate, where nothing was measured; `karma_of`: thousandths of a point, by the evaluator's own
    judgement; `sightings_of`: round trips to a peer from vantage points that the evaluator trusts;
    `unix_offset_ns`: civil time minus the clock of instants (None: schedules are not looked at).
    """

    rtt_of: Callable[[P], int | None] = _unknown
    estimate_of: Callable[[int], int | None] = _unmoved
    karma_of: Callable[[P], int] = _no_karma
    sightings_of: Callable[[P], Sequence[Sighting]] = _unseen
    unix_offset_ns: int | None = None


def price_ucr(offered: OfferedCargo, prompt_tokens: int, output_tokens: int, units: int = 0) -> int:
    """What a job costs at the Island's asking prices, micro-credits, each part rounded up."""
    prompt = -(-prompt_tokens * offered.prompt_ask_ucr // ASK_TOKENS)
    output = -(-output_tokens * offered.output_ask_ucr // ASK_TOKENS)
    return prompt + output + units * offered.unit_ask_ucr


def is_open(schedule: Sequence[Window], unix_now: UnixNs) -> bool:
    """Whether a weekly schedule is open now. An empty one always is."""
    if not schedule:
        return True
    minute = (unix_now // _MINUTE_NS + _EPOCH_WEEK_MINUTE) % WEEK_MINUTES
    return any((minute - window.start) % WEEK_MINUTES < window.minutes for window in schedule)
