"""Which Island gets a job: the one that is expected to finish it first.

Pure: candidates and job in, order out. First a filter (Cargo, draining, schedule, price, karma,
jurisdiction: what fails is not asked), then an order by expected completion: round trip + wait for a slot +
prompt / prefill rate + output / decode rate, with claims corrected by what we measured. Times that differ
by less than the estimates are worth are equal; then the better fit comes first, then the nearer region.

`choose` takes the first of them, unless what is known of its load is old: then two of the near-best are
drawn and the less loaded one is taken (Mitzenmacher, "How useful is old information?", 2000), so that not
all gateways send their jobs to the same Island until its next advert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Final, Generic, TypeAlias, TypeVar

import msgspec

from protocol.adverts import OfferedCargo
from protocol.dice import Dice
from protocol.ids import CargoDigest
from protocol.instants import MILLISECOND_NS, SECOND_NS, Instant, UnixNs
from protocol.work import ChatPrompt, Generation, TextPrompt
from routing.fit import score_of_offer
from routing.geography import region_distance
from routing.islands import Experience, Island, IslandBook
from routing.jurisdiction import resides
from routing.requirements import ANYTHING, Outlook, Requirements, is_open, price_ucr

P = TypeVar("P")

#: A rate that nobody has claimed or measured yet, tokens/s: pessimistic, so that known Islands come first.
UNKNOWN_DECODE_TPS: Final = 5.0
UNKNOWN_PREFILL_TPS: Final = 50.0

#: Claims below this are taken as this: slower than any use, and no expected time outgrows an integer.
MIN_TPS: Final = 0.1

#: Assumed round trip where none was measured yet.
UNKNOWN_RTT_NS: Final = SECOND_NS

#: Loading a Cargo's weights from disk: the order of magnitude of a few GB from an SSD.
LOADING_NS: Final = 20 * SECOND_NS

#: An Island under suspicion is worse than any that is not: more than any real wait.
SUSPICION_PENALTY_NS: Final = 3_600 * SECOND_NS

#: An Island whose context looks too short comes after all others, but it is asked: lengths are estimates, and
#: if the prompt really is too long, an Island is the one to say so.
TOO_SMALL_PENALTY_NS: Final = 2 * SUSPICION_PENALTY_NS

#: Characters per token in English text, for prompts that nobody has tokenised yet.
CHARS_PER_TOKEN: Final = 4

#: What a chat template adds at most: its own boilerplate, the Cargo's system prompt, the frame of a message.
#: And how often a byte may come out: JSON inside a template is escaped.
TEMPLATE_TOKENS: Final = 4096
MESSAGE_TOKENS: Final = 64
ESCAPED_BYTES: Final = 2

#: Tokens that a runtime may put before a prompt that it was given raw.
PREFIX_TOKENS: Final = 8

#: Tokens expected from a job that names no max_tokens, and at most expected from one that does.
TYPICAL_OUTPUT_TOKENS: Final = 256


#: Expected times are compared in steps of 1/32 of their size (3 %): estimates are not better than that.
TIE_BITS: Final = 5

#: An advert older than this may say less of an Island's load than chance does: it was sent before the jobs
#: of the last round trips. Islands tell of changes within some 50 ms, and a coordinator passes them on
#: within 100 ms.
STALE_LOAD_NS: Final = 500 * MILLISECOND_NS

#: Near-best: at most a tenth and 20 ms later than the best.
NEAR_BEST_DIVISOR: Final = 10
NEAR_BEST_NS: Final = 20 * MILLISECOND_NS


@dataclass(frozen=True, slots=True)
class JobShape:
    """What placement needs to know of a job. Token counts are estimates."""

    cargo: CargoDigest
    prompt_tokens: int
    output_tokens: int
    units: int = 0


class Candidate(msgspec.Struct, Generic[P], frozen=True):
    """An Island that may run the job. `load_permille`: jobs per slot there, as far as known, `load_age_ns`
    ago.
    """

    peer: P
    expected_ns: int
    queue_ns: int
    price_ucr: int = 0
    fit: int = 0
    region: int = 0
    load_permille: int = 0
    load_age_ns: int = 0


@dataclass(frozen=True, slots=True)
class Query(Generic[P]):
    """A job to be placed, for whom, and what is known. `excluded`: peers not to ask."""

    job: JobShape
    outlook: Outlook[P]
    excluded: AbstractSet[P] = frozenset()
    requirements: Requirements = ANYTHING


Policy: TypeAlias = Callable[[Instant, IslandBook[P], Query[P]], list[Candidate[P]]]
"""Islands that may run the job, best first."""


def shape_of(cargo: CargoDigest, work: Generation, done: int = 0) -> JobShape:
    """Estimate a generation of which `done` tokens exist already."""
    prompt = work.prompt
    if isinstance(prompt, ChatPrompt):
        chars = sum(len(m.content) + 16 for m in prompt.messages) + sum(len(t.parameters) for t in prompt.tools)
        tokens = chars // CHARS_PER_TOKEN
    elif isinstance(prompt, TextPrompt):
        tokens = len(prompt.text) // CHARS_PER_TOKEN
    else:
        tokens = len(prompt.tokens)
    limit = TYPICAL_OUTPUT_TOKENS if work.max_tokens is None else min(work.max_tokens, TYPICAL_OUTPUT_TOKENS)
    return JobShape(cargo, tokens + done + 1, max(1, limit - done))


def most_prompt_tokens(work: Generation) -> int:
    """No honest count of this prompt's tokens is larger: a token is at least one byte of text."""
    prompt = work.prompt
    if isinstance(prompt, ChatPrompt):
        texts = [part for m in prompt.messages for part in (m.content, m.name or "", m.tool_call_id or "")]
        for message in prompt.messages:
            texts += [part for call in message.tool_calls for part in (call.id, call.name, call.arguments)]
        texts += [part for tool in prompt.tools for part in (tool.name, tool.description, tool.parameters)]
        frames = len(prompt.messages) + len(prompt.tools)
        text_bytes = ESCAPED_BYTES * sum(len(text.encode()) for text in texts)
        return text_bytes + MESSAGE_TOKENS * frames + TEMPLATE_TOKENS
    if isinstance(prompt, TextPrompt):
        return len(prompt.text.encode()) + PREFIX_TOKENS
    return len(prompt.tokens) + PREFIX_TOKENS


def _rate(claimed: float, unknown: float) -> float:
    """0 says that it was not measured yet."""
    return max(claimed, MIN_TPS) if claimed else unknown


def _load(offered: OfferedCargo, experience: Experience) -> int:
    """Jobs there: what it says, or what we sent, if that is more."""
    return max(offered.active + offered.queued, experience.reserved)


def queue_ns(island: Island[P], offered: OfferedCargo, output_tokens: int) -> int:
    """Expected wait for a slot: the rounds of jobs before ours, each as long as ours."""
    load = _load(offered, island.experience)
    if load < offered.slots:
        return 0
    rate = _rate(offered.decode_tps, UNKNOWN_DECODE_TPS)
    rounds = (load - offered.slots) // max(1, offered.slots) + 1
    return round(rounds * output_tokens * max(1, offered.slots) / rate * SECOND_NS)


def expected_ns(
    now: Instant, island: Island[P], offered: OfferedCargo, job: JobShape, rtt_ns: int | None
) -> tuple[int, int]:
    """When would this Island have finished the job, in nanoseconds from now? And the wait for a slot in it.

    Sequences decoded together share the engine, so a sequence's rate is the lone rate over the number of them
    (measured: the aggregate hardly grows on a CPU). Prompts are read one after the other, at the full rate.
    """
    experience = island.experience
    waiting_ns = queue_ns(island, offered, job.output_tokens)
    together = min(max(offered.active, experience.reserved), max(0, offered.slots - 1)) + 1
    claimed = _rate(offered.decode_tps, UNKNOWN_DECODE_TPS)
    measured = experience.decode_tps.get(offered.digest)
    lone_tps = claimed if measured is None else min(claimed, measured * together)
    prefill_tps = _rate(offered.prefill_tps, UNKNOWN_PREFILL_TPS)
    read = experience.prefill_tps.get(offered.digest)
    if read is not None:
        prefill_tps = max(MIN_TPS, min(prefill_tps, read))
    seconds = job.prompt_tokens / prefill_tps + job.output_tokens * together / max(lone_tps, MIN_TPS)
    total_ns = (UNKNOWN_RTT_NS if rtt_ns is None else rtt_ns) + waiting_ns + round(seconds * SECOND_NS)
    if offered.state != "ready":
        total_ns += LOADING_NS
    if experience.suspect_until > now:
        total_ns += SUSPICION_PENALTY_NS
    if job.prompt_tokens > offered.context_length:
        total_ns += TOO_SMALL_PENALTY_NS
    return total_ns, waiting_ns


# --- the filter -----------------------------------------------------------------------------------


def admitted(now: Instant, island: Island[P], offered: OfferedCargo, query: Query[P]) -> bool:
    """Whether the job, or its part of the layers if it offers one, may run there at all. Cheap checks first; a
    jurisdiction may cost a millisecond.
    """
    job, outlook, requirements = query.job, query.outlook, query.requirements
    if island.advert.draining or offered.state == "failed":
        return False
    if outlook.unix_offset_ns is not None and not is_open(
        island.advert.schedule, UnixNs(now + outlook.unix_offset_ns)
    ):
        return False
    if requirements.gpu and not offered.vram_mib:
        return False
    if (
        requirements.max_price_ucr is not None
        and price_ucr(offered, job.prompt_tokens, job.output_tokens, job.units) > requirements.max_price_ucr
    ):
        return False
    if (
        requirements.karma_floor_milli is not None
        and outlook.karma_of(island.peer) < requirements.karma_floor_milli
    ):
        return False
    return requirements.residency is None or resides(requirements.residency, outlook.sightings_of(island.peer))


def candidates(
    now: Instant, offers: Iterable[tuple[Island[P], OfferedCargo]], query: Query[P]
) -> list[Candidate[P]]:
    """Those of the Islands that may run the job, in the order given; not those that have only a part of the
    Cargo, or room for one (routing/chains/offers.py). `IslandBook.offers` gives a Cargo's Islands.
    """
    found: list[Candidate[P]] = []
    job, outlook = query.job, query.outlook
    for island, offered in offers:
        peer, advert = island.peer, island.advert
        if peer in query.excluded or offered.shard is not None or not admitted(now, island, offered, query):
            continue
        rtt_ns = outlook.rtt_of(peer)
        if rtt_ns is None and advert.coordinate:
            rtt_ns = outlook.estimate_of(advert.coordinate)
        total_ns, waiting_ns = expected_ns(now, island, offered, job, rtt_ns)
        load = _load(offered, island.experience)
        found.append(
            Candidate(
                peer=peer,
                expected_ns=total_ns,
                queue_ns=waiting_ns,
                price_ucr=price_ucr(offered, job.prompt_tokens, job.output_tokens, job.units),
                fit=score_of_offer(offered, advert.hardware, load, advert.load_permille),
                region=region_distance(query.requirements.region, advert.region),
                load_permille=1000 * load // max(1, offered.slots),
                load_age_ns=now - island.advised,
            )
        )
    return found


# --- the order ------------------------------------------------------------------------------------


def _step(expected: int) -> tuple[int, int]:
    """Which of the steps of 1/32 of its size a duration lies in: grows with it, so no order is turned round."""
    bits = max(0, expected.bit_length() - TIE_BITS)
    return bits, expected >> bits


def _by_completion(candidate: Candidate[P]) -> tuple[tuple[int, int], int, int, int, int]:
    step = _step(candidate.expected_ns)
    return step, -candidate.fit, candidate.region, candidate.expected_ns, candidate.price_ucr


def in_order(found: Iterable[Candidate[P]]) -> list[Candidate[P]]:
    """By expected completion, fit and region, best first."""
    return sorted(found, key=_by_completion)


def soonest(now: Instant, book: IslandBook[P], query: Query[P]) -> list[Candidate[P]]:
    """Our policy: expected completion, then fit, then region. Ties keep the order of adverts, oldest first."""
    return in_order(candidates(now, book.offers(query.job.cargo), query))


def rank(
    now: Instant,
    book: IslandBook[P],
    job: JobShape,
    rtt_of: Callable[[P], int | None],
    excluded: AbstractSet[P] = frozenset(),
) -> list[Candidate[P]]:
    """`soonest` for a job without requirements."""
    return soonest(now, book, Query(job, Outlook(rtt_of=rtt_of), excluded))


def choose(ranked: Sequence[Candidate[P]], dice: Dice) -> Candidate[P] | None:
    """The one to ask first. Draws only if the first one's load is known from an old advert, and if there is
    any load among the near-best: in a quiet network the nearest and fastest is the right one, however old
    its word.
    """
    if not ranked:
        return None
    best = ranked[0]
    if best.load_age_ns <= STALE_LOAD_NS:
        return best
    limit_ns = best.expected_ns + best.expected_ns // NEAR_BEST_DIVISOR + NEAR_BEST_NS
    near = [candidate for candidate in ranked if candidate.expected_ns <= limit_ns]
    if len(near) == 1 or not any(candidate.load_permille for candidate in near):
        return best
    return min(dice.sample(near, 2), key=lambda candidate: (candidate.load_permille, candidate.expected_ns))
