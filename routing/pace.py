"""How an Island's tokens come in: its gaps, its speed, and from when on its silence is too long."""

from __future__ import annotations

from typing import Final

from protocol.instants import SECOND_NS, Instant
from routing.job_events import SupervisionPolicy

#: A running attempt's stall limit is this many times its mean gap between frames, within the policy's bounds.
STALL_FACTOR: Final = 50
GAP_WEIGHT: Final = 0.1

#: Tokens, or time, from which on an attempt says something about an Island's speed.
MIN_TIMED_TOKENS: Final = 8
MIN_TIMED_NS: Final = SECOND_NS


class Pace:
    """Of one attempt. `alive_at`: the last sign of life, or when its silence began to count."""

    __slots__ = ("_gap_ns", "_timed_ns", "_timed_tokens", "alive_at")

    def __init__(self, now: Instant) -> None:
        self.alive_at = now
        self._gap_ns = 0.0
        self._timed_tokens = 0
        self._timed_ns = 0

    def heard(self, now: Instant, *, generating: bool) -> int:
        """Returns how long the Island was silent although it had tokens to make, 0 before its first."""
        gap = 0
        if generating:
            gap = now - self.alive_at
            self._gap_ns = gap if self._gap_ns == 0 else self._gap_ns + GAP_WEIGHT * (gap - self._gap_ns)
        self.alive_at = now
        return gap

    def took(self, tokens: int, gap_ns: int) -> None:
        if gap_ns:
            self._timed_tokens += tokens
            self._timed_ns += gap_ns

    @property
    def speed(self) -> tuple[int, int] | None:
        """(tokens, ns), if it was watched for long enough."""
        enough = self._timed_tokens >= MIN_TIMED_TOKENS or self._timed_ns >= MIN_TIMED_NS
        return (self._timed_tokens, self._timed_ns) if self._timed_ns and enough else None

    def stall_ns(self, policy: SupervisionPolicy, *, in_chain: bool) -> int:
        """The longest silence between tokens."""
        if in_chain:
            return policy.chain_stall_ns
        if self._gap_ns == 0:
            return policy.stall_ns
        return min(policy.stall_ns, max(policy.stall_floor_ns, round(STALL_FACTOR * self._gap_ns)))
