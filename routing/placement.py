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


def queue_ns(island: Island[P], offered: OfferedCargo, output_tokens: int) -> int:
    """Expected wait for a slot: the rounds of jobs before ours, each as long as ours."""
    load = max(offered.active + offered.queued, island.experience.reserved)
    if load < offered.slots:
        return 0
    rate = _rate(offered.decode_tps, UNKNOWN_DECODE_TPS)
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
    together = min(max(offered.active, island.experience.reserved), max(0, offered.slots - 1)) + 1
    claimed = _rate(offered.decode_tps, UNKNOWN_DECODE_TPS)
    measured = island.experience.decode_tps.get(offered.digest)
    lone_tps = claimed if measured is None else min(claimed, measured * together)
    prefill_tps = _rate(offered.prefill_tps, UNKNOWN_PREFILL_TPS)
    seconds = job.prompt_tokens / prefill_tps + job.output_tokens * together / max(lone_tps, MIN_TPS)
    total_ns = (UNKNOWN_RTT_NS if rtt_ns is None else rtt_ns) + waiting_ns + round(seconds * SECOND_NS)
    if offered.state != "ready":
        total_ns += LOADING_NS
    if island.experience.suspect_until > now:
        total_ns += SUSPICION_PENALTY_NS
    if job.prompt_tokens > offered.context_length:
        total_ns += TOO_SMALL_PENALTY_NS
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
        ranked.append(expected_ns(now, island, offered, job, rtt_of(island.peer)))
    ranked.sort(key=lambda candidate: candidate.expected_ns)
    return ranked
