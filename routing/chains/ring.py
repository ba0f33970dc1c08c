"""The ring machine: all sessions of chains that run through one node, at whatever place.

What it does for a session at its place is always the same: take rows from the stage before (a head: token ids
from its engine), keep what comes out of the engine in a log, feed that to the next stage, and if that one
dies feed the log to another. All else follows:

- `RingOpen` is answered at once with what this stage has, and the next stage is opened at the same time; what
  is made meanwhile waits in the log. So a whole ring opens in one traversal, and a stage that took over learns
  what is behind it while it is fed again.
- Who counts, of two who claim to feed a session here, is said by `ring_session.standing`. An account that
  changed goes on round the ring until nobody learns anything from it; the head hears of all losses by it.
- A head numbers its changes of mind (`turn`). Each row bears the turn it was asked for in, so a stage tells
  rows that void others (a draft was wrong) from rows that it is fed again, and the head knows the ones that
  are void although they still come round.
- Whoever has lost rows (its engine died, or its log was over the bound and the next stage died) says so to the
  stage before it: `RingOpened(again=True, have)`, and gets them from that one's log; a head has all token ids.
- A later head counts from turn 0 again. A stage keeps its rows then only if the one that tells it of the new
  head has fed it without a break until now, and only those that this one still vouches for (`upto`); else it
  can not know whether it missed a turn, and takes all anew. The first stage shows a hash of its tokens.

Driver rules
- One machine per node. `Send` of a `ToStage` message goes on the link that this node opened to the peer
  (dialled on demand, its addresses are in the chain's `StagePeer`), of a `FromStage` message on the link that
  the peer opened to this node; if there is none, it is dropped. Messages of one link stay in order. Large ones
  may not delay pongs for long: answer pings where they are received, or keep frames small.
- A link that this node opened and that breaks, or can not be made within the driver's own patience: order
  `DownstreamLost`, once; nothing of the old link may be received after that. `Disconnect(peer)`: drop that
  link, without `DownstreamLost`. A link that a peer opened and that breaks: `UpstreamLost`.
  (`PeerLost` stands for both.) A new link from a peer whose old one still stands replaces it; `UpstreamLost`
  for the old one may then be ordered before anything of the new one is received, but need not.
- `Admit` -> `StageRuntime.open`, `Compute` -> `feed` (heads, too), `Release` -> `close`. No Admit and no
  Release is told to a head: its engine opens by `submit` and closes when the job leaves it. `Computed` ->
  `Done`, `Lost` -> `EngineLost`, `Refused` -> `EngineRefused`, `Wanted` -> `Draw`. A `Done` of work given
  before the last `Admit` or `Release` of its session may not be told (else it could pass for newer work).
- A head's first `Draw` has all tokens there are and no drafts (`HeadRuntime.submit` says so).
- A head orders `Begin` before its engine can want anything, and `Finish` for each `Begin`, also after
  `SessionFailed`. `Ended` follows each `Finish` within the policy's `end_ns`. A chain that is made anew for a
  job has a higher generation at each place than all before it for that job.
- `ShardHeldHere` first, for each shard that is ready, and whenever that changes.
- `Woken` at `next_wake()`.
"""

from __future__ import annotations

from protocol.codec import excerpt
from protocol.ids import PeerId
from protocol.instants import Instant, after
from protocol.machine import Input, Ordered, PeerLost, Received, Woken
from protocol.ring import (
    FromStage,
    RingAck,
    RingEnd,
    RingFault,
    RingFeed,
    RingOpen,
    RingOpened,
    RingPing,
    RingPong,
    ToStage,
)
from routing.chains.events import (
    Begin,
    Command,
    Done,
    DownstreamLost,
    Draw,
    EngineLost,
    EngineRefused,
    Finish,
    ShardHeldHere,
    UpstreamLost,
)
from routing.chains.ring_core import WATCH_NS, Effects, Sign, Timer
from routing.chains.ring_door import Door
from routing.chains.ring_log import Cut, cut_equal_rows
from routing.chains.ring_policy import LATE_NS, RingPolicy
from routing.chains.ring_session import OutletState, Session
from routing.chains.ring_stage import StageDuties

__all__ = ["RingMachine", "RingPolicy"]


class RingMachine(StageDuties):
    """See the module's text. `sign` makes this node's signed receipts. `unix_offset_ns`: civil time minus the
    clock that instants come from. `cut`: takes rows out of a payload, see `ring_log.Cut`. `door`: whose
    sessions this node works on; None: everybody's.
    """

    def __init__(
        self,
        me: PeerId,
        policy: RingPolicy = RingPolicy(),  # noqa: B008 - frozen: one shared default is safe
        *,
        sign: Sign,
        unix_offset_ns: int,
        cut: Cut = cut_equal_rows,
        door: Door | None = None,
    ) -> None:
        super().__init__(me, policy, sign=sign, unix_offset_ns=unix_offset_ns, cut=cut, door=door)

    # --- what can be asked ------------------------------------------------------------------------

    def trip_ns(self, session: str) -> int:
        """Head: what one traversal of the ring takes for a few rows, from `Draw` to the last `Done`, smoothed.
        0: not known (yet).
        """
        known = self._sessions.get(session)
        return 0 if known is None or known.head is None else known.head.trip_ns

    def sessions(self, cargo: str) -> int:
        """How many run through this node's shard of the Cargo."""
        return sum(session.chain.cargo == cargo for session in self._sessions.values())

    def is_fed_by(self, peer: PeerId) -> bool:
        """Whether sessions run over the link that this peer opened."""
        return peer in self._feeders

    def feeds(self, peer: PeerId) -> bool:
        """Whether sessions run over the link that we opened to this peer."""
        return peer in self._links

    def turned_away(self, now: Instant, command: Begin) -> tuple[str, str] | None:
        """Why this node would be no head of that session: (code, detail)."""
        return self._turned_away(now, self._beginning(now, command))

    @property
    def log_bytes(self) -> int:
        """Held for replays."""
        return sum(session.log.size for session in self._sessions.values())

    def next_wake(self) -> Instant | None:
        return self._agenda.next()

    # --- inputs -----------------------------------------------------------------------------------

    def receive(self, now: Instant, what: Input[PeerId, ToStage | FromStage, Command]) -> Effects:
        match what:
            case Received(peer, message):
                self._message(now, peer, message)
            case Ordered(command):
                self._command(now, command)
            case PeerLost(peer):
                self._link_lost(now, peer, "connection lost", silent=False)
                self._feeder_lost(now, peer)
            case Woken():
                self._woken(now)
        out, self._out = self._out, []
        return out

    def _command(self, now: Instant, command: Command) -> None:
        match command:
            case Draw():
                self._draw(now, command)
            case Done():
                self._done(now, command)
            case Begin():
                self._begin(now, command)
            case Finish():
                self._finish(now, command)
            case DownstreamLost(peer, reason):
                self._link_lost(now, peer, reason, silent=False)
            case UpstreamLost(peer):
                self._feeder_lost(now, peer)
            case EngineLost(cargo):
                self._engine_lost(cargo)
            case EngineRefused(name, code, detail):
                session = self._sessions.get(name)
                if session is not None:
                    self._abandon(session, code, excerpt(detail))
            case ShardHeldHere():
                self._shard_held(command)

    def _message(self, now: Instant, peer: PeerId, message: ToStage | FromStage) -> None:
        match message:
            case RingOpen() | RingFeed() | RingEnd() | RingPing():
                if peer in self._feeder_heard:
                    self._feeder_heard[peer] = now
                self._from_before(now, peer, message)
            case RingOpened() | RingAck() | RingFault() | RingPong():
                self._links.heard(now, peer)
                self._from_behind(now, peer, message)

    def _from_before(self, now: Instant, peer: PeerId, message: ToStage) -> None:
        match message:
            case RingFeed():
                self._feed(now, peer, message)
            case RingOpen():
                self._open(now, peer, message)
            case RingEnd():
                self._end(now, peer, message)
            case RingPing(number):
                self._send(peer, RingPong(number))

    def _from_behind(self, now: Instant, peer: PeerId, message: FromStage) -> None:
        if isinstance(message, RingPong):
            self._links.answered(now, peer, message.number)
            return
        session = self._sessions.get(message.session)
        if session is None:
            if isinstance(message, RingOpened) and message.asks:
                # It still has a session that is over here, or was given up, and nobody told it.
                self._send(peer, RingEnd(message.session, replaced=True))
            return
        if session.outlet.peer != peer:
            return
        match message:
            case RingAck(until=until, compute_ns=compute_ns):
                if session.outlet.state is OutletState.OPEN:
                    if until > session.outlet.acked:
                        session.outlet.again, session.outlet.tries = False, 0
                    session.outlet.acknowledged(now, until, at_once=compute_ns > 0)
                    session.outlet.heard = now
                    self._pump(now, session)
            case RingOpened():
                self._next_opened(now, session, message)
            case RingFault(code=code, index=index, detail=detail):
                reason = excerpt(f"{code}: {detail}" if detail else code)
                if index != session.next_index and code != "unknown":
                    self._fail_upwards(session, excerpt(code), index, excerpt(detail))
                else:
                    self._replace(now, session, reason, once=code == "unknown", failed=code != "busy")

    # --- time -------------------------------------------------------------------------------------

    def _woken(self, now: Instant) -> None:
        first = self._agenda.next()
        late = first is not None and now - first > LATE_NS
        if late:
            self._links.forgive(now)
            self._feeder_heard = dict.fromkeys(self._feeder_heard, now)
        while (key := self._agenda.pop_due(now)) is not None:
            timer, name = key
            if timer == "ping":
                self._ping(now, PeerId(name))
                continue
            session = self._sessions.get(name)
            if session is not None:
                self._timer(now, timer, session, late=late)

    def _timer(self, now: Instant, timer: Timer, session: Session, *, late: bool) -> None:
        match timer:
            case "open" if late:
                self._agenda.set(("open", session.name), after(now, self._policy.open_ns))
            case "open":
                self._replace(now, session, "no answer to being opened", once=False)
            case "retry":
                self._connect(now, session)
            case "watch":
                self._watch(now, session, late=late)
            case "drain":
                self._start_over(session)
            case "orphan":
                self._orphan(now, session)
            case "end" if session.head is not None:
                self._ended(now, session, session.head)
            case _:
                pass

    def _ping(self, now: Instant, peer: PeerId) -> None:
        if peer not in self._links:
            return
        limit = self._links.patience(peer)
        if now >= limit:
            self._link_lost(now, peer, "silent", silent=True)
            return
        self._send(peer, RingPing(self._links.next_ping(now, peer)))
        self._agenda.set(("ping", peer), min(after(now, self._policy.ping_ns), limit))

    def _watch(self, now: Instant, session: Session, *, late: bool) -> None:
        """A stage that lives and does not work is replaced; one that only waits for those behind it says so."""
        outlet = session.outlet
        if session.upstream is not None and session.told < session.intake.have:
            self._tell_again(session)
            self._agenda.set(("watch", session.name), after(now, WATCH_NS))
        if outlet.state is OutletState.OPEN and outlet.acked < min(outlet.sent, session.log.end):
            if late:
                outlet.heard = now
            if now - outlet.heard >= self._policy.stall_ns:
                self._replace(now, session, "does not work", once=False)
            else:
                self._agenda.set(("watch", session.name), after(now, WATCH_NS))

    def _orphan(self, now: Instant, session: Session) -> None:
        """Nothing came from the stage before us for long, or its link is gone."""
        patience_ns, peer = self._policy.orphan_ns, session.upstream
        if session.head is not None:
            return
        alone = session.alone_since is not None and now - session.alone_since >= patience_ns
        heard = self._feeder_heard.get(peer, session.touched) if peer is not None else session.touched
        if alone or now - heard >= patience_ns or now - session.moved >= self._policy.idle_ns:
            self._end_behind(session, RingEnd(session.name))
            self._forget(session)
            return
        if peer is not None and now - session.touched >= patience_ns:
            # It feeds others, but of this one it may know nothing any more; then it answers with the end.
            session.touched = now
            have = session.intake.end
            self._send(peer, RingOpened(session.name, have, session.turn, session.began, asks=True))
        due = min(heard, session.touched)
        if session.alone_since is not None:
            due = min(due, session.alone_since)
        self._agenda.set(("orphan", session.name), after(max(due, after(now, -patience_ns + 1)), patience_ns))
