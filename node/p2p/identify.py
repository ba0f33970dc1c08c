"""libp2p's identify: peers of any implementation learn who we are, what we speak, and where they seem to be.

`/ipfs/id/1.0.0` answers with one protobuf message and closes; `/ipfs/id/push/1.0.0` carries the same message
unasked when something changed (libp2p specs, identify). Nothing in it is proof of anything but what noise
has proved already: the public key must be the connection's, the rest are the peer's claims.

We send no signed peer record: what proves an address here is that somebody met us there (AutoNAT), and records
that others pass on are the DHT's.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

import trio
from google.protobuf.message import DecodeError
from libp2p.identity.identify.pb.identify_pb2 import Identify

from node.p2p.errors import StreamBroken, Unreachable
from node.p2p.host import Host
from node.p2p.multiaddrs import (
    decode_multiaddr_untrusted,
    decode_varint_untrusted,
    encode_multiaddr,
    encode_varint,
)
from node.p2p.relay_dial import PathFilter
from node.p2p.stream import Stream
from protocol.codec import excerpt
from protocol.errors import Fault, ProtocolError
from protocol.ids import PeerId, public_key_of_untrusted
from protocol.limits import KIB, MAX_ADDRESSES

IDENTIFY_PROTOCOL: Final = "/ipfs/id/1.0.0"
PUSH_PROTOCOL: Final = "/ipfs/id/push/1.0.0"

#: What go-libp2p says here; others show it and decide nothing by it.
_PROTOCOL_VERSION: Final = "ipfs/0.1.0"

#: Bytes of one message (go-libp2p and js-libp2p refuse more), and parts that an answer may be split into (go).
MAX_MESSAGE_BYTES: Final = 8 * KIB
MAX_MESSAGES: Final = 10

_MAX_ANSWER_BYTES: Final = MAX_MESSAGES * (MAX_MESSAGE_BYTES + 2)

#: Protocols that are kept of a peer; a go-libp2p node with everything on has some thirty.
MAX_PROTOCOLS: Final = 256

#: An answer comes one round trip after the question; three seconds on a satellite link with losses.
IDENTIFY_S: Final = 10.0

#: Before the Ed25519 key in libp2p's public key message: { 1: Ed25519 (1), 2: 32 bytes }.
_KEY_PREFIX: Final = bytes((0x08, 0x01, 0x12, 0x20))


@dataclass(frozen=True, slots=True)
class Identified:
    """What a peer says of itself, safe to show. Claims, all of them, but for `peer`.

    `listen`: addresses of kinds that we know, as text without the peer's own id, at most MAX_ADDRESSES.
    `observed`: the address that the peer sees us at, without a peer id; None if it says none, a relay's, or one
    that we can not read.
    """

    peer: PeerId
    agent: str
    protocol_version: str
    protocols: tuple[str, ...]
    listen: tuple[str, ...]
    observed: str | None


def serve_identify(host: Host, *, agent: str, pushed: Callable[[Identified], None] | None = None) -> None:
    """Answer identify on this host, and take pushes. `agent`: program and version, as `archipelag/0.1.0`.

    `pushed` is called with what a peer tells unasked; it must not raise or block. Without it, pushes are read,
    checked and dropped. Raises ValueError if these protocols are handled already.
    """

    async def answer(stream: Stream) -> None:
        message = encode_identify(host, agent=agent, observed=observed_address(stream.remote))
        with trio.fail_after(IDENTIFY_S):
            await stream.send_all(encode_varint(len(message)) + message)

    async def take(stream: Stream) -> None:
        with trio.fail_after(IDENTIFY_S):
            told = decode_identify_untrusted(await _read_untrusted(stream), stream.peer)
        if pushed is not None:
            pushed(told)

    host.handle(IDENTIFY_PROTOCOL, answer)
    host.handle(PUSH_PROTOCOL, take)


async def identify(host: Host, peer: PeerId, *, over: PathFilter | None = None) -> Identified:
    """Ask a connected peer who it is; takes IDENTIFY_S at most. `over`: on a connection with such a path.

    Raises Unreachable (not connected, does not speak identify, no answer in time, broken off) and
    ProtocolError (the answer makes no sense, or names another key).
    """
    try:
        with trio.fail_after(IDENTIFY_S):
            stream = await host.open_stream(peer, IDENTIFY_PROTOCOL, over=over)
            try:
                message = await _read_untrusted(stream)
                await stream.aclose()
            finally:
                stream.reset()  # does nothing once both have finished
    except StreamBroken as error:
        raise Unreachable(error.reason) from error
    except trio.TooSlowError:
        raise Unreachable(f"no answer to identify within {IDENTIFY_S:g} s") from None
    return decode_identify_untrusted(message, peer)


async def push_identify(host: Host, peer: PeerId, *, agent: str) -> None:
    """Tell a connected peer what has changed here (addresses, protocols). Raises Unreachable."""
    try:
        with trio.fail_after(IDENTIFY_S):
            stream = await host.open_stream(peer, PUSH_PROTOCOL)
            message = encode_identify(host, agent=agent, observed=observed_address(stream.remote))
            await stream.send_all(encode_varint(len(message)) + message)
            await stream.aclose()
    except StreamBroken as error:
        raise Unreachable(error.reason) from error
    except trio.TooSlowError:
        raise Unreachable(f"the push was not taken within {IDENTIFY_S:g} s") from None


def observed_address(remote: str) -> str | None:
    """The multiaddress of a socket's 'host:port'; None for what is no such address (relayed, gone)."""
    host, _, port = remote.rpartition(":")
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None
    return f"/ip{address.version}/{address}/tcp/{port}"


def encode_identify(host: Host, *, agent: str, observed: str | None) -> bytes:
    """Our own message, without its length: as many addresses and protocols as fit MAX_MESSAGE_BYTES."""
    message = Identify(
        protocol_version=_PROTOCOL_VERSION,
        agent_version=agent,
        public_key=_KEY_PREFIX + public_key_of_untrusted(host.peer),
    )
    if observed is not None:
        message.observed_addr = encode_multiaddr(observed)
    suffix = f"/p2p/{host.peer}"
    for address in host.addresses[:MAX_ADDRESSES]:
        message.listen_addrs.append(encode_multiaddr(address.removesuffix(suffix)))
    for protocol in host.protocols:
        if message.ByteSize() + len(protocol.encode()) + 3 > MAX_MESSAGE_BYTES:
            break
        message.protocols.append(protocol)
    return message.SerializeToString()


def decode_identify_untrusted(data: bytes, peer: PeerId) -> Identified:
    """What `peer` said in these bytes (parts of a split message joined). Raises ProtocolError.

    Addresses of kinds that we do not know are left out: a peer may well listen where we can not dial.
    """
    message = Identify()
    try:
        message.ParseFromString(data)
        agent, version = _text_untrusted(message.agent_version), _text_untrusted(message.protocol_version)
        protocols = tuple(_text_untrusted(protocol) for protocol in message.protocols[:MAX_PROTOCOLS])
    except (DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(Fault.MALFORMED, "an identify message that is no protobuf") from error
    # An empty key is allowed: a push need not repeat it.
    if message.public_key and message.public_key != _KEY_PREFIX + public_key_of_untrusted(peer):
        raise ProtocolError(Fault.WRONG_ISSUER, "identify names another key than the connection's")
    listen = _known_untrusted(message.listen_addrs[:MAX_ADDRESSES])
    observed = _known_untrusted([message.observed_addr]) if message.observed_addr else ()
    if observed and "/p2p-circuit" in observed[0]:
        observed = ()  # a relay's address, not ours
    return Identified(
        peer=peer,
        agent=agent,
        protocol_version=version,
        protocols=protocols,
        listen=tuple(text.removesuffix(f"/p2p/{peer}") for text in listen),
        observed=observed[0].partition("/p2p/")[0] if observed else None,
    )


def _text_untrusted(value: object) -> str:
    """What the library gives for a text: bytes if it is no UTF-8, whatever its type hints say."""
    if not isinstance(value, str):
        raise ProtocolError(Fault.MALFORMED, "a text in identify that is not UTF-8")
    return excerpt(value)


def _known_untrusted(addresses: Iterable[bytes]) -> tuple[str, ...]:
    found: list[str] = []
    for data in addresses:
        try:
            found.append(decode_multiaddr_untrusted(data))
        except ProtocolError:
            continue
    return tuple(found)


async def _read_untrusted(stream: Stream) -> bytes:
    """All that comes up to the stream's end, as one message. Raises ProtocolError, StreamBroken."""
    data = bytearray()
    while chunk := await stream.receive_some():
        data += chunk
        if len(data) > _MAX_ANSWER_BYTES:
            raise ProtocolError(Fault.OVERSIZE, f"an identify answer of more than {_MAX_ANSWER_BYTES} bytes")
    return join_messages_untrusted(bytes(data))


def join_messages_untrusted(data: bytes) -> bytes:
    """Length-prefixed messages joined. Raises ProtocolError.

    Concatenated protobuf messages are one message, which is how go-libp2p splits one that is large.
    """
    bodies: list[bytes] = []
    at = 0
    while at < len(data):
        size, at = decode_varint_untrusted(data, at)
        if size > MAX_MESSAGE_BYTES or len(bodies) >= MAX_MESSAGES:
            raise ProtocolError(Fault.OVERSIZE, f"identify message {len(bodies)} of {size} bytes")
        if size > len(data) - at:
            raise ProtocolError(Fault.MALFORMED, "an identify message is cut off")
        bodies.append(data[at : at + size])
        at += size
    if not bodies:
        raise ProtocolError(Fault.MALFORMED, "an empty identify answer")
    return b"".join(bodies)
