"""From a pipe of bytes to a secured one that both sides agreed to multiplex with yamux."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from node.p2p.errors import ChannelBroken
from node.p2p.limits import HostLimits
from node.p2p.multistream import NegotiationFailed, NotSupported, Proposer, Responder
from node.p2p.noise import NOISE_PROTOCOL, Channel, Credentials, HandshakeFailed, Secured
from node.p2p.transport import ExactReader, Transport, send_all
from protocol.errors import ProtocolError
from protocol.ids import PeerId, peer_id_untrusted

YAMUX_PROTOCOL: Final = "/yamux/1.0.0"

#: Also yamux. The name says that this connection carries bulk only; who does not know it refuses.
BULK_PROTOCOL: Final = "/archipelag/bulk-yamux/1.0.0"


class Upgrader:
    """Makes secured connections for one identity."""

    def __init__(self, seed: bytes, limits: HostLimits) -> None:
        self._credentials = Credentials(seed)
        self._limits = limits

    async def dial(self, transport: Transport, peer: PeerId, *, bulk: bool = False) -> Secured:
        """Secure a connection on which we speak first, to `peer`, for `bulk` or all else. Closes it on failure.

        It is ours to use only once the other side has admitted us: a host that refuses us for want of room
        does so before its last answer here. Raises HandshakeFailed, ChannelBroken.
        """
        try:
            reader = ExactReader(transport)
            await _propose_raw(transport, reader, NOISE_PROTOCOL)
            secured = await self._credentials.dial(transport, reader, peer)
            rest = await _propose(secured.channel, BULK_PROTOCOL if bulk else YAMUX_PROTOCOL)
        except NotSupported as error:
            transport.close()
            raise HandshakeFailed("it does not speak noise and yamux") from error
        except NegotiationFailed as error:
            transport.close()
            raise HandshakeFailed(f"no libp2p peer: {error}") from error
        except BaseException:
            transport.close()
            raise
        secured.channel.unreceive(rest)
        return replace(secured, bulk=bulk)

    async def prove(self, transport: Transport, peer: PeerId) -> None:
        """Let `peer` prove that it is at the other end, then close. Raises HandshakeFailed, ChannelBroken."""
        try:
            reader = ExactReader(transport)
            await _propose_raw(transport, reader, NOISE_PROTOCOL)
            await self._credentials.dial(transport, reader, peer)
        except (NotSupported, NegotiationFailed) as error:
            raise HandshakeFailed("no libp2p peer that speaks noise") from error
        finally:
            transport.close()

    async def accept(
        self,
        transport: Transport,
        admit: Callable[[PeerId, bool], None],
        takes_bulk: Callable[[PeerId], bool] = lambda _: False,
    ) -> Secured:
        """Secure a connection on which the other side speaks first. `admit(peer, bulk)` raises if we do not
        want that peer; asked again when it is known what it is for. `takes_bulk`: is there room for one?

        Closes it on failure. Raises HandshakeFailed, ChannelBroken, and what `admit` raises.
        """
        try:
            reader = ExactReader(transport)
            await _respond_raw(transport, reader, NOISE_PROTOCOL)
            secured = await self._credentials.accept(transport, reader)
            peer = peer_id_untrusted(secured.peer)
            admit(peer, False)

            def speaks(protocol: str) -> bool:
                return protocol == YAMUX_PROTOCOL or (protocol == BULK_PROTOCOL and takes_bulk(peer))

            protocol, rest = await _respond(secured.channel, speaks)
            bulk = protocol == BULK_PROTOCOL
            admit(peer, bulk)  # others may have come meanwhile
        except NegotiationFailed as error:
            transport.close()
            raise HandshakeFailed(str(error)) from error
        except ProtocolError as error:
            transport.close()
            raise HandshakeFailed("a peer whose key is not Ed25519") from error
        except BaseException:
            transport.close()
            raise
        secured.channel.unreceive(rest)
        return replace(secured, bulk=bulk)


async def _propose_raw(transport: Transport, reader: ExactReader, protocol: str) -> None:
    proposer = Proposer(protocol)
    await send_all(transport, proposer.opening)
    while not proposer.agreed:
        await reader.fill()
        proposer.feed_untrusted(_taken(reader))
    reader.buffer += proposer.rest()


async def _respond_raw(transport: Transport, reader: ExactReader, protocol: str) -> None:
    responder = Responder(protocol.__eq__)
    while responder.agreed is None:
        await reader.fill()
        answer = responder.feed_untrusted(_taken(reader))
        if answer:
            await send_all(transport, answer)
    reader.buffer += responder.rest()


def _taken(reader: ExactReader) -> bytes:
    data = bytes(reader.buffer)
    reader.buffer.clear()
    return data


async def _propose(channel: Channel, protocol: str) -> bytes:
    proposer = Proposer(protocol)
    await _send(channel, proposer.opening)
    while not proposer.agreed:
        proposer.feed_untrusted(await _receive(channel))
    return proposer.rest()


async def _respond(channel: Channel, speaks: Callable[[str], bool]) -> tuple[str, bytes]:
    responder = Responder(speaks)
    while responder.agreed is None:
        answer = responder.feed_untrusted(await _receive(channel))
        if answer:
            await _send(channel, answer)
    return responder.agreed, responder.rest()


async def _send(channel: Channel, data: bytes) -> None:
    if not channel.send_nowait(data):
        await channel.flush()


async def _receive(channel: Channel) -> bytes:
    records = await channel.receive()
    if not records:
        raise ChannelBroken("the other side refused the connection")
    return b"".join(records)
