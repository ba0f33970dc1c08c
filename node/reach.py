"""Links on demand: dial a peer when somebody has something for it, once, however many ask.

An address that failed is left alone for a while, twice as long each time. What is remembered is bounded, and so
are the dials that run and those that wait.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

import trio

from node.p2p import StreamBroken, Unreachable
from node.peer_types import PeersConfig
from node.rpc import CallFailed, PeerUnreachable
from protocol.ids import PeerId
from protocol.instants import SECOND_NS

#: Dials that run at once: each costs a socket, and some ms of CPU for its handshake.
MAX_DIALS: Final = 64

#: Dials that run or wait. A lookup waits for three at a time.
MAX_WAITING_DIALS: Final = 1024

#: Addresses of one peer that are tried.
MAX_ADDRESSES_TRIED: Final = 8

#: Failed addresses that are remembered, the oldest forgotten first.
MAX_FAILED: Final = 4096

#: When both sides dialled at once and ours lost, the other's link is up after this long at most.
_OTHER_LINK_S: Final = 1.0


@dataclass(slots=True)
class _Dial:
    addresses: deque[str]
    scope: trio.CancelScope
    tried: set[str] = field(default_factory=set[str])
    up: trio.Event = field(default_factory=trio.Event)  # whoever opened the link
    done: trio.Event = field(default_factory=trio.Event)
    waiters: int = 0
    error: str = ""


class Reacher:
    """`open_link(peer, address)` makes a link or raises; without an address, over a connection that exists."""

    def __init__(
        self,
        open_link: Callable[[PeerId, str | None], Awaitable[object]],
        is_up: Callable[[PeerId], bool],
        is_connected: Callable[[PeerId], bool],
        nursery: trio.Nursery,
        config: PeersConfig,
    ) -> None:
        self._open_link = open_link
        self._is_up = is_up
        self._is_connected = is_connected
        self._nursery = nursery
        self._config = config
        self._dials: dict[PeerId, _Dial] = {}
        self._running: Final = trio.CapacityLimiter(MAX_DIALS)
        self._failed: OrderedDict[str, tuple[int, float]] = OrderedDict()

    async def reach(self, peer: PeerId, addresses: Iterable[str]) -> None:
        """Return once there is a link to the peer. Raises PeerUnreachable."""
        if self._is_up(peer):
            await trio.lowlevel.checkpoint()
            return
        while (dial := self._dials.get(peer)) is not None and dial.scope.cancel_called:
            await dial.done.wait()  # given up by those who wanted it; we do want it
        if dial is None:
            if len(self._dials) >= MAX_WAITING_DIALS:
                await trio.lowlevel.checkpoint()
                raise PeerUnreachable(f"{len(self._dials)} dials are under way")
            dial = self._dials[peer] = _Dial(deque(), trio.CancelScope())
            self._nursery.start_soon(self._run, peer, dial)
        for address in addresses:
            if len(dial.tried) + len(dial.addresses) < MAX_ADDRESSES_TRIED and address not in dial.addresses:
                dial.addresses.append(address)
        dial.waiters += 1
        try:
            await dial.done.wait()
        finally:
            dial.waiters -= 1
            if not dial.waiters:
                dial.scope.cancel()  # nobody wants it any more (or it is done)
        if dial.error:
            raise PeerUnreachable(dial.error)

    def note_up(self, peer: PeerId) -> None:
        """A link is up, whoever opened it."""
        dial = self._dials.get(peer)
        if dial is not None:
            dial.up.set()

    def resting(self, address: str) -> bool:
        """Did this address fail a moment ago?"""
        failed = self._failed.get(address)
        return failed is not None and trio.current_time() < failed[1]

    def forgive(self, address: str) -> None:
        """There is news of this address: it may be dialled at once."""
        self._failed.pop(address, None)

    async def _run(self, peer: PeerId, dial: _Dial) -> None:
        dial.error = "given up"
        try:
            with dial.scope:
                async with self._running:
                    dial.error = await self._try_all(peer, dial)
        finally:
            del self._dials[peer]
            if self._is_up(peer):
                dial.error = ""
            dial.done.set()

    async def _try_all(self, peer: PeerId, dial: _Dial) -> str:
        """What went wrong last; empty if there is a link."""
        if self._is_connected(peer):
            error = await self._try(peer, None, dial)
            if not error:
                return ""
        error = "no address is known"
        while dial.addresses and not self._is_up(peer):
            address = dial.addresses.popleft()
            if address in dial.tried:
                continue
            dial.tried.add(address)
            if self.resting(address):
                error = "its addresses failed a moment ago"
                continue
            error = await self._try(peer, address, dial)
        return "" if self._is_up(peer) else error

    async def _try(self, peer: PeerId, address: str | None, dial: _Dial) -> str:
        try:
            with trio.fail_after(self._config.reach_ns / SECOND_NS):
                await self._open_link(peer, address)
        except (CallFailed, PeerUnreachable) as failure:
            with trio.move_on_after(_OTHER_LINK_S):
                await dial.up.wait()
            error = str(failure)
        except (Unreachable, StreamBroken) as failure:
            error = str(failure)
        except trio.TooSlowError:
            error = "no answer in time"
        else:
            error = ""
        if self._is_up(peer):
            error = ""
        if address is not None:
            self._remember(address, failed=bool(error))
        return error

    def _remember(self, address: str, *, failed: bool) -> None:
        count = self._failed.pop(address, (0, 0.0))[0]
        if not failed:
            return
        rest_ns = min(self._config.failed_max_ns, self._config.failed_first_ns << min(count, 16))
        self._failed[address] = (count + 1, trio.current_time() + rest_ns / SECOND_NS)
        if len(self._failed) > MAX_FAILED:
            self._failed.popitem(last=False)
