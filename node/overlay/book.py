"""The address book: who the DHT's small integers are, and where they can be met.

Bounded: beyond `capacity` the entries unused for longest go, but never one that the DHT or the driver still
refers to. A number is never given out again.

Whose word counts. What a peer says of itself, over its own connection or under its signature, replaces what was
known; what others say of it is hearsay, used only after that. An address at which we met the peer stands first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from typing import Final

from dht.keys import key_of_peer
from node.overlay.addresses import (
    Scope,
    group_of_host,
    host_of_remote,
    scope_of_host,
    take_addresses_untrusted,
)
from node.p2p import parse_address
from protocol.errors import ProtocolError
from protocol.ids import PeerId, peer_id_untrusted

#: Peers in the book. An entry is about 1 KiB; a table has some hundred peers, provider records name more.
MAX_BOOK: Final = 32_768

#: What stays when room is made: a quarter goes at once, so that a sweep is rare.
_KEPT_SHARE: Final = 3 / 4

#: Hearsay addresses of one peer; a newer word pushes out the oldest.
_MAX_HEARSAY: Final = 8


@dataclass(slots=True)
class _Entry:
    peer: PeerId
    own: tuple[str, ...] = ()
    hearsay: tuple[str, ...] = ()
    met_at: str = ""  # one of these worked last
    group: int = 0


class AddressBook:
    """Implements `dht.directory.Directory`. `me` is this node's number."""

    def __init__(self, me: PeerId, *, capacity: int = MAX_BOOK) -> None:
        self._capacity = capacity
        self._room_at = capacity  # when to make room next
        self._entries: OrderedDict[int, _Entry] = OrderedDict()  # least recently used first
        self._numbers: dict[PeerId, int] = {}
        self._next = 0
        self.keys: Final[dict[int, int]] = {}
        self.in_use: Callable[[], Container[int]] = frozenset  # the numbers that must stay
        self.me: Final = self.number_of(me)

    def __len__(self) -> int:
        return len(self._entries)

    # --- numbers ----------------------------------------------------------------------------------

    def number_of(self, peer: PeerId) -> int:
        """The peer's number; a new one if it has none. The name must have been checked."""
        number = self._numbers.get(peer)
        if number is not None:
            self._entries.move_to_end(number)
            return number
        if len(self._entries) >= self._room_at:
            self._make_room()
        number, self._next = self._next, self._next + 1
        self._entries[number] = _Entry(peer)
        self._numbers[peer] = number
        self.keys[number] = key_of_peer(peer)
        return number

    def find(self, peer: PeerId) -> int | None:
        """The peer's number, if it has one."""
        return self._numbers.get(peer)

    def peer_of(self, number: int) -> PeerId:
        """Who this is. Raises KeyError for a number that was given up."""
        return self._entries[number].peer

    def group_of(self, peer: int) -> int:
        """For `Directory`: the network of the address where it was met, else of the first that is known."""
        entry = self._entries.get(peer)
        if entry is None:
            return 0
        if not entry.group:
            entry.group = _group_of(entry.own or entry.hearsay)
        return entry.group

    def intern_untrusted(self, text: str, addresses: Iterable[str], narrowest: Scope) -> int | None:
        """The number of a peer that somebody told us of, with hearsay addresses.

        None: no name of a peer, or nowhere to meet it.
        """
        number = self._numbers.get(PeerId(text))
        if number is None:
            try:
                peer = peer_id_untrusted(text)
            except ProtocolError:
                return None
            told = take_addresses_untrusted(peer, addresses, narrowest)
            if not told:
                return None
            number = self.number_of(peer)
            self._entries[number].hearsay = told
            return number
        self._entries.move_to_end(number)
        entry = self._entries[number]
        if number != self.me and not entry.own:
            self._hear(entry, addresses, narrowest)
        return number

    def met_numbers(self, count: int) -> list[int]:
        """Peers worth remembering: those met at an address lately, then those that told us one themselves."""
        latest = [number for number in reversed(self._entries) if number != self.me]
        met = [number for number in latest if self._entries[number].met_at]
        told = [number for number in latest if self._entries[number].own and not self._entries[number].met_at]
        return (met + told)[:count]

    # --- addresses --------------------------------------------------------------------------------

    def addresses(self, number: int) -> tuple[str, ...]:
        """Where to meet it, in full form, best first."""
        entry = self._entries.get(number)
        if entry is None:
            return ()
        known = dict.fromkeys((entry.met_at, *entry.own, *entry.hearsay))
        return tuple(address for address in known if address)

    def own_word_untrusted(self, number: int, addresses: Iterable[str], narrowest: Scope) -> tuple[str, ...]:
        """What the peer says of itself. Returns the addresses that are news."""
        entry = self._entries[number]
        told = take_addresses_untrusted(entry.peer, addresses, narrowest)
        news = tuple(address for address in told if address not in entry.own)
        if told:
            entry.own, entry.hearsay = told, ()
            if entry.met_at not in told:
                entry.met_at = ""
        return news

    def announce(self, addresses: tuple[str, ...]) -> None:
        """Our own addresses, for those whom we tell that we provide something."""
        self._entries[self.me].own = addresses

    def trust(self, peer: PeerId, address: str) -> int:
        """An address out of the settings or of an earlier run."""
        number = self.number_of(peer)
        entry = self._entries[number]
        if address not in entry.own:
            entry.hearsay = tuple(dict.fromkeys((address, *entry.hearsay)))[:_MAX_HEARSAY]
        return number

    def met(self, number: int, remote: str) -> None:
        """There is a connection with it, to or from this 'host:port'."""
        entry = self._entries[number]
        host = host_of_remote(remote)
        if scope_of_host(host) is not None:
            entry.group = group_of_host(host)
        base = f"/{'ip6' if ':' in host else 'ip4'}/{host}/tcp/{remote.rpartition(':')[2]}/"
        for address in (*entry.own, *entry.hearsay):
            if address.startswith(base) and "/p2p-circuit/" not in address:
                entry.met_at = address
                return

    def failed(self, number: int) -> None:
        """It was met at none of its addresses; what others said of it is worth nothing."""
        entry = self._entries.get(number)
        if entry is not None:
            entry.met_at = ""
            if entry.own:
                entry.hearsay = ()

    # --- bounds -----------------------------------------------------------------------------------

    def _hear(self, entry: _Entry, addresses: Iterable[str], narrowest: Scope) -> None:
        suffix = f"/p2p/{entry.peer}"
        known = entry.hearsay
        news = [text for text in addresses if text not in known and text + suffix not in known]
        if news:
            told = take_addresses_untrusted(entry.peer, news, narrowest)
            entry.hearsay = (*known, *told)[-_MAX_HEARSAY:]

    def _make_room(self) -> None:
        used = self.in_use()
        wanted = len(self._entries) - int(self._capacity * _KEPT_SHARE)
        leaving: list[int] = []
        for number in self._entries:
            if len(leaving) >= wanted:
                break
            if number not in used and number != self.me:
                leaving.append(number)
        for number in leaving:
            del self._numbers[self._entries.pop(number).peer]
            del self.keys[number]
        # With more in use than there should be, one look at all of it for each newcomer would be a burden.
        self._room_at = max(self._capacity, len(self._entries) + self._capacity // 16)


def _group_of(addresses: tuple[str, ...]) -> int:
    for text in addresses:
        address = parse_address(text)
        if not address.kind.startswith("dns") and (group := group_of_host(address.host)):
            return group
    return 0
