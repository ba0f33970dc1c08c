"""A stage in the midst of a chain, the first one, too: opened by the stage before it, fed, ended."""

from __future__ import annotations

from protocol.codec import excerpt
from protocol.errors import Fault, ProtocolError
from protocol.ids import PeerId
from protocol.instants import Instant, after
from protocol.limits import MAX_RECEIPT_BYTES
from protocol.ring import (
    MAX_CHAIN_BYTES,
    MAX_PERMIT_BYTES,
    MAX_STAGES,
    RingEnd,
    RingFault,
    RingFeed,
    RingOpen,
    RingOpened,
)
from routing.chains.events import Admit, Done, ShardHeldHere
from routing.chains.ring_head import TOKEN_BYTES, HeadDuties
from routing.chains.ring_log import Rows
from routing.chains.ring_policy import MAX_HELD_BYTES, MAX_TAKEN_ROWS
from routing.chains.ring_session import OutletState, Session, reconciled, same_layers, standing


class StageDuties(HeadDuties):
    """What a node does in sessions that it is fed, and what it says of them."""

    # --- being opened -----------------------------------------------------------------------------

    def _open(self, now: Instant, peer: PeerId, message: RingOpen) -> None:
        chain, index = message.chain, message.index
        session = self._sessions.get(message.session)
        refusal = self._refusal(now, peer, message, session)
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
            return  # from before a replacement; if it is right after all, it will hear of that and come again
        self._opened_again(now, peer, session, message)

    def _refusal(
        self, now: Instant, peer: PeerId, message: RingOpen, session: Session | None
    ) -> tuple[str, str] | None:
        """Why this can not be: (code, detail)."""
        chain, index = message.chain, message.index
        if index >= len(chain.stages) or not chain.is_whole:
            return "refused", "not a whole chain"
        if not chain.is_bounded:
            return "refused", f"a chain takes at most {MAX_CHAIN_BYTES} bytes"
        if message.permit is not None and not message.permit.is_below(MAX_PERMIT_BYTES):
            return "refused", f"a permit takes less than {MAX_PERMIT_BYTES} bytes"
        if chain.stages[index].holder.peer != self._me or chain.stages[index - 1].holder.peer != peer:
            return "refused", "the chain names others for these places"
        is_head = index == len(chain.stages) - 1
        if is_head:
            if session is None or session.head is None or not same_layers(session.chain, chain):
                return "unknown", "no such session begins here"
            return None
        if session is not None and session.head is not None:
            return "refused", "this node is the head of that session"
        if session is not None and (session.consumer, session.chain.cargo) != (message.consumer, chain.cargo):
            return "refused", "it is somebody else's session"
        stage = chain.stages[index]
        held = self._held.get(chain.cargo)
        if held is None or (held.first, held.last) != (stage.first, stage.last):
            return "unknown", "these layers are not held here"
        if session is None:
            if len(self._sessions) >= self._policy.sessions:
                return "busy", "too many sessions"
            if len(self._feeders.get(peer, ())) >= self._policy.sessions_per_peer:
                return "busy", "too many sessions of this peer"
            return self._turned_away(now, message)
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
        if not chain.is_bounded:
            chain = message.chain
        changed = chain != session.chain or newer_head
        session.chain = chain
        if self._learn(session, message.losses):
            changed = True
        if newer_head:
            self._new_head(now, peer, session, message)
        # What this one sent while somebody else counted was passed over.
        turned = peer != session.upstream
        if turned:
            self._bind(now, session, peer)
        session.touched = session.moved = now
        session.alone_since, session.asked = None, False
        session.told = session.acks = 0
        have, mark = session.intake.end, session.mark
        self._send(peer, RingOpened(session.name, have, session.turn, session.began, again=turned, mark=mark))
        holder = chain.stages[session.next_index].holder.peer
        if newer_head or session.outlet.peer != holder:
            self._connect(now, session)
        elif changed:
            self._pass_on(session)
        if session.stuck is not None:
            self._send(peer, session.stuck)
        self._acknowledge(now, session)

    def _new_head(self, now: Instant, peer: PeerId, session: Session, message: RingOpen) -> None:
        session.began, session.prompt = message.began, message.prompt
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
        session.touched = session.moved = now
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
            dtype, held = session.chain.dtype, self._held.get(session.chain.cargo)
            self._cut(dtype, message.payload, message.rows, 0, 0)
            size = len(message.payload) // message.rows
            if held is not None and held.row_bytes.get(dtype, size) != size:
                raise ProtocolError(Fault.MALFORMED, f"rows of {size} bytes are none of this model's")
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
        session.step_ns, session.wait_ns = max(1, done.compute_ns), max(0, done.wait_ns)
        if session.head is not None:
            self._head_done(now, session, session.head)
        else:
            self._stage_done(now, session, done, valid)
        session.step_ns = 0

    def _stage_done(self, now: Instant, session: Session, done: Done, valid: int) -> None:
        """Of its rows, the first `valid` are."""
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
        receipts = tuple(each for each in message.receipts if each.is_below(MAX_RECEIPT_BYTES))
        if len(receipts) < MAX_STAGES:
            receipts = (*receipts, self._sign(self._receipt(now, session)))
        outlet = session.outlet
        hops = (*message.hops, outlet.hop_ns)[:MAX_STAGES]
        rtts = (*message.rtts, self._links.rtt_ns(outlet.peer))[:MAX_STAGES]
        self._end_behind(session, RingEnd(session.name, receipts, hops, rtts))
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

    def _shard_held(self, held: ShardHeldHere) -> None:
        cargo, first, last = held.cargo, held.first, held.last
        if first < last:
            self._held[cargo] = held
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
