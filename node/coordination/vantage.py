"""Coordinators whose place is known: where round trips are measured that prove where an Island stands."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.ids import PeerId
from routing.geography import Place


@dataclass(frozen=True, slots=True)
class Vantage:
    """A coordinator (also this one) whose place the settings tell. `operator`: who runs it."""

    peer: PeerId
    operator: str
    place: Place
