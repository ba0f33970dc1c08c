"""Whether what an Island, or a chain of them, swears at a job's end is what happened.

What is signed by whoever did it, and is true as far as the gateway can know, is a receipt. What a head says of
its stages is only sorted here: who can not have stood in the chain is left out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from protocol.envelope import Envelope, open_untrusted
from protocol.errors import ProtocolError
from protocol.ids import CargoDigest, JobId
from protocol.instants import UnixNs
from protocol.jobs import RECEIPT, RECEIPT_KIND, JobDone, Receipt, Usage, token_hash
from protocol.limits import MAX_CONTEXT_TOKENS
from protocol.ring import STAGE_RECEIPT, STAGE_RECEIPT_KIND, Chain, Stage, StageReceipt, StageShare, StageWork
from protocol.work import Generation
from routing.job_events import StageSeen
from routing.placement import most_prompt_tokens


@dataclass(frozen=True, slots=True)
class Facts:
    """What the gateway knows of a job: `ids`: all tokens so far, from index `first` on made in this attempt.
    `chain`: as it was given to the head of this attempt; None: no chain.
    """

    job: JobId
    cargo: CargoDigest
    consumer: str
    seed: int
    first: int
    ids: Sequence[int]
    chain: Chain | None
    unix_now: UnixNs


def later_session(job: JobId, number: int) -> JobId:
    """What the job's `number`th chain knows it by: stages of an earlier one may still know its own name."""
    return JobId(hashlib.sha256(f"{job} {number}".encode()).hexdigest()[: len(job)])


def usage_plausible(usage: Usage, made: int, work: Generation) -> bool:
    """Whether these counts can be true. `made`: tokens that came; `completion_tokens` is checked elsewhere."""
    cached, prompt = usage.cached_tokens, usage.prompt_tokens
    return (
        usage.generated_tokens == made
        and cached <= prompt <= most_prompt_tokens(work)
        and usage.drafts_right <= min(usage.drafts, made)
    )


def receipt_untrusted(message: JobDone, peer: object, facts: Facts) -> Receipt | None:
    """What the Island signed, if it is true."""
    try:
        opened = open_untrusted(message.receipt, RECEIPT_KIND, RECEIPT, facts.unix_now)
    except ProtocolError:
        return None
    receipt = opened.body
    honest = (
        opened.issuer == peer
        and receipt.job == facts.job
        and receipt.cargo == facts.cargo
        and receipt.consumer == facts.consumer
        and receipt.started_unix_ns <= receipt.finished_unix_ns
        and receipt.first == facts.first
        and receipt.completion_tokens == len(facts.ids)
        and receipt.prompt_tokens == message.usage.prompt_tokens
        and receipt.seed == facts.seed
        and receipt.output_hash == token_hash(facts.ids)
        and _shares_plausible(receipt.stages, facts.chain, peer)
    )
    return receipt if honest else None


def stages_untrusted(works: Sequence[StageWork], facts: Facts) -> tuple[StageSeen, ...]:
    """Those that can have stood in the chain, each peer once at a place, in the order told; a stage's own
    receipt only if it signed it for this job and these layers.
    """
    seen: dict[tuple[int, str], StageSeen] = {}
    for work in works:
        stage = _place(facts.chain, work.index)
        if stage is None or (work.first, work.last) != (stage.first, stage.last):
            continue
        if not _may_stand(stage, work.peer) or (work.index, work.peer) in seen:
            continue
        receipt = _stage_receipt_untrusted(work.receipt, work, facts)
        seen[work.index, work.peer] = StageSeen(
            work.peer,
            work.index,
            work.first,
            work.last,
            work.hop_ns,
            work.failed,
            work.reason,
            receipt,
            work.rtt_ns,
        )
    return tuple(seen.values())


def _place(chain: Chain | None, index: int) -> Stage | None:
    return chain.stages[index] if chain is not None and index < len(chain.stages) else None


def _may_stand(stage: Stage, peer: str) -> bool:
    return peer == stage.holder.peer or any(spare.peer == peer for spare in stage.spares)


def _shares_plausible(shares: Sequence[StageShare], chain: Chain | None, head: object) -> bool:
    """Who had which layers at the end: the chain's own layers, in order, nobody twice, the signer the last."""
    if chain is None:
        return not shares
    if len(shares) != len(chain.stages) or shares[-1].peer != head:
        return False
    whole = all(a.last == b.first for a, b in pairwise(shares))
    known = all(
        (share.first, share.last) == (stage.first, stage.last) and _may_stand(stage, share.peer)
        for share, stage in zip(shares, chain.stages, strict=True)
    )
    return whole and known and len({share.peer for share in shares}) == len(shares)


def _stage_receipt_untrusted(envelope: Envelope | None, work: StageWork, facts: Facts) -> StageReceipt | None:
    if envelope is None:
        return None
    try:
        opened = open_untrusted(envelope, STAGE_RECEIPT_KIND, STAGE_RECEIPT, facts.unix_now)
    except ProtocolError:
        return None
    receipt = opened.body
    honest = (
        opened.issuer == work.peer
        and receipt.session == facts.job
        and receipt.cargo == facts.cargo
        and receipt.consumer == facts.consumer
        and (receipt.index, receipt.first, receipt.last) == (work.index, work.first, work.last)
        and receipt.started_unix_ns <= receipt.finished_unix_ns
        and receipt.kept <= min(receipt.rows, MAX_CONTEXT_TOKENS)
    )
    return receipt if honest else None
