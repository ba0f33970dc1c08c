"""The ring machine: all sessions of chains that run through one node, at whatever place.

What it does for a session at its place is always the same: take rows from the stage before (a head: token ids
from its engine), keep what comes out of the engine in a log, feed that to the next stage, and if that one dies
feed the log to another. All else follows:

- `RingOpen` is answered at once with what this stage has, and the next stage is opened at the same time; what is
  made meanwhile waits in the log. So a whole ring opens in one traversal, and a stage that took over learns what
  is behind it while it is fed again.
- Who counts, of two who claim to feed a session here, is said by `ring_session.standing`. An account that changed
  goes on round the ring until nobody learns anything from it; the head hears of all losses by it.
- A head numbers its changes of mind (`turn`). Each row bears the turn it was asked for in, so a stage tells rows
  that void others (a draft was wrong) from rows that it is fed again, and the head knows the ones that are void
  although they still come round.
- Whoever has lost rows (its engine died, or its log was over the bound and the next stage died) says so to the
  stage before it: `RingOpened(again=True, have)`, and gets them from that one's log; a head has all token ids.

Driver rules
- One machine per node. `Send` of a `ToStage` message goes on the link that this node opened to the peer (dialled
  on demand, its addresses are in the chain's `StagePeer`), of a `FromStage` message on the link that the peer
  opened to this node; if there is none, it is dropped. Messages of one link stay in order. Large ones may not
  delay pongs for long: answer pings where they are received, or keep frames small.
- A link that this node opened and that breaks, or can not be made within the driver's own patience: order
  `DownstreamLost`, once; nothing of the old link may be received after that. `Disconnect(peer)`: drop that
  link, without `DownstreamLost`. A link that a peer opened and that breaks: `UpstreamLost`.
  (`PeerLost` stands for both.) If a peer opens a new link while its old one still stands, the old one is gone:
  order `UpstreamLost` before anything of the new one is received. (A stage must know that it may have missed rows.)
- `Admit` -> `StageRuntime.open`, `Compute` -> `feed` (heads, too), `Release` -> `close`. No Admit and no Release is
  told to a head: its engine opens by `submit` and closes when the job leaves it. `Computed` -> `Done`,
  `Lost` -> `EngineLost`, `Refused` -> `EngineRefused`, `Wanted` -> `Draw`. A `Done` of work given before the last
  `Admit` or `Release` of its session may not be told (else it could pass for newer work).
- A head's first `Draw` has all tokens there are and no drafts (`HeadRuntime.submit` says so).
- A head orders `Begin` before its engine can want anything, and `Finish` for each `Begin`, also after
  `SessionFailed`. `Ended` follows each `Finish` within the policy's `end_ns`. A chain that is made anew for a job
  has a higher generation at each place than all before it for that job.
- `ShardHeldHere` first, for each shard that is ready, and whenever that changes.
- `Woken` at `next_wake()`.
"""

from __future__ import annotations

from protocol.codec import excerpt
from protocol.errors import Fault, ProtocolError
from protocol.ids import PeerId
from protocol.instants import Instant, after
from protocol.machine import Input, Ordered, PeerLost, Received, Woken
from protocol.ring import (
    MAX_STAGES,
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
    Admit,
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
from routing.chains.ring_head import TOKEN_BYTES, HeadDuties
from routing.chains.ring_log import Cut, Rows, cut_equal_rows
from routing.chains.ring_policy import LATE_NS, MAX_HELD_BYTES, MAX_TAKEN_ROWS, RingPolicy
from routing.chains.ring_session import OutletState, Session, reconciled, same_layers, standing

__all__ = ["RingMachine", "RingPolicy"]


class RingMachine(HeadDuties):
    """See the module's text. `sign` makes this node's signed receipts. `unix_offset_ns`: civil time minus the
    clock that instants come from. `cut`: takes rows out of a payload, see `ring_log.Cut`.
    """

    def __init__(
        self,
        me: PeerId,
        policy: RingPolicy = RingPolicy(),  # noqa: B008 - frozen: one shared default is safe
        *,
        sign: Sign,
        unix_offset_ns: int,
        cut: Cut = cut_equal_rows,
    ) -> None:
        super().__init__(me, policy, sign=sign, unix_offset_ns=unix_offset_ns, cut=cut)

    # --- what can be asked ------------------------------------------------------------------------

    def trip_ns(self, session: str) -> int:
        """Head: what one traversal of the ring takes for a few rows, from `Draw` to the last `Done`, smoothed. 0:
        not known (yet).
        """
        known = self._sessions.get(session)
        return 0 if known is None or known.head is None else known.head.trip_ns

    def sessions(self, cargo: str) -> int:
        """How many run through this node's shard of the Cargo."""
        return sum(session.chain.cargo == cargo for session in self._sessions.values())

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
            case ShardHeldHere(cargo, first, last):
                self._shard_held(cargo, first, last)

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
            return
        session = self._sessions.get(message.session)
        if session is None:
            if isinstance(message, RingOpened):
                # It still has a session that is over here, or was given up, and nobody told it.
                self._send(peer, RingEnd(message.session))
            return
        if session.outlet.peer != peer:
            return
        match message:
            case RingAck(until=until):
                if session.outlet.state is OutletState.OPEN:
                    if until > session.outlet.acked:
                        session.outlet.again, session.outlet.tries = False, 0
                    session.outlet.acknowledged(now, until)
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

    # --- being opened -----------------------------------------------------------------------------

    def _open(self, now: Instant, peer: PeerId, message: RingOpen) -> None:
        chain, index = message.chain, message.index
        session = self._sessions.get(message.session)
        refusal = self._refusal(peer, message, session)
        if refusal is not None:
            code, detail = refusal
            self._send(peer, RingFault(message.session, code, index, detail))
            return
        mine = (chain.stages[-1].generation, message.began)
        if session is not None and session.head is None:
            moved = session.index != index or not same_layers(session.chain, chain)
            if moved and mine > session.standing[:2]:
                self._forget(session)
                session = None
            elif moved:
                return
        if session is None:
            self._admit(now, peer, message)
            return
        if session.head is not None and mine != session.standing[:2]:
            return
        theirs = standing(chain, message.began, index)
        # In a ring of two we may have put this one there ourselves: then our account names it already.
        other = session.upstream is not None and session.chain.stages[index - 1].holder.peer != peer
        if theirs < session.standing or (theirs == session.standing and other):
            return  # from before a replacement; if it is right after all, it will hear of that one and come again
        self._opened_again(now, peer, session, message)

    def _refusal(self, peer: PeerId, message: RingOpen, session: Session | None) -> tuple[str, str] | None:
        """Why this can not be: (code, detail)."""
        chain, index = message.chain, message.index
        if index >= len(chain.stages) or not chain.is_whole:
            return "refused", "not a whole chain"
        if chain.stages[index].holder.peer != self._me or chain.stages[index - 1].holder.peer != peer:
            return "refused", "the chain names others for these places"
        is_head = index == len(chain.stages) - 1
        if is_head:
            if session is None or session.head is None or not same_layers(session.chain, chain):
                return "unknown", "no such session begins here"
            return None
        if session is not None and session.head is not None:
            return "refused", "this node is the head of that session"
        stage = chain.stages[index]
        if self._held.get(chain.cargo) != (stage.first, stage.last):
            return "unknown", "these layers are not held here"
        if session is None:
            if len(self._sessions) >= self._policy.sessions:
                return "busy", "too many sessions"
            if len(self._feeders.get(peer, ())) >= self._policy.sessions_per_peer:
                return "busy", "too many sessions of this peer"
        return None

    def _admit(self, now: Instant, peer: PeerId, message: RingOpen) -> None:
        """A session that is new here."""
        session = self._session_of(now, message)
        self._bind(now, session, peer)
        chain = message.chain
        self._emit(Admit(session.name, chain.cargo, chain.dtype, message.prompt, message.deterministic))
        self._send(peer, RingOpened(session.name, 0, 0, session.began))
        self._agenda.set(("orphan", session.name), after(now, self._policy.orphan_ns))
        self._connect(now, session)

    def _opened_again(self, now: Instant, peer: PeerId, session: Session, message: RingOpen) -> None:
        """By a new head, a new stage before us, or the same one that tells what has changed."""
        newer_head = (message.chain.stages[-1].generation, message.began) > session.standing[:2]
        chain = reconciled(session.chain, message.chain, session.index, newer_head=newer_head)
        changed = chain != session.chain or newer_head
        session.chain = chain
        if self._learn(session, message.losses):
            changed = True
        if newer_head:
            self._new_head(now, peer, session, message)
        if peer != session.upstream:
            self._bind(now, session, peer)
        session.touched, session.alone_since, session.asked = now, None, False
        session.told = 0
        have, mark = session.intake.end, session.mark
        self._send(peer, RingOpened(session.name, have, session.turn, session.began, mark=mark))
        holder = chain.stages[session.next_index].holder.peer
        if newer_head or session.outlet.peer != holder:
            self._connect(now, session)
        elif changed:
            self._pass_on(session)
        self._acknowledge(now, session)

    def _new_head(self, now: Instant, peer: PeerId, session: Session, message: RingOpen) -> None:
        session.began, session.prompt = message.began, message.prompt
        session.consumer = message.consumer
        # What the one before us sent is what it has, if nothing was lost between. Anybody else can not know
        # whether we have missed something; the first stage is asked for a mark of its tokens.
        trusted = session.index == 0 or (peer == session.upstream and session.alone_since is None)
        session.upto = message.upto if trusted else 0
        self._void(now, session, session.upto)
        session.turn = 0
        session.log.renumber(0)
        session.intake.turns = [(0, 0)]
        session.outlet.again, session.outlet.tries = False, 0

    def _void(self, now: Instant, session: Session, position: int, *, behind: bool = True) -> None:
        """Rows from here on are wrong, `behind` us, too (unless they have been corrected there already)."""
        if session.intake.truncate(position):
            self._agenda.sooner(("drain", session.name), after(now, self._policy.drain_ns))
        session.log.truncate(position)
        if behind:
            session.outlet.rewind(position)
        session.told = min(session.told, position)
        del session.tokens[session.intake.end * TOKEN_BYTES :]

    # --- rows -------------------------------------------------------------------------------------

    def _feed(self, now: Instant, peer: PeerId, message: RingFeed) -> None:
        session = self._sessions.get(message.session)
        if session is None:
            self._send(peer, RingFault(message.session, "unknown", 0, "no such session here"))
            return
        if session.upstream != peer:
            return  # of one who was replaced
        session.touched = now
        try:
            self._check(session, message)
            if session.head is not None:
                self._head_fed(session, session.head, message)
            else:
                self._take(now, session, message)
        except ProtocolError as error:
            self._abandon(session, "invalid", excerpt(str(error)))

    def _check(self, session: Session, message: RingFeed) -> None:
        if session.index == 0 and len(message.payload) != message.rows * TOKEN_BYTES:
            raise ProtocolError(Fault.MALFORMED, "tokens have four bytes each")
        if session.index:
            self._cut(session.chain.dtype, message.payload, message.rows, 0, 0)
        waiting = session.intake.end - session.intake.have + message.rows
        if waiting > MAX_TAKEN_ROWS or session.intake.held_bytes > MAX_HELD_BYTES:
            raise ProtocolError(Fault.OVERSIZE, "more rows than a window holds")

    def _take(self, now: Instant, session: Session, message: RingFeed) -> None:
        if message.turn > session.turn:
            session.turn = message.turn
            knows = session.outlet.state is OutletState.OPEN and session.outlet.turn >= message.turn
            self._void(now, session, message.position, behind=not knows)
        end = session.intake.end
        if message.position > end:
            if not session.asked:
                self._ask_again(session)
            return
        session.asked = False
        skip = end - message.position
        if skip >= message.rows:
            self._tell_again(session)
            return
        payload = message.payload
        if skip:
            payload = (
                self._cut(session.chain.dtype, payload, message.rows, skip, message.rows)
                if session.index
                else payload[skip * TOKEN_BYTES :]
            )
        if session.index == 0:
            session.tokens += payload
        ready = session.intake.accept(Rows(end, message.rows - skip, message.turn, payload))
        if ready is not None:
            self._compute(session, ready)

    def _done(self, now: Instant, done: Done) -> None:
        session = self._sessions.get(done.session)
        if session is None:
            return
        valid = session.intake.told(done.position, done.rows)
        if valid is None:
            return  # of what a head's engine has dropped itself
        session.rows += done.rows
        session.compute_ns += max(0, done.compute_ns)
        session.step_ns, session.wait_ns = max(0, done.compute_ns), max(0, done.wait_ns)
        if session.head is not None:
            self._head_done(now, session, session.head)
            return
        for start, stop, turn in session.intake.turns_of(done.position, valid) if valid else ():
            new = max(start, session.log.end)
            if start > session.log.end:
                self._rebuild(now, session)  # the log was begun anew meanwhile
                break
            if new < stop:
                at = new - done.position
                payload = done.payload
                if (at, stop - done.position) != (0, done.rows):
                    payload = self._cut(session.chain.dtype, payload, done.rows, at, stop - done.position)
                if turn > session.outlet.turn:
                    session.outlet.rewind(new)
                session.log.append(stop - new, turn, payload)
        ready = session.intake.settle()
        if session.intake.limit is None:
            self._agenda.cancel(("drain", session.name))
        for rows in ready:
            self._compute(session, rows)
        self._pump(now, session)
        self._bound_logs()

    def _end(self, now: Instant, peer: PeerId, message: RingEnd) -> None:
        session = self._sessions.get(message.session)
        if session is None or session.upstream != peer:
            return
        if session.head is not None:
            self._head_end(now, session, session.head, message)
            return
        if message.replaced:
            self._forget(session)
            return
        receipts = message.receipts
        if len(receipts) < MAX_STAGES:
            receipts = (*receipts, self._sign(self._receipt(now, session)))
        self._end_behind(
            session, RingEnd(session.name, receipts, (*message.hops, session.outlet.hop_ns)[:MAX_STAGES])
        )
        self._forget(session)

    def _end_behind(self, session: Session, message: RingEnd) -> None:
        if session.outlet.state is not OutletState.NONE:
            self._send(session.outlet.peer, message)

    # --- what is lost here ------------------------------------------------------------------------

    def _engine_lost(self, cargo: str) -> None:
        for session in self._sessions.values():
            if session.chain.cargo == cargo:
                session.intake.lost()
                if session.head is not None:
                    session.head.waiting = True
                    session.told = 0
                else:
                    self._start_over(session)

    def _start_over(self, session: Session) -> None:
        """The engine takes it from nothing; the log of what it made before stays good."""
        self._agenda.cancel(("drain", session.name))
        session.intake.lost()
        session.tokens.clear()
        session.told = 0
        chain = session.chain
        self._emit(Admit(session.name, chain.cargo, chain.dtype, session.prompt, session.deterministic))
        self._ask_again(session)

    def _shard_held(self, cargo: str, first: int, last: int) -> None:
        if first < last:
            self._held[cargo] = (first, last)
        else:
            self._held.pop(cargo, None)
        for session in list(self._sessions.values()):
            stage = session.stage
            if session.chain.cargo == cargo and (stage.first, stage.last) != (first, last):
                self._abandon(session, "unknown", "these layers are not held here any more")

    def _feeder_lost(self, now: Instant, peer: PeerId) -> None:
        for name in sorted(self._feeders.get(peer, ())):
            session = self._sessions[name]
            if session.head is None:
                session.alone_since = now
                self._agenda.set(("orphan", name), after(now, self._policy.orphan_ns))

    # --- time -------------------------------------------------------------------------------------

    def _woken(self, now: Instant) -> None:
        first = self._agenda.next()
        late = first is not None and now - first > LATE_NS
        if late:
            self._links.forgive(now)
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
        self._send(peer, RingPing(self._links.next_ping(peer)))
        self._agenda.set(("ping", peer), min(after(now, self._policy.ping_ns), limit))

    def _watch(self, now: Instant, session: Session, *, late: bool) -> None:
        """A stage that lives and does not work is replaced; one that only waits for those behind it says so."""
        outlet = session.outlet
        if session.upstream is not None and session.told < session.intake.have:
            self._send(session.upstream, RingAck(session.name, session.told))
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
        if alone or now - heard >= patience_ns:
            self._end_behind(session, RingEnd(session.name))
            self._forget(session)
            return
        if peer is not None and now - session.touched >= patience_ns:
            # It feeds others, but of this one it may know nothing any more; then it answers with the end.
            session.touched = now
            self._send(peer, RingOpened(session.name, session.intake.end, session.turn, session.began))
        due = min(heard, session.touched)
        if session.alone_since is not None:
            due = min(due, session.alone_since)
        self._agenda.set(("orphan", session.name), after(max(due, after(now, -patience_ns + 1)), patience_ns))
