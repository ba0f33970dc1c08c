"""What this gateway knows of Islands, from two sources: those that advertise here, and those that other
coordinators vouch for; and what models that makes.

An Island stays as long as one source knows it. A model whose last Island went is remembered for a while, so
that jobs for it wait instead of failing as unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Final

from cargos.resolve import builtin_catalogue
from gateway.service import ModelInfo
from protocol.adverts import IslandAdvert
from protocol.coordination import CargoCount
from protocol.ids import CargoDigest, PeerId
from protocol.instants import SECOND_NS, Instant, UnixNs
from routing.islands import IslandBook, Naming, Shelf

#: A model whose last Island has gone is still known for this long (jobs for it wait, then fail with 503 and not
#: with 404): longer than a restart takes. So many at most, the one gone longest is forgotten first.
REMEMBER_MODEL_NS: Final = 600 * SECOND_NS
MAX_MODELS_REMEMBERED: Final = 256

#: Cargos whose first appearance is remembered (the models list shows it); the oldest is forgotten first.
MAX_CARGOS_SEEN: Final = 4096

#: Sources say when an Island is gone; the book itself never thinks so.
_FOREVER_NS: Final = 1 << 62


class MeshBook:
    """`elsewhere`: Cargos that other coordinators say they have, for models that no Island known here runs."""

    def __init__(
        self,
        now: Callable[[], Instant],
        unix_now: Callable[[], UnixNs],
        elsewhere: Callable[[], Iterable[CargoCount]],
    ) -> None:
        self.islands: Final[IslandBook[PeerId]] = IslandBook(ttl_ns=_FOREVER_NS)
        self._now = now
        self._unix_now = unix_now
        self._elsewhere = elsewhere
        self._direct: dict[PeerId, None] = {}
        self._vouched: dict[PeerId, dict[str, None]] = {}
        self._first_seen: dict[str, int] = {}
        self._called: dict[str, Naming] = {}
        self._gone: dict[str, tuple[ModelInfo, Instant]] = {}
        #: Tokens/s of a Cargo's chain of Islands, by digest; None: there is no complete one.
        self.chains: Callable[[str], float | None] = _no_chain

    def __len__(self) -> int:
        return len(self.islands)

    # --- Islands ------------------------------------------------------------------------------------

    def advertised(self, peer: PeerId, advert: IslandAdvert, sequence: int) -> None:
        """It advertises here."""
        self._direct[peer] = None
        self._admit(peer, advert, sequence)

    def left(self, peer: PeerId) -> bool:
        """It does not advertise here any more. Whether it is unknown now."""
        if self._direct.pop(peer, self) is self:
            return False
        if peer in self._vouched:
            # Its link to us is gone; maybe it is, too. Others are asked first until that is clear.
            self.islands.suspect(self._now(), peer)
            return False
        self._forget(peer)
        return True

    def advertises_here(self, peer: PeerId) -> bool:
        """Whether this gateway is one of its coordinators."""
        return peer in self._direct

    def vouched(self, cargo: str, peer: PeerId, advert: IslandAdvert, sequence: int) -> None:
        """Another coordinator says that it has the Cargo."""
        self._vouched.setdefault(peer, {})[cargo] = None
        self._admit(peer, advert, sequence)

    def unvouched(self, cargo: str, peer: PeerId) -> bool:
        """No other coordinator says so any more. Whether the Island is unknown now."""
        cargos = self._vouched.get(peer)
        if cargos is None:
            return False
        cargos.pop(cargo, None)
        if cargos:
            return False
        del self._vouched[peer]
        if peer in self._direct:
            return False
        self._forget(peer)
        return True

    def name_of(self, peer: PeerId) -> str:
        island = self.islands.get(peer)
        return island.advert.name if island is not None else peer[-8:]

    def _admit(self, peer: PeerId, advert: IslandAdvert, sequence: int) -> None:
        if self.islands.admit(self._now(), peer, advert, sequence):
            for offered in advert.cargos:
                self._first_seen.setdefault(offered.digest, self._unix_now() // SECOND_NS)
                if len(self._first_seen) > MAX_CARGOS_SEEN:
                    oldest = next(iter(self._first_seen))
                    del self._first_seen[oldest]
                    self._called.pop(oldest, None)

    def _forget(self, peer: PeerId) -> None:
        island = self.islands.get(peer)
        if island is None:
            return
        for offered in island.advert.cargos:
            shelf = self.islands.shelves.get(offered.digest)
            if offered.state == "ready" and shelf is not None:
                info = self._info(offered.digest, shelf)
                self._gone.pop(info.digest, None)
                self._gone[info.digest] = (_without_islands(info), self._now())
                if len(self._gone) > MAX_MODELS_REMEMBERED:
                    del self._gone[next(iter(self._gone))]
        self.islands.lost(peer)

    # --- models -------------------------------------------------------------------------------------

    def models(self) -> tuple[ModelInfo, ...]:
        """All that can be asked for, by name, the best served first."""
        found = {
            digest: self._info(digest, shelf) for digest, shelf in self.islands.shelves.items() if shelf.usable
        }
        for count in self._elsewhere():
            if count.digest not in found:
                found[count.digest] = self._info_elsewhere(count)
        return tuple(sorted(found.values(), key=lambda info: (info.id, -info.ready, info.version, info.digest)))

    def model(self, name: str) -> ModelInfo | None:
        """By name, name@version or digest: here, elsewhere, or gone a while ago.

        A name of the shipped catalogue means the Cargo there and no other, whatever Islands call theirs.
        """
        shipped = builtin_catalogue().get(name)
        if shipped is not None:
            name = shipped.digest
        return next(iter(self._candidates(name)), None)

    def _candidates(self, name: str) -> Iterator[ModelInfo]:
        shelves = self.islands.shelves
        digests = (digest for digest in self.islands.called(name) if shelves[digest].usable)
        infos = [self._info(digest, shelves[digest]) for digest in digests]
        infos = [info for info in infos if name in _names_of(info)]
        yield from sorted(infos, key=lambda info: (-info.ready, info.version, info.digest))
        elsewhere = [c for c in self._elsewhere() if name in {c.digest, c.name, f"{c.name}@{c.version}"}]
        yield from (self._info_elsewhere(c) for c in sorted(elsewhere, key=lambda c: (-c.ready, c.digest)))
        for info, gone in reversed(self._gone.values()):
            if name in _names_of(info) and self._now() - gone < REMEMBER_MODEL_NS:
                yield info

    def _info(self, digest: str, shelf: Shelf[PeerId]) -> ModelInfo:
        called = self._name_cargo(digest, shelf)
        chain_tps = self.chains(digest)
        return ModelInfo(
            id=called.name,
            digest=CargoDigest(digest),
            version=called.version,
            runtime=called.runtime,
            context_length=shelf.context_length,
            publisher=called.publisher,
            islands=sum(shelf.contexts.values()),
            ready=shelf.ready + (chain_tps is not None),
            decode_tps=max(shelf.decode_tps, chain_tps or 0.0),
            first_seen_unix_s=self._first_seen.get(digest, 0),
        )

    def _info_elsewhere(self, count: CargoCount) -> ModelInfo:
        return ModelInfo(
            id=count.name,
            digest=CargoDigest(count.digest),
            version=count.version,
            runtime="",
            context_length=0,
            publisher="",
            islands=count.islands,
            ready=count.ready,
            decode_tps=0.0,
            first_seen_unix_s=self._first_seen.get(count.digest, 0),
        )

    def _name_cargo(self, digest: str, shelf: Shelf[PeerId]) -> Naming:
        """What most Islands call it, and on a tie what it was called before: one liar renames nothing."""
        naming = max(shelf.namings, key=lambda n: shelf.namings[n])
        before = self._called.get(digest)
        if before is not None and shelf.namings.get(before) == shelf.namings[naming]:
            return before
        self._called[digest] = naming
        return naming


def _no_chain(_digest: str) -> float | None:
    return None


def _without_islands(info: ModelInfo) -> ModelInfo:
    return ModelInfo(
        info.id,
        info.digest,
        info.version,
        info.runtime,
        info.context_length,
        info.publisher,
        islands=0,
        ready=0,
        decode_tps=0.0,
        first_seen_unix_s=info.first_seen_unix_s,
    )


def _names_of(info: ModelInfo) -> tuple[str, str, str]:
    return info.id, f"{info.id}@{info.version}", info.digest
