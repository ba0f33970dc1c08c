"""Questions that a gateway asks coordinators once: which Islands have this Cargo?

Two coordinators are asked at a time; who does not answer in time is followed by the next. An answer may
name other coordinators that have more: those are asked too while there are fewer Islands than wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

from protocol.coordination import CargoName, FindIslands
from protocol.instants import Instant, after
from routing.agenda import Agenda
from routing.following_events import Find, FollowingPolicy, FoundIsland, FoundIslands, Sighted

P = TypeVar("P")

#: Coordinators asked at once, and answers that are enough if they leave nothing to ask for.
PARALLEL: Final = 2


@dataclass(slots=True)
class Question(Generic[P]):
    """`open`: calls under way, by coordinator. `asked`: all that were ever asked."""

    find: Find
    open: dict[P, int] = field(default_factory=dict["P", int])
    asked: dict[P, None] = field(default_factory=dict["P", None])
    referred: dict[P, None] = field(default_factory=dict["P", None])
    answers: int = 0
    islands: dict[P, FoundIsland[P]] = field(default_factory=dict["P", FoundIsland["P"]])

    def next_to_ask(self, order: Iterable[P], tries: int) -> list[P]:
        """Whom to ask now, best first: as many as may be asked at once and are worth it."""
        if len(self.islands) >= self.find.limit:
            return []
        free = min(PARALLEL - len(self.open), tries - len(self.asked))
        if free <= 0:
            return []
        fresh = [peer for peer in self.referred if peer not in self.asked]
        if not fresh and self.answers + len(self.open) >= PARALLEL:
            return []
        fresh += [peer for peer in order if peer not in self.asked and peer not in self.referred]
        return fresh[:free]

    def take(self, coordinator: P, islands: Iterable[FoundIsland[P]]) -> None:
        """An answer."""
        self.open.pop(coordinator, None)
        self.answers += 1
        for island in islands:
            known = self.islands.get(island.peer)
            if known is None:
                if len(self.islands) < self.find.limit:
                    self.islands[island.peer] = island
                continue
            newer = island if island.sequence > known.sequence else known
            sighted = {s.coordinator: s for s in (*known.sighted, *island.sighted)}
            self.islands[island.peer] = FoundIsland(
                newer.peer, newer.advert, newer.sequence, newer.expires_unix_ns, tuple(sighted.values())
            )

    def result(self) -> FoundIslands[P]:
        return FoundIslands(self.find.ticket, tuple(self.islands.values()), self.answers)


class Questions(Generic[P]):
    """All questions under way. `order`: whom to turn to for a Cargo, best first; `send`, `emit`: of the
    owner; `number`: gives call numbers.
    """

    def __init__(
        self,
        policy: FollowingPolicy,
        order: Callable[[Instant, CargoName], list[P]],
        send: Callable[[P, FindIslands], None],
        emit: Callable[[FoundIslands[P]], None],
        number: Callable[[], int],
    ) -> None:
        self._policy: Final = policy
        self._order: Final = order
        self._send: Final = send
        self._emit: Final = emit
        self._number: Final = number
        self._questions: dict[int, Question[P]] = {}
        # Calls under way: the ticket they belong to and whom they were made to.
        self._calls: dict[int, tuple[int, P]] = {}
        self._agenda: Agenda[int] = Agenda()

    def next_wake(self) -> Instant | None:
        return self._agenda.next()

    def begin(self, now: Instant, find: Find) -> None:
        if find.ticket in self._questions or len(self._questions) >= self._policy.finds:
            self._emit(Question[P](find).result())
            return
        self._questions[find.ticket] = Question(find)
        self._go_on(now, find.ticket)

    def expects(self, peer: P, call: int) -> bool:
        """Whether this peer owes an answer to this call."""
        known = self._calls.get(call)
        return known is not None and known[1] == peer

    def answered(
        self, now: Instant, peer: P, call: int, islands: Iterable[FoundIsland[P]], referred: Iterable[P]
    ) -> None:
        ticket = self._close(call)
        question = self._questions[ticket]
        question.take(peer, islands)
        question.referred.update(dict.fromkeys(referred))
        self._go_on(now, ticket)

    def failed(self, now: Instant, peer: P, call: int) -> None:
        """It declined, lied, or was silent."""
        ticket = self._close(call)
        self._questions[ticket].open.pop(peer, None)
        self._go_on(now, ticket)

    def lost(self, now: Instant, peer: P) -> None:
        for call, (_, asked) in tuple(self._calls.items()):
            if asked == peer and call in self._calls:
                self.failed(now, peer, call)

    def give_up_silent(self, now: Instant) -> list[P]:
        """Stop waiting for those that have not answered in time; returns them."""
        silent: list[P] = []
        while (call := self._agenda.pop_due(now)) is not None:
            peer = self._calls[call][1]
            silent.append(peer)
            self.failed(now, peer, call)
        return silent

    def _go_on(self, now: Instant, ticket: int) -> None:
        """Ask whom there is to ask, or end."""
        question = self._questions[ticket]
        find = question.find
        for peer in question.next_to_ask(self._order(now, find.cargo), self._policy.find_tries):
            call = self._number()
            question.open[peer] = call
            question.asked[peer] = None
            self._calls[call] = (ticket, peer)
            self._agenda.set(call, after(now, self._policy.find_retry_ns))
            self._send(peer, FindIslands(call, find.cargo, find.wanted, find.limit))
        if not question.open:
            del self._questions[ticket]
            self._emit(question.result())

    def _close(self, call: int) -> int:
        self._agenda.cancel(call)
        return self._calls.pop(call)[0]


def sighted(coordinator: P, rtt_ns: int) -> tuple[Sighted[P], ...]:
    return (Sighted(coordinator, rtt_ns),) if rtt_ns else ()
