"""A coordinator: keeps the adverts of the Islands that chose it, answers who has a Cargo, tells followers
of changes, and says of itself what others need to find it.

It is a machine like the rest; several run side by side and none is special. Nothing that a peer sends makes
it hold or do more than the policy says: messages are metered per peer, Islands are counted in total and per
network, subscriptions per follower and in total. Signatures are checked only where they may change something.

A newcomer does not push out an Island that is here: a flood of new identities finds a full book and goes
elsewhere, those that came before stay as long as they live.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, Generic, TypeAlias, TypeVar

from protocol.adverts import IslandAdvert
from protocol.codec import excerpt
from protocol.coordination import (
    MAX_REFERRALS,
    MAX_SHOWN_RTT_NS,
    MAX_SUMMARY_CARGOS,
    AdvertKeep,
    AdvertPut,
    AdvertTaken,
    AdvertWithdrawn,
    CargoCount,
    CargoName,
    CoordinationMessage,
    CoordinatorSummary,
    Declined,
    FindIslands,
    Follow,
    Following,
    IslandsFound,
    PushTaken,
    SeenIsland,
    Unfollow,
)
from protocol.dice import Dice
from protocol.envelope import Envelope
from protocol.errors import Fault, ProtocolError
from protocol.ids import CargoDigest, cargo_digest_untrusted
from protocol.instants import MILLISECOND_NS, SECOND_NS, Instant, UnixNs, after
from protocol.machine import Effect, Emit, Input, Ordered, PeerLost, Received, Send, Woken
from routing.agenda import Agenda
from routing.coordinator_events import (
    CoordinatorCommand,
    CoordinatorEvent,
    CoordinatorPolicy,
    Identity,
    IslandChanged,
    IslandGone,
    LearnCoordinator,
    PeerMisbehaved,
    RoundTripSeen,
    Serve,
    StatementsDue,
    SummaryMade,
    WorkSeen,
)
from routing.geography import claims
from routing.islands import IslandBook
from routing.jurisdiction import LeastRoundTrip
from routing.karma_witness import KarmaWitness
from routing.meter import Allowance, RateMeter
from routing.notary import Notary, Stated
from routing.placement import Candidate, JobShape, Query, candidates, in_order
from routing.referrals import CoordinatorBook
from routing.requirements import Outlook, Requirements
from routing.subscriptions import Room, Subscriptions

P = TypeVar("P")

Effects: TypeAlias = list[Effect[P, CoordinationMessage, CoordinatorEvent[P]]]

#: Whom it has no room for comes back after this, or goes elsewhere.
FULL_RETRY_MS: Final = 30_000

#: Islands that one question looks at: of a Cargo with more, as many are drawn. Each costs some microseconds.
MAX_CONSIDERED: Final = 512

#: Summaries that say nothing new are repeated this many times more rarely.
QUIET_FACTOR: Final = 3

#: A timer that fires later than this says that this process was stopped.
LATE_NS: Final = 2 * SECOND_NS

_EXPIRE, _SUMMARY, _STATEMENTS = "expire", "summary", "statements"


@dataclass(slots=True)
class _Held:
    """What is kept of an Island beside its entry in the book."""

    envelope: Envelope
    expires_unix_ns: UnixNs
    group: int
    rtt: LeastRoundTrip = field(default_factory=LeastRoundTrip)


def _no_group(_peer: object) -> int:
    return 0


def _no_estimate(_one: int, _other: int) -> int | None:
    return None


class Coordinator(Generic[P]):
    """See the module's text. `unix_offset_ns`: civil time minus the clock that instants come from.
    `group_of`: the network that a peer's connection comes from, 0: not limited. `estimate`: the round trip
    between two packed network coordinates. `witness`: counts for karma; without one, `WorkSeen` is dropped.
    `book`: the owner may read it.
    """

    def __init__(
        self,
        me: P,
        notary: Notary[P],
        dice: Dice,
        *,
        unix_offset_ns: int,
        policy: CoordinatorPolicy = CoordinatorPolicy(),  # noqa: B008 - frozen: one shared default is safe
        group_of: Callable[[P], int] = _no_group,
        estimate: Callable[[int, int], int | None] = _no_estimate,
        witness: KarmaWitness[P] | None = None,
    ) -> None:
        self.me: Final = me
        self._notary: Final = notary
        self._dice: Final = dice
        self._unix_offset_ns = unix_offset_ns
        self._policy: Final = policy
        self._group_of: Final = group_of
        self._estimate: Final = estimate
        self._witness: Final = witness
        self.book: Final[IslandBook[P]] = IslandBook(ttl_ns=policy.island_ttl_ns, capacity=policy.islands)
        self.others: Final[CoordinatorBook[P]] = CoordinatorBook(policy.coordinators)
        self._held: dict[P, _Held] = {}
        self._groups: dict[int, int] = {}
        self._meter: RateMeter[P] = RateMeter(policy.requests_per_s, policy.request_burst, policy.metered_peers)
        self._follows: Subscriptions[P] = Subscriptions(
            policy, self._offering, self._show, unix_offset_ns=unix_offset_ns
        )
        self._agenda: Agenda[str] = Agenda()
        self._identity: Identity | None = None
        self._said: CoordinatorSummary | None = None
        self._said_at = Instant(0)
        self._said_sequence = 0
        self._expire_at = Instant(0)
        self._out: Effects[P] = []

    @property
    def follows(self) -> int:
        """Subscriptions there are."""
        return len(self._follows)

    def serves(self, peer: P, cargo: CargoName) -> bool:
        """Whether this peer follows the Cargo here."""
        return self._follows.has(peer, cargo)

    def rtt_ns(self, now: Instant, peer: P) -> int | None:
        """The smallest round trip to an Island lately."""
        held = self._held.get(peer)
        return None if held is None else held.rtt.value(now)

    def receive(self, now: Instant, what: Input[P, CoordinationMessage, CoordinatorCommand[P]]) -> Effects[P]:
        match what:
            case Received(peer, message):
                self._message(now, peer, message)
            case Ordered(command):
                self._command(now, command)
            case PeerLost(peer):
                self._follows.lost(peer)
                self._drop(now, peer, "lost")
            case Woken():
                self._woken(now)
            case _:
                pass
        for peer, push in self._follows.due(now):
            self._send(peer, push)
        out, self._out = self._out, []
        return out

    def set_clock(self, unix_offset_ns: int) -> None:
        """Civil time is so far from the clock of instants now: it was set, or this machine slept."""
        self._unix_offset_ns = unix_offset_ns
        self._said = None  # what it said may have expired by the new time
        if self._identity is not None:
            self._agenda.set(_SUMMARY, Instant(0))

    def next_wake(self) -> Instant | None:
        wakes = [wake for wake in (self._agenda.next(), self._follows.next_wake()) if wake is not None]
        return min(wakes, default=None)

    # --- inputs -----------------------------------------------------------------------------------

    def _command(self, now: Instant, command: CoordinatorCommand[P]) -> None:
        match command:
            case Serve(identity):
                self._identity = identity
                self._agenda.sooner(_SUMMARY, now)
                if self._witness is not None:
                    self._agenda.sooner(_STATEMENTS, after(now, self._policy.statements_ns))
                self._woken(now)
            case LearnCoordinator(envelope):
                self._learn(now, envelope)
            case RoundTripSeen(peer, rtt_ns):
                held = self._held.get(peer)
                if held is not None:
                    held.rtt.add(now, rtt_ns)
                if held is not None and self._witness is not None:
                    self._witness.measured(self._unix(now), peer, max(1, -(-rtt_ns // 1000)))
            case WorkSeen():
                if self._witness is not None:
                    self._witness.saw(
                        self._unix(now),
                        command.peer,
                        work_units=command.work_units,
                        failures=command.failures,
                        timeouts=command.timeouts,
                        lies=command.lies,
                        audits_passed=command.audits_passed,
                        audits_failed=command.audits_failed,
                    )

    def _woken(self, now: Instant) -> None:
        while (what := self._agenda.pop_due(now)) is not None:
            if what == _EXPIRE:
                self._expire(now)
            elif what == _SUMMARY:
                self._summarise(now)
                self._agenda.set(_SUMMARY, after(now, self._policy.summary_ns))
            elif what == _STATEMENTS and self._witness is not None:
                due = self._witness.due(self._unix(now))
                if due:
                    self._emit(StatementsDue(tuple(due)))
                self._agenda.set(_STATEMENTS, after(now, self._policy.statements_ns))

    def _message(self, now: Instant, peer: P, message: CoordinationMessage) -> None:
        allowance = self._meter.take(now, peer)
        if allowance is not Allowance.GRANTED:
            if allowance is Allowance.REFUSED and isinstance(
                message, AdvertPut | AdvertKeep | FindIslands | Follow
            ):
                wait_ms = self._meter.retry_ns(peer) // MILLISECOND_NS + 1
                self._send(peer, Declined(message.call, "too-fast", wait_ms))
            elif allowance is Allowance.FLOODING:
                self._emit(PeerMisbehaved(peer, "flood"))
            return
        match message:
            case AdvertPut():
                self._put(now, peer, message)
            case AdvertKeep():
                self._keep(now, peer, message)
            case AdvertWithdrawn():
                self._drop(now, peer, "withdrawn")
            case FindIslands():
                self._find(now, peer, message)
            case Follow():
                self._follow(now, peer, message)
            case Unfollow(cargo):
                self._follows.unfollow(peer, cargo)
            case PushTaken():
                self._follows.taken(now, peer, message)
            case _:
                self._emit(PeerMisbehaved(peer, Fault.UNEXPECTED.value))

    # --- Islands ----------------------------------------------------------------------------------

    def _put(self, now: Instant, peer: P, message: AdvertPut) -> None:
        envelope = message.envelope
        known = self.book.get(peer)
        if known is not None and envelope.sequence <= known.sequence:
            self._keep(now, peer, AdvertKeep(message.call, known.sequence))  # a repetition, or an old one late
            return
        group = self._group_of(peer)
        if known is None and not self._has_room(group):
            self._send(peer, Declined(message.call, "full", FULL_RETRY_MS))
            return
        try:
            stated = self._open_untrusted(now, peer, envelope)
        except ProtocolError as error:
            if error.fault is not Fault.EXPIRED:  # that may be a wrong clock, here or there
                self._emit(PeerMisbehaved(peer, error.fault.value))
            self._send(peer, Declined(message.call, "invalid", FULL_RETRY_MS, excerpt(error.detail)))
            return
        held = self._held.get(peer)
        if held is None:
            self._held[peer] = _Held(envelope, stated.expires_unix_ns, group)
            self._groups[group] = self._groups.get(group, 0) + 1
        else:
            held.envelope, held.expires_unix_ns = envelope, stated.expires_unix_ns
        before = set[str]() if known is None else {offered.digest for offered in known.advert.cargos}
        if any(
            offered.state == "ready" and not self._is_ready(offered.digest) for offered in stated.body.cargos
        ):
            self._agenda.sooner(_SUMMARY, after(now, self._policy.summary_soon_ns))
        self.book.admit(now, peer, stated.body, stated.sequence)
        self._watch_silence()
        self._send(peer, AdvertTaken(message.call, stated.sequence))
        self._emit(IslandChanged(peer, stated.body, stated.sequence, known is None))
        for offered in stated.body.cargos:
            before.discard(offered.digest)
            self._follows.changed(now, offered.digest, peer)
        for digest in sorted(before):
            self._follows.withdrawn(now, digest, peer)

    def _open_untrusted(self, now: Instant, peer: P, envelope: Envelope) -> Stated[P, IslandAdvert]:
        stated = self._notary.open_advert_untrusted(envelope, self._unix(now))
        if stated.peer != peer:
            raise ProtocolError(Fault.WRONG_ISSUER, "an advert must come from the Island itself")
        return stated

    def _keep(self, now: Instant, peer: P, message: AdvertKeep) -> None:
        island, held = self.book.get(peer), self._held.get(peer)
        if island is None or held is None or self._unix(now) > held.expires_unix_ns:
            self._send(peer, AdvertTaken(message.call, 0))
            return
        self.book.touch(now, peer)
        self._send(peer, AdvertTaken(message.call, island.sequence))

    def _is_ready(self, digest: str) -> bool:
        shelf = self.book.shelves.get(digest)
        return shelf is not None and shelf.ready > 0

    def _has_room(self, group: int) -> bool:
        if self.book.full:
            return False
        return group == 0 or self._groups.get(group, 0) < self._policy.islands_per_group

    def _drop(self, now: Instant, peer: P, reason: str) -> None:
        island, held = self.book.get(peer), self._held.pop(peer, None)
        if island is None or held is None:
            return
        self.book.lost(peer)
        left = self._groups[held.group] - 1
        if left:
            self._groups[held.group] = left
        else:
            del self._groups[held.group]
        self._emit(IslandGone(peer, reason))
        for offered in island.advert.cargos:
            self._follows.withdrawn(now, offered.digest, peer)

    def _watch_silence(self) -> None:
        due = self.book.next_expiry()
        if due is None:
            self._agenda.cancel(_EXPIRE)
        elif _EXPIRE not in self._agenda:
            self._expire_at = after(due, 1)
            self._agenda.set(_EXPIRE, self._expire_at)

    def _expire(self, now: Instant) -> None:
        if now - self._expire_at > LATE_NS:
            # We were stopped: what Islands sent meanwhile waits unread. Hear them first.
            self._expire_at = after(now, LATE_NS)
            self._agenda.set(_EXPIRE, self._expire_at)
            return
        for peer in self.book.late(now):
            self._drop(now, peer, "silent")
        self._watch_silence()

    # --- gateways ---------------------------------------------------------------------------------

    def _offering(self, cargo: CargoName) -> Iterator[P]:
        for island, offered in self.book.offers(cargo):
            if offered.state != "failed":
                yield island.peer

    def _show(self, now: Instant, peer: P) -> SeenIsland | None:
        island, held = self.book.get(peer), self._held.get(peer)
        if island is None or held is None:
            return None
        rtt_ns = min(held.rtt.value(now) or 0, MAX_SHOWN_RTT_NS)
        return SeenIsland(held.envelope, rtt_ns, max(0, now - island.advised) // MILLISECOND_NS)

    def _follow(self, now: Instant, peer: P, message: Follow) -> None:
        try:
            cargo_digest_untrusted(message.cargo)
        except ProtocolError as error:
            self._send(peer, Declined(message.call, "invalid", FULL_RETRY_MS, error.detail))
            return
        if not self._follows.follow(now, peer, message):
            self._send(peer, Declined(message.call, "full", FULL_RETRY_MS))
            return
        lease_ms = self._policy.follow_lease_ns // MILLISECOND_NS
        shelf = self.book.shelves.get(message.cargo)
        count = 0 if shelf is None else len(shelf.offers)
        self._send(peer, Following(message.call, message.cargo, lease_ms, count))

    def _find(self, now: Instant, peer: P, message: FindIslands) -> None:
        digest = self._meant(message.cargo)
        ranked = [] if digest is None else self._rank(now, CargoDigest(digest), message)
        room = Room()
        shown: list[SeenIsland] = []
        for candidate in ranked[: message.limit]:
            seen = self._show(now, candidate.peer)
            if seen is not None and room.take(seen.envelope):
                shown.append(seen)
        referrals: list[Envelope] = []
        if len(shown) < message.limit:
            for known in self.others.having(digest or message.cargo, self._unix(now)):
                if len(referrals) == MAX_REFERRALS:
                    break
                if known.peer not in {peer, self.me} and room.take(known.envelope):
                    referrals.append(known.envelope)
        self._send(peer, IslandsFound(message.call, tuple(shown), len(ranked), tuple(referrals)))

    def _meant(self, name: CargoName) -> str | None:
        """The Cargo that people mean by a name that several may bear: the one with most Islands ready."""
        shelves = self.book.shelves
        named = self.book.called(name)
        return max(named, key=lambda d: (shelves[d].ready, len(shelves[d].offers), d), default=None)

    def _rank(self, now: Instant, digest: CargoDigest, message: FindIslands) -> list[Candidate[P]]:
        """By what Islands claim, as seen from the asker; it judges again, on its own evidence."""
        wanted = message.wanted
        offers = [
            (island, offered)
            for island, offered in self.book.offers(digest)
            if not wanted.jurisdictions or claims(island.advert.country, wanted.jurisdictions)
        ]
        if len(offers) > MAX_CONSIDERED:
            offers = self._dice.sample(offers, MAX_CONSIDERED)
        outlook: Outlook[P] = Outlook(
            estimate_of=lambda there: self._estimate(wanted.coordinate, there) if wanted.coordinate else None,
            unix_offset_ns=self._unix_offset_ns,
        )
        requirements = Requirements(max_price_ucr=wanted.max_price_ucr or None, gpu=wanted.gpu)
        job = JobShape(digest, wanted.prompt_tokens, max(1, wanted.output_tokens))
        return in_order(candidates(now, offers, Query(job, outlook, frozenset(), requirements)))

    # --- itself and others ------------------------------------------------------------------------

    def _learn(self, now: Instant, envelope: Envelope) -> None:
        try:
            stated = self._notary.open_summary_untrusted(envelope, self._unix(now))
        except ProtocolError:
            return  # gossip checks its items; what else comes is not worth a word
        if stated.peer != self.me:
            self.others.admit(stated, envelope)

    def _summarise(self, now: Instant) -> None:
        identity = self._identity
        if identity is None:
            return
        summary = self._summary(identity)
        quiet_ns = QUIET_FACTOR * self._policy.summary_ns
        if summary == self._said and now - self._said_at < quiet_ns:
            return
        unix_now = self._unix(now)
        expires = UnixNs(unix_now + self._policy.summary_ttl_ns)
        # Above the last one also if the clock was set back: others take only what is newer.
        self._said_sequence = max(self._said_sequence + 1, unix_now)
        envelope = self._notary.seal_summary(summary, sequence=self._said_sequence, expires_unix_ns=expires)
        self._said, self._said_at = summary, now
        self._emit(SummaryMade(envelope, summary, self._policy.summary_ttl_ns))

    def _summary(self, identity: Identity) -> CoordinatorSummary:
        shelves = sorted(
            ((digest, shelf) for digest, shelf in self.book.shelves.items() if shelf.usable),
            key=lambda row: (-len(row[1].offers), row[0]),
        )
        counts: list[CargoCount] = []
        for digest, shelf in shelves[:MAX_SUMMARY_CARGOS]:
            naming = max(shelf.namings, key=lambda n: (shelf.namings[n], n))
            counts.append(CargoCount(digest, naming.name, naming.version, len(shelf.offers), shelf.ready))
        return CoordinatorSummary(
            name=identity.name,
            addresses=identity.addresses,
            region=identity.region,
            country=identity.country,
            coordinate=identity.coordinate,
            islands=len(self.book),
            full=self.book.full,
            cargos=tuple(counts),
        )

    # --- small things -----------------------------------------------------------------------------

    def _unix(self, now: Instant) -> UnixNs:
        return UnixNs(now + self._unix_offset_ns)

    def _send(self, peer: P, message: CoordinationMessage) -> None:
        self._out.append(Send(peer, message))

    def _emit(self, event: CoordinatorEvent[P]) -> None:
        self._out.append(Emit(event))
