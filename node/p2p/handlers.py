"""Inbound streams: each goes to its protocol's handler, in a task of its own, behind a wall, within bounds."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeAlias

import structlog
import trio

from node.p2p.errors import StreamBroken, Unreachable
from node.p2p.limits import HostLimits
from node.p2p.multistream import MAX_LINE_BYTES, NegotiationFailed, Responder, line
from node.p2p.sockets import leaves
from node.p2p.stream import Counters, Stream
from protocol.codec import excerpt
from protocol.errors import ProtocolError
from protocol.ids import PeerId

Handler: TypeAlias = Callable[[Stream], Awaitable[None]]

_log = structlog.get_logger("p2p")


class Handlers:
    """The protocols of a host, and the tasks that serve their streams."""

    def __init__(self, limits: HostLimits, counters: Counters) -> None:
        self.running = 0  # streams with a handler now
        self._limits = limits
        self._counters = counters
        self._handlers: dict[str, Handler] = {}
        self._bulk: set[str] = set()
        self._of_peer: dict[PeerId, int] = {}
        self._tasks: trio.Nursery | None = None

    @property
    def protocols(self) -> tuple[str, ...]:
        """What is handled, in the order in which it was registered."""
        return tuple(self._handlers)

    def add(self, protocol: str, handler: Handler, *, bulk: bool = False) -> None:
        """`bulk`: on connections for bulk, too. Raises ValueError if the name is too long or taken."""
        line(protocol)
        if protocol in self._handlers:
            raise ValueError(f"{protocol} is handled already")
        self._handlers[protocol] = handler
        if bulk:
            self._bulk.add(protocol)

    def open(self, tasks: trio.Nursery) -> None:
        """Serve, in this nursery."""
        self._tasks = tasks

    def close(self) -> None:
        """Take no more streams; those that are served end with the nursery."""
        self._tasks = None

    def admit(self, stream: Stream) -> bool:
        """Start a handler for a stream that the peer opens, unless there are too many."""
        peer = stream.peer
        running = self._of_peer.get(peer, 0)
        if (
            self._tasks is None
            or running >= self._limits.max_inbound_streams_per_peer
            or self.running >= self._limits.max_inbound_streams
        ):
            return False
        self._of_peer[peer] = running + 1
        self.running += 1
        self._tasks.start_soon(self._run, stream)
        return True

    async def _run(self, stream: Stream) -> None:
        in_order = False
        try:
            in_order = await self._serve(stream)
        finally:
            if not in_order:  # else the peer may still be reading what it was sent
                stream.reset()
            self.running -= 1
            self._of_peer[stream.peer] -= 1
            if not self._of_peer[stream.peer]:
                del self._of_peer[stream.peer]

    async def _serve(self, stream: Stream) -> bool:
        """The wall round handlers. Did it end in order, with the stream closed?"""
        try:
            with trio.fail_after(self._limits.negotiation_s):
                handler = await self._agree(stream)
            if handler is not None:
                await handler(stream)
                if not stream.adopted:
                    await stream.aclose()
                return True
        except (StreamBroken, trio.TooSlowError, NegotiationFailed) as error:
            _log.debug("stream ended", peer=stream.peer, protocol=stream.protocol, reason=excerpt(str(error)))
        except Exception as error:  # noqa: BLE001 - the outermost boundary of a handler's task
            if _only_remote(error):
                _log.debug("stream ended", peer=stream.peer, protocol=stream.protocol, reason=repr(error))
                return False
            self._counters.handler_failures += 1
            _log.exception("a stream handler failed", peer=stream.peer, protocol=stream.protocol)
        return False

    async def _agree(self, stream: Stream) -> Handler | None:
        responder = Responder(self._bulk.__contains__ if stream.path.bulk else self._handlers.__contains__)
        while responder.agreed is None:
            data = await stream.receive_some(MAX_LINE_BYTES)
            if not data:
                return None
            answer = responder.feed_untrusted(data)
            if answer:
                await stream.send_all(answer)
        if rest := responder.rest():
            stream.unreceive(rest)
        stream.protocol = responder.agreed
        return self._handlers[responder.agreed]


def _only_remote(error: BaseException) -> bool:
    """Is this nothing but what remotes cause?"""
    return all(isinstance(leaf, (StreamBroken, Unreachable, ProtocolError)) for leaf in leaves(error))
