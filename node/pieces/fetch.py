"""One fetch: find who has the file, ask several at once, check every piece, go on while it gets anywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import structlog
import trio

from cargos.errors import WrongContent
from cargos.manifest import CargoFile
from cargos.shards.pieces_plan import TICK_NS, PiecesPlan
from node.p2p.errors import StreamBroken, Unreachable
from node.p2p.host import plain_errors
from node.p2p.sockets import leaves
from node.pieces.limits import FetchLimits
from node.pieces.session import HolderRefused, HolderSession, WrongList
from node.pieces.suspects import Suspects
from node.streams import ByteStream
from protocol.errors import ProtocolError
from protocol.ids import PeerId
from protocol.instants import SECOND_NS, Instant

_log = structlog.get_logger("pieces")

#: What one peer can do to a fetch; all of it ends its session and nothing else.
_REMOTE_FAULTS: Final = (StreamBroken, Unreachable, ProtocolError, HolderRefused, WrongList, trio.TooSlowError)


class PieceNetwork(Protocol):
    """Where peers come from."""

    async def find(self, sha256: str) -> Sequence[PeerId]:
        """Who says to have pieces of this file, the one to ask first at the front."""
        ...

    async def open(self, peer: PeerId) -> ByteStream:
        """A stream of `PIECES_PROTOCOL` to the peer. Raises Unreachable, StreamBroken."""
        ...


class PieceSink(Protocol):
    """Where pieces go."""

    def hashes(self) -> bytes | None:
        """The piece list, if it is known already. For threads."""
        ...

    async def learn(self, hashes: bytes) -> None:
        """The piece list, right."""
        ...

    async def put(self, index: int, data: bytes) -> None:
        """Verify a piece by the list and keep it. Raises WrongContent."""
        ...


@dataclass(slots=True)
class FetchCounters:
    """Since the start, for metrics."""

    pieces: int = 0
    bytes: int = 0
    wrong_pieces: int = 0
    stalled_peers: int = 0
    failed_peers: int = 0


class PieceFetch:
    """`run` it once. `note` is told each piece that is there, after it was put."""

    def __init__(
        self,
        network: PieceNetwork,
        file: CargoFile,
        wanted: Sequence[int],
        sink: PieceSink,
        *,
        limits: FetchLimits,
        suspects: Suspects,
        counters: FetchCounters,
        seed: int,
        note: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._network = network
        self._file = file
        self._sink = sink
        self._limits = limits
        self._suspects = suspects
        self._counters = counters
        self._note = note
        sizes = {i: min(file.piece_bytes, file.size_bytes - i * file.piece_bytes) for i in wanted}
        self._plan: PiecesPlan[PeerId] = PiecesPlan(sizes, limits.policy, seed=seed)
        self._listed = False
        self._list_turn = trio.Lock()
        self._sessions: dict[PeerId, HolderSession] = {}
        self._trying: set[PeerId] = set()
        self._not_before: dict[PeerId, float] = {}
        self._generous: set[PeerId] = set()  # gave something since we last met them
        self._unchecked: dict[PeerId, trio.Semaphore] = {}
        self._search_now = trio.Event()
        self._searched_in_vain = 0
        self._progress_at = 0.0
        self._busy_at = 0.0
        self._done = trio.Event()
        self._nursery: trio.Nursery

    async def run(self) -> frozenset[int]:
        """The pieces of `wanted` that no peer gave. What goes wrong with our own disk is raised."""
        if self._plan.complete:
            await trio.lowlevel.checkpoint()
            return frozenset()
        self._listed = await trio.to_thread.run_sync(self._sink.hashes) is not None
        self._progress_at = self._busy_at = trio.current_time()
        with plain_errors():
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._search)
                await self._drive()
                nursery.cancel_scope.cancel()
        return frozenset(self._plan.left)

    # --- whom to ask --------------------------------------------------------------------------------

    async def _search(self) -> None:
        """Have as many peers as are of use."""
        while True:
            self._search_now = trio.Event()
            found = 0
            if len(self._trying) < self._limits.max_peers:
                for peer in await self._network.find(self._file.sha256):
                    if len(self._trying) < self._limits.max_peers and self._may_try(peer):
                        found += 1
                        self._trying.add(peer)
                        self._nursery.start_soon(self._meet, peer)
            if found:
                self._searched_in_vain = 0
            elif not self._some_to_try_soon():
                self._searched_in_vain += 1
            # Not at once, when peers come and go; and soon enough for one that broke off in the middle.
            await trio.sleep(self._limits.again_s)
            with trio.move_on_after(self._limits.search_s):
                await self._search_now.wait()

    def _may_try(self, peer: PeerId) -> bool:
        now = trio.current_time()
        return (
            peer not in self._trying
            and not self._suspects.banned(peer, now)
            and self._not_before.get(peer, 0.0) <= now
        )

    def _some_to_try_soon(self) -> bool:
        now = trio.current_time()
        return any(now < at <= now + self._limits.again_s for at in self._not_before.values())

    async def _meet(self, peer: PeerId) -> None:
        """A peer, from the first word to its end. The wall round what remotes do."""
        reason = "it finished"
        try:
            await self._talk(peer)
        except* _REMOTE_FAULTS as faults:  # in groups, and beside cancellations when the fetch ends
            reason = self._blame(peer, next(leaves(faults)))
        finally:
            self._sessions.pop(peer, None)
            self._plan.lost(peer)
            again = peer in self._generous
            self._generous.discard(peer)
            wait_s = self._limits.again_s if again else self._limits.penalty_s
            self._not_before[peer] = trio.current_time() + wait_s
            self._trying.discard(peer)
            self._searched_in_vain = 0
            self._search_now.set()
        _log.debug("a peer gives no more pieces", peer=peer, file=self._file.name, reason=reason)

    def _blame(self, peer: PeerId, fault: BaseException) -> str:
        self._counters.failed_peers += 1
        if isinstance(fault, (WrongList, ProtocolError)):
            self._suspect(peer, "its piece list is wrong" if isinstance(fault, WrongList) else str(fault))
        return str(fault) or type(fault).__name__

    def _suspect(self, peer: PeerId, reason: str) -> None:
        _log.warning("a peer sends what is not in the file", peer=peer, file=self._file.name, reason=reason)
        self._suspects.ban(peer, trio.current_time())

    async def _talk(self, peer: PeerId) -> None:
        with trio.fail_after(self._limits.open_s):
            stream = await self._network.open(peer)
        session = HolderSession(stream, self._file, self._limits, self)
        try:
            with trio.fail_after(self._limits.open_s):
                await session.open()
            if await self._learn_list(session):
                self._sessions[peer] = session
                self._unchecked[peer] = trio.Semaphore(self._limits.unchecked_pieces)
                self._plan.add_peer(self._now(), peer, session.held)
                self._decide()
                await session.run()
        finally:
            session.close()

    async def _learn_list(self, session: HolderSession) -> bool:
        """Is the piece list known, from this peer or from another one meanwhile?"""
        async with self._list_turn:
            if not self._listed:
                hashes = await session.fetch_list()
                if hashes is not None:
                    await self._sink.learn(hashes)
                    self._listed = True
                    self._progress_at = trio.current_time()
        return self._listed

    # --- what to ask --------------------------------------------------------------------------------

    async def _drive(self) -> None:
        """Until all is there or nothing more is to be had."""
        asked_at = trio.current_time()
        while not self._plan.complete and not self._hopeless():
            self._decide()
            with trio.move_on_after(TICK_NS / SECOND_NS):
                await self._done.wait()
            if trio.current_time() - asked_at >= self._limits.ask_again_s:
                asked_at = trio.current_time()
                self._ask_again()

    def _hopeless(self) -> bool:
        now = trio.current_time()
        if any(self._plan.open_at(peer) for peer in self._plan.peers) or self._trying - self._sessions.keys():
            self._busy_at = now
        if now - self._progress_at > self._limits.patience_s or now - self._busy_at > self._limits.idle_s:
            return True
        return self._searched_in_vain > 0 and not self._trying

    def _ask_again(self) -> None:
        """Those that fetch the file themselves may have by now what nobody had."""
        lacking = bool(self._plan.missing())
        for peer, session in self._sessions.items():
            if lacking or not self._plan.useful(peer):
                session.ask_again()

    def _decide(self) -> None:
        decision = self._plan.decide(self._now())
        for peer, piece in decision.cancel:
            if peer in self._sessions:
                self._sessions[peer].cancel(piece)
        for peer in decision.stalled:
            self._counters.stalled_peers += 1
            self._sessions[peer].close()
        for peer, piece in decision.ask:
            self._sessions[peer].ask(piece)

    @staticmethod
    def _now() -> Instant:
        return Instant(round(trio.current_time() * SECOND_NS))

    # --- for the sessions (`session.Listener`) --------------------------------------------------------

    def on_holdings(self, peer: PeerId, held: list[int]) -> None:
        self._plan.add_peer(self._now(), peer, held)
        self._decide()

    def on_bytes(self, peer: PeerId, index: int, size: int) -> None:
        self._counters.bytes += size
        self._plan.received(self._now(), peer, index)

    def on_refusal(self, peer: PeerId, index: int, *, busy: bool) -> None:
        self._plan.refused(self._now(), peer, index, busy=busy)
        self._decide()

    async def on_piece(self, peer: PeerId, index: int, data: bytes) -> None:
        if not self._plan.arrived(self._now(), peer, index):
            await trio.lowlevel.checkpoint()
            return
        self._decide()
        turn = self._unchecked[peer]
        await turn.acquire()
        self._nursery.start_soon(self._check, peer, index, data, turn)

    async def _check(self, peer: PeerId, index: int, data: bytes, turn: trio.Semaphore) -> None:
        try:
            await self._sink.put(index, data)
        except WrongContent:
            self._counters.wrong_pieces += 1
            self._suspect(peer, f"piece {index} is wrong")
            self._plan.wrong(peer, index)
            if peer in self._sessions:
                self._sessions[peer].close()
            self._decide()
            return
        finally:
            turn.release()
        self._plan.verified(index)
        self._counters.pieces += 1
        self._progress_at = trio.current_time()
        self._generous.add(peer)
        self._note(index)
        if self._plan.complete:
            self._done.set()
