"""The dialler's half of a relayed connection, and the pipe that it and the listener's half are made of.

The relay joins two streams and sees only what noise has sealed end to end, so to the upgrade a relayed
connection is a transport like a socket.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol, TypeAlias

import trio

from node.p2p.addresses import Address
from node.p2p.errors import ChannelBroken, StreamBroken, Unreachable
from node.p2p.nat_messages import (
    HOP_PROTOCOL,
    STATUS_OK,
    ConnectRequest,
    decode_hop_status_untrusted,
    encode_hop_request,
    receive_message_untrusted,
    send_message,
    status_words,
)
from node.p2p.stream import Stream
from node.p2p.transport import Path
from protocol.errors import ProtocolError
from protocol.ids import PeerId

PathFilter: TypeAlias = Callable[[Path], bool]

#: The relay has to open a stream to the target, which has to accept: two round trips more than a plain dial.
CIRCUIT_S: Final = 15.0


def is_direct(path: Path) -> bool:
    """Not through a relay."""
    return path.relay is None


def is_relayed(path: Path) -> bool:
    """Through a relay."""
    return path.relay is not None


def is_from_listener(path: Path) -> bool:
    """Dialled from the port that we listen on."""
    return path.from_listener


class Opener(Protocol):
    """What of a host is needed here."""

    async def open_stream(self, peer: PeerId, protocol: str, *, over: PathFilter | None = None) -> Stream: ...


class StreamTransport:
    """A stream as a pipe below another connection."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.remote: Final = f"relayed by {stream.peer}"

    def send_nowait(self, data: bytes | memoryview) -> int:
        try:
            return self._stream.send_some_nowait(data)
        except StreamBroken as error:
            raise ChannelBroken(error.reason) from error

    async def wait_writable(self) -> None:
        try:
            await self._stream.wait_sendable()
        except StreamBroken as error:
            raise ChannelBroken(error.reason) from error

    async def receive_some(self) -> bytes:
        try:
            return await self._stream.receive_some()
        except StreamBroken as error:
            raise ChannelBroken(error.reason) from error

    def close(self) -> None:
        self._stream.reset()


async def open_circuit(host: Opener, target: Address) -> StreamTransport:
    """Ask the relay, to which there is a connection, to join us to `target`. Raises Unreachable."""
    relay, peer = target.relay, target.peer
    if relay is None or peer is None:
        raise ValueError(f"{target} is not relayed")
    try:
        with trio.fail_after(CIRCUIT_S):
            stream = await host.open_stream(relay, HOP_PROTOCOL, over=is_direct)
            status = 0
            try:
                await send_message(stream, encode_hop_request(ConnectRequest(peer)))
                status = decode_hop_status_untrusted(await receive_message_untrusted(stream)).status
            finally:
                if status != STATUS_OK:
                    stream.reset()
    except StreamBroken as error:
        raise Unreachable(f"the relay gave up: {error.reason}") from error
    except ProtocolError as error:
        raise Unreachable(f"the relay broke the protocol: {error.detail}") from error
    except trio.TooSlowError:
        raise Unreachable(f"no answer from the relay within {CIRCUIT_S:g} s") from None
    if status != STATUS_OK:
        raise Unreachable(status_words(status))
    return StreamTransport(stream)
