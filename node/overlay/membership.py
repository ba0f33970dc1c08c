"""How a peer gets into the network and stays in it: bootstrap, cached peers, its own record, ways back.

Alone is whose routing table is empty, or who has no link and finds nobody by a lookup. Then it enters anew by
the addresses of the settings, the peers of last time and all whom it met, with backoff. From time to time it
asks the bootstrap peers even when all seems well: two halves of a split network see nothing wrong, each for
itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

import structlog
import trio

from node.overlay.cache import MAX_CACHED_ADDRESSES, MAX_CACHED_PEERS, CachedPeer, OverlayFiles
from node.overlay.records import PEER_RECORD_TTL_NS
from node.p2p import AddressInvalid, Host, parse_peer_address
from node.peers import PeerEvent, Peers, PeerUp
from protocol.ids import PeerId
from protocol.instants import SECOND_NS

if TYPE_CHECKING:
    from node.overlay.overlay import Overlay

#: Entering again after nobody answered: at once doubled up to a minute, with jitter.
REJOIN_FIRST_S: Final = 1.0
REJOIN_MAX_S: Final = 60.0

#: How often to see whether we are alone.
ALONE_CHECK_S: Final = 15.0

#: Bootstrap peers are asked again after this long, so that a split network grows together.
HEAL_S: Final = 600.0

#: The peers met are written down this often, besides at the end: after a power cut the list is so old.
SAVE_S: Final = 60.0

#: Peers that are asked at once on entering; each costs a connection.
MAX_SEEDS: Final = 32

#: A change of addresses waits this long for further ones before the peer record is put anew.
RECORD_SETTLE_S: Final = 2.0

#: A record that nobody took is put again after this long.
RECORD_RETRY_S: Final = 30.0

_log = structlog.get_logger("overlay")


class Membership:
    """Made by `Overlay`."""

    def __init__(
        self, overlay: Overlay, host: Host, peers: Peers, files: OverlayFiles, bootstrap: Iterable[str]
    ) -> None:
        self.joined = False
        self._overlay = overlay
        self._host = host
        self._peers = peers
        self._files = files
        self._bootstrap = [self._seed(address) for address in bootstrap if not self._is_self(address)]
        self._cached: list[int] = []
        self._changed = trio.Event()
        self._met_somebody = trio.Event()
        peers.subscribe(self._on_peer)

    async def run(self) -> None:
        """Until cancelled."""
        self._load()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._stay)
            nursery.start_soon(self._publish)
            nursery.start_soon(self._save_often)

    async def join(self, addresses: Iterable[str] = ()) -> int:
        """See Overlay.join."""
        seeds = [self._seed(address) for address in addresses if not self._is_self(address)]
        contacts = await self._overlay.driver.join(self._seeds(seeds))
        if contacts and not self.joined:
            self.joined = True
            _log.info("in the overlay", contacts=contacts)
            self._overlay.provide_again()
        return contacts

    def references(self) -> set[int]:
        """Ways in that must stay in the address book."""
        return {*self._bootstrap, *self._cached}

    def note_change(self) -> None:
        """What our peer record says has changed."""
        self._changed.set()

    def save(self) -> None:
        """Write down the peers met, the best first."""
        book, found = self._overlay.book, list[CachedPeer]()
        for number in book.met_numbers(MAX_CACHED_PEERS):
            addresses = book.addresses(number)[:MAX_CACHED_ADDRESSES]
            found.append(CachedPeer(book.peer_of(number), addresses))
        if found:  # nobody met this time: those of last time may still be there
            self._files.save_peers(tuple(found))

    # --- tasks --------------------------------------------------------------------------------------

    async def _stay(self) -> None:
        failures = 0
        while True:
            self._met_somebody = trio.Event()
            if self._seeds():
                if await self.join():
                    failures = 0
                    await self._wait_until_alone()
                    _log.warning("alone", remedy="entering the overlay anew")
                    self.joined = False
                    continue
                if failures == 2:
                    _log.warning("nobody answers in the overlay", seeds=len(self._seeds()))
            pause = min(REJOIN_MAX_S, REJOIN_FIRST_S * 2**failures) * (0.5 + 0.5 * self._jitter())
            failures = min(failures + 1, 16)
            with trio.move_on_after(pause if self._seeds() else REJOIN_MAX_S):
                await self._met_somebody.wait()

    async def _wait_until_alone(self) -> None:
        heal_s = self._overlay.config.heal_s
        heal_at = trio.current_time() + heal_s * (0.5 + self._jitter())
        while True:
            await trio.sleep(min(ALONE_CHECK_S, heal_s) * (0.75 + 0.5 * self._jitter()))
            if not len(self._overlay.driver.machine.table):
                return
            if not self._peers.up():
                found = await self._overlay.find_closest(self._overlay.own_key)
                if not found.closest:
                    return
            if trio.current_time() >= heal_at:
                heal_at = trio.current_time() + heal_s * (0.5 + self._jitter())
                if self._bootstrap:
                    await self._overlay.driver.join(tuple(self._bootstrap[:MAX_SEEDS]))

    async def _publish(self) -> None:
        """Keep our peer record true."""
        while True:
            await self._changed.wait()
            self._changed = trio.Event()
            await trio.sleep(RECORD_SETTLE_S)
            await self._publish_once()
            with trio.move_on_after(PEER_RECORD_TTL_NS / 2 / SECOND_NS):
                await self._changed.wait()
            self._changed.set()

    async def _publish_once(self) -> None:
        """Until somebody took it."""
        while self._overlay.announced:
            if self.joined and await self._overlay.publish_self():
                return
            await trio.sleep(RECORD_RETRY_S if self.joined else RECORD_SETTLE_S)

    async def _save_often(self) -> None:
        while True:
            await trio.sleep(SAVE_S)
            self.save()

    # --- seeds --------------------------------------------------------------------------------------

    def _seeds(self, first: Iterable[int] = ()) -> tuple[int, ...]:
        """Whom to enter by: those named now, those of the settings, some of last time, whoever is there."""
        book = self._overlay.book
        up = [number for peer in self._peers.up() if (number := book.find(peer)) is not None]
        seeds = dict.fromkeys((*first, *self._bootstrap, *up, *self._cached, *book.met_numbers(MAX_SEEDS)))
        return tuple(number for number in seeds if number != book.me and book.addresses(number))[:MAX_SEEDS]

    def _seed(self, address: str) -> int:
        _, peer = parse_peer_address(address)
        return self._overlay.book.trust(peer, address)

    def _is_self(self, address: str) -> bool:
        return parse_peer_address(address)[1] == self._host.peer

    def _load(self) -> None:
        """Peers of last time, in the file of our own making but checked all the same."""
        for cached in self._files.load_peers_untrusted():
            for address in reversed(cached.addresses):
                try:
                    named, peer = parse_peer_address(address)
                    if peer == cached.peer and peer != self._host.peer:
                        number = self._overlay.book.trust(PeerId(peer), str(named))
                        if number not in self._cached:
                            self._cached.append(number)
                except AddressInvalid:
                    continue

    def _on_peer(self, event: PeerEvent) -> None:
        if isinstance(event, PeerUp):
            self._met_somebody.set()

    def _jitter(self) -> float:
        return self._overlay.dice.unit()
