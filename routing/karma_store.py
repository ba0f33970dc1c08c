"""All statements one evaluator holds, and the scores it draws from them.

Bounded by `QuotaMap`: strangers' statements go first. Within capacity the store is a join-semilattice:
whatever the order and number of merges, equal sets of statements give equal stores, and equal scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from routing.gossip_quota import QuotaMap
from routing.karma import KarmaPolicy, Merge, Statement, contradict, order_of
from routing.trust import FULL, TrustPolicy, trust_of

P = TypeVar("P")


#: Trust is drawn anew after one edge in so many changed (at once in a small network), and in each epoch: an
#: edge moves by minutes of work, so what is a few changes old is as good.
EDGES_PER_CHANGE: Final = 50


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """A statement takes about half a KiB of Python objects."""

    statements: int = 131_072
    """64 MiB: ten statements each about 13,000 Islands."""

    of_strangers: int = 16_384
    """An eighth: they count nothing now, and are kept in case their issuer becomes trusted."""

    per_issuer: int = 16_384
    """More than a coordinator's Islands (protocol.limits.MAX_ISLANDS_PER_COORDINATOR)."""

    barred: int = 4_096
    """Issuers remembered as proven liars. Who is forgotten starts as a stranger: without trust."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What a peer is worth to this evaluator. `issuers`: how many statements of trusted issuers it rests on."""

    points_mpt: int
    net_units: int
    issuers: int


class KarmaStore(Generic[P]):
    """`me` is always a seed: what this evaluator states itself counts in full."""

    def __init__(
        self,
        me: P,
        seeds: Mapping[P, int] | None = None,
        policy: KarmaPolicy = KarmaPolicy(),  # noqa: B008 - frozen: one shared default is safe
        trust_policy: TrustPolicy = TrustPolicy(),  # noqa: B008 - likewise
        limits: StoreLimits = StoreLimits(),  # noqa: B008 - likewise
    ) -> None:
        self.me: Final = me
        self.policy: Final = policy
        self._trust_policy: Final = trust_policy
        self._limits: Final = limits
        self._seeds: dict[P, int] = {**(seeds or {}), me: FULL}
        self._trust: dict[P, int] = dict(self._seeds)
        self._trust_epoch: int | None = None
        self._barred: dict[P, None] = {}
        self._said: QuotaMap[P, P, Statement[P]] = QuotaMap(
            limits.statements, limits.of_strangers, limits.per_issuer, self._trust.__contains__
        )
        self._about: dict[P, dict[P, None]] = {}  # subject -> issuers, in order of arrival
        self._attested: dict[P, dict[P, None]] = {}  # issuer -> subjects: the edges of the trust graph
        self._rows: dict[P, dict[P, int]] = {}  # the same in this epoch's units, as far as they were asked for
        self._changed = True
        self._edges = self._edges_changed = 0

    def __len__(self) -> int:
        return len(self._said)

    def merge(self, statement: Statement[P], epoch: int) -> Merge:
        """Take a statement (verified, if it came from elsewhere). `epoch`: the running one, by our clock."""
        if statement.issuer == statement.subject:
            return Merge.REFUSED
        if not epoch - self.policy.keep_epochs <= statement.epoch <= epoch + 1:
            return Merge.REFUSED
        held = self._said.get(statement.issuer, statement.subject)
        contradiction = held is not None and contradict(held, statement)
        if contradiction:
            self._bar(statement.issuer)
        if held is not None and order_of(statement) <= order_of(held):
            return Merge.CONTRADICTS if contradiction else Merge.STALE
        gone = self._said.put(statement.issuer, statement.subject, statement)
        self._about.setdefault(statement.subject, {})[statement.issuer] = None
        self._forget(gone)
        if self._said.get(statement.issuer, statement.subject) is None:
            return Merge.REFUSED
        if statement.counters.attested_units or statement.past.attested_units:
            subjects = self._attested.setdefault(statement.issuer, {})
            self._edges += statement.subject not in subjects
            subjects[statement.subject] = None
            self._edge_changed(statement.issuer)
        else:
            self._unattest(statement.issuer, statement.subject)
        return Merge.CONTRADICTS if contradiction else Merge.NEW

    def about(self, subject: P) -> Iterator[Statement[P]]:
        """The statements held about a peer."""
        for issuer in tuple(self._about.get(subject, ())):
            statement = self._said.get(issuer, subject)
            if statement is not None:
                yield statement

    def by(self, issuer: P) -> Iterator[Statement[P]]:
        for _, statement in self._said.of(issuer):
            yield statement

    def __iter__(self) -> Iterator[Statement[P]]:
        for _, _, statement in self._said:
            yield statement

    # --- judging --------------------------------------------------------------------------------

    def set_seeds(self, seeds: Mapping[P, int]) -> None:
        """Whom to believe, besides oneself. Weights up to trust.FULL."""
        self._seeds = {**seeds, self.me: FULL}
        self._changed = True

    def trust(self, issuer: P, epoch: int) -> int:
        """How much this issuer's word counts, 0..FULL."""
        self._refresh(epoch)
        return self._trust.get(issuer, 0)

    def standing(self, subject: P, epoch: int) -> Standing:
        """The peer's karma in this epoch; 0 points if nothing is known."""
        self._refresh(epoch)
        own_credit = own_debit = hearsay = issuers = 0
        for issuer in self._about.get(subject, ()):
            trust = self._trust.get(issuer, 0)
            statement = self._said.get(issuer, subject)
            if not trust or statement is None:
                continue
            issuers += 1
            credit, debit = self.policy.for_and_against(statement, epoch)
            if issuer == self.me:
                own_credit, own_debit = credit, debit
            else:
                hearsay += trust * self.policy.hearsay_units(credit, debit)
        net_units = self.policy.net_units(own_credit, own_debit, hearsay // FULL)
        return Standing(self.policy.points_mpt(net_units), net_units, issuers)

    def points_mpt(self, subject: P, epoch: int) -> int:
        return self.standing(subject, epoch).points_mpt

    def min_rtts(self, subject: P, epoch: int) -> list[tuple[P, int, int]]:
        """(issuer, its trust, shortest round trip in microseconds) of the trusted issuers that measured one
        in the last two epochs, by descending trust.
        """
        self._refresh(epoch)
        found = [
            (statement.issuer, self._trust.get(statement.issuer, 0), statement.min_rtt_us)
            for statement in self.about(subject)
            if statement.min_rtt_us and statement.epoch >= epoch - 1
        ]
        return sorted((row for row in found if row[1]), key=lambda row: -row[1])

    def expire(self, epoch: int) -> int:
        """Drop what was not renewed for `keep_epochs`. Returns how many."""
        late = [(s.issuer, s.subject) for s in self if s.epoch < epoch - self.policy.keep_epochs]
        for issuer, subject in late:
            self._said.pop(issuer, subject)
            self._unlink(issuer, subject)
        return len(late)

    def _row(self, issuer: P) -> dict[P, int]:
        """Whose statements the issuer verified, and how much of them, less what it holds against them."""
        row = self._rows.get(issuer)
        if row is None:
            row = self._rows[issuer] = {}
            for subject in self._attested.get(issuer, ()):
                statement = self._said.get(issuer, subject)
                if statement is not None:
                    past = self.policy.fold(statement, self._trust_epoch or 0)
                    units = past.attested_units - past.lie_units + min(0, past.merit_units)
                    if units > 0:
                        row[subject] = units
        return row

    def _refresh(self, epoch: int) -> None:
        """Draw trust anew if something important changed, or enough edges: one drawing takes 4 us an edge."""
        few = self._edges_changed <= self._edges // EDGES_PER_CHANGE
        if not self._changed and self._trust_epoch == epoch and few:
            return
        if self._trust_epoch != epoch:
            self._rows.clear()
        self._changed, self._trust_epoch, self._edges_changed = False, epoch, 0
        drawn = trust_of(self._seeds, self._row, self._trust_policy, self._barred.keys())
        if drawn.keys() != self._trust.keys():
            self._trust.clear()
            self._trust.update(drawn)
            self._forget(self._said.reconsider())
        else:
            self._trust.update(drawn)

    def _bar(self, issuer: P) -> None:
        """A proven liar: believed no more. Not ourselves, whose double statement is a lost memory."""
        if issuer == self.me:
            return
        self._barred.pop(issuer, None)
        self._barred[issuer] = None
        if len(self._barred) > self._limits.barred:
            del self._barred[next(iter(self._barred))]
        self._changed = True

    def _forget(self, gone: list[tuple[P, P, Statement[P]]]) -> None:
        for issuer, subject, _ in gone:
            self._unlink(issuer, subject)

    def _unlink(self, issuer: P, subject: P) -> None:
        self._unattest(issuer, subject)
        issuers = self._about.get(subject)
        if issuers is not None:
            issuers.pop(issuer, None)
            if not issuers:
                del self._about[subject]

    def _unattest(self, issuer: P, subject: P) -> None:
        subjects = self._attested.get(issuer)
        if subjects is not None and subjects.pop(subject, ()) is None:
            self._edges -= 1
            if not subjects:
                del self._attested[issuer]
            self._edge_changed(issuer)

    def _edge_changed(self, issuer: P) -> None:
        """Only edges of the trusted matter; a stranger's are read when it becomes trusted."""
        self._rows.pop(issuer, None)
        self._edges_changed += issuer in self._trust
