"""Heartbeats on links, the end of silent ones and of those that nobody needs.

A link is lively while somebody needs it (kept, pinned, a call or another stream to that peer is open); lively
links are pinged each second and judged by their silence. All others are quiet: they get a ping now and then,
and end when they are not used for long (who sends notices over one has time-outs of its own). So a link costs
next to nothing when it rests, and a peer that others come to see can not be filled with links: how many may
rest is bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import structlog
import trio

from node.p2p import Host
from node.peer_types import Known, PeersConfig
from node.rpc import RpcLink
from protocol.adverts import METHOD_STAY, Accepted
from protocol.ids import PeerId
from protocol.instants import SECOND_NS

#: Looks for silence per heartbeat.
_LOOKS: Final = 4

#: Calls on a link that moved to a better connection may take this long, and are looked at so often.
_FINISH_S: Final = 10.0
_FINISH_LOOK_S: Final = 0.1

#: Whoever hears a goodbye ends the link within this time, or we do.
PART_S: Final = 2.0

_log = structlog.get_logger("peers")


async def finish_link(link: RpcLink) -> None:
    """End a link that has a successor, once its open calls are done."""
    with trio.move_on_after(_FINISH_S):
        while link.busy and not link.ended.is_set():  # noqa: ASYNC110 - calls have no common event
            await trio.sleep(_FINISH_LOOK_S)
    link.close("replaced by a newer link")


class LinkWatch:
    """Watches the links in `known`. `needed` says which peers somebody here wants to stay connected to."""

    def __init__(
        self, host: Host, known: Mapping[PeerId, Known], needed: Callable[[PeerId], bool], config: PeersConfig
    ) -> None:
        self._host = host
        self._known = known
        self._needed = needed
        self._config = config
        self._streamless: dict[PeerId, float] = {}

    async def run(self) -> None:
        """Until cancelled."""
        heartbeat = self._config.heartbeat_ns / SECOND_NS
        tick = heartbeat / _LOOKS
        next_sweep = trio.current_time()
        while True:
            before = trio.current_time()
            await trio.sleep(tick)
            now = trio.current_time()
            if (
                now - before > tick + heartbeat
            ):  # it was us who slept: what they sent waits unread in our sockets
                for known in self._known.values():
                    known.judged_from = known.pinged_at = now
                    known.link.ping()
            await self._end_silent(now)
            if now >= next_sweep:
                next_sweep = now + heartbeat - tick / 2
                await self._sweep(now)
                await self._end_streamless(now)

    def protected(self, peer: PeerId) -> bool:
        """Is the peer needed here, or are there streams to it besides its link?"""
        return self._needed(peer) or self._host.is_held(peer) or self._host.streams_of(peer) > 1

    def find_room(self, *, ours: bool) -> PeerId | None:
        """The peer whose link should end so that one more may exist; None if there is room.

        Raises BlockingIOError if there is none and all links are in use.
        """
        bound = self._config.max_on_demand if ours else self._config.max_strangers
        if len(self._known) < bound:
            return None
        free = [
            (known.link.used_at, peer)
            for peer, known in self._known.items()
            if known.ours == ours
            and not known.leaving  # one that was told to go makes room already
            and not known.link.busy
            and not self.protected(peer)
        ]
        if len(free) < bound:
            return None
        used_at, peer = min(free)
        if not ours and trio.current_time() - used_at < self._config.quiet_after_ns / SECOND_NS:
            raise BlockingIOError
        return peer

    async def _end_silent(self, now: float) -> None:
        limit = self._config.dead_after_ns / SECOND_NS
        for peer, known in tuple(self._known.items()):
            since = known.judged_from if known.lively else known.pinged_at
            if now - since <= limit:
                continue
            heard = self._host.heard_at(peer)
            if heard is None or (not known.lively and heard >= since):
                continue  # quiet, and its last ping was answered
            if now - max(heard, since) > limit:
                _log.warning("peer silent", peer=peer, silent_s=round(now - heard, 1))
                await self._host.disconnect(peer, f"silent for {now - heard:.1f} s")

    async def _sweep(self, now: float) -> None:
        config = self._config
        for peer, known in tuple(self._known.items()):
            link = known.link
            if known.leaving:
                if now - known.parted_at > PART_S:
                    link.close("not used")
                continue
            unused = now - link.used_at
            needed = self.protected(peer)
            if needed and unused > config.idle_ns / SECOND_NS / 4:
                link.notify(METHOD_STAY, Accepted())  # the other side may not need us, and would close it
            if needed or link.busy:
                if not known.lively:
                    known.lively, known.judged_from = True, now
                link.ping()
                continue
            known.lively = False
            limit = config.idle_ns if known.ours else config.idle_ns + config.idle_grace_ns
            if unused > limit / SECOND_NS:
                known.part(now)
                continue
            used = unused < config.quiet_after_ns / SECOND_NS
            rest_ns = config.quiet_after_ns if used else config.quiet_heartbeat_ns
            if now - known.pinged_at >= rest_ns / SECOND_NS:
                known.pinged_at = now
                link.ping()

    async def _end_streamless(self, now: float) -> None:
        """Connections without a link and without streams: strangers that say nothing, leftovers."""
        streamless = [
            peer
            for peer in self._host.connected()
            if peer not in self._known
            and not self._needed(peer)
            and not self._host.is_held(peer)
            and not self._host.streams_of(peer)
        ]
        before, self._streamless = self._streamless, {}
        for peer in streamless:
            since = before.get(peer, now)
            if now - since > self._config.streamless_ns / SECOND_NS:
                _log.debug("connection without streams", peer=peer)
                await self._host.disconnect(peer, "no streams")
            else:
                self._streamless[peer] = since
