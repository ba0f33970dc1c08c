"""What stages and heads have in common: the sessions, and feeding whoever comes next."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final, Literal, TypeAlias

from protocol.codec import excerpt
from protocol.envelope import Envelope
from protocol.errors import ProtocolError
from protocol.ids import PeerId
from protocol.instants import MILLISECOND_NS, Instant, UnixNs, after
from protocol.machine import Disconnect, Effect, Emit, Send
from protocol.ring import (
    MAX_LOSS_CHARS,
    MAX_LOSSES,
    FromStage,
    RingAck,
    RingEnd,
    RingFault,
    RingFeed,
    RingOpen,
    RingOpened,
    StageLoss,
    StageReceipt,
    ToStage,
)
from routing.agenda import Agenda
from routing.chains.events import Compute, Release, RingEvent, ShardHeldHere, StageReplaced
from routing.chains.ring_door import GUEST_LANES, GUEST_SHARE, Door, check_permit_untrusted
from routing.chains.ring_links import Links
from routing.chains.ring_log import Cut, RowLog, Rows
from routing.chains.ring_policy import MAX_MARKS, RingPolicy
from routing.chains.ring_session import Outlet, OutletState, Session, once_more, with_spare, work_of

Effects: TypeAlias = list[Effect[PeerId, ToStage | FromStage, RingEvent]]
Sign: TypeAlias = Callable[[StageReceipt], Envelope]
Timer: TypeAlias = Literal["ping", "open", "retry", "watch", "drain", "orphan", "end"]

#: How often a session with rows on their way is looked at.
WATCH_NS: Final = 1000 * MILLISECOND_NS


class RingCore:
    """State, and what moves it on the side of the next stage. See `routing.chains.ring`."""

    def __init__(
        self, me: PeerId, policy: RingPolicy, *, sign: Sign, unix_offset_ns: int, cut: Cut, door: Door | None
    ) -> None:
        self._me: Final = me
        self._policy: Final = policy
        self._sign: Final = sign
        self._unix_offset_ns: Final = unix_offset_ns
        self._cut: Final = cut
        self._door: Final = door
        self._sessions: dict[str, Session] = {}
        self._links: Final = Links(policy)
        self._feeders: dict[PeerId, set[str]] = {}
        self._feeder_heard: dict[PeerId, Instant] = {}
        self._held: dict[str, ShardHeldHere] = {}
        self._agenda: Agenda[tuple[Timer, str]] = Agenda()
        self._out: Effects = []

    # --- effects ----------------------------------------------------------------------------------

    def _send(self, peer: PeerId, message: ToStage | FromStage) -> None:
        self._out.append(Send(peer, message))

    def _emit(self, event: RingEvent) -> None:
        self._out.append(Emit(event))

    def _compute(self, session: Session, rows: Rows) -> None:
        self._emit(Compute(session.name, rows.position, rows.rows, rows.payload))

    # --- sessions ---------------------------------------------------------------------------------

    def _session_of(self, now: Instant, opening: RingOpen) -> Session:
        """A new one, as this message has it."""
        session = Session(
            name=opening.session,
            chain=opening.chain,
            index=opening.index,
            consumer=opening.consumer,
            prompt=opening.prompt,
            deterministic=opening.deterministic,
            began=opening.began,
            upto=opening.upto,
            outlet=Outlet(self._me),
            log=RowLog(partial(self._cut, opening.chain.dtype)),
            started=now,
            touched=now,
            moved=now,
            losses=opening.losses,
            permit=opening.permit,
            guest=self._door is not None and self._door.is_guest(opening.chain.cargo, opening.consumer),
        )
        self._sessions[session.name] = session
        return session

    def _turned_away(self, now: Instant, opening: RingOpen) -> tuple[str, str] | None:
        """Why this node does not work on a session of its consumer, who has none of this name here."""
        door, cargo = self._door, opening.chain.cargo
        if door is None:
            return None
        unix_now = UnixNs(now + self._unix_offset_ns)
        guests = [s for s in self._sessions.values() if s.guest and s.chain.cargo == cargo]
        if door.is_guest(cargo, opening.consumer):
            lanes = sum(session.deterministic for session in guests) if opening.deterministic else 0
            held = self._held.get(cargo)
            places = 0 if held is None else held.slots // GUEST_SHARE
            if len(guests) >= places or lanes >= GUEST_LANES:
                return "busy", "guests have no more places here"
        try:
            check_permit_untrusted(
                opening.permit, session=opening.session, cargo=cargo, consumer=opening.consumer, now=unix_now
            )
        except ProtocolError as error:
            return "refused", excerpt(error.detail)
        return None

    def _bind(self, now: Instant, session: Session, peer: PeerId) -> None:
        """This peer feeds it from now on."""
        self._unbind(session)
        session.upstream, session.alone_since = peer, None
        self._feeders.setdefault(peer, set()).add(session.name)
        self._feeder_heard[peer] = now

    def _unbind(self, session: Session) -> None:
        peer = session.upstream
        if peer is not None and peer in self._feeders:
            self._feeders[peer].discard(session.name)
            if not self._feeders[peer]:
                del self._feeders[peer]
                self._feeder_heard.pop(peer, None)
        session.upstream = None

    def _forget(self, session: Session) -> None:
        """It is over here."""
        self._unbind(session)
        self._links.detach(session.outlet.peer, session.name)
        for timer in ("open", "retry", "watch", "drain", "orphan", "end"):
            self._agenda.cancel((timer, session.name))
        del self._sessions[session.name]
        if session.head is None:
            self._emit(Release(session.name))

    def _fail_upwards(self, session: Session, code: str, index: int, detail: str) -> None:
        """It can not go on from here. A head tells its user (see there). Who feeds us next hears it, too."""
        session.stuck = RingFault(session.name, code, index, detail)
        if session.upstream is not None:
            self._send(session.upstream, session.stuck)

    def _abandon(self, session: Session, code: str, detail: str) -> None:
        """It can not go on here; the stage before us will find somebody else."""
        self._fail_upwards(session, code, session.index, detail)
        if session.head is None:
            self._forget(session)

    # --- the next stage ---------------------------------------------------------------------------

    def _opening(self, session: Session) -> RingOpen:
        return RingOpen(
            session=session.name,
            chain=session.chain,
            index=session.next_index,
            upto=session.upto
            if session.head is not None
            else min(session.upto, session.outlet.sent, session.log.end),
            prompt=session.prompt,
            consumer=session.consumer,
            deterministic=session.deterministic,
            began=session.began,
            losses=session.losses,
            permit=session.permit,
        )

    def _connect(self, now: Instant, session: Session) -> None:
        """Open the session at whom the chain names next, and wait for what it has."""
        peer = PeerId(session.chain.stages[session.next_index].holder.peer)
        if session.outlet.peer != peer:
            self._links.detach(session.outlet.peer, session.name)
        session.outlet.turn_to(peer)
        session.stuck = None
        if self._links.attach(now, peer, session.name):
            self._agenda.set(("ping", peer), after(now, self._policy.ping_ns))
        self._agenda.cancel(("retry", session.name))
        self._agenda.set(("open", session.name), after(now, self._policy.open_ns))
        self._send(peer, self._opening(session))

    def _pass_on(self, session: Session) -> None:
        """The account of the chain has changed: the next stage should know, and goes on as it is."""
        if session.outlet.state is not OutletState.NONE:
            self._send(session.outlet.peer, self._opening(session))

    def _next_opened(self, now: Instant, session: Session, message: RingOpened) -> None:
        outlet = session.outlet
        if outlet.state is OutletState.NONE or message.began != session.began:
            return
        if outlet.state is OutletState.OPEN and not message.again:
            return  # the answer to a changed account; what was sent meanwhile is on its way
        self._agenda.cancel(("open", session.name))
        # A head is ahead of us with its turns, so what we send it may be void by now; it will want it again.
        to_head = session.next_index == len(session.chain.stages) - 1
        outlet.opened(message.have, min(message.turn, session.turn) if to_head else message.turn)
        outlet.heard = now
        self._verify(session, message)
        unknown = session.log.first_after(outlet.turn)
        if unknown is not None:
            outlet.rewind(unknown)
        self._pump(now, session)

    def _verify(self, session: Session, message: RingOpened) -> None:
        """A head knows what the first stage should have (see there)."""

    def _pump(self, now: Instant, session: Session) -> None:
        """Send what there is, as far as the window goes; acknowledge what that makes room for."""
        outlet, log, policy = session.outlet, session.log, self._policy
        if outlet.state is OutletState.OPEN:
            if outlet.sent < log.base:
                self._rebuild(now, session)
                return
            while (
                outlet.sent < log.end
                and outlet.sent - outlet.acked < policy.window_rows
                and outlet.bytes_ahead < policy.window_bytes
            ):
                rows = log.gather(outlet.sent, policy.feed_rows, policy.feed_bytes)
                self._send(
                    outlet.peer, RingFeed(session.name, rows.position, rows.rows, rows.payload, rows.turn)
                )
                if outlet.sent == outlet.acked:
                    outlet.heard = now
                outlet.sent, outlet.turn = rows.end, max(outlet.turn, rows.turn)
                outlet.bytes_ahead += len(rows.payload)
                outlet.sizes.append((rows.end, len(rows.payload)))
                if len(outlet.marks) < MAX_MARKS:
                    outlet.marks.append((rows.end, rows.rows, now))
        self._acknowledge(now, session)

    def _acknowledge(self, now: Instant, session: Session) -> None:
        """Tell the stage before us how far we are, but not further than what the next one leaves room for: so
        a stage that is slow slows all before it, instead of filling their memory.
        """
        until = self._tellable(session)
        due = self._policy.ack_due if session.acks >= self._policy.acks_at_once else 1
        if until >= session.told + due and session.upstream is not None:
            session.told = until
            session.acks += 1
            self._send(session.upstream, RingAck(session.name, until, session.step_ns, session.wait_ns))
        if session.told < session.intake.have or session.outlet.acked < min(
            session.outlet.sent, session.log.end
        ):
            self._agenda.sooner(("watch", session.name), after(now, WATCH_NS))

    def _tellable(self, session: Session) -> int:
        if session.head is not None:
            return session.intake.have
        return min(session.intake.have, session.outlet.sent + self._policy.window_rows)

    def _tell_again(self, session: Session) -> None:
        """It does not know how far we are: it sent what we have, or was not told for a while."""
        if session.upstream is not None:
            session.told = max(session.told, self._tellable(session))
            self._send(session.upstream, RingAck(session.name, session.told))

    def _ask_again(self, session: Session) -> None:
        """We need rows that we were sent before."""
        session.asked = True
        session.told = min(session.told, session.intake.end)
        if session.upstream is not None:
            have = session.intake.end
            self._send(
                session.upstream,
                RingOpened(session.name, have, session.turn, session.began, again=True, mark=session.mark),
            )

    def _rebuild(self, now: Instant, session: Session) -> None:
        """The next stage needs rows that our log has forgotten: make them once more, from the first."""
        session.log.clear()
        session.tokens.clear()
        session.told = 0
        if session.intake.truncate(0):
            self._agenda.sooner(("drain", session.name), after(now, self._policy.drain_ns))
        self._ask_again(session)

    def _bound_logs(self) -> None:
        """All logs together stay within the policy, as far as they hold what the next stages have, and within a
        higher bound whatever they hold.
        """
        total = sum(session.log.size for session in self._sessions.values())
        if total <= self._policy.log_bytes:
            return
        stages = [session for session in self._sessions.values() if session.head is None]
        stages.sort(key=lambda each: each.log.size, reverse=True)
        for session in stages:
            if session.outlet.state is OutletState.OPEN:
                before = session.log.size
                session.log.forget_before(min(session.outlet.acked, session.outlet.sent))
                total -= before - session.log.size
                if total <= self._policy.log_bytes:
                    return
        for session in stages:
            if total <= self._policy.most_log_bytes:
                return
            total -= session.log.size
            self._abandon(session, "busy", "too many rows of it lie here that nobody takes")

    # --- its death --------------------------------------------------------------------------------

    def _link_lost(self, now: Instant, peer: PeerId, reason: str, *, silent: bool) -> None:
        """The link to a stage that we feed is gone, or it said nothing for too long."""
        self._agenda.cancel(("ping", peer))
        names = self._links.drop(peer)
        if silent:
            self._out.append(Disconnect(peer, reason))
        for name in names:
            session = self._sessions.get(name)
            if session is not None and session.outlet.peer == peer:
                self._replace(now, session, reason, once=not silent)

    def _replace(self, now: Instant, session: Session, reason: str, *, once: bool, failed: bool = True) -> None:
        """The next stage does not do its work. `once`: it may be tried once more if there is nobody else."""
        outlet, index, chain = session.outlet, session.next_index, session.chain
        if outlet.state is OutletState.NONE:
            return
        to_head = index == len(chain.stages) - 1
        if outlet.peer in self._links and not to_head:
            self._send(outlet.peer, RingEnd(session.name, replaced=True))
        self._links.detach(outlet.peer, session.name)
        self._agenda.cancel(("open", session.name))
        outlet.state = OutletState.NONE
        if to_head:
            self._head_lost(now, session, reason)
            return
        lost = chain.stages[index]
        loss = StageLoss(lost.holder.peer, index, lost.generation, failed, reason[:MAX_LOSS_CHARS])
        tired = len(session.losses) >= MAX_LOSSES  # so often that it will go on like this
        renewed = None if tired else with_spare(chain, index)
        if renewed is None and once and not outlet.again and not tired:
            outlet.again = True
            renewed = once_more(chain, index)
        elif renewed is not None:
            outlet.again = False
        session.note((loss,))
        if renewed is None:
            code = "stranded" if failed else "busy"
            self._fail_upwards(session, code, index, f"{reason}; nobody else stands by"[:MAX_LOSS_CHARS])
            return
        session.chain = renewed
        self._emit(StageReplaced(session.name, renewed, work_of(renewed, loss)))
        self._connect(now, session)

    def _head_lost(self, now: Instant, session: Session, reason: str) -> None:
        """Only the gateway can put another one there. If the link alone broke, it can be had again."""
        session.outlet.tries += 1
        if session.outlet.tries > self._policy.head_tries:
            self._fail_upwards(session, "stranded", session.next_index, f"the head: {reason}"[:MAX_LOSS_CHARS])
        else:
            self._agenda.set(("retry", session.name), after(now, self._policy.retry_ns))
