"""A gateway's ear in the network: follows each wanted Cargo at two coordinators or more, and asks questions.

It chooses coordinators that say they have the Cargo, nearest first, then any that are near, not two in one
network while there is a choice. Each is heard of every two seconds at least; one that is silent for five,
or whose link is gone, is replaced at once, and its Islands stay known for a while so that the next one can
vouch for them. A job that waits for an Island is therefore served again within ten seconds after its
coordinators died.

What a coordinator shows is in the Islands' own signed words; it can withhold and delay, not invent: more
than one is asked so that withholding needs a conspiracy.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final, Generic, TypeAlias, TypeVar

from protocol.codec import excerpt
from protocol.coordination import (
    CargoName,
    CoordinationMessage,
    Declined,
    Follow,
    Following,
    IslandsFound,
    IslandsPushed,
    PushTaken,
    SeenIsland,
    Unfollow,
)
from protocol.dice import Dice
from protocol.envelope import Envelope
from protocol.errors import Fault, ProtocolError
from protocol.instants import MILLISECOND_NS, SECOND_NS, Instant, UnixNs, after
from protocol.machine import Disconnect, Effect, Emit, Input, Ordered, PeerLost, Received, Send, Woken
from routing.agenda import Agenda
from routing.candidates import CandidateBook, CoordinatorCandidate
from routing.finding import Questions, sighted
from routing.followed import Followed, FollowedIsland
from routing.following_events import (
    CoordinatorKnown,
    CoordinatorLost,
    CoordinatorUp,
    Find,
    FollowingCommand,
    FollowingEvent,
    FollowingPolicy,
    FoundCoordinators,
    FoundIsland,
    IslandSeen,
    IslandsVouched,
    IslandUnseen,
    LearnSummary,
    NeedCoordinators,
    RoundTripMeasured,
    Served,
    Sighted,
    Unwant,
    Want,
)
from routing.gossip_peers import Budget
from routing.notary import Notary
from routing.referrals import CoordinatorBook

P = TypeVar("P")

Effects: TypeAlias = list[Effect[P, CoordinationMessage, FollowingEvent[P]]]

#: A timer that fires later than this says that this process was stopped: nobody else is to blame for the
#: silence.
LATE_NS: Final = 2 * SECOND_NS

#: How often expired adverts are looked for, and whether other coordinators have more of a Cargo.
REVIEW_NS: Final = 10 * SECOND_NS

#: Adverts that one coordinator may make us verify: all that it may show of 64 Cargos at once, and then what 128
#: busy Islands have to say. A tenth of a second of processor time a second.
SHOWN_PER_S: Final = 1000
SHOWN_BURST: Final = 16_384

#: Who lied (a signature that does not match) is left alone for so long.
LIAR_NS: Final = 3600 * SECOND_NS

_Key: TypeAlias = tuple[str, P | None, CargoName]


@dataclass(slots=True)
class _Subscription:
    """`have`: number of the last push taken."""

    call: int = 0
    have: int = 0
    served: bool = False


@dataclass(slots=True)
class _Link:
    """A coordinator that is followed. `heard`: its last word, or when we began. `cargos`: the one renewed
    longest ago first.
    """

    heard: Instant
    vouched: Instant
    budget: Budget
    cargos: dict[CargoName, _Subscription] = field(default_factory=dict[CargoName, _Subscription])


class Follower(Generic[P]):
    """See the module's text. `unix_offset_ns`: civil time minus the clock that instants come from."""

    def __init__(
        self,
        me: P,
        notary: Notary[P],
        dice: Dice,
        *,
        unix_offset_ns: int,
        policy: FollowingPolicy = FollowingPolicy(),  # noqa: B008 - frozen: one shared default is safe
    ) -> None:
        self.me: Final = me
        self._notary: Final = notary
        self._unix_offset_ns = unix_offset_ns
        self._policy: Final = policy
        self.candidates: Final[CandidateBook[P]] = CandidateBook(policy.candidates, dice)
        self.summaries: Final[CoordinatorBook[P]] = CoordinatorBook(policy.coordinators)
        self.followed: Final[Followed[P]] = Followed()
        self._wanted: dict[CargoName, None] = {}
        self._links: dict[P, _Link] = {}
        self._refused: dict[tuple[P, CargoName], Instant] = {}
        self._questions: Questions[P] = Questions(policy, self._order, self._send, self._emit, self._next_call)
        self._agenda: Agenda[_Key[P]] = Agenda()
        self._calls = 0
        self._search_ns = policy.candidates.search_first_ns
        self._out: Effects[P] = []

    def coordinators(self, cargo: CargoName) -> tuple[P, ...]:
        """Those that have accepted this Cargo's subscription and still answer."""
        return tuple(
            peer
            for peer, link in self._links.items()
            if (sub := link.cargos.get(cargo)) is not None and sub.served
        )

    @property
    def linked(self) -> Collection[P]:
        """Coordinators that are followed for anything."""
        return self._links.keys()

    def receive(self, now: Instant, what: Input[P, CoordinationMessage, FollowingCommand[P]]) -> Effects[P]:
        match what:
            case Received(peer, message):
                self._message(now, peer, message)
            case Ordered(command):
                self._command(now, command)
            case PeerLost(peer):
                self._unreachable(now, peer)
            case Woken():
                self._woken(now)
            case _:
                pass
        out, self._out = self._out, []
        return out

    def set_clock(self, unix_offset_ns: int) -> None:
        """Civil time is so far from the clock of instants now: it was set, or this machine slept."""
        self._unix_offset_ns = unix_offset_ns
        self.candidates.forgive()

    def next_wake(self) -> Instant | None:
        wakes = [wake for wake in (self._agenda.next(), self._questions.next_wake()) if wake is not None]
        return min(wakes, default=None)

    # --- inputs -----------------------------------------------------------------------------------

    def _command(self, now: Instant, command: FollowingCommand[P]) -> None:
        match command:
            case Want(cargo):
                if cargo not in self._wanted and len(self._wanted) < self._policy.cargos:
                    self._wanted[cargo] = None
                    self._fill(now, cargo)
                    self._agenda.sooner(("review", None, ""), after(now, REVIEW_NS))
            case Unwant(cargo):
                self._unwant(cargo)
            case Find():
                self._questions.begin(now, command)
            case FoundCoordinators(candidates):
                self.candidates.learn((c for c in candidates if c.peer != self.me), self._links)
                self._fill_all(now)
            case LearnSummary(envelope):
                if self._learn(now, envelope) is not None:
                    self._fill_all(now)
            case CoordinatorUp(peer):
                if peer not in self._links:
                    self.candidates.worked(peer)
                self._fill_all(now)
            case RoundTripMeasured(peer, rtt_ns):
                self.candidates.measured(peer, rtt_ns)

    def _woken(self, now: Instant) -> None:
        first = self._agenda.next()
        if first is not None and now - first > LATE_NS:
            for link in self._links.values():
                link.heard = now
        for peer in self._questions.give_up_silent(now):
            if peer not in self._links:
                self.candidates.failed(now, peer)
        while (key := self._agenda.pop_due(now)) is not None:
            what, peer, cargo = key
            match what:
                case "probe" if peer is not None and peer in self._links:
                    self._probe(now, peer, self._links[peer])
                case "orphan" if peer is not None:
                    self._forget(cargo, peer)
                case "review":
                    self._review(now)
                case "search":
                    self._search(now)
                case "fill":
                    self._fill_all(now)
                case _:
                    pass

    def _message(self, now: Instant, peer: P, message: CoordinationMessage) -> None:
        link = self._links.get(peer)
        match message:
            case IslandsFound():
                self._answer(now, peer, message)
            case Declined(call) if self._questions.expects(peer, call):
                self._questions.failed(now, peer, call)
            case IslandsPushed(cargo=cargo) if link is None or cargo not in link.cargos:
                if peer in self.candidates:
                    self._send(peer, Unfollow(cargo))  # we left; it did not hear
            case IslandsPushed(islands=islands) if link is not None:
                if not link.budget.take(now, 1 + len(islands)):
                    self._drop_link(now, peer, "floods", LIAR_NS, lied=True)
                    return
                self._heard(now, peer, link)
                self._pushed(now, peer, link.cargos[message.cargo], message)
            case Following(call, cargo) if link is not None:
                sub = link.cargos.get(cargo)
                if sub is not None and 0 < call <= sub.call:
                    self._heard(now, peer, link)
                    if not sub.served:
                        sub.served = True
                        self.candidates.worked(peer)
                        self._emit(Served(cargo, peer))
            case Declined() if link is not None:
                self._declined(now, peer, link, message)
            case _:
                pass

    # --- coordinators that are followed -----------------------------------------------------------

    def _heard(self, now: Instant, peer: P, link: _Link) -> None:
        link.heard = now
        if now - link.vouched >= self._policy.probe_ns:
            link.vouched = now
            vouched = {
                island: None for cargo in link.cargos for island in self.followed.vouched_by(peer, cargo)
            }
            if vouched:
                self._emit(IslandsVouched(tuple(vouched)))

    def _probe(self, now: Instant, peer: P, link: _Link) -> None:
        """Renew the subscription that was renewed longest ago; those not accepted yet come first."""
        served = any(sub.served for sub in link.cargos.values())
        if now - link.heard >= (self._policy.dead_after_ns if served else self._policy.answer_ns):
            self._out.append(Disconnect(peer, "silent"))
            self._drop_link(now, peer, "silent")
            return
        cargo = next((c for c, sub in link.cargos.items() if not sub.served), next(iter(link.cargos)))
        self._follow(now, peer, link, cargo)

    def _follow(self, now: Instant, peer: P, link: _Link, cargo: CargoName) -> None:
        sub = link.cargos.pop(cargo, None) or _Subscription()
        link.cargos[cargo] = sub
        sub.call = self._next_call()
        self._send(peer, Follow(sub.call, cargo, self._policy.limit, sub.have))
        pace_ns = min(self._policy.probe_ns, self._policy.renew_ns // len(link.cargos))
        if not all(other.served for other in link.cargos.values()) or now - link.heard > pace_ns:
            pace_ns = min(pace_ns, self._policy.retry_ns)
        self._agenda.set(("probe", peer, ""), after(now, pace_ns))

    def _declined(self, now: Instant, peer: P, link: _Link, message: Declined) -> None:
        cargo = next((c for c, sub in link.cargos.items() if sub.call == message.call), None)
        if cargo is None:
            return
        link.heard = now
        code, retry_ns = message.code, message.retry_ms * MILLISECOND_NS
        if code == "too-fast":
            self._agenda.set(("probe", peer, ""), after(now, max(self._policy.retry_ns, retry_ns)))
            return
        if len(link.cargos) == 1:
            self._drop_link(now, peer, f"declined: {excerpt(code)}", retry_ns)
            return
        self._refused[peer, cargo] = after(now, max(retry_ns, REVIEW_NS))
        self._leave(now, peer, cargo, orphans=True)
        self._fill(now, cargo)

    def _unreachable(self, now: Instant, peer: P) -> None:
        if peer in self._links:
            self._drop_link(now, peer, "lost")
        self._questions.lost(now, peer)

    def _drop_link(self, now: Instant, peer: P, reason: str, least_ns: int = 0, *, lied: bool = False) -> None:
        link = self._links[peer]
        cargos = tuple(link.cargos)
        for cargo in cargos:
            self._leave(now, peer, cargo, orphans=True)
        self.candidates.failed(now, peer, least_ns, lied=lied)
        self._emit(CoordinatorLost(peer, reason))
        for cargo in cargos:
            self._fill(now, cargo)

    def _leave(self, now: Instant, peer: P, cargo: CargoName, *, orphans: bool) -> None:
        """No longer follow a Cargo there. `orphans`: keep its Islands for a while."""
        link = self._links[peer]
        del link.cargos[cargo]
        for island in self.followed.vouched_by(peer, cargo):
            if self.followed.unvouch(peer, cargo, island):
                if orphans:
                    self._agenda.set(("orphan", island, cargo), after(now, self._policy.orphan_ns))
                else:
                    self._forget(cargo, island)
        if not link.cargos:
            del self._links[peer]
            self._agenda.cancel(("probe", peer, ""))

    def _unwant(self, cargo: CargoName) -> None:
        if self._wanted.pop(cargo, self) is self:
            return
        for peer, link in tuple(self._links.items()):
            if cargo in link.cargos:
                self._send(peer, Unfollow(cargo))
                self._leave(Instant(0), peer, cargo, orphans=False)
        for island in self.followed.islands(cargo):
            self._forget(cargo, island.peer)

    # --- which coordinators -----------------------------------------------------------------------

    def _order(self, now: Instant, cargo: CargoName) -> list[P]:
        """All that may be turned to for a Cargo: those that say they have it, then the others; nearest
        first.
        """
        having = {known.peer for known in self.summaries.having(cargo, self._unix(now))}
        usable = [p for p in self.candidates.usable(now) if self._refused.get((p, cargo), now) <= now]
        return [p for p in usable if p in having] + [p for p in usable if p not in having]

    def _following(self, cargo: CargoName) -> list[P]:
        return [peer for peer, link in self._links.items() if cargo in link.cargos]

    def _fill_all(self, now: Instant) -> None:
        for cargo in tuple(self._wanted):
            self._fill(now, cargo)

    def _fill(self, now: Instant, cargo: CargoName) -> None:
        current = self._following(cargo)
        order = [peer for peer in self._order(now, cargo) if peer not in current]
        while order and len(current) < self._policy.count:
            groups = {self.candidates.group(peer) for peer in current} - {0}
            apart = [peer for peer in order if self.candidates.group(peer) not in groups]
            self._subscribe(now, cargo, (apart or order)[0], current, order)
        if self.followed.count(cargo) < self._policy.enough:
            for known in self.summaries.having(cargo, self._unix(now)):
                if known.peer in order and len(current) < self._policy.most:
                    self._subscribe(now, cargo, known.peer, current, order)
        if len(current) < self._policy.count and ("search", None, "") not in self._agenda:
            self._agenda.set(("search", None, ""), now)
        later = self.candidates.next_usable(now)
        if later is not None:
            self._agenda.sooner(("fill", None, ""), later)

    def _subscribe(self, now: Instant, cargo: CargoName, peer: P, current: list[P], order: list[P]) -> None:
        link = self._links.get(peer)
        if link is None:
            link = self._links[peer] = _Link(now, now, Budget.full(SHOWN_PER_S, SHOWN_BURST, now))
        self._follow(now, peer, link, cargo)
        current.append(peer)
        order.remove(peer)

    def _review(self, now: Instant) -> None:
        """Drop expired adverts; leave coordinators that have nothing of a Cargo for such that say they do."""
        for cargo, island in self.followed.expired(self._unix(now)):
            self._forget(cargo, island)
        self._refused = {key: until for key, until in self._refused.items() if until > now}
        for cargo in tuple(self._wanted):
            having = {known.peer for known in self.summaries.having(cargo, self._unix(now))}
            current = self._following(cargo)
            useless = [p for p in current if p not in having and not self.followed.told(p, cargo)]
            if useless and any(p in having for p in self._order(now, cargo) if p not in current):
                self._send(useless[0], Unfollow(cargo))
                self._leave(now, useless[0], cargo, orphans=True)
            self._fill(now, cargo)
        if self._wanted:
            self._agenda.set(("review", None, ""), after(now, REVIEW_NS))

    def _search(self, now: Instant) -> None:
        if all(len(self._following(cargo)) >= self._policy.count for cargo in self._wanted):
            self._search_ns = self._policy.candidates.search_first_ns
            return
        self._emit(NeedCoordinators())
        self._agenda.set(("search", None, ""), after(now, self._search_ns))
        self._search_ns = min(2 * self._search_ns, self._policy.candidates.search_max_ns)

    def _learn(self, now: Instant, envelope: Envelope) -> P | None:
        """A coordinator's word about itself: where it is, and what it has. Returns it if that is news."""
        try:
            stated = self._notary.open_summary_untrusted(envelope, self._unix(now))
        except ProtocolError:
            return None
        if stated.peer == self.me or not self.summaries.admit(stated, envelope):
            return None
        self._emit(CoordinatorKnown(stated.peer, stated.body.addresses))
        self.candidates.learn((CoordinatorCandidate(stated.peer),), self._links)
        return stated.peer

    # --- Islands ----------------------------------------------------------------------------------

    def _pushed(self, now: Instant, peer: P, sub: _Subscription, push: IslandsPushed) -> None:
        self._send(peer, PushTaken(push.push, push.cargo))
        if push.push <= sub.have:
            return
        sub.have = push.push
        cargo = push.cargo
        told = dict.fromkeys(self.followed.vouched_by(peer, cargo)) if push.anew else {}
        try:
            for key in push.lost:
                island = self._notary.peer_of_untrusted(key)
                if self.followed.unvouch(peer, cargo, island):
                    self._forget(cargo, island)
            for seen in push.islands:
                found = self._open_untrusted(now, peer, seen)
                if found is not None:
                    told.pop(found.peer, None)
                    self._vouched(peer, cargo, found, seen)
        except ProtocolError:
            self._drop_link(now, peer, "lied", LIAR_NS, lied=True)
            return
        for island in told:
            if self.followed.unvouch(peer, cargo, island):
                self._forget(cargo, island)

    def _open_untrusted(self, now: Instant, coordinator: P, seen: SeenIsland) -> FoundIsland[P] | None:
        """An Island's advert as a coordinator shows it; None if it has expired. Raises ProtocolError."""
        try:
            stated = self._notary.open_advert_untrusted(seen.envelope, self._unix(now))
        except ProtocolError as error:
            if error.fault is Fault.EXPIRED:
                return None
            raise
        witnessed = sighted(coordinator, seen.rtt_ns)
        return FoundIsland(stated.peer, stated.body, stated.sequence, stated.expires_unix_ns, witnessed)

    def _vouched(self, peer: P, cargo: CargoName, found: FoundIsland[P], seen: SeenIsland) -> None:
        has_it = any(o.digest == cargo and o.state != "failed" for o in found.advert.cargos)
        if not has_it:
            if self.followed.unvouch(peer, cargo, found.peer):
                self._forget(cargo, found.peer)
            return
        known = self.followed.get(cargo, found.peer)
        if (known is None or peer not in known.by) and self.followed.told(peer, cargo) >= self._policy.limit:
            return  # more than it was asked for
        island = FollowedIsland(found.peer, found.advert, found.sequence, UnixNs(found.expires_unix_ns))
        news = self.followed.vouch(peer, cargo, island, seen.rtt_ns)
        self._agenda.cancel(("orphan", found.peer, cargo))
        if news:
            self._emit(IslandSeen(cargo, found, seen.age_ms * MILLISECOND_NS))

    def _forget(self, cargo: CargoName, island: P) -> None:
        self._agenda.cancel(("orphan", island, cargo))
        if self.followed.drop(cargo, island):
            self._emit(IslandUnseen(cargo, island))

    def sighted(self, island: P) -> tuple[Sighted[P], ...]:
        """Round trips that coordinators measured to it, as told lately."""
        return self.followed.sighted(island)

    # --- questions --------------------------------------------------------------------------------

    def _answer(self, now: Instant, peer: P, message: IslandsFound) -> None:
        if not self._questions.expects(peer, message.call):
            return
        try:
            opened = [self._open_untrusted(now, peer, seen) for seen in message.islands]
        except ProtocolError:
            self.candidates.failed(now, peer, LIAR_NS, lied=True)
            self._emit(CoordinatorLost(peer, "lied"))
            self._questions.failed(now, peer, message.call)
            return
        self.candidates.worked(peer)
        referred = [self._learn(now, envelope) for envelope in message.coordinators]
        self._questions.answered(
            now,
            peer,
            message.call,
            [island for island in opened if island is not None],
            [other for other in referred if other is not None],
        )

    # --- small things -----------------------------------------------------------------------------

    def _unix(self, now: Instant) -> UnixNs:
        return UnixNs(now + self._unix_offset_ns)

    def _next_call(self) -> int:
        self._calls += 1
        return self._calls

    def _send(self, peer: P, message: CoordinationMessage) -> None:
        self._out.append(Send(peer, message))

    def _emit(self, event: FollowingEvent[P]) -> None:
        self._out.append(Emit(event))
