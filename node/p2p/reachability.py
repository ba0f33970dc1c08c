"""Can others dial this node? It asks some of them to try (libp2p's AutoNAT, version 1).

Asking: each answer is one server's word; `Verdicts` weighs the last word of several. Serving: a dial-back goes
only to the IP address that the request came from, so nobody can aim us at a third party, from a passing port
(the one we listen on may be open in the asker's NAT), and how many there are is bounded.

What this can not tell: a NAT that lets in whatever comes from an address once spoken to looks like no NAT.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import structlog
import trio

from node.p2p.addresses import Address, parse_address
from node.p2p.errors import AddressInvalid, StreamBroken, Unreachable
from node.p2p.host import Host
from node.p2p.nat_messages import (
    AUTONAT_PROTOCOL,
    DIAL_BAD_REQUEST,
    DIAL_ERROR,
    DIAL_OK,
    DIAL_REFUSED,
    DialRequest,
    DialResponse,
    decode_dial_request_untrusted,
    decode_dial_response_untrusted,
    encode_dial_request,
    encode_dial_response,
    receive_message_untrusted,
    send_message,
)
from node.p2p.rates import RateLimit
from node.p2p.relay_dial import is_direct
from node.p2p.sockets import dial, explain
from node.p2p.stream import Stream
from node.p2p.transport import SocketTransport
from protocol.codec import excerpt
from protocol.errors import ProtocolError
from protocol.ids import PeerId

_log = structlog.get_logger("reachability")

#: Addresses that a server tries, one after the other.
MAX_DIALS_PER_REQUEST: Final = 4

#: Per address: a SYN that is dropped shows by this silence; a live peer answers within a second.
DIAL_BACK_S: Final = 5.0

#: All of a request, from the asker's side: the server's dials and then some.
REQUEST_S: Final = MAX_DIALS_PER_REQUEST * DIAL_BACK_S + 5.0

#: Servers whose last word counts.
_MAX_SERVERS: Final = 8


class Reachability(StrEnum):
    """What is believed of this node."""

    UNKNOWN = "unknown"
    PUBLIC = "public"
    PRIVATE = "private"


class Verdicts:
    """The last word of each of some servers, and what follows from them. Pure.

    A belief needs `needed` servers that agree and are the majority; it stays until as much speaks against it,
    so that one liar or one lost packet changes nothing once others have spoken.
    """

    def __init__(self, needed: int) -> None:
        self._needed: Final = needed
        self._words: OrderedDict[PeerId, str | None] = OrderedDict()
        self.belief = Reachability.UNKNOWN

    def record(self, server: PeerId, met_at: str | None, *, available: int) -> bool:
        """`server` met us at that address, or (None) could not. `available`: servers that could be asked; with
        fewer than `needed`, all of them have to do. Did the belief change?
        """
        self._words[server] = met_at
        self._words.move_to_end(server)
        if len(self._words) > _MAX_SERVERS:
            self._words.popitem(last=False)
        good = sum(1 for word in self._words.values() if word is not None)
        bad = len(self._words) - good
        needed = max(1, min(self._needed, available))
        before = self.belief
        if good >= needed and good > bad:
            self.belief = Reachability.PUBLIC
        elif bad >= needed and bad > good:
            self.belief = Reachability.PRIVATE
        return self.belief is not before

    def heard(self, server: PeerId) -> bool:
        """Has it said anything?"""
        return server in self._words

    @property
    def settled(self) -> bool:
        """Do enough servers support the belief, whoever else could be asked?"""
        good = sum(1 for word in self._words.values() if word is not None)
        support = {Reachability.PUBLIC: good, Reachability.PRIVATE: len(self._words) - good}
        return support.get(self.belief, 0) >= self._needed

    @property
    def met_at(self) -> tuple[str, ...]:
        """Addresses at which servers met us, the most often named first."""
        found: dict[str, int] = {}
        for word in self._words.values():
            if word is not None:
                found[word] = found.get(word, 0) + 1
        return tuple(sorted(found, key=lambda text: (-found[text], text)))

    def forget(self) -> None:
        """Everything, but for the belief: our addresses have changed, and it has to be earned anew."""
        self._words.clear()


async def ask_to_be_dialled(host: Host, server: PeerId, addresses: Sequence[str]) -> str | None:
    """The address at which `server` could dial us; None if it could not.

    Raises Unreachable if it did not try (does not serve this, refused, no answer): that says nothing.
    """
    request = encode_dial_request(DialRequest(host.peer, tuple(addresses)))
    try:
        with trio.fail_after(REQUEST_S):
            stream = await host.open_stream(server, AUTONAT_PROTOCOL, over=is_direct)
            try:
                await send_message(stream, request)
                answer = decode_dial_response_untrusted(await receive_message_untrusted(stream))
            except BaseException:
                stream.reset()
                raise
            await stream.aclose()
    except StreamBroken as error:
        raise Unreachable(error.reason) from error
    except ProtocolError as error:
        raise Unreachable(f"the peer broke the protocol: {error.detail}") from error
    except trio.TooSlowError:
        raise Unreachable(f"no answer within {REQUEST_S:g} s") from None
    if answer.status == DIAL_ERROR:
        return None
    if answer.status != DIAL_OK:
        raise Unreachable(f"the peer did not try to dial us ({answer.status})")
    asked = [text.partition("/p2p/")[0] for text in addresses]
    met_at = (answer.address or asked[0]).partition("/p2p/")[0]
    if met_at not in asked:
        raise Unreachable("the peer says that it met us where we did not ask it to")
    return met_at


@dataclass(frozen=True, slots=True)
class DialBackLimits:
    """What strangers may make a server do."""

    per_peer_per_minute: int = 4
    """A node asks several servers once, and again when something changed."""

    per_minute: int = 60
    """All together; each costs up to MAX_DIALS_PER_REQUEST dials."""

    concurrent: int = 8
    """More are refused: they may ask somebody else."""


class DialBackServer:
    """AutoNAT's serving side on a host."""

    def __init__(self, host: Host, limits: DialBackLimits) -> None:
        self.served = 0
        self.refused = 0
        self._host = host
        self._limits = limits
        self._running = 0
        self._per_peer = RateLimit[PeerId](limits.per_peer_per_minute, per_s=60.0)
        self._all = RateLimit[str](limits.per_minute, per_s=60.0)
        host.handle(AUTONAT_PROTOCOL, self._serve)

    async def _serve(self, stream: Stream) -> None:
        with trio.fail_after(REQUEST_S):
            try:
                request = decode_dial_request_untrusted(await receive_message_untrusted(stream))
            except ProtocolError:
                answer = DialResponse(DIAL_BAD_REQUEST)
            else:
                answer = await self._answer(stream, request)
            await send_message(stream, encode_dial_response(answer))

    async def _answer(self, stream: Stream, request: DialRequest) -> DialResponse:
        if request.peer != stream.peer:
            return DialResponse(DIAL_BAD_REQUEST)
        targets = dialable_back(request.addresses, stream.remote)[:MAX_DIALS_PER_REQUEST]
        now = trio.current_time()
        # Relayed askers have no IP address that we could know; the rest is said in `DialBackLimits`.
        if (
            not is_direct(stream.path)
            or not targets
            or self._running >= self._limits.concurrent
            or not self._per_peer.take(stream.peer, now)
            or not self._all.take("", now)
        ):
            self.refused += 1
            return DialResponse(DIAL_REFUSED)
        self._running += 1
        try:
            for target in targets:
                if await self._dial_back(target, stream.peer):
                    return DialResponse(DIAL_OK, str(target))
        finally:
            self._running -= 1
            self.served += 1
        return DialResponse(DIAL_ERROR)

    async def _dial_back(self, target: Address, peer: PeerId) -> bool:
        try:
            with trio.fail_after(DIAL_BACK_S):
                await self._host.prove(SocketTransport(await dial(target)), peer)
        except (OSError, Unreachable, trio.TooSlowError) as error:
            reason = explain(error) if isinstance(error, OSError) else str(error)
            _log.debug("dial-back failed", peer=peer, address=str(target), reason=excerpt(reason))
            return False
        return True


def dialable_back(addresses: Sequence[str], remote: str) -> tuple[Address, ...]:
    """Which of a remote's addresses may be dialled for it: those on the IP that it comes from ('host:port')."""
    try:
        source = ipaddress.ip_address(remote.rpartition(":")[0].partition("%")[0])
    except ValueError:
        return ()
    found: list[Address] = []
    for text in addresses:
        try:
            address = parse_address(text)
        except AddressInvalid:
            continue
        if address.relay is None and address.kind in {"ip4", "ip6"} and address.port:
            plain = Address(address.kind, address.host, address.port)
            if ipaddress.ip_address(address.host) == source and plain not in found:
                found.append(plain)
    return tuple(found)
