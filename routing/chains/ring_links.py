"""Whether the stages that this node feeds are alive: one ping for all sessions over a link."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final

from protocol.ids import PeerId
from protocol.instants import Instant, after
from routing.chains.ring_policy import RingPolicy

#: Pings whose answers are awaited: those of two seconds, which is longer than a link may be silent.
_MAX_PINGS: Final = 8


@dataclass(slots=True)
class Link:
    """`heard`: its last word, or when we turned to it; `fresh`: it has not said anything yet. `pings`: (number,
    when) of the latest ones; `rtt_ns`: the shortest answer to one, 0: none came.
    """

    heard: Instant
    fresh: bool = True
    sessions: set[str] = field(default_factory=set[str])
    number: int = 0
    rtt_ns: int = 0
    pings: deque[tuple[int, Instant]] = field(default_factory=lambda: deque(maxlen=_MAX_PINGS))


class Links:
    """By peer. A link is kept as long as sessions use it."""

    def __init__(self, policy: RingPolicy) -> None:
        self._policy = policy
        self._links: dict[PeerId, Link] = {}

    def __contains__(self, peer: PeerId) -> bool:
        return peer in self._links

    def attach(self, now: Instant, peer: PeerId, session: str) -> bool:
        """Whether it is a new link."""
        link = self._links.get(peer)
        if link is None:
            self._links[peer] = Link(now, sessions={session})
            return True
        link.sessions.add(session)
        return False

    def detach(self, peer: PeerId, session: str) -> None:
        link = self._links.get(peer)
        if link is not None:
            link.sessions.discard(session)
            if not link.sessions:
                del self._links[peer]

    def drop(self, peer: PeerId) -> list[str]:
        """The link is gone. Returned: whose it was."""
        link = self._links.pop(peer, None)
        return sorted(link.sessions) if link is not None else []

    def heard(self, now: Instant, peer: PeerId) -> None:
        link = self._links.get(peer)
        if link is not None:
            link.heard, link.fresh = now, False

    def forgive(self, now: Instant) -> None:
        """We were away ourselves."""
        for link in self._links.values():
            link.heard = now

    def patience(self, peer: PeerId) -> Instant:
        """When its silence has lasted too long."""
        link = self._links[peer]
        return after(link.heard, self._policy.connect_ns if link.fresh else self._policy.dead_ns)

    def next_ping(self, now: Instant, peer: PeerId) -> int:
        link = self._links[peer]
        link.number += 1
        link.pings.append((link.number, now))
        return link.number

    def answered(self, now: Instant, peer: PeerId, number: int) -> None:
        """A ping was. The link may have moved to a shorter way meanwhile: the shortest counts."""
        link = self._links.get(peer)
        if link is None:
            return
        while link.pings and link.pings[0][0] <= number:
            asked, at = link.pings.popleft()
            if asked == number and now > at:
                link.rtt_ns = min(link.rtt_ns or now - at, now - at)

    def rtt_ns(self, peer: PeerId) -> int:
        """There and back; 0: not known."""
        link = self._links.get(peer)
        return 0 if link is None else link.rtt_ns
