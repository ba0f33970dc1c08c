"""Whether the stages that this node feeds are alive: one ping for all sessions over a link."""

from __future__ import annotations

from dataclasses import dataclass, field

from protocol.ids import PeerId
from protocol.instants import Instant, after
from routing.chains.ring_policy import RingPolicy


@dataclass(slots=True)
class Link:
    """`heard`: its last word, or when we turned to it; `fresh`: it has not said anything yet."""

    heard: Instant
    fresh: bool = True
    sessions: set[str] = field(default_factory=set[str])
    number: int = 0


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

    def next_ping(self, peer: PeerId) -> int:
        link = self._links[peer]
        link.number += 1
        return link.number
