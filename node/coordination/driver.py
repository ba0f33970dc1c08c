"""A machine of `routing` over kept links: a short match over what it wants done.

Each message travels as a notice on the RPC link to its peer. A machine whose user may dial (an Island towards
its coordinators) has links opened for it; one that only answers (a coordinator) sends to whoever is there.
Everything happens in the task that has the news, nothing waits, and only a dial has a task of its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final, Generic, TypeAlias, TypeVar

import structlog
import trio

from node.machine_loop import MachineLoop
from node.peers import PeerDown, PeerEvent, Peers
from node.rpc import PeerUnreachable
from protocol.codec import Message
from protocol.ids import PeerId
from protocol.machine import (
    Disconnect,
    Effect,
    Emit,
    Machine,
    Ordered,
    PeerLost,
    Received,
    Send,
    Trace,
    Woken,
)

M = TypeVar("M", bound=Message)
C = TypeVar("C")
E = TypeVar("E")

#: Messages that wait for one link to come up. Machines repeat what is not acknowledged, so a few are enough.
MAX_WAITING_PER_PEER: Final = 16

#: Peers that messages wait for.
MAX_WAITING_PEERS: Final = 256

#: Opening a link for a machine may take this long; the machine has given up the peer by then.
REACH_S: Final = 10.0

Reach: TypeAlias = Callable[[PeerId], Awaitable[None]]
"""Have a link to the peer. Raises PeerUnreachable."""

_log = structlog.get_logger("coordination")


class MachineDriver(Generic[M, C, E]):
    """Runs one machine. `run` keeps its time; all else happens when peers or users call.

    `on_event` is called for each event, in order; it may order something, which happens after it. `reach`:
    how to get a link; without it, what is for a peer without a link is lost, and the machine told.
    """

    def __init__(
        self,
        machine: Machine[PeerId, M, C, E],
        peers: Peers,
        method: str,
        nursery: trio.Nursery,
        on_event: Callable[[E], None],
        *,
        reach: Reach | None = None,
        disconnect: Callable[[PeerId, str], Awaitable[None]] | None = None,
    ) -> None:
        self._loop: MachineLoop[PeerId, M, C, E] = MachineLoop(machine, self._apply)
        self._peers = peers
        self._method = method
        self._nursery = nursery
        self._on_event = on_event
        self._reach = reach
        self._disconnect = disconnect
        self._outbox: dict[PeerId, deque[M]] = {}
        self._unsubscribe = peers.subscribe(self._on_peer)

    def order(self, command: C) -> None:
        """Tell the machine what its user wants."""
        self._loop.feed(Ordered(command))

    def received(self, peer: PeerId, message: M) -> None:
        """A peer's message came."""
        self._loop.feed(Received(peer, message))

    def wake(self) -> None:
        """Something about the machine was changed: see what it has to do now."""
        self._loop.feed(Woken())

    async def run(self) -> None:
        """Wake the machine when it asks for it, until cancelled."""
        try:
            await self._loop.run()
        finally:
            self._unsubscribe()

    # --- inside -------------------------------------------------------------------------------------

    def _apply(self, effect: Effect[PeerId, M, E]) -> None:
        match effect:
            case Send(peer, message):
                self._send(peer, message)
            case Emit(event):
                self._on_event(event)
            case Disconnect(peer, reason):
                if self._disconnect is not None:
                    self._nursery.start_soon(self._disconnect, peer, reason)
            case Trace(name, values):
                _log.debug(name, **dict(values))
            case _:
                pass

    def _send(self, peer: PeerId, message: M) -> None:
        if self._peers.hello(peer) is not None:
            self._peers.notify(peer, self._method, message)
            return
        if self._reach is None:
            self._loop.feed(PeerLost(peer))
            return
        waiting = self._outbox.get(peer)
        if waiting is not None:
            waiting.append(message)
            if len(waiting) > MAX_WAITING_PER_PEER:
                waiting.popleft()
        elif len(self._outbox) < MAX_WAITING_PEERS:
            self._outbox[peer] = deque((message,))
            self._nursery.start_soon(self._connect, peer, self._reach)
        else:
            self._loop.feed(PeerLost(peer))

    async def _connect(self, peer: PeerId, reach: Reach) -> None:
        try:
            with trio.fail_after(REACH_S):
                await reach(peer)
        except (PeerUnreachable, trio.TooSlowError) as error:
            self._outbox.pop(peer, None)
            _log.debug("unreachable", peer=peer, reason=str(error) or "no answer in time")
            self._loop.feed(PeerLost(peer))
        else:
            for message in self._outbox.pop(peer, ()):
                self._peers.notify(peer, self._method, message)

    def _on_peer(self, event: PeerEvent) -> None:
        if isinstance(event, PeerDown) and event.peer not in self._outbox:
            self._loop.feed(PeerLost(event.peer))
