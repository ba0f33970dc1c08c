"""Addresses that are dialled for ever: the peers that this node works with."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Final

import structlog
import trio

from node.p2p import StreamBroken, Unreachable
from node.peer_types import Known, PeersConfig, PeerState
from node.rpc import CallFailed, PeerUnreachable, RpcLink
from protocol.dice import Dice
from protocol.ids import PeerId
from protocol.instants import SECOND_NS, Instant

#: A first failure or two are usual when both sides start together.
FAILURES_TO_TELL: Final = 3

_log = structlog.get_logger("peers")


@dataclass(slots=True)
class Kept:
    """An address to stay connected to."""

    address: str
    peer: PeerId
    scope: trio.CancelScope
    release: Callable[[], None]
    state: PeerState = "connecting"
    detail: str = ""
    last_seen: Instant | None = None


class Keeper:
    """Keeps a link to each of its addresses, with backoff. `known`: links that are up, whoever opened them."""

    def __init__(
        self,
        known: Mapping[PeerId, Known],
        open_link: Callable[[PeerId, str], Awaitable[RpcLink]],
        pin: Callable[[PeerId], Callable[[], None]],
        nursery: trio.Nursery,
        *,
        config: PeersConfig,
        dice: Dice,
    ) -> None:
        self._known = known
        self._open_link = open_link
        self._pin = pin
        self._nursery = nursery
        self._config = config
        self._dice = dice
        self._kept: dict[str, Kept] = {}

    def keep(self, address: str, peer: PeerId) -> None:
        """Dial the address of this peer and stay connected. Idempotent."""
        if address not in self._kept:
            kept = self._kept[address] = Kept(address, peer, trio.CancelScope(), self._pin(peer))
            self._nursery.start_soon(self._keep, kept)

    def forget(self, address: str) -> None:
        """Dial it no more. Idempotent."""
        kept = self._kept.pop(address, None)
        if kept is not None:
            kept.scope.cancel()
            kept.release()

    def kept(self) -> Collection[Kept]:
        """All addresses, with or without a link."""
        return self._kept.values()

    async def _keep(self, kept: Kept) -> None:
        """Dial, wait for the end of the link, wait a little, dial again."""
        failures = 0
        with kept.scope:
            while True:
                kept.state = "connecting"
                began = trio.current_time()
                try:
                    with trio.fail_after(self._config.connect_ns / SECOND_NS):
                        link = await self._link_to(kept)
                except (Unreachable, CallFailed, PeerUnreachable, StreamBroken) as error:
                    kept.detail = str(error)
                except trio.TooSlowError:
                    kept.detail = "no answer in time"
                else:
                    kept.state, kept.detail = "connected", ""
                    began = trio.current_time()
                    await link.ended.wait()
                    kept.detail = link.reason
                    if trio.current_time() - began >= self._config.steady_after_ns / SECOND_NS:
                        failures = 0
                    if kept.peer in self._known:
                        continue  # replaced
                kept.state = "waiting"
                # Said once, when it begins; the table shows it as long as it lasts.
                level = logging.WARNING if failures == FAILURES_TO_TELL else logging.DEBUG
                _log.log(level, "can not reach", address=kept.address, reason=kept.detail, failures=failures)
                await trio.sleep(self.backoff_ns(failures) / SECOND_NS)
                failures += 1

    async def _link_to(self, kept: Kept) -> RpcLink:
        known = self._known.get(kept.peer)
        if known is not None:
            return known.link
        try:
            return await self._open_link(kept.peer, kept.address)
        except (CallFailed, PeerUnreachable):
            known = self._known.get(kept.peer)  # the peer's own link may have won
            if known is not None:
                return known.link
            raise

    def backoff_ns(self, failures: int) -> int:
        """Exponential, with jitter between half and the whole, so that restarts do not come in herds."""
        steps = math.ceil(math.log2(max(1, self._config.backoff_max_ns // self._config.backoff_first_ns)))
        whole = min(self._config.backoff_max_ns, self._config.backoff_first_ns << min(failures, steps))
        return round(whole * (0.5 + 0.5 * self._dice.unit()))
