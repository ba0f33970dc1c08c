"""The last stage: it asks for rows, and what it asked for comes round the ring."""

from __future__ import annotations

from functools import partial

import msgspec

from protocol.codec import excerpt
from protocol.errors import ProtocolError
from protocol.instants import MILLISECOND_NS, Instant, after
from protocol.limits import MAX_RECEIPT_BYTES
from protocol.ring import (
    MAX_STAGE_WORKS,
    STAGE_RECEIPT,
    RingEnd,
    RingFeed,
    RingOpen,
    RingOpened,
    StageLoss,
    StageReceipt,
    StageWork,
)
from routing.chains.events import Begin, Draw, Ended, Finish, SessionFailed, StageReplaced
from routing.chains.ring_core import RingCore
from routing.chains.ring_log import RowLog, Rows, cut_equal_rows
from routing.chains.ring_policy import TRIP_ROWS
from routing.chains.ring_session import Head, OutletState, Session, smoothed, token_mark, work_of

TOKEN_BYTES = 4


class HeadDuties(RingCore):
    """What a node does in sessions whose head it is."""

    def _begin(self, now: Instant, command: Begin) -> None:
        chain, name = command.chain, command.session
        old = self._sessions.get(name)
        if old is not None and old.head is not None:
            self._ended(now, old, old.head)  # nobody waits for its end to come round
        elif old is not None:
            self._forget(old)
        opening = self._beginning(now, command)
        if old is not None and old.began >= opening.began:
            opening = msgspec.structs.replace(opening, began=old.began + 1)
        away = self._turned_away(now, opening)
        session = self._session_of(now, opening)
        session.head, session.log = Head(), RowLog(partial(cut_equal_rows, chain.dtype))
        if not chain.is_whole or not chain.is_bounded or chain.head.peer != self._me:
            self._fail_upwards(session, "invalid", opening.index, "not a chain whose last stage is this node")
        elif away is not None:
            self._fail_upwards(session, away[0], opening.index, away[1])

    def _beginning(self, now: Instant, command: Begin) -> RingOpen:
        """What a head says of itself."""
        return RingOpen(
            command.session,
            command.chain,
            len(command.chain.stages) - 1,
            0,
            0,
            command.consumer,
            deterministic=command.deterministic,
            began=max(0, (now + self._unix_offset_ns) // MILLISECOND_NS),
            permit=command.permit,
        )

    def _draw(self, now: Instant, command: Draw) -> None:
        session = self._sessions.get(command.session)
        if session is None or session.head is None or session.head.failed or session.head.ending:
            return
        head, log, intake = session.head, session.log, session.intake
        position, rows, payload = command.position, command.rows, command.payload
        if position > log.end or rows < 1 or len(payload) != rows * TOKEN_BYTES:
            self._fail_upwards(session, "invalid", session.index, "the engine wants rows that do not join")
            return
        end = position + rows
        same = position + _common_tokens(log.read(position), payload)
        needs_again = head.waiting or position < intake.end
        head.waiting = False
        intake.drop(position)
        session.told = min(session.told, position)
        if same < log.end:
            session.turn += 1
            head.cut(session.turn, same)
            log.truncate(same)
            session.outlet.rewind(same)
        if same < end:
            log.append(end - same, session.turn, payload[(same - position) * TOKEN_BYTES :])
            if rows <= TRIP_ROWS:
                head.trips.append((end, now))
        session.prompt = command.prompt
        if not head.drawn:
            head.drawn = True
            # The last token may stand where a stage still has a rejected draft that the head before us had
            # no time to replace. Without drafts there is none, and a prompt's last step is not cut.
            session.upto = end if session.deterministic else end - 1
            self._connect(now, session)
            return
        if needs_again and intake.end < same:
            self._ask_again(session)
        self._pump(now, session)

    def _verify(self, session: Session, message: RingOpened) -> None:
        """If the first stage was fed by a head before us, do its tokens mean ours? If not, all is fed anew."""
        outlet, head = session.outlet, session.head
        if head is None:
            return
        known, outlet.verified = outlet.verified, True
        ours = session.log.read(0)[: message.have * TOKEN_BYTES]
        if message.have and message.turn == 0 and not known and token_mark(ours) != message.mark:
            session.turn += 1
            head.cut(session.turn, 0)
            session.log.renumber(session.turn)
        outlet.sent = outlet.acked = min(message.have, session.log.end)

    def _head_fed(self, session: Session, head: Head, message: RingFeed) -> None:
        """Rows came round. Only those that were asked for, and not since thought better of, are passed on."""
        if head.waiting or head.failed:
            return
        intake = session.intake
        stop = min(head.valid_until(message.turn, message.position + message.rows), session.log.end)
        if message.position > intake.end:
            if not session.asked:
                self._ask_again(session)
            return
        session.asked = False
        head.forget_cuts(message.turn)
        start, stop = intake.end - message.position, stop - message.position
        if start >= stop:
            self._tell_again(session)
            return
        payload = message.payload
        if stop - start < message.rows:
            payload = self._cut(session.chain.dtype, payload, message.rows, start, stop)
        ready = intake.accept(Rows(intake.end, stop - start, message.turn, payload))
        if ready is not None:
            self._compute(session, ready)

    def _head_done(self, now: Instant, session: Session, head: Head) -> None:
        while head.trips and head.trips[0][0] <= session.intake.have:
            _, drawn = head.trips.popleft()
            head.trip_ns = smoothed(head.trip_ns, now - drawn)
        self._acknowledge(now, session)

    def _learn(self, session: Session, losses: tuple[StageLoss, ...]) -> bool:
        """Of replacements elsewhere. Whether there are new ones."""
        new = session.note(losses)
        if session.head is not None:
            for loss in new:
                if loss.index < len(session.chain.stages):
                    self._emit(StageReplaced(session.name, session.chain, work_of(session.chain, loss)))
        return bool(new)

    def _fail_upwards(self, session: Session, code: str, index: int, detail: str) -> None:
        head = session.head
        if head is None:
            super()._fail_upwards(session, code, index, detail)
        elif not head.failed and not head.ending:
            head.failed = True
            works = [work for work in self._lost_works(session) if work.failed]
            index = min(index, len(session.chain.stages) - 1)
            stage = session.chain.stages[index]
            blamed = {work.peer for work in works} | {self._me}
            if code == "stranded" and stage.holder.peer not in blamed:
                reason = excerpt(detail)
                works.append(
                    StageWork(stage.holder.peer, index, stage.first, stage.last, failed=True, reason=reason)
                )
            self._emit(SessionFailed(session.name, code, index, detail, tuple(works[:MAX_STAGE_WORKS])))

    # --- the end ----------------------------------------------------------------------------------

    def _finish(self, now: Instant, command: Finish) -> None:
        session = self._sessions.get(command.session)
        if session is None or session.head is None or session.head.ending:
            return
        session.head.ending = True
        if session.outlet.state is OutletState.NONE:
            self._ended(now, session, session.head)
            return
        outlet = session.outlet
        rtts = (self._links.rtt_ns(outlet.peer),)
        self._send(outlet.peer, RingEnd(session.name, hops=(outlet.hop_ns,), rtts=rtts))
        self._agenda.set(("end", session.name), after(now, self._policy.end_ns))

    def _head_end(self, now: Instant, session: Session, head: Head, message: RingEnd) -> None:
        if head.ending:
            head.receipts, head.hops, head.rtts = message.receipts, message.hops, message.rtts
            self._ended(now, session, head)
        elif session.intake.have < session.log.end:
            # They took us for dead, or gone; there is still something to do.
            self._replace(now, session, "let the session go", once=True, failed=False)

    def _ended(self, now: Instant, session: Session, head: Head) -> None:
        last = len(session.chain.stages) - 1
        receipts = {last: self._sign(self._receipt(now, session))}
        for envelope in head.receipts:
            if not envelope.is_below(MAX_RECEIPT_BYTES):
                continue  # it would find no place in what the head says of them all
            try:
                receipt = STAGE_RECEIPT.decode_untrusted(envelope.body)
            except ProtocolError:
                continue  # whose it should be is left without one
            if receipt.session == session.name and receipt.index < last:
                receipts.setdefault(receipt.index, envelope)
        works = [
            StageWork(
                peer=stage.holder.peer,
                index=index,
                first=stage.first,
                last=stage.last,
                hop_ns=head.hops[index] if index < len(head.hops) else 0,
                rtt_ns=head.rtts[index] if index < len(head.rtts) else 0,
                receipt=receipts.get(index),
            )
            for index, stage in enumerate(session.chain.stages)
        ]
        works += self._lost_works(session)
        self._emit(Ended(session.name, session.chain, tuple(works[:MAX_STAGE_WORKS])))
        self._forget(session)

    def _lost_works(self, session: Session) -> list[StageWork]:
        return [
            work_of(session.chain, loss) for loss in session.losses if loss.index < len(session.chain.stages)
        ]

    def _receipt(self, now: Instant, session: Session) -> StageReceipt:
        return StageReceipt(
            session=session.name,
            cargo=session.chain.cargo,
            consumer=session.consumer,
            index=session.index,
            first=session.stage.first,
            last=session.stage.last,
            rows=session.rows,
            kept=session.intake.have,
            compute_ns=session.compute_ns,
            started_unix_ns=max(0, session.started + self._unix_offset_ns),
            finished_unix_ns=max(0, now + self._unix_offset_ns),
        )


def _common_tokens(old: bytes, new: bytes) -> int:
    """How many tokens (uint32) both begin with."""
    most = min(len(old), len(new)) // TOKEN_BYTES
    if old[: most * TOKEN_BYTES] == new[: most * TOKEN_BYTES]:
        return most
    low, high = 0, most  # the first `low` are equal, the first `high` are not
    while high - low > 1:
        middle = (low + high) // 2
        if old[low * TOKEN_BYTES : middle * TOKEN_BYTES] == new[low * TOKEN_BYTES : middle * TOKEN_BYTES]:
            low = middle
        else:
            high = middle
    return low
