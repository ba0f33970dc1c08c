"""Messages of the job stream: one libp2p stream carries one attempt at one job.

    gateway                         Island
      JobOffer      ------------->
                    <-------------  JobAccept | JobReject
                    <-------------  JobProgress*          (model loading, prompt)
                    <-------------  JobTokens*            (one frame a tick, each token with its index)
      JobGrant*     ------------->                        (the consumer took more: go on to this index)
      JobCancel     ------------->                        (or just: the stream closes)
                    <-------------  JobDone | JobError

An attempt that resumes gets the tokens so far in its offer; its first token has the next index.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import Annotated, ClassVar, Final, TypeAlias

from msgspec import Meta

from protocol.codec import Codec, Message
from protocol.envelope import Envelope
from protocol.limits import (
    DEFAULT_TOKEN_WINDOW,
    MAX_CONTEXT_TOKENS,
    MAX_CONTROL_BYTES,
    MAX_OFFER_BYTES,
    MAX_RECEIPT_BYTES,
    MAX_REMOTE_TEXT_CHARS,
    MAX_TOKEN_TEXT_CHARS,
    MAX_TOKEN_WINDOW,
    MAX_TOKENS_PER_FRAME,
    MAX_TOP_LOGPROBS,
)
from protocol.ring import MAX_CHAIN_BYTES, MAX_STAGE_WORKS, MAX_STAGES, Chain, StageShare, StageWork
from protocol.work import Part, TokenId, Work

JOB_PROTOCOL: Final = "/archipelag/job/1.0.0"
RECEIPT_KIND: Final = "job-receipt"

_Code = Annotated[str, Meta(min_length=1, max_length=32)]
_Detail = Annotated[str, Meta(max_length=MAX_REMOTE_TEXT_CHARS)]
_Index = Annotated[int, Meta(ge=0, le=MAX_CONTEXT_TOKENS)]
_Millis = Annotated[int, Meta(ge=0, le=86_400_000)]


class TopLogprob(Part, frozen=True, gc=False, array_like=True):
    id: TokenId
    piece: Annotated[bytes, Meta(max_length=1024)]
    logprob: float


class Token(Part, frozen=True, gc=False, array_like=True):
    """One generated token.

    `text` is what this token releases to the consumer: possibly nothing (half a UTF-8 character, a
    stop string that may yet complete), possibly more than its own piece. `piece` (its raw bytes), `logprob`
    (natural logarithm, before sampling filters) and `top` are filled when log-probabilities were asked.
    """

    id: TokenId
    text: Annotated[str, Meta(max_length=MAX_TOKEN_TEXT_CHARS)]
    piece: Annotated[bytes, Meta(max_length=1024)] = b""
    logprob: float | None = None
    top: Annotated[tuple[TopLogprob, ...], Meta(max_length=MAX_TOP_LOGPROBS)] = ()


class JobOffer(Message, frozen=True, gc=False, tag="offer"):
    """Do this. `resume` holds ids of the tokens generated so far, index 0 first.

    `deadline_ms`: the consumer gives up that long after this message; an Island need not start what it
    can not finish. `granted`: tokens with an index below it may be generated at once. `chain`: the receiver
    is the last stage of these and has the others work with it; None: it has the whole Cargo. `permit`: with a
    chain, the sender's `SessionPermit`, for its stages.
    """

    max_bytes: ClassVar[int] = MAX_OFFER_BYTES + MAX_CONTROL_BYTES + MAX_CHAIN_BYTES

    job: Annotated[str, Meta(min_length=32, max_length=32)]
    cargo: Annotated[str, Meta(min_length=71, max_length=71)]
    work: Work
    resume: Annotated[tuple[TokenId, ...], Meta(max_length=MAX_CONTEXT_TOKENS)] = ()
    granted: Annotated[int, Meta(ge=1, le=MAX_CONTEXT_TOKENS + MAX_TOKEN_WINDOW)] = DEFAULT_TOKEN_WINDOW
    deadline_ms: Annotated[int, Meta(ge=1, le=86_400_000)] = 600_000
    chain: Chain | None = None
    permit: Envelope | None = None


class JobAccept(Message, frozen=True, gc=False, tag="accept"):
    """It is in the queue, this many jobs before it."""

    ahead: Annotated[int, Meta(ge=0, le=1_000_000)] = 0


class JobReject(Message, frozen=True, gc=False, tag="reject"):
    """Not here. `code`: busy, unknown-cargo, too-long, invalid, draining. `too-long` and `invalid`
    mean that no other Island with this Cargo would take it either; `detail` then tells the consumer why.
    """

    code: _Code
    detail: _Detail = ""
    retry_after_ms: _Millis = 0


class JobProgress(Message, frozen=True, gc=False, tag="progress"):
    """Before the first token. `stage`: 'loading' or 'prompt'; done/total in bytes or tokens."""

    stage: _Code
    done: Annotated[int, Meta(ge=0, lt=1 << 53)]
    total: Annotated[int, Meta(ge=0, lt=1 << 53)]


class JobTokens(Message, frozen=True, gc=False, tag="tokens"):
    """Consecutive tokens; the first has index `first`."""

    max_bytes: ClassVar[int] = 16 * MAX_CONTROL_BYTES

    first: _Index
    tokens: Annotated[tuple[Token, ...], Meta(min_length=1, max_length=MAX_TOKENS_PER_FRAME)]


class JobGrant(Message, frozen=True, gc=False, tag="grant"):
    """Tokens with an index below `until` may be generated now. Never shrinks."""

    until: Annotated[int, Meta(ge=1, le=MAX_CONTEXT_TOKENS + MAX_TOKEN_WINDOW)]


class JobCancel(Message, frozen=True, gc=False, tag="cancel"):
    """Stop; nobody wants the rest."""


class Usage(Part, frozen=True, gc=False):
    """Counts of one attempt. `completion_tokens` counts from index 0, resumed ones included;
    `generated_tokens` only those that this Island made. Times are the Island's own, in nanoseconds.

    Of a chain's head: `traversals` of the ring, with how many `drafts` behind their tokens in all, and how many
    of those were `drafts_right`.
    """

    prompt_tokens: _Index
    completion_tokens: _Index
    generated_tokens: _Index
    cached_tokens: _Index = 0
    queue_ns: Annotated[int, Meta(ge=0, lt=1 << 53)] = 0
    prefill_ns: Annotated[int, Meta(ge=0, lt=1 << 53)] = 0
    decode_ns: Annotated[int, Meta(ge=0, lt=1 << 53)] = 0
    traversals: _Index = 0
    drafts: _Index = 0
    drafts_right: _Index = 0


class JobDone(Message, frozen=True, gc=False, tag="done"):
    """The end. `finish`: stop, length. `tail`: text that was held back and is released now.

    `receipt` is the Island's signed `Receipt`. `stages`: if a chain did it, what each of them did, those
    that were lost on the way too.
    """

    max_bytes: ClassVar[int] = MAX_CONTROL_BYTES + MAX_STAGE_WORKS * MAX_RECEIPT_BYTES

    finish: _Code
    tail: Annotated[str, Meta(max_length=MAX_TOKEN_TEXT_CHARS)]
    usage: Usage
    receipt: Envelope
    stages: Annotated[tuple[StageWork, ...], Meta(max_length=MAX_STAGE_WORKS)] = ()


class JobError(Message, frozen=True, gc=False, tag="error"):
    """It went wrong here. `retryable`: another Island may succeed. `stages`: of a chain, those that failed."""

    max_bytes: ClassVar[int] = MAX_CONTROL_BYTES + MAX_STAGE_WORKS * MAX_RECEIPT_BYTES

    code: _Code
    detail: _Detail = ""
    retryable: bool = True
    stages: Annotated[tuple[StageWork, ...], Meta(max_length=MAX_STAGE_WORKS)] = ()


class Receipt(Message, frozen=True, gc=False, tag="receipt"):
    """What an Island swears it did. Hashes are SHA-256 over little-endian 32-bit token ids.

    `first` is the index of the first token that this Island generated; `output_hash` covers tokens
    0..completion_tokens-1, so that receipts of a handed-over job chain up. `stages`: of a chain, who had which
    layers at the end.
    """

    max_bytes: ClassVar[int] = MAX_RECEIPT_BYTES

    job: Annotated[str, Meta(max_length=32)]
    cargo: Annotated[str, Meta(max_length=71)]
    consumer: Annotated[str, Meta(max_length=64)]
    prompt_hash: Annotated[bytes, Meta(max_length=32)]
    output_hash: Annotated[bytes, Meta(max_length=32)]
    prompt_tokens: _Index
    completion_tokens: _Index
    first: _Index
    seed: Annotated[int, Meta(ge=0, lt=1 << 53)]
    started_unix_ns: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
    finished_unix_ns: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
    stages: Annotated[tuple[StageShare, ...], Meta(max_length=MAX_STAGES)] = ()


def token_hash(ids: Sequence[int]) -> bytes:
    """SHA-256 over little-endian 32-bit token ids: how receipts name a prompt or an output."""
    return hashlib.sha256(struct.pack(f"<{len(ids)}I", *ids)).digest()


ToIsland: TypeAlias = JobOffer | JobGrant | JobCancel
FromIsland: TypeAlias = JobAccept | JobReject | JobProgress | JobTokens | JobDone | JobError

TO_ISLAND: Final[Codec[ToIsland]] = Codec(ToIsland)
FROM_ISLAND: Final[Codec[FromIsland]] = Codec(FromIsland)
RECEIPT: Final[Codec[Receipt]] = Codec(Receipt)
