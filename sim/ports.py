"""Where machines stand in a world: a service's machines by node, and the port of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeAlias

from protocol.machine import Machine

AnyMachine: TypeAlias = Machine[int, Any, Any, Any]
RoundTrip: TypeAlias = Callable[[int, int, Any], tuple[Any, int]]
"""(source, destination, message) -> the message as the other side decodes it, and its size on the wire."""

#: Of a machine that shall not be woken.
NEVER: Final = 1 << 62


class Service:
    """One name and its machines by node."""

    __slots__ = ("index", "kinds", "name", "ports", "round_trip", "size_of")

    def __init__(self, index: int, name: str) -> None:
        self.index = index
        self.name = name
        self.ports: dict[int, Port] = {}
        self.kinds: dict[type, int] = {}
        self.size_of: Callable[[Any], int] | None = None
        self.round_trip: RoundTrip | None = None


class Port:
    """A machine at its place. Dead when `machine` is None: events that were on their way to it are dropped."""

    __slots__ = ("access", "kinds", "machine", "node", "polled", "ports", "row", "service", "site", "wake")

    def __init__(
        self,
        node: int,
        service: Service,
        machine: AnyMachine | None,
        place: tuple[int, int, int],
        *,
        polled: bool,
    ) -> None:
        self.node = node
        self.service = service
        self.machine = machine
        self.polled = polled
        self.wake = NEVER
        # What every message needs, within reach: the service's dictionaries, and (site, its row, access line).
        self.ports = service.ports
        self.kinds = service.kinds
        self.site, self.row, self.access = place
