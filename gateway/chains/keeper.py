"""Keeps chains for Cargos that no single Island holds: asks Islands to hold layers, waits until they have them,
and mends what breaks. What is decided is in `gateway.chains.book`; here are the calls and the clock.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from typing import Final

import structlog
import trio

from dht.coordinates import estimate_ns
from gateway.chains.book import ChainBook, Order
from gateway.chains.layout import Layout
from gateway.chains.orders import REACH_S, OrderGiver
from gateway.chains.shortage import Shortage
from gateway.mesh_book import MeshBook
from gateway.service import StageInfo
from gateway.work_done import WorkBook
from node.manifests import fetch_manifest
from node.overlay.overlay import Overlay
from node.peers import PeerDown, PeerEvent, Peers
from node.rpc import CallFailed, PeerUnreachable
from protocol.adverts import HELLO, METHOD_HELLO
from protocol.dice import Dice
from protocol.ids import CargoDigest, PeerId
from protocol.instants import MILLISECOND_NS, SECOND_NS, Instant
from protocol.ring import Chain, Dtype, ShardHeld
from protocol.work import Work
from routing.chains.pairs import Pairs, neighbours, parted
from routing.chains.rebalance import BalancePolicy
from routing.job_events import Ask, Assignment, Full, NotYet, StageSeen
from routing.requirements import Outlook, Requirements

#: Adverts that come together are looked at together.
GATHER_S: Final = 0.05

#: Without news, all is looked at this often.
REVIEW_S: Final = 5.0

#: A stage that its head accuses gets this long to show that it lives.
ALIVE_NS: Final = SECOND_NS

#: An answer that is missed this much later than its deadline was missed by us, who were stopped or blocked.
LATE_NS: Final = 250 * MILLISECOND_NS

#: Losses of links that are remembered, to check what heads say of their stages.
MAX_LOSSES: Final = 4096

#: Cargos for which chains are kept; each may cost an allocation per advert that changes.
MAX_CHAINED_CARGOS: Final = 64

#: Nobody showed a Cargo's manifest: the next try comes after this.
MANIFEST_RETRY_S: Final = 10.0

_log = structlog.get_logger("chains")


class ChainKeeper:
    """`run` until cancelled. `giver`: gets orders to their Islands. `ready`: called when a Cargo's chain has
    become complete.
    """

    def __init__(
        self,
        peers: Peers,
        overlay: Overlay,
        known: MeshBook,
        work: WorkBook,
        outlook: Outlook[PeerId],
        *,
        giver: OrderGiver,
        me: PeerId,
        requirements: Requirements,
        now: Callable[[], Instant],
        nursery: trio.Nursery,
        ready: Callable[[], None],
        dtype: Dtype,
        balance: BalancePolicy | None,
    ) -> None:
        self._peers = peers
        self._overlay = overlay
        self._known = known
        self._work = work
        self._now = now
        self._nursery = nursery
        self._ready = ready
        self.book: Final = ChainBook(
            known.islands,
            outlook,
            me=me,
            requirements=requirements,
            sharding_of=work.sharding,
            rtt_of=self._rtt_ns,
            ours=known.advertises_here,
            dice=Dice(overlay.dice.u64(), stream=7),
            dtype=dtype,
            balance=balance,
        )
        self._me = me
        self._giver = giver
        self._news = trio.Event()
        self._learning: set[str] = set()
        self._ignorant: dict[str, float] = {}
        self._told: dict[str, object] = {}
        self._names: OrderedDict[PeerId, str] = OrderedDict()
        self._losses: OrderedDict[PeerId, Instant] = OrderedDict()
        self.pairs: Final = Pairs[PeerId]()
        known.chains = self.book.ready_tps
        peers.subscribe(self._on_peer)

    # --- what jobs ask ------------------------------------------------------------------------------

    def place(
        self, cargo: CargoDigest, work: Work, now: Instant, ask: Ask[PeerId]
    ) -> Assignment[PeerId] | NotYet | Full | None:
        """See `ChainBook.place`. A Cargo that nobody asked for lately may get memory that it did not before."""
        if self.book.note_asked(now, cargo):
            self.look()
        return self.book.place(now, cargo, work, ask)

    def stages_of(self, chain: Chain | None, seen: Iterable[StageSeen] = ()) -> tuple[StageInfo, ...]:
        """For people. `seen`: who stood in it by its head's account; the last one at a place did at the end."""
        if chain is None:
            return ()
        stood = {stage.index: stage.peer for stage in seen if not stage.failed}
        peers = [PeerId(stood.get(n, stage.holder.peer)) for n, stage in enumerate(chain.stages)]
        return tuple(
            StageInfo(self._name(peer), peer, stage.first, stage.last)
            for peer, stage in zip(peers, chain.stages, strict=True)
        )

    def why_nobody(self, cargo: CargoDigest) -> str:
        """Why there is no chain for it, for its consumer; empty if that is not so."""
        short = self.book.shortage(cargo)
        return (
            ""
            if short is None
            else f"the Islands have too little memory for this model together: {short.detail}"
        )

    def measured(self, cargo: CargoDigest, chain: Chain, stages: Sequence[StageSeen]) -> None:
        """A job was done by these; what their head says of how they worked together."""
        for a, b, rtt_ns in neighbours(chain, stages):
            self.pairs.worked(self._now(), PeerId(a), PeerId(b), rtt_ns)
        self.book.measured(cargo, stages)

    def accused(
        self, since: Instant, chain: Chain, stages: Sequence[StageSeen], fresh: AbstractSet[str]
    ) -> None:
        """A head says that some of these failed, and of `fresh` for the first time. Those of whom it is seen
        here, too, have failed: their link went down after `since`, or they do not answer now. Of others only
        the link from the stage before may have broken: nobody is charged, and these two are kept apart for a
        while.
        """
        before = parted(chain, stages)
        for peer in fresh:
            by = before.get(peer)
            self._nursery.start_soon(self._try, PeerId(peer), since, None if by is None else PeerId(by))

    def _name(self, peer: PeerId) -> str:
        """Also of one that stood in a chain and is gone."""
        name = self._known.name_of(peer)
        if self._known.islands.get(peer) is None:
            return self._names.get(peer, name)
        self._names[peer] = name
        self._names.move_to_end(peer)
        if len(self._names) > MAX_LOSSES:
            self._names.popitem(last=False)
        return name

    # --- forming chains -----------------------------------------------------------------------------

    def look(self) -> None:
        """Something changed."""
        self._news.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self._news = trio.Event()
            wake = self._look_at_all()
            wait_s = REVIEW_S if wake is None else min(REVIEW_S, max(0, wake - self._now()) / SECOND_NS)
            with trio.move_on_after(wait_s + GATHER_S):
                await self._news.wait()
            await trio.sleep(GATHER_S)

    def _look_at_all(self) -> Instant | None:
        wakes: list[Instant] = []
        shelves, became_ready = self._known.islands.shelves, False
        for digest in self.book.wanted()[:MAX_CHAINED_CARGOS]:
            if shelves[digest].ready:
                continue  # somebody has all of it
            if self._work.sharding(digest) is None:
                self._learn(digest)
            step = self.book.step(self._now(), digest, learning=digest in self._learning)
            for order in step.orders:
                self._nursery.start_soon(self._order, digest, order)
            if step.wake is not None:
                wakes.append(step.wake)
            became_ready = became_ready or step.became_ready
            self._tell(digest)
        for digest in self._told.keys() - shelves.keys():
            del self._told[digest]
        if became_ready:
            self._ready()
        return min(wakes, default=None)

    async def _order(self, digest: str, order: Order) -> None:
        held: ShardHeld | None = None
        hold = order.hold
        name = self._known.name_of(order.peer)
        try:
            held = await self._giver.give(order.peer, hold)
        except (CallFailed, PeerUnreachable) as error:
            _log.info("layers refused", island=name, first=hold.first, last=hold.last, reason=str(error))
        if held is not None:
            _log.info("layers ordered", island=name, first=held.first, last=held.last)
        self.book.answered(self._now(), digest, order, held)
        self.look()

    def _tell(self, digest: str) -> None:
        """Log which Island holds what, when that changed and is complete; or why there is no chain."""
        layout, shortage = self.book.layout(digest), self.book.shortage(digest)
        complete = self.book.ready_tps(digest) is not None
        what = layout if complete else shortage
        told: object = what.everybody if isinstance(what, Layout) else what
        if told == self._told.get(digest) or (told is None and digest not in self._told):
            return
        self._told[digest] = told
        info = self._known.model(digest)
        name = digest if info is None else info.id
        if isinstance(what, Shortage):
            _log.warning(
                "no chain",
                cargo=name,
                reason=what.detail,
                islands=what.here,
                room_mib=what.room_mib,
                enough_islands=what.enough_islands,
                enough_room_mib=what.enough_room_mib,
            )
        elif what is None:
            _log.info("chain incomplete", cargo=name)
        else:
            _log.info(
                "chain ready",
                cargo=name,
                layers=what.layers,
                stages=[[self._name(peer), first, last] for peer, first, last in what.stages],
                spares=[[self._name(peer), first, last] for peer, first, last in what.spares],
            )

    # --- manifests ----------------------------------------------------------------------------------

    def _learn(self, digest: str) -> None:
        tried = self._ignorant.get(digest, 0.0)
        if digest in self._learning or trio.current_time() < tried or not self._work.lacks(digest):
            return
        self._learning.add(digest)
        self._nursery.start_soon(self._fetch_manifest, digest)

    async def _fetch_manifest(self, digest: str) -> None:
        """From one Island after the other, until one shows it."""
        try:
            for island, _ in tuple(self._known.islands.offers(digest)):
                manifest = None
                with trio.move_on_after(REACH_S):
                    try:
                        await self._overlay.reach(island.peer)
                        manifest = await fetch_manifest(self._peers, island.peer, CargoDigest(digest))
                    except PeerUnreachable:
                        continue
                if manifest is not None:
                    self._work.learn(manifest)
                    self._ignorant.pop(digest, None)
                    return
            self._ignorant[digest] = trio.current_time() + MANIFEST_RETRY_S
            if len(self._ignorant) > MAX_CHAINED_CARGOS:
                del self._ignorant[next(iter(self._ignorant))]
        finally:
            self._learning.discard(digest)
            self.look()

    # --- who failed ---------------------------------------------------------------------------------

    def _on_peer(self, event: PeerEvent) -> None:
        if isinstance(event, PeerDown):
            self._losses.pop(event.peer, None)
            self._losses[event.peer] = self._now()
            if len(self._losses) > MAX_LOSSES:
                self._losses.popitem(last=False)

    async def _try(self, peer: PeerId, since: Instant, by: PeerId | None) -> None:
        if not self._gone(peer, since) and (self._peers.hello(peer) is None or await self._answers(peer)):
            # Nothing is seen here of what its head says.
            if by is not None and not self._gone(by, since):
                self.pairs.broke(self._now(), by, peer)
                _log.info("stages kept apart", one=self._name(by), other=self._name(peer))
            return
        self._known.islands.suspect(self._now(), peer)
        self._work.failed(peer, timeout=False)
        _log.warning("stage failed", island=self._name(peer))

    def _gone(self, peer: PeerId, since: Instant) -> bool:
        lost = self._losses.get(peer)
        return lost is not None and lost >= since

    async def lives(self, peer: PeerId) -> bool:
        """Whether it answers in time, or nothing can be said: no link, or this process itself was stopped."""
        asked = self._now()
        if self._peers.hello(peer) is None or await self._answers(peer):
            return True
        return self._now() - asked > ALIVE_NS + LATE_NS

    async def _answers(self, peer: PeerId) -> bool:
        """Whether it lives: any answer shows it."""
        try:
            await self._peers.call(peer, METHOD_HELLO, self._peers.introduction, HELLO, deadline_ns=ALIVE_NS)
        except CallFailed as error:
            return error.code != "deadline"
        except PeerUnreachable:
            return False
        return True

    # --- how far ------------------------------------------------------------------------------------

    def _rtt_ns(self, a: PeerId, b: PeerId) -> int | None:
        """Between two Islands, or an Island and this gateway."""
        return self.pairs.rtt_ns(self._now(), a, b, self._estimate_ns(a, b))

    def _estimate_ns(self, a: PeerId, b: PeerId) -> int | None:
        if self._me in (a, b):
            other = b if a == self._me else a
            measured = self._peers.rtt_ns(other)
            if measured is not None:
                return measured
        first, second = self._coordinate(a), self._coordinate(b)
        return estimate_ns(first, second) if first and second else None

    def _coordinate(self, peer: PeerId) -> int:
        if peer == self._me:
            return self._overlay.driver.machine.coordinate
        island = self._known.islands.get(peer)
        return 0 if island is None else island.advert.coordinate
