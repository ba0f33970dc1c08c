"""Islands as karma sees them: honest ones, and attackers by strategy. One actor is one machine; it may have
many names.

Each hour an actor says how it will do the jobs of that hour (`Plan`) and hears how it went. Strategies:
`free-rider` (junk from the first job, a new name when caught), `whitewash` (honest up to the threshold, then
junk, then a new name), `sleeper` (honest until nothing more can be saved up, then junk), `collusion` (junk, and
its members state all there is about each other), `sybil` (one machine's work, many names that praise each
other), `slander` (honest work, and lies about rivals).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

Strategy: TypeAlias = Literal["honest", "free-rider", "whitewash", "sleeper", "collusion", "sybil", "slander"]

#: Points that a sleeper saves up: all that one coordinator can credit (routing/karma.py, credit_cap).
SLEEPER_MPT: Final = 40_000

#: Names that a sybil works under in turns.
SYBIL_NAMES: Final = 6


@dataclass(frozen=True, slots=True)
class Plan:
    """This hour's work: under which name, and how much of it is junk (percent)."""

    name: int
    junk_percent: int


@dataclass(slots=True)
class Actor:
    """`names`: node numbers it has had, the present one last. Hours are of jobs at their full price."""

    strategy: Strategy
    names: list[int] = field(default_factory=list[int])
    worked_h: float = 0.0
    paid_h: float = 0.0
    junk_paid_h: float = 0.0
    betrays: bool = False
    wants_name: bool = False

    @property
    def honest(self) -> bool:
        return self.strategy == "honest"

    @property
    def states(self) -> bool:
        """Whether it issues statements of its own."""
        return self.strategy in ("collusion", "sybil", "slander")

    def plan(self, hour: int, worst_mpt: int, threshold_mpt: int) -> Plan:
        """`worst_mpt`: its karma in the eyes of the coordinator that thinks least of it."""
        match self.strategy:
            case "free-rider" | "collusion":
                return Plan(self.names[-1], 100)
            case "whitewash":
                return Plan(self.names[-1], 100 if worst_mpt >= threshold_mpt else 0)
            case "sleeper":
                self.betrays = self.betrays or worst_mpt >= SLEEPER_MPT
                return Plan(self.names[-1], 100 if self.betrays else 0)
            case "sybil":
                return Plan(self.names[hour % len(self.names)], 0)
            case _:
                return Plan(self.names[-1], 0)

    def heard(self, *, caught: bool) -> None:
        """It was found out, or not: whoever was starts again under another name."""
        if caught and self.strategy in ("free-rider", "whitewash", "sleeper", "collusion"):
            self.wants_name, self.betrays = True, False
