"""Whose word counts how much: trust that flows from the evaluator's own seeds.

The graph. Nodes are coordinators. The evaluator names seeds (itself, coordinators it has chosen to believe),
each with a weight up to `FULL`. An edge i -> j says how much of what j stated about others i has replayed and
found right (`Counters.attested_units`), less what i holds against j. It costs real, verified work to get an
edge, and only honest issuers' edges matter. What does *not* make an edge: praise, agreeing statements
(anybody can copy what others published), and work done as an Island (who computes well need not speak true).

The flow (personalised random walks with decay, in the manner of EigenTrust, Kamvar et al. 2003, and MeritRank,
Nasrulin et al. 2022). Each seed starts with its weight. In each step a node passes `damping` of what arrived on
to those it has edges to, in proportion; a node whose edges sum to less than `floor_units` passes only that
part. A node's trust is all that ever arrived, at most `FULL`.

The guarantee. Let S be any set of identities without a seed, however many, stating whatever they like. Let
phi be the flow over the edges into S (the attack edges) as honest nodes alone make it, i.e. computed as if S
stated nothing: the sum over attack edges h -> s of trust(h) * edge / max(floor, edges of h). Then

    sum of trust over S  <=  damping / (1 - damping) * phi            (= phi for damping 1/2)

because a walk enters S for the first time with damping * phi in all, and whatever S does, a walk has at most
1 / (1 - damping) expected steps left. So trust can be moved about within S, never made, and who splits into a
thousand identities divides it by a thousand. Rounding is downwards only, so the bound is exact in integers.

What it means for karma: another's word is worth between -credit_cap and +credit_cap hours, times its issuer's
trust (`KarmaPolicy.hearsay_units`). So all that S states moves no peer's karma by more than bound *
credit_cap, up or down: while bound < knee / credit_cap (1/6 by default: 6.7 of 40 hours), nobody comes over
the monetization threshold on the word of S alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

from routing.karma import HOUR_UNITS

P = TypeVar("P")

#: Full trust, in fixed point: below it a walk is cut off, after some 30 halvings.
FULL: Final = 1 << 32


@dataclass(frozen=True, slots=True)
class TrustPolicy:
    damping_percent: int = 50
    """All strangers together weigh at most as much as the seeds that let them in. More would make hearsay of
    hearsay count more than what the evaluator chose to believe."""

    floor_units: int = 40 * HOUR_UNITS
    """A coordinator that has verified less than this (one credit cap) passes on only a part: a first edge of
    half an hour is not the whole of its issuer's opinion."""

    steps: int = 8
    """Longer walks carry under 1/256 of a seed's weight."""


def trust_of(
    seeds: Mapping[P, int],
    edges: Callable[[P], Mapping[P, int]],
    policy: TrustPolicy,
    barred: Collection[P] = (),
) -> dict[P, int]:
    """Trust by peer, 0 < trust <= FULL; peers without trust are absent.

    `seeds`: weights up to FULL. `edges(issuer)`: verified units by subject, not negative; edges to oneself
    count nothing. `barred`: peers that nothing flows to (proven liars), not even as seeds. The result does not
    depend on any iteration order.
    """
    barred = frozenset(barred)
    trust = {peer: min(FULL, weight) for peer, weight in seeds.items() if weight > 0 and peer not in barred}
    arrived = dict(trust)
    for _ in range(policy.steps):
        flowing: dict[P, int] = {}
        for issuer, mass in arrived.items():
            out = edges(issuer)
            total = max(policy.floor_units, sum(units for peer, units in out.items() if peer != issuer))
            passed = mass * policy.damping_percent
            for peer, units in out.items():
                if peer != issuer and peer not in barred and (share := passed * units // (100 * total)):
                    flowing[peer] = flowing.get(peer, 0) + share
        if not flowing:
            break
        for peer, mass in flowing.items():
            trust[peer] = trust.get(peer, 0) + mass
        arrived = flowing
    return {peer: min(FULL, weight) for peer, weight in trust.items()}


def attack_flow(
    seeds: Mapping[P, int],
    edges: Mapping[P, Mapping[P, int]],
    region: Collection[P],
    policy: TrustPolicy,
) -> int:
    """Phi of the guarantee: what honest nodes let into `region` (fixed point, rounded up), whatever it
    states.
    """
    inside = frozenset(region)
    honest = {issuer: out for issuer, out in edges.items() if issuer not in inside}
    reached = _visits(seeds, honest, policy)
    flow = 0
    for issuer, out in honest.items():
        into = sum(units for peer, units in out.items() if peer in inside)
        total = max(policy.floor_units, sum(units for peer, units in out.items() if peer != issuer))
        flow += -(-reached.get(issuer, 0) * into // total)
    return flow


def _visits(seeds: Mapping[P, int], edges: Mapping[P, Mapping[P, int]], policy: TrustPolicy) -> dict[P, int]:
    """All that ever arrives, not cut at FULL, rounded up, for a bound that holds."""
    visits = dict(seeds)
    arrived = dict(seeds)
    for _ in range(policy.steps):
        flowing: dict[P, int] = {}
        for issuer, mass in arrived.items():
            out = edges.get(issuer, {})
            total = max(policy.floor_units, sum(units for peer, units in out.items() if peer != issuer))
            for peer, units in out.items():
                if peer != issuer:
                    share = -(-mass * policy.damping_percent * units // (100 * total))
                    flowing[peer] = flowing.get(peer, 0) + share
        for peer, mass in flowing.items():
            visits[peer] = visits.get(peer, 0) + mass
        arrived = flowing
    return visits
