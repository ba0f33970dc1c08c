"""libp2p's ping (`/ipfs/ping/1.0.0`): 32 bytes come back as they are, as often as the dialler likes.

Between Islands round trips are measured on the kept RPC stream (node/rpc.py); this is for every other peer.
"""

from __future__ import annotations

import secrets
from typing import Final

import trio

from node.p2p.errors import StreamBroken, Unreachable
from node.p2p.host import Host
from node.p2p.stream import Stream
from protocol.errors import Fault, ProtocolError
from protocol.ids import PeerId
from protocol.instants import SECOND_NS

PING_PROTOCOL: Final = "/ipfs/ping/1.0.0"
PING_BYTES: Final = 32

#: The specification: a listener should accept at most two streams from one peer.
MAX_STREAMS_PER_PEER: Final = 2

#: A stream on which no ping comes is closed: go-libp2p does so after a minute, too.
IDLE_S: Final = 60.0

#: How long `ping` waits; what js-libp2p and py-libp2p wait.
PING_S: Final = 10.0


def serve_ping(host: Host) -> None:
    """Answer pings on this host. Raises ValueError if the protocol is handled already."""
    open_streams: dict[PeerId, int] = {}

    async def answer(stream: Stream) -> None:
        peer = stream.peer
        running = open_streams.get(peer, 0)
        if running >= MAX_STREAMS_PER_PEER:
            stream.reset()
            return
        open_streams[peer] = running + 1
        try:
            await _echo(stream)
        finally:
            open_streams[peer] -= 1
            if not open_streams[peer]:
                del open_streams[peer]

    host.handle(PING_PROTOCOL, answer)


async def _echo(stream: Stream) -> None:
    """Whole pings only: some clients take what their first read brings for the answer."""
    rest = b""
    while True:
        with trio.fail_after(IDLE_S):  # also for a peer that does not read its answers
            chunk = await stream.receive_some()
            if not chunk:
                return
            rest += chunk
            whole = len(rest) - len(rest) % PING_BYTES
            if whole:
                await stream.send_all(rest[:whole])
                rest = rest[whole:]


async def ping(host: Host, peer: PeerId) -> int:
    """One round trip to a connected peer on a stream of its own, in nanoseconds; the stream's opening does not
    count. Takes PING_S at most.

    Raises Unreachable (not connected, does not speak ping, no answer in time, broken off) and ProtocolError
    (the answer is not what was sent).
    """
    payload = secrets.token_bytes(PING_BYTES)
    answer = b""
    try:
        with trio.fail_after(PING_S):
            stream = await host.open_stream(peer, PING_PROTOCOL)
            closed = False
            try:
                began = trio.current_time()
                await stream.send_all(payload)
                while len(answer) < PING_BYTES:
                    chunk = await stream.receive_some()
                    if not chunk:
                        raise Unreachable("the peer closed the stream instead of answering the ping")
                    answer += chunk
                took_ns = round((trio.current_time() - began) * SECOND_NS)
                if answer != payload:
                    raise ProtocolError(Fault.UNEXPECTED, "the answer to a ping is not what was sent")
                await stream.aclose()
                closed = True
            finally:
                if not closed:
                    stream.reset()
    except StreamBroken as error:
        raise Unreachable(error.reason) from error
    except trio.TooSlowError:
        raise Unreachable(f"no answer to a ping within {PING_S:g} s") from None
    return took_ns
