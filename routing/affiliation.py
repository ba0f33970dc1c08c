"""Which coordinators an Island tells of itself, and the telling.

From candidates (found by the DHT, or named by the owner) it takes the nearest, two of them unless told
otherwise, and not two in one network while there is another choice, so that no single failure hides the
Island. Named (pinned) ones are always told. Each gets the advert when it changes and a sign of life every
two seconds in between; both are acknowledged, and what is not acknowledged is repeated. A coordinator that
is silent for five seconds, or whose link is gone, is replaced at once by the next nearest. Better ones that
turn up are moved to slowly, and the old one is left only when the new one has taken the advert.

The advert is signed anew when it changes and before it expires; the time until then bounds how long a lying
coordinator can show an Island that has left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Generic, TypeAlias, TypeVar

import msgspec

from protocol.adverts import IslandAdvert
from protocol.codec import excerpt
from protocol.coordination import (
    AdvertKeep,
    AdvertPut,
    AdvertTaken,
    AdvertWithdrawn,
    CoordinationMessage,
    Declined,
)
from protocol.dice import Dice
from protocol.envelope import Envelope
from protocol.instants import MILLISECOND_NS, SECOND_NS, Instant, UnixNs, after
from protocol.machine import Disconnect, Effect, Emit, Input, Ordered, PeerLost, Received, Send, Woken
from routing.agenda import Agenda
from routing.candidates import CandidateBook, CandidatePolicy, CoordinatorCandidate

P = TypeVar("P")


@dataclass(frozen=True, slots=True)
class AffiliationPolicy:
    """Durations in nanoseconds. `count`: coordinators to keep, besides pinned ones."""

    count: int = 2
    alive_ns: int = 2 * SECOND_NS
    """Between two signs of life."""
    retry_ns: int = 500 * MILLISECOND_NS
    """What is not acknowledged by then is repeated."""
    dead_after_ns: int = 5 * SECOND_NS
    """Silence until a coordinator is given up: seven tries. With the next one's first answer it makes less
    than ten seconds without any, even if all coordinators that an Island has die at once."""
    answer_ns: int = 3 * SECOND_NS
    """Until a new one's first answer: what is listed may be long dead."""
    coalesce_ns: int = 50 * MILLISECOND_NS
    """Changes that come close together share one advert..."""
    advert_gap_ns: int = 200 * MILLISECOND_NS
    """...and adverts have at least this distance: a coordinator admits twenty messages a second."""
    advert_ttl_ns: int = 120 * SECOND_NS
    """What the signature says; signed anew after a third of it."""
    candidates: CandidatePolicy = field(default_factory=CandidatePolicy)


# --- commands -------------------------------------------------------------------------------------


class Advertise(msgspec.Struct, frozen=True, gc=False):
    """This is what the Island offers now."""

    advert: IslandAdvert


class FoundCoordinators(msgspec.Struct, Generic[P], frozen=True):
    """Candidates, anew or again. Those that are not named stay as they are."""

    candidates: tuple[CoordinatorCandidate[P], ...]


class RoundTripMeasured(msgspec.Struct, Generic[P], frozen=True, gc=False):
    """A heartbeat's round trip to a coordinator, nanoseconds."""

    peer: P
    rtt_ns: int


class CoordinatorUp(msgspec.Struct, Generic[P], frozen=True, gc=False):
    """A connection to this coordinator has just come up (again): what it did before is forgiven."""

    peer: P


class Leave(msgspec.Struct, frozen=True, gc=False):
    """The Island stops: all are told once, with this last advert (draining)."""

    advert: IslandAdvert


AffiliationCommand: TypeAlias = (
    Advertise | FoundCoordinators[P] | RoundTripMeasured[P] | CoordinatorUp[P] | Leave
)

# --- events ---------------------------------------------------------------------------------------


class NeedCandidates(msgspec.Struct, frozen=True, gc=False):
    """Look for coordinators (in the DHT, around here). Comes again, ever more slowly, until there are
    enough.
    """


class Affiliated(msgspec.Struct, Generic[P], frozen=True, gc=False):
    """A coordinator has taken the advert."""

    peer: P


class Parted(msgspec.Struct, Generic[P], frozen=True, gc=False):
    """`reason`: lost, silent, declined: ..., nearer."""

    peer: P
    reason: str


class TurnedAway(msgspec.Struct, Generic[P], frozen=True, gc=False):
    """A coordinator does not take the advert; it is tried again later. `code`: full, invalid, ...; `detail`:
    its own words. Both are safe to show.
    """

    peer: P
    code: str
    detail: str


AffiliationEvent: TypeAlias = NeedCandidates | Affiliated[P] | Parted[P] | TurnedAway[P]

Effects: TypeAlias = list[Effect[P, CoordinationMessage, AffiliationEvent[P]]]
Sealer: TypeAlias = Callable[[IslandAdvert, int, UnixNs], Envelope]
"""(advert, sequence, expires) -> envelope."""


#: A timer that fires later than this says that this process was stopped: nobody else is to blame for the
#: silence.
LATE_NS: Final = 2 * SECOND_NS

#: A coordinator may have a higher number of ours than we do (our clock was set back). One so far ahead lies.
MAX_AHEAD_NS: Final = 3600 * SECOND_NS

#: It tells of one such number after a restart of ours. More often, it makes us sign for nothing.
MAX_RAISED: Final = 3

#: Who lied is left alone for so long, also if it connects anew.
LIAR_NS: Final = 3600 * SECOND_NS

#: Among how many reviews one asks for new candidates although there are enough.
REVIEWS_PER_SEARCH: Final = 5

#: Long ago: due, and late.
_AT_ONCE: Final = Instant(0)

_SEAL, _REVIEW, _SEARCH, _FILL = "seal", "review", "search", "fill"


@dataclass(slots=True)
class _Tie(Generic[P]):
    """One coordinator. `heard`: its last answer, or when we began. `taken`: number of the advert that it
    has; `sent`: of the one that it was sent last; `raised`: how often it knew a higher one than we; `call`:
    what is under way (0: nothing), and whether that is an advert. `replaces`: whom it takes the place of.
    """

    heard: Instant
    taken: int = 0
    sent: int = 0
    raised: int = 0
    call: int = 0
    putting: bool = False
    affiliated: bool = False
    replaces: P | None = None


class Affiliation(Generic[P]):
    """See the module's text. `seal(advert, sequence, expires)` signs; `unix_offset_ns`: civil time minus
    the clock that instants come from; sequence numbers grow with civil time, so that they outlast a restart.
    """

    def __init__(
        self,
        seal: Sealer,
        dice: Dice,
        *,
        unix_offset_ns: int,
        policy: AffiliationPolicy = AffiliationPolicy(),  # noqa: B008 - frozen: one shared default is safe
    ) -> None:
        self._seal_with: Final = seal
        self._dice: Final = dice
        self._unix_offset_ns = unix_offset_ns
        self._policy: Final = policy
        self.candidates: Final[CandidateBook[P]] = CandidateBook(policy.candidates, dice)
        self._ties: dict[P, _Tie[P]] = {}
        self._agenda: Agenda[tuple[str, P | None]] = Agenda()
        self._advert: IslandAdvert | None = None
        self._envelope: Envelope | None = None
        self._sequence = 0
        self._sealed = 0  # the number of the envelope at hand
        self._sealed_at = Instant(0)
        self._calls = 0
        self._reviews = 0
        self._search_ns = policy.candidates.search_first_ns
        self._stopped = False
        self._out: Effects[P] = []

    @property
    def coordinators(self) -> tuple[P, ...]:
        """Those that have taken an advert and still answer."""
        return tuple(peer for peer, tie in self._ties.items() if tie.affiliated)

    def receive(self, now: Instant, what: Input[P, CoordinationMessage, AffiliationCommand[P]]) -> Effects[P]:
        if not self._stopped:
            match what:
                case Received(peer, message):
                    self._message(now, peer, message)
                case Ordered(command):
                    self._command(now, command)
                case PeerLost(peer):
                    if peer in self._ties:
                        self._part(now, peer, "lost")
                case Woken():
                    self._woken(now)
                case _:
                    pass
        out, self._out = self._out, []
        return out

    def set_clock(self, unix_offset_ns: int) -> None:
        """Civil time is so far from the clock of instants now: it was set, or this machine slept. What was
        signed may have expired, and who refused it may take what is signed anew.
        """
        self._unix_offset_ns = unix_offset_ns
        self.candidates.forgive()
        if self._envelope is not None:
            self._agenda.set((_SEAL, None), _AT_ONCE)

    def next_wake(self) -> Instant | None:
        return None if self._stopped else self._agenda.next()

    # --- inputs -----------------------------------------------------------------------------------

    def _command(self, now: Instant, command: AffiliationCommand[P]) -> None:
        match command:
            case Advertise(advert):
                if advert != self._advert:
                    self._advert = advert
                    gap = after(self._sealed_at, self._policy.advert_gap_ns)
                    soon = after(now, 0 if self._envelope is None else self._policy.coalesce_ns)
                    self._agenda.sooner((_SEAL, None), max(soon, gap) if self._envelope else now)
                self._woken(now)
            case FoundCoordinators(candidates):
                self.candidates.learn(candidates, self._ties)
                self._fill(now)
            case CoordinatorUp(peer):
                if peer not in self._ties:
                    self.candidates.worked(peer)
                self._fill(now)
            case RoundTripMeasured(peer, rtt_ns):
                self.candidates.measured(peer, rtt_ns)
            case Leave(advert):
                self._advert = advert
                self._seal(now)
                for peer in self._ties:
                    self._put(peer, self._ties[peer])
                self._stopped = True

    def _woken(self, now: Instant) -> None:
        first = self._agenda.next()
        if first is not None and now - first > LATE_NS:
            for tie in self._ties.values():
                tie.heard = now
        while (key := self._agenda.pop_due(now)) is not None:
            match key:
                case ("seal", None):
                    self._seal(now)
                    self._fill(now)
                    for peer, tie in self._ties.items():
                        if not tie.putting:
                            self._ask(now, peer, tie)
                case ("review", None):
                    self._review(now)
                case ("search", None):
                    self._search(now)
                case ("fill", None):
                    self._fill(now)
                case (_, peer) if peer is not None and peer in self._ties:
                    self._ask_again(now, peer, self._ties[peer])
                case _:
                    pass

    def _message(self, now: Instant, peer: P, message: CoordinationMessage) -> None:
        tie = self._ties.get(peer)
        if tie is None:
            return
        match message:
            case AdvertTaken(call, sequence) if 0 < call <= tie.call:
                self._taken(now, peer, tie, sequence)
            case Declined(call, code, retry_ms, detail) if 0 < call <= tie.call:
                tie.heard, tie.putting = now, False
                if code == "too-fast":
                    wait_ns = max(retry_ms * MILLISECOND_NS, self._policy.advert_gap_ns)
                    self._agenda.set(("ask", peer), after(now, min(wait_ns, self._policy.alive_ns)))
                else:
                    self._emit(TurnedAway(peer, excerpt(code), excerpt(detail)))
                    self._part(now, peer, f"declined: {excerpt(code)}", retry_ms * MILLISECOND_NS)
            case _:
                pass  # late, or not for us

    def _taken(self, now: Instant, peer: P, tie: _Tie[P], sequence: int) -> None:
        repeat = tie.putting and sequence != tie.sent
        tie.heard, tie.taken = now, sequence
        if sequence > self._sequence:
            tie.raised += 1
            if sequence > now + self._unix_offset_ns + MAX_AHEAD_NS:
                self._part(now, peer, "claims a number that we never gave", LIAR_NS, lied=True)
                return
            if tie.raised > MAX_RAISED:
                self._part(now, peer, "has adverts that are not ours; does another machine use this identity?")
                return
            # One of ours from before the clock was set back: go on above it.
            self._sequence = sequence
            self._agenda.sooner((_SEAL, None), max(now, after(self._sealed_at, self._policy.advert_gap_ns)))
        if sequence and not tie.affiliated:
            tie.affiliated = True
            self.candidates.worked(peer)
            self._emit(Affiliated(peer))
            if tie.replaces is not None and tie.replaces in self._ties:
                self._send(tie.replaces, AdvertWithdrawn())
                self._untie(tie.replaces, "nearer")
            tie.replaces = None
        if repeat and sequence < self._sealed:
            return  # it was sent a newer one: the next try comes in its time, however often it says this
        tie.putting = False
        if sequence < self._sealed:
            self._ask(now, peer, tie)
        else:
            self._agenda.set(("ask", peer), after(now, self._policy.alive_ns))

    # --- moves ------------------------------------------------------------------------------------

    def _seal(self, now: Instant) -> None:
        if self._advert is None:
            return
        unix_now = now + self._unix_offset_ns
        self._sequence = max(self._sequence + 1, unix_now)
        expires = UnixNs(unix_now + self._policy.advert_ttl_ns)
        self._envelope = self._seal_with(self._advert, self._sequence, expires)
        self._sealed, self._sealed_at = self._sequence, now
        self._agenda.set((_SEAL, None), after(now, self._policy.advert_ttl_ns // 3))

    def _ask(self, now: Instant, peer: P, tie: _Tie[P]) -> None:
        """Send the advert, or a sign of life if it has it."""
        if tie.taken and tie.taken >= self._sealed:
            self._calls += 1
            tie.call, tie.putting = self._calls, False
            self._send(peer, AdvertKeep(tie.call, tie.taken))
        else:
            self._put(peer, tie)
        self._agenda.set(("ask", peer), after(now, self._policy.retry_ns))

    def _put(self, peer: P, tie: _Tie[P]) -> None:
        if self._envelope is not None:
            self._calls += 1
            tie.call, tie.putting, tie.sent = self._calls, True, self._sealed
            self._send(peer, AdvertPut(tie.call, self._envelope))

    def _ask_again(self, now: Instant, peer: P, tie: _Tie[P]) -> None:
        patience_ns = self._policy.dead_after_ns if tie.affiliated else self._policy.answer_ns
        if now - tie.heard >= patience_ns:
            self._part(now, peer, "silent", disconnect=True)
        else:
            self._ask(now, peer, tie)

    def _fill(self, now: Instant) -> None:
        """Tie up with the nearest until there are enough, and with all that are pinned."""
        if self._envelope is None:
            return
        while len(self._ties) < self._policy.count:
            peer = self.candidates.pick(now, self._ties)
            if peer is None:
                break
            self._begin(now, peer)
        for peer in self.candidates.usable(now):
            if self.candidates.pinned(peer) and peer not in self._ties:
                self._begin(now, peer)
        if len(self._ties) < self._policy.count:
            if (_SEARCH, None) not in self._agenda:
                self._agenda.set((_SEARCH, None), now if self._search_is_new() else after(now, self._search_ns))
        else:
            self._agenda.cancel((_SEARCH, None))
            self._search_ns = self._policy.candidates.search_first_ns
        later = self.candidates.next_usable(now)
        if later is not None:
            self._agenda.sooner((_FILL, None), later)
        if (_REVIEW, None) not in self._agenda:
            self._agenda.set((_REVIEW, None), after(now, self._review_in()))

    def _search_is_new(self) -> bool:
        return self._search_ns == self._policy.candidates.search_first_ns

    def _search(self, now: Instant) -> None:
        if len(self._ties) >= self._policy.count:
            return
        self._emit(NeedCandidates())
        self._search_ns = min(2 * self._search_ns, self._policy.candidates.search_max_ns)
        self._agenda.set((_SEARCH, None), after(now, self._search_ns))

    def _begin(self, now: Instant, peer: P, replaces: P | None = None) -> None:
        tie = self._ties[peer] = _Tie(now, replaces=replaces)
        self._ask(now, peer, tie)

    def _review_in(self) -> int:
        """Not all Islands at the same time."""
        review_ns = self._policy.candidates.review_ns
        return review_ns // 2 + self._dice.below(review_ns)

    def _review(self, now: Instant) -> None:
        self._agenda.set((_REVIEW, None), after(now, self._review_in()))
        self._reviews += 1
        if self._reviews % REVIEWS_PER_SEARCH == 0:
            self._emit(NeedCandidates())
        if len(self._ties) != self._policy.count or not all(tie.affiliated for tie in self._ties.values()):
            return
        change = self.candidates.better(now, self._ties)
        if change is not None:
            best, worst = change
            self._begin(now, best, worst)

    def _part(
        self,
        now: Instant,
        peer: P,
        reason: str,
        least_ns: int = 0,
        *,
        disconnect: bool = False,
        lied: bool = False,
    ) -> None:
        self._untie(peer, reason)
        self.candidates.failed(now, peer, least_ns, lied=lied)
        if disconnect:
            self._out.append(Disconnect(peer, reason))
        self._fill(now)

    def _untie(self, peer: P, reason: str) -> None:
        tie = self._ties.pop(peer)
        self._agenda.cancel(("ask", peer))
        if tie.affiliated:
            self._emit(Parted(peer, reason))

    def _send(self, peer: P, message: CoordinationMessage) -> None:
        self._out.append(Send(peer, message))

    def _emit(self, event: AffiliationEvent[P]) -> None:
        self._out.append(Emit(event))
