"""The kernel: protocol logic as machines without I/O.

A `Machine` is told what happened (an `Input`) and when, and answers with what should happen (`Effect`s).
It reads no clock, draws no hidden randomness, logs nothing and knows no trio. Two interpreters run the
same machines: the driver in `node` (trio, libp2p) and the world in `sim` (virtual time). Each is one short
`match` over the effects.

`P` is the peer type: `PeerId` in the node, a small int in the simulator. `M` is the machine's message
union, `C` its commands from the local user, `E` the events it emits to that user.

Inputs and effects are `msgspec.Struct`s: the cheapest objects there are to make (a third of a frozen
dataclass), and a simulated network makes some ten million of them. `gc=False`: none may be part of a cycle.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, Protocol, TypeAlias, TypeVar

import msgspec

from protocol.instants import Instant

P = TypeVar("P")
M = TypeVar("M")
C = TypeVar("C")
E = TypeVar("E")


class Received(msgspec.Struct, Generic[P, M], frozen=True, gc=False):
    """A peer's message arrived, decoded and within limits, otherwise unchecked."""

    peer: P
    message: M


class Woken(msgspec.Struct, frozen=True, gc=False):
    """An instant asked for by `WakeAt` has come. May come late, never early, and may be spurious."""


class Ordered(msgspec.Struct, Generic[C], frozen=True, gc=False):
    """The local user wants something."""

    command: C


class PeerLost(msgspec.Struct, Generic[P], frozen=True, gc=False):
    """The connection (or the stream that this machine had) to the peer is gone."""

    peer: P


Input: TypeAlias = Received[P, M] | Woken | Ordered[C] | PeerLost[P]


class Send(msgspec.Struct, Generic[P, M], frozen=True, gc=False):
    """Send to the peer, connecting first if need be. Fire and forget: failure comes as `PeerLost`."""

    peer: P
    message: M


class WakeAt(msgspec.Struct, frozen=True, gc=False):
    """Call again at this instant. Only the earliest matters; `next_wake` tells the same."""

    instant: Instant


class Emit(msgspec.Struct, Generic[E], frozen=True, gc=False):
    """Tell the local user."""

    event: E


class Disconnect(msgspec.Struct, Generic[P], frozen=True, gc=False):
    """Drop the peer (or this machine's stream to it)."""

    peer: P
    reason: str


class Persist(msgspec.Struct, frozen=True, gc=False):
    """Keep these bytes under this key across restarts."""

    key: str
    value: bytes


class Trace(msgspec.Struct, frozen=True, gc=False):
    """A line for the log or the simulator's event record: a short name and flat values."""

    name: str
    values: tuple[tuple[str, int | float | str], ...] = ()


Effect: TypeAlias = Send[P, M] | WakeAt | Emit[E] | Disconnect[P] | Persist | Trace


class Machine(Protocol[P, M, C, E]):
    """State that moves only by `receive`."""

    def receive(self, now: Instant, what: Input[P, M, C]) -> Iterable[Effect[P, M, E]]:
        """Take one input. Total: no input raises, whatever a remote sent."""
        ...

    def next_wake(self) -> Instant | None:
        """The earliest instant at which `Woken` should be delivered, if any."""
        ...
