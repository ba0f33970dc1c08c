"""One session at one stage: its place in the chain, its rows, and the accounts of who stands where."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from hashlib import blake2b
from typing import Final

import msgspec

from protocol.codec import excerpt
from protocol.envelope import Envelope
from protocol.ids import PeerId
from protocol.instants import Instant
from protocol.ring import (
    MARK_BYTES,
    MAX_GENERATION,
    MAX_LOSSES,
    Chain,
    RingFault,
    Stage,
    StageLoss,
    StageWork,
)
from routing.chains.ring_intake import Intake
from routing.chains.ring_log import RowLog
from routing.chains.ring_policy import MAX_CUTS, SMOOTHING

NEVER: Final = Instant(0)


class OutletState(Enum):
    NONE = "none"
    """Nobody is fed: not opened yet, or nobody is left."""
    OPENING = "opening"
    OPEN = "open"


@dataclass(slots=True)
class Outlet:
    """The next stage. Rows below `sent` were sent to it (or it had them), below `acked` it has computed.
    `turn`: the latest turn it knows of. `marks`: (end, rows, when sent) of feeds whose time is taken.
    `again`: it was lost by its link alone and has been tried once more; `tries`: of the head.
    """

    peer: PeerId
    state: OutletState = OutletState.NONE
    sent: int = 0
    acked: int = 0
    turn: int = 0
    hop_ns: int = 0
    bytes_ahead: int = 0
    heard: Instant = NEVER
    again: bool = False
    tries: int = 0
    verified: bool = False
    marks: deque[tuple[int, int, Instant]] = field(default_factory=deque[tuple[int, int, Instant]])
    sizes: deque[tuple[int, int]] = field(default_factory=deque[tuple[int, int]])
    """(end, bytes) of feeds that are not acknowledged."""

    def turn_to(self, peer: PeerId) -> None:
        """Somebody is to be opened there; how much it has it will say. `sent` stays true of one that was fed
        until now without a break.
        """
        if self.peer != peer or self.state is OutletState.NONE:
            self.sent = self.acked = 0
            self.verified = False
        self.peer, self.state = peer, OutletState.OPENING
        self.marks.clear()
        self.sizes.clear()
        self.bytes_ahead = 0

    def rewind(self, position: int) -> None:
        """Rows from here on have to be sent (again)."""
        self.sent = min(self.sent, position)
        self.acked = min(self.acked, position)
        while self.marks and self.marks[-1][0] > position:
            self.marks.pop()
        while self.sizes and self.sizes[-1][0] > position:
            self.bytes_ahead -= self.sizes.pop()[1]

    def opened(self, have: int, turn: int) -> None:
        self.state = OutletState.OPEN
        self.sent = self.acked = have
        self.turn = turn
        self.marks.clear()
        self.sizes.clear()
        self.bytes_ahead = 0

    def acknowledged(self, now: Instant, until: int, *, at_once: bool) -> None:
        """`at_once`: told when the last of them was done. Those before it were done earlier, and count as if
        they had taken as long as that one.
        """
        self.acked = max(self.acked, min(until, self.sent))
        feeds, rows, at = 0, 1, now
        while self.marks and self.marks[0][0] <= until:
            _, rows, at = self.marks.popleft()
            feeds += 1
        for _ in range(feeds if at_once else 0):
            self.hop_ns = smoothed(self.hop_ns, (now - at) // rows)
        while self.sizes and self.sizes[0][0] <= until:
            self.bytes_ahead -= self.sizes.popleft()[1]


@dataclass(slots=True)
class Head:
    """What only the last stage knows. `cuts`: (turn, position), both rising: rows from there on that are of
    an earlier turn are void. `waiting`: its engine will ask anew. `trips`: (end, when drawn).
    """

    cuts: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    waiting: bool = True
    drawn: bool = False
    failed: bool = False
    ending: bool = False
    trip_ns: int = 0
    trips: deque[tuple[int, Instant]] = field(default_factory=deque[tuple[int, Instant]])
    receipts: tuple[Envelope, ...] = ()
    hops: tuple[int, ...] = ()
    rtts: tuple[int, ...] = ()

    def cut(self, turn: int, position: int) -> None:
        while self.cuts and self.cuts[-1][1] >= position:
            self.cuts.pop()
        self.cuts.append((turn, position))
        while self.trips and self.trips[-1][0] > position:
            self.trips.pop()

    def valid_until(self, turn: int, position: int) -> int:
        """Of rows of this turn, those below it (at most `position`) are valid."""
        for later, at in self.cuts:
            if later > turn:
                return min(position, at)
        return position

    def forget_cuts(self, turn: int) -> None:
        """Rows of this turn have come round: older ones that are void are on no link any more."""
        if len(self.cuts) > MAX_CUTS:
            self.cuts = [cut for cut in self.cuts if cut[0] > turn]


@dataclass(slots=True)
class Session:
    """`turn`: the latest that was seen. `asked`: the stage before us was told that we need rows again; what
    does not join until they come is passed over. `told`: acknowledged up to there. `touched`: the last
    message about it from the stage before, or question to it; `moved`: its last rows; `alone_since`: the
    link to that stage was lost then.
    """

    name: str
    chain: Chain
    index: int
    consumer: str
    prompt: int
    deterministic: bool
    began: int
    upto: int
    outlet: Outlet
    log: RowLog
    started: Instant
    touched: Instant
    moved: Instant
    upstream: PeerId | None = None
    alone_since: Instant | None = None
    turn: int = 0
    told: int = 0
    acks: int = 0
    """Sent since it was opened by whoever feeds it now."""
    asked: bool = False
    stuck: RingFault | None = None
    """Why it can not go on from here, if so."""
    rows: int = 0
    compute_ns: int = 0
    tokens: bytearray = field(default_factory=bytearray)
    """Of the first stage: what it was fed."""
    wait_ns: int = 0
    step_ns: int = 0
    """What the step took that is being told now; 0: none is."""
    losses: tuple[StageLoss, ...] = ()
    permit: Envelope | None = None
    guest: bool = False
    """Its consumer is not one that this node works for."""
    intake: Intake = field(default_factory=Intake)
    head: Head | None = None

    @property
    def stage(self) -> Stage:
        return self.chain.stages[self.index]

    @property
    def next_index(self) -> int:
        return (self.index + 1) % len(self.chain.stages)

    @property
    def standing(self) -> tuple[int, ...]:
        return standing(self.chain, self.began, self.index)

    @property
    def mark(self) -> bytes:
        """Of the tokens that the first stage has."""
        return token_mark(self.tokens) if self.index == 0 else b""

    def note(self, losses: tuple[StageLoss, ...]) -> tuple[StageLoss, ...]:
        """Remember these. Returned: those that are new."""
        known = {(loss.peer, loss.index, loss.generation) for loss in self.losses}
        new = tuple(loss for loss in losses if (loss.peer, loss.index, loss.generation) not in known)
        new = new[: MAX_LOSSES - len(self.losses)]
        self.losses += new
        return new


def token_mark(tokens: bytes | bytearray) -> bytes:
    return blake2b(tokens, digest_size=MARK_BYTES).digest()


def smoothed(old_ns: int, sample_ns: int) -> int:
    return sample_ns if old_ns == 0 else old_ns + (sample_ns - old_ns) // SMOOTHING


def standing(chain: Chain, began: int, index: int) -> tuple[int, ...]:
    """How much the word of who feeds place `index` counts, given their account of the chain.

    Who stands where is decided place by place from the head on: each replaces the next one and gives it a
    higher generation. So of two who claim to feed us, the one counts whose account is newer at the first
    place where they differ; the other was replaced there, or was put in by somebody who was.
    """
    stages = chain.stages
    return (stages[-1].generation, began, *(stage.generation for stage in stages[:index]))


def reconciled(ours: Chain, theirs: Chain, index: int, *, newer_head: bool) -> Chain:
    """Our account and that of a feeder that counts: before us theirs, behind us the newer at each place."""
    last = len(ours.stages) - 1

    def choose(place: int, a: Stage, b: Stage) -> Stage:
        if place <= index or place == last:
            return b
        return b if b.generation > a.generation or (newer_head and b.generation == a.generation) else a

    stages = tuple(
        choose(place, a, b) for place, (a, b) in enumerate(zip(ours.stages, theirs.stages, strict=True))
    )
    return msgspec.structs.replace(theirs, stages=stages)


def same_layers(a: Chain, b: Chain) -> bool:
    return (
        a.cargo == b.cargo
        and a.dtype == b.dtype
        and [(stage.first, stage.last) for stage in a.stages]
        == [(stage.first, stage.last) for stage in b.stages]
    )


def with_spare(chain: Chain, index: int) -> Chain | None:
    """The chain with the next spare at this place; None if there is none that stands nowhere else."""
    stage = chain.stages[index]
    others = {other.holder.peer for other in chain.stages}
    spares = [spare for spare in stage.spares if spare.peer not in others]
    if not spares or stage.generation >= MAX_GENERATION:
        return None
    return _replaced(
        chain, index, Stage(spares[0], stage.first, stage.last, tuple(spares[1:]), stage.generation + 1)
    )


def once_more(chain: Chain, index: int) -> Chain | None:
    """The same holder again, as a new generation; None if there were too many."""
    stage = chain.stages[index]
    if stage.generation >= MAX_GENERATION:
        return None
    return _replaced(chain, index, msgspec.structs.replace(stage, generation=stage.generation + 1))


def _replaced(chain: Chain, index: int, stage: Stage) -> Chain:
    stages = (*chain.stages[:index], stage, *chain.stages[index + 1 :])
    return msgspec.structs.replace(chain, stages=stages)


def work_of(chain: Chain, loss: StageLoss) -> StageWork:
    stage = chain.stages[loss.index]
    return StageWork(
        loss.peer, loss.index, stage.first, stage.last, failed=loss.failed, reason=excerpt(loss.reason)
    )
