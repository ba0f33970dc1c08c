"""The kernel: protocol logic as machines without I/O.

A `Machine` is told what happened (an `Input`) and when, and answers with what should happen (`Effect`s).
It reads no clock, draws no hidden randomness, logs nothing and knows no trio. Two interpreters run the
same machines: the driver in `node` (trio, libp2p) and the world in `sim` (virtual time). Each is one short
`match` over the effects.

`P` is the peer type: `PeerId` in the node, a small int in the simulator. `M` is the machine's message
union, `C` its commands from the local user, `E` the events it emits to that user.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeAlias, TypeVar

from protocol.instants import Instant

P = TypeVar("P")
M = TypeVar("M")
C = TypeVar("C")
E = TypeVar("E")


@dataclass(frozen=True, slots=True)
class Received(Generic[P, M]):
    """A peer's message arrived, decoded and within limits, otherwise unchecked."""

    peer: P
    message: M


@dataclass(frozen=True, slots=True)
class Woken:
    """An instant asked for by `WakeAt` has come. May come late, never early, and may be spurious."""


@dataclass(frozen=True, slots=True)
class Ordered(Generic[C]):
    """The local user wants something."""

    command: C


@dataclass(frozen=True, slots=True)
class PeerLost(Generic[P]):
    """The connection (or the stream that this machine had) to the peer is gone."""

    peer: P


Input: TypeAlias = Received[P, M] | Woken | Ordered[C] | PeerLost[P]


@dataclass(frozen=True, slots=True)
class Send(Generic[P, M]):
    """Send to the peer, connecting first if need be. Fire and forget: failure comes as `PeerLost`."""

    peer: P
    message: M


@dataclass(frozen=True, slots=True)
class WakeAt:
    """Call again at this instant. Only the earliest matters; `next_wake` tells the same."""

    instant: Instant


@dataclass(frozen=True, slots=True)
class Emit(Generic[E]):
    """Tell the local user."""

    event: E


@dataclass(frozen=True, slots=True)
class Disconnect(Generic[P]):
    """Drop the peer (or this machine's stream to it)."""

    peer: P
    reason: str


@dataclass(frozen=True, slots=True)
class Persist:
    """Keep these bytes under this key across restarts."""

    key: str
    value: bytes


@dataclass(frozen=True, slots=True)
class Trace:
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
