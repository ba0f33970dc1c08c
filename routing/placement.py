"""Which Island gets a job: the one that is expected to finish it first.

Pure: candidates and job in, order out. Expected completion is round trip + wait for a slot + prompt /
prefill rate + output / decode rate, with claims corrected by what we measured. Karma, price,
jurisdiction and chains join here when their parts exist.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from protocol.adverts import OfferedCargo
from protocol.ids import CargoDigest
from protocol.instants import SECOND_NS, Instant
from protocol.work import ChatPrompt, Generation, TextPrompt
from routing.islands import Island, IslandBook

P = TypeVar("P")

#: A rate that nobody has claimed or measured yet, tokens/s: pessimistic, so that known Islands come first.
UNKNOWN_DECODE_TPS: Final = 5.0
UNKNOWN_PREFILL_TPS: Final = 50.0

#: Assumed round trip where none was measured yet.
UNKNOWN_RTT_NS: Final = SECOND_NS

#: Loading a Cargo's weights from disk: the order of magnitude of a few GB from an SSD.
LOADING_NS: Final = 20 * SECOND_NS

#: An Island under suspicion is worse than any that is not: more than any real wait.
SUSPICION_PENALTY_NS: Final = 3_600 * SECOND_NS

#: Characters per token in English text, for prompts that nobody has tokenised yet.
CHARS_PER_TOKEN: Final = 4

#: Tokens expected from a job that names no max_tokens, and at most expected from one that does.
TYPICAL_OUTPUT_TOKENS: Final = 256


@dataclass(frozen=True, slots=True)
class JobShape:
    """What placement needs to know of a job. Token counts are estimates."""

    cargo: CargoDigest
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Candidate(Generic[P]):
    peer: P
    expected_ns: int
    queue_ns: int


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


def queue_ns(island: Island[P], offered: OfferedCargo, output_tokens: int) -> int:
    """Expected wait for a slot: the rounds of jobs before ours, each as long as ours."""
    load = max(offered.active + offered.queued, island.reserved)
    if load < offered.slots:
        return 0
    rate = offered.decode_tps or UNKNOWN_DECODE_TPS
    rounds = (load - offered.slots) // max(1, offered.slots) + 1
    return round(rounds * output_tokens * max(1, offered.slots) / rate * SECOND_NS)


def expected_ns(
    now: Instant, island: Island[P], offered: OfferedCargo, job: JobShape, rtt_ns: int | None
) -> Candidate[P]:
    """When would this Island have finished the job, in nanoseconds from now?

    Sequences decoded together share the engine, so a sequence's rate is the lone rate over the number of them
    (measured: the aggregate hardly grows on a CPU).
    """
    waiting_ns = queue_ns(island, offered, job.output_tokens)
    together = min(max(offered.active, island.reserved), max(0, offered.slots - 1)) + 1
    claimed = offered.decode_tps or UNKNOWN_DECODE_TPS
    measured = island.decode_tps.get(offered.digest)
    lone_tps = claimed if measured is None else min(claimed, measured * together)
    prefill_tps = offered.prefill_tps or UNKNOWN_PREFILL_TPS
    seconds = job.prompt_tokens / prefill_tps + job.output_tokens * together / max(lone_tps, 0.1)
    total_ns = (UNKNOWN_RTT_NS if rtt_ns is None else rtt_ns) + waiting_ns + round(seconds * SECOND_NS)
    if offered.state != "ready":
        total_ns += LOADING_NS
    if island.suspect_until > now:
        total_ns += SUSPICION_PENALTY_NS
    return Candidate(island.peer, total_ns, waiting_ns)


def rank(
    now: Instant,
    book: IslandBook[P],
    job: JobShape,
    rtt_of: Callable[[P], int | None],
    excluded: AbstractSet[P] = frozenset(),
) -> list[Candidate[P]]:
    """Islands that can run the job, best first. Ties keep the order of the longest unheard."""
    ranked: list[Candidate[P]] = []
    for island in book:
        if island.peer in excluded or island.advert.draining:
            continue
        offered = island.cargo(job.cargo)
        if offered is None or offered.state == "failed":
            continue
        if job.prompt_tokens // 2 > offered.context_length:  # estimates err: the Island judges close cases
            continue
        ranked.append(expected_ns(now, island, offered, job, rtt_of(island.peer)))
    ranked.sort(key=lambda candidate: candidate.expected_ns)
    return ranked
