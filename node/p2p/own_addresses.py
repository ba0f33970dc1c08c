"""Where others see this node: what peers say of it (identify), and what follows for its listening port."""

from __future__ import annotations

import ipaddress
from typing import Final

from node.p2p.addresses import Address, parse_address
from node.p2p.errors import AddressInvalid, Unreachable
from node.p2p.host import Host
from node.p2p.identify import Identified, identify
from node.p2p.relay_dial import PathFilter, is_direct, is_from_listener
from node.p2p.transport import Path
from protocol.errors import ProtocolError
from protocol.ids import PeerId

#: Told to a peer that shall dial us; it tries a few of them only.
MAX_OWN_ADDRESSES: Final = 8


def _came_to_us(path: Path) -> bool:
    return path.relay is None and path.inbound


class OwnAddresses:
    """What peers observed of us, kept at the host (`Host.observed`)."""

    def __init__(self, host: Host) -> None:
        self._host = host

    async def learn(self, peer: PeerId) -> Identified | None:
        """Ask a directly connected peer where it sees us. None if it does not say."""
        paths = self._host.paths(peer)
        over: PathFilter = is_direct
        if any(map(is_from_listener, paths)):
            over = is_from_listener
        elif any(map(_came_to_us, paths)):
            over = _came_to_us
        try:
            told = await identify(self._host, peer, over=over)
        except (Unreachable, ProtocolError):
            return None
        if told.observed is not None:
            self._host.note_observed(peer, told.observed, mapped=over is not is_direct)
        return told

    async def learn_port(self, relay: PeerId | None) -> None:
        """Make sure to know where this relay sees our listening port, if it was dialled from there."""
        if relay is None or ((seen := self._host.observed.get(relay)) is not None and seen.mapped):
            return
        await self.learn(relay)

    def mapped(self) -> tuple[str, ...]:
        """Where peers see our listening port, the most often named first."""
        named: dict[str, int] = {}
        for observed in self._host.observed.values():
            if observed.mapped:
                named[observed.address] = named.get(observed.address, 0) + 1
        return tuple(sorted(named, key=lambda text: -named[text]))

    def ips(self) -> tuple[str, ...]:
        """The IP addresses that peers see us at, the most often named first: a few who invent some do not push
        out the one that all others see.
        """
        named: dict[str, int] = {}
        for observed in self._host.observed.values():
            address = _parsed(observed.address)
            if address is not None:
                named[address.host] = named.get(address.host, 0) + 1
        return tuple(sorted(named, key=lambda ip: (-named[ip], ip)))

    def candidates(self) -> tuple[str, ...]:
        """Where we might be dialled: as peers see our port, at the IP that they see with the port that we
        listen on (a forwarded port, no NAT at all), and where we listen.
        """
        found = dict.fromkeys(self.mapped())
        for ip in self.ips():
            version = ipaddress.ip_address(ip).version
            for host, port in self._host.endpoints:
                if ipaddress.ip_address(host.partition("%")[0]).version == version:
                    found[str(Address(f"ip{version}", ip, port))] = None
        listening = [text.partition("/p2p/")[0] for text in self._host.listening]
        elsewhere = [text for text in listening if not _is_loopback(text)]
        found |= dict.fromkeys(elsewhere or listening)
        return tuple(found)[:MAX_OWN_ADDRESSES]


def _parsed(text: str) -> Address | None:
    try:
        address = parse_address(text)
    except AddressInvalid:
        return None
    return address if address.kind in {"ip4", "ip6"} else None


def _is_loopback(text: str) -> bool:
    address = _parsed(text)
    return address is not None and ipaddress.ip_address(address.host).is_loopback
