"""What a scenario may ask of a network of peers, whether it is simulated or consists of processes.

Peers are numbered 0, 1, 2, ... in the order in which they started; peer 0 is whom the others enter by. Times
are seconds of the network's own time: virtual in the simulator, the wall clock's for processes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class LookupResult:
    """`peers`: nearest to the key first, or providers in the order in which they were learnt. `took_ms`: as the
    machine itself counts it. `values`: what records say, the newest of each issuer.
    """

    peers: tuple[int, ...]
    values: tuple[bytes, ...]
    took_ms: float
    hops: int
    queries: int
    failures: int


class Timeout(AssertionError):
    """What was waited for did not come about in time."""


class Timed(ABC):
    """A network's own time."""

    @abstractmethod
    async def wait(self, seconds: float) -> None:
        """Let the network live for so long."""

    @property
    @abstractmethod
    def step_s(self) -> float:
        """How often to look when something is awaited."""

    @property
    @abstractmethod
    def now_s(self) -> float:
        """The network's time."""

    async def until(self, holds: Callable[[], object], what: str, within_s: float) -> float:
        """Wait until `holds()` is true (it may be a coroutine function); how long that took. Raises Timeout."""
        began = self.now_s
        while True:
            found = holds()
            if hasattr(found, "__await__"):
                found = await found  # type: ignore[misc]
            if found:
                return self.now_s - began
            if self.now_s - began > within_s:
                raise Timeout(f"not within {within_s:g} s: {what}")
            await self.wait(self.step_s)


class Network(Timed):
    """Made without peers; `start` or `join` adds them."""

    #: Its name in reports.
    kind: ClassVar[str]

    def __init__(self) -> None:
        #: DHT key of each peer that ever was.
        self.keys: list[int] = []
        self._dead: set[int] = set()

    @property
    def live(self) -> list[int]:
        """Peers that were started and not killed."""
        return [peer for peer in range(len(self.keys)) if peer not in self._dead]

    def closest(self, key: int, count: int, among: Iterable[int] | None = None, *, but: int = -1) -> list[int]:
        """The truth: the `count` peers nearest to a key, of the live ones (or `among`), without `but`."""
        peers = self.live if among is None else among
        near = sorted((self.keys[peer] ^ key, peer) for peer in peers if peer != but)
        return [peer for _, peer in near[:count]]

    # --- peers --------------------------------------------------------------------------------------

    @abstractmethod
    async def join(self, count: int) -> list[int]:
        """Start so many peers, which enter by peer 0; their numbers. They may still be entering on return."""

    @abstractmethod
    async def kill(self, peers: Sequence[int]) -> None:
        """They stop at once, without a farewell."""

    @abstractmethod
    async def partition(self, groups: Sequence[Sequence[int]]) -> None:
        """From now on only peers of one group reach each other."""

    @abstractmethod
    async def heal(self) -> None:
        """All reach each other again."""

    # --- the DHT ------------------------------------------------------------------------------------

    @abstractmethod
    async def table(self, peer: int) -> list[int]:
        """Whom its routing table holds."""

    @abstractmethod
    async def find_closest(self, asker: int, key: int) -> LookupResult: ...

    @abstractmethod
    async def put(self, peer: int, name: str, value: bytes, *, ttl_s: int = 3600) -> int:
        """Put a record of this peer's at `record_key(name)`. At how many peers it lies."""

    @abstractmethod
    async def get(self, asker: int, name: str) -> LookupResult: ...

    @abstractmethod
    async def provide(self, peer: int, key: int) -> int:
        """At how many peers it lies."""

    @abstractmethod
    async def withdraw(self, peer: int, key: int) -> None:
        """Provide it no more; what others hold of it expires."""

    @abstractmethod
    async def find_providers(self, asker: int, key: int) -> LookupResult: ...

    # --- made of these ------------------------------------------------------------------------------

    async def settle(self, k: int, within_s: float = 60.0) -> None:
        """Wait until every live peer knows k others, among them its nearest neighbour, and nobody dead."""

        async def settled() -> bool:
            for peer in self.live:
                known = set(await self.table(peer))
                nearest = self.closest(self.keys[peer], 1, but=peer)
                enough = len(known) >= min(k, len(self.live) - 1)
                if not enough or not known.issuperset(nearest) or not known.isdisjoint(self._dead):
                    return False
            return True

        await self.until(settled, "every peer knows its neighbours, and nobody who is dead", within_s)

    async def dead_share(self) -> float:
        """Entries for dead peers in all live peers' tables, as a share of all entries."""
        entries = dead = 0
        for peer in self.live:
            known = await self.table(peer)
            entries += len(known)
            dead += sum(other in self._dead for other in known)
        return dead / max(entries, 1)


class CoordinationNetwork(Timed):
    """Coordinators and Islands, numbered each for themselves in the order in which they started."""

    kind: ClassVar[str]

    @abstractmethod
    async def start(self, coordinators: int, islands: int) -> None:
        """All enter by coordinator 0. They may still be looking for each other on return."""

    @abstractmethod
    async def coordinators_of(self, island: int) -> set[int]:
        """The coordinators that have this Island's advert, as it knows."""

    @abstractmethod
    async def issuers_about(self, coordinator: int, island: int) -> set[int]:
        """Whose karma statements about an Island a coordinator can read."""

    @abstractmethod
    async def kill(self, coordinator: int, *, silent: bool = False) -> None:
        """It stops at once, without a farewell. `silent`: its connections stay
        open, but nothing comes any more.
        """
