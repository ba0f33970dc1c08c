"""Messages of a chain: Islands that hold consecutive layers of one model and pass activations on.

    gateway --offer--> head                       (the last stage: it has the vocabulary, samples, answers)
    head --token ids--> stage 0 --activations--> stage 1 ... --activations--> head

Stages stand in a ring: the head feeds token ids to stage 0, each stage feeds what its layers make of
them to the next, the last is the head again. A link goes from a stage to the next one; it is opened by the
upstream side, which sends `ToStage`, and answered with `FromStage`. One link carries all sessions of the two.

    upstream                          downstream
      RingOpen     ------------->                     this session runs through you, at this place of this chain
                   <-------------   RingOpened        I have its rows below `have` already
      RingFeed*    ------------->                     rows from `position` on, in place of what was there
                   <-------------   RingAck*          rows below `until` are in my memory
      RingEnd      ------------->                     goes round the ring and gathers the stages' receipts
                   <-------------   RingFault         this session can not go on here
      RingPing     ------------->
                   <-------------   RingPong          on every link, so that a frozen stage is noticed

What a stage sent is kept by it for as long as the session lives: if the next stage dies, its replacement is
opened with the same session, says that it has nothing, and is fed the log. Whoever is behind it says
how much it has, so that nothing is computed or passed on twice. The same two messages serve every death.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal, TypeAlias, get_args

import msgspec
from msgspec import Meta

from protocol.codec import Codec, Message
from protocol.envelope import Envelope
from protocol.instants import SECOND_NS
from protocol.limits import (
    KIB,
    MAX_ADDRESS_CHARS,
    MAX_ADDRESSES,
    MAX_CONTEXT_TOKENS,
    MAX_ENVELOPE_OVERHEAD_BYTES,
    MAX_RECEIPT_BYTES,
    MAX_REMOTE_TEXT_CHARS,
    MIB,
)
from protocol.work import Part

RING_PROTOCOL: Final = "/archipelag/ring/1.0.0"
STAGE_RECEIPT_KIND: Final = "stage-receipt"
SESSION_PERMIT_KIND: Final = "session-permit"

#: One Island is no chain; beyond eight the hops cost more than any model of today needs memory.
MIN_STAGES: Final = 2
MAX_STAGES: Final = 8

#: Stages that may take over at one place. The next one is asked when the one before it does not answer.
MAX_SPARES: Final = 3

#: Replacements of one session that are told round the ring: each place may be taken by its spares in turn.
MAX_LOSSES: Final = MAX_STAGES * (1 + MAX_SPARES)

#: BLAKE2b of token ids, to tell whether two mean the same ones.
MARK_BYTES: Final = 16

#: A reason in one of them: a word and a short detail.
MAX_LOSS_CHARS: Final = 100

#: The deepest model known has 126 layers; room for four times that.
MAX_LAYERS: Final = 512

#: Rows in one feed. Stages compute at most 63 at a time; a prompt arrives at the first stage in larger pieces.
MAX_FEED_ROWS: Final = 4096

#: 128 rows of 16,384 values in float32.
MAX_FEED_BYTES: Final = 8 * MIB

#: A name that only those who take part know: the job's.
SESSION_CHARS: Final = 32

#: Each stage and spare with four addresses of the greatest length would take 40 KiB; addresses usually have 80
#: characters. Whoever makes a chain keeps it below this.
MAX_CHAIN_BYTES: Final = 64 * KIB

#: An envelope around two names.
MAX_PERMIT_BYTES: Final = KIB

#: A permit holds so much longer than the job may take: clocks of volunteers' machines differ.
PERMIT_SLACK_NS: Final = 600 * SECOND_NS

#: Of a stage's place. Each chain that is made anew for a job begins some above the one before.
MAX_GENERATION: Final = 1 << 31

#: How activations travel; see cargos/shards/dtypes.py for what each costs and changes.
Dtype: TypeAlias = Literal["f32", "f16s", "q8x"]
DTYPES: Final[tuple[Dtype, ...]] = get_args(Dtype)

PeerText = Annotated[str, Meta(min_length=1, max_length=64)]
SessionId = Annotated[str, Meta(min_length=SESSION_CHARS, max_length=SESSION_CHARS)]
Layer = Annotated[int, Meta(ge=0, le=MAX_LAYERS)]
Rows = Annotated[int, Meta(ge=0, le=MAX_CONTEXT_TOKENS)]
_Nanos = Annotated[int, Meta(ge=0, lt=1 << 53)]
_Count = Annotated[int, Meta(ge=0, lt=1 << 53)]


class StagePeer(Part, frozen=True, gc=False, array_like=True):
    """An Island and where it can be dialled (if it is not connected already)."""

    peer: PeerText
    addresses: Annotated[
        tuple[Annotated[str, Meta(max_length=MAX_ADDRESS_CHARS)], ...], Meta(max_length=MAX_ADDRESSES)
    ] = ()


class Stage(Part, frozen=True, gc=False):
    """Layers `first` to `last` (exclusive) and who has them. `spares` hold the same layers and stand by.

    `generation` rises when another Island takes the place, so that of two accounts the newer one counts.
    """

    holder: StagePeer
    first: Layer
    last: Layer
    spares: Annotated[tuple[StagePeer, ...], Meta(max_length=MAX_SPARES)] = ()
    generation: Annotated[int, Meta(ge=0, le=MAX_GENERATION)] = 0


class Chain(Part, frozen=True, gc=False):
    """All layers of a Cargo in order; the last stage is the head. Made by the planner."""

    cargo: Annotated[str, Meta(min_length=71, max_length=71)]
    stages: Annotated[tuple[Stage, ...], Meta(min_length=MIN_STAGES, max_length=MAX_STAGES)]
    dtype: Dtype = "f16s"

    @property
    def head(self) -> StagePeer:
        return self.stages[-1].holder

    @property
    def is_whole(self) -> bool:
        """Whether the stages follow each other without gap or overlap from layer 0 on, nobody twice."""
        at = 0
        for stage in self.stages:
            if stage.first != at or stage.last <= stage.first:
                return False
            at = stage.last
        return len({stage.holder.peer for stage in self.stages}) == len(self.stages)

    @property
    def is_bounded(self) -> bool:
        """Whether it is short enough to be passed on with all that stages add to a message."""
        return len(msgspec.msgpack.encode(self)) <= MAX_CHAIN_BYTES


class SessionPermit(Message, frozen=True, gc=False, tag="sp"):
    """Said by a consumer, signed by it: session `session` on a chain of this Cargo is a job of mine."""

    max_bytes: ClassVar[int] = MAX_PERMIT_BYTES

    session: SessionId
    cargo: Annotated[str, Meta(min_length=71, max_length=71)]


class StageLoss(Part, frozen=True, gc=False, array_like=True):
    """Who had place `index` of a session and was replaced there. `failed`: false if it only had no room."""

    peer: PeerText
    index: Annotated[int, Meta(ge=0, lt=MAX_STAGES)]
    generation: Annotated[int, Meta(ge=0, le=MAX_GENERATION)]
    failed: bool = True
    reason: Annotated[str, Meta(max_length=MAX_LOSS_CHARS)] = ""


class RingOpen(Message, frozen=True, gc=False, tag="ro"):
    """Session `session` runs through you at place `index` of `chain` from now on; I feed you. Sent again when
    the account of the chain has changed; it goes on round the ring until everybody knows.

    `began`: when this head began with it (its civil time, ms). A later head's word counts more: what the
    stage has from row `upto` on is void once such a one opens it (all, if it was not fed by me until now).
    `prompt`: rows of the prompt.
    `deterministic`: computed alone, the prompt in steps of 32 rows on a fixed grid, each later row alone, so
    that a replay makes the same numbers bit for bit. `losses`: whom the session has lost so far. `permit`: the
    consumer's `SessionPermit`.
    """

    max_bytes: ClassVar[int] = 96 * KIB

    session: SessionId
    chain: Chain
    index: Annotated[int, Meta(ge=0, lt=MAX_STAGES)]
    upto: Rows
    prompt: Rows
    consumer: PeerText
    deterministic: bool = False
    began: _Count = 0
    losses: Annotated[tuple[StageLoss, ...], Meta(max_length=MAX_LOSSES)] = ()
    permit: Envelope | None = None


class RingFeed(Message, frozen=True, gc=False, tag="rf"):
    """Rows `position` to `position + rows`. `payload`: at place 0 token ids (uint32, little-endian), elsewhere
    activations in the chain's dtype.

    `turn`: how often the head had changed its mind (drafts that were wrong) when it asked for these rows. A
    turn that the stage has not seen yet voids what it has from `position` on. Otherwise the rows are part of
    what it is fed anyway, maybe once more: those that it has already are passed over.
    """

    max_bytes: ClassVar[int] = MAX_FEED_BYTES + 256

    session: SessionId
    position: Rows
    rows: Annotated[int, Meta(ge=1, le=MAX_FEED_ROWS)]
    payload: Annotated[bytes, Meta(min_length=1, max_length=MAX_FEED_BYTES)]
    turn: _Count = 0


class RingEnd(Message, frozen=True, gc=False, tag="re"):
    """The session is over. Each stage adds its receipt and passes it on; the head gets them all. `hops`: per
    place, from 0 on, what the stage before it measured from feed to acknowledgement, per row; `rtts`: the
    shortest answer to a ping between the two (0: none came). `replaced`: it goes on without this stage, so the
    end is not passed on.
    """

    max_bytes: ClassVar[int] = MAX_STAGES * (MAX_RECEIPT_BYTES + KIB)

    session: SessionId
    receipts: Annotated[tuple[Envelope, ...], Meta(max_length=MAX_STAGES)] = ()
    hops: Annotated[tuple[_Nanos, ...], Meta(max_length=MAX_STAGES)] = ()
    rtts: Annotated[tuple[_Nanos, ...], Meta(max_length=MAX_STAGES)] = ()
    replaced: bool = False


class RingPing(Message, frozen=True, gc=False, tag="rp"):
    number: _Count


class RingOpened(Message, frozen=True, gc=False, tag="rd"):
    """Rows below `have` are in this stage's memory, and it knows of all turns up to `turn`. `began`: of which
    head this speaks. `again`: said unasked: the stage has lost rows (its engine died, its log was too large),
    so send from `have` on once more. `mark`: of the first stage, a hash of the tokens below `have`.
    `asks`: nothing came for long; is this session still yours? Who does not know it answers with `RingEnd`.
    """

    session: SessionId
    have: Rows
    turn: _Count = 0
    began: _Count = 0
    again: bool = False
    mark: Annotated[bytes, Meta(max_length=MARK_BYTES)] = b""
    asks: bool = False


class RingAck(Message, frozen=True, gc=False, tag="ra"):
    """Rows below `until` are computed and passed on. Not said of each row: it makes room in the window of who
    sent them, and nobody waits for it before that. `compute_ns`: what the last step took in the engine, 0 if
    this is said later than when it was done; `wait_ns`: what it waited for the engine. Claims: who sent the
    feed knows the time between.
    """

    session: SessionId
    until: Rows
    compute_ns: _Nanos = 0
    wait_ns: _Nanos = 0


class RingFault(Message, frozen=True, gc=False, tag="rx"):
    """The session can not go on here. `code`: busy (no slot), unknown (no such shard here), refused (not this
    chain), lost (its memory is gone), stranded (no stage behind me takes it), invalid. `index`: the place in
    the chain that it is about.
    """

    session: SessionId
    code: Annotated[str, Meta(min_length=1, max_length=32)]
    index: Annotated[int, Meta(ge=0, lt=MAX_STAGES)]
    detail: Annotated[str, Meta(max_length=MAX_REMOTE_TEXT_CHARS)] = ""


class RingPong(Message, frozen=True, gc=False, tag="rq"):
    number: _Count


class StageReceipt(Message, frozen=True, gc=False, tag="sr"):
    """What one stage swears it did for a session. `rows`: computed, replays and drafts included; `kept`: rows
    in its memory at the end, which is what is paid for.
    """

    max_bytes: ClassVar[int] = MAX_RECEIPT_BYTES

    session: SessionId
    cargo: Annotated[str, Meta(max_length=71)]
    consumer: PeerText
    index: Annotated[int, Meta(ge=0, lt=MAX_STAGES)]
    first: Layer
    last: Layer
    rows: _Count
    kept: Rows
    compute_ns: _Nanos
    started_unix_ns: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
    finished_unix_ns: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]


class StageShare(Part, frozen=True, gc=False, array_like=True):
    """Who had which layers, in a receipt."""

    peer: PeerText
    first: Layer
    last: Layer


class StageWork(Part, frozen=True, gc=False):
    """The head's account of one stage, for the gateway. `hop_ns`: what the stage before it measured from feed
    to acknowledgement, per row; `rtt_ns`: there and back on their link, without work (0: not measured).
    `failed`: it let the session down, and `reason` how. `receipt`: what the stage itself signed
    (`StageReceipt`), if it lived to do so.
    """

    peer: PeerText
    index: Annotated[int, Meta(ge=0, lt=MAX_STAGES)]
    first: Layer
    last: Layer
    hop_ns: _Nanos = 0
    rtt_ns: _Nanos = 0
    failed: bool = False
    reason: Annotated[str, Meta(max_length=MAX_REMOTE_TEXT_CHARS)] = ""
    receipt: Envelope | None = None


#: Stages and those that were replaced on the way.
MAX_STAGE_WORKS: Final = MAX_STAGES + MAX_LOSSES

ToStage: TypeAlias = RingOpen | RingFeed | RingEnd | RingPing
FromStage: TypeAlias = RingOpened | RingAck | RingFault | RingPong

TO_STAGE: Final[Codec[ToStage]] = Codec(ToStage)
FROM_STAGE: Final[Codec[FromStage]] = Codec(FromStage)
STAGE_RECEIPT: Final[Codec[StageReceipt]] = Codec(StageReceipt)
SESSION_PERMIT: Final[Codec[SessionPermit]] = Codec(SessionPermit)

# --- ordering shards --------------------------------------------------------------------------------

#: RPC to an Island that offered room for a Cargo: hold these layers. From its coordinators only.
METHOD_HOLD: Final = "hold-shard"

#: RPC to a coordinator by one who follows the Cargo there: have this Island of yours hold these layers, for me;
#: and what the coordinator then calls at the Island. Both carry the same signed order.
METHOD_RELAY_HOLD: Final = "relay-hold"
METHOD_HOLD_FOR: Final = "hold-shard-for"

SHARD_ORDER_KIND: Final = "shard-order"

#: An order travels through one coordinator or the next within seconds; the clocks' tolerance comes on top.
SHARD_ORDER_TTL_NS: Final = 30 * SECOND_NS


class HoldShard(Message, frozen=True, gc=False, tag="hs"):
    """Hold layers `first` to `last` of this Cargo, which you said you would. An Island that holds other layers
    of it lets them go once no session uses them; with `first == last` it lets go only. `displace`: somebody
    asks for this Cargo now, so that idle layers of other Cargos may go for it (`ShardRange.idle`).
    """

    cargo: Annotated[str, Meta(min_length=71, max_length=71)]
    first: Layer
    last: Layer
    displace: bool = False


class ShardHeld(Message, frozen=True, gc=False, tag="hh"):
    """What the Island holds of it now, or will once it is loaded: not always what was asked (another
    coordinator may have been first).
    """

    first: Layer
    last: Layer


class ShardOrder(Message, frozen=True, gc=False, tag="so"):
    """Said by whoever wants the layers, signed by it, so that a coordinator can pass orders on but not make or
    change them, and the Island knows whose they are. Its number is higher than that of any earlier order of
    the same issuer for the same Cargo; with the same number it is the same order once more, which came
    another way.
    """

    island: PeerText
    hold: HoldShard


class RelayedOrder(Message, frozen=True, gc=False, tag="rl"):
    """`envelope`: a `ShardOrder`."""

    max_bytes: ClassVar[int] = MAX_ENVELOPE_OVERHEAD_BYTES + KIB

    envelope: Envelope


HOLD_SHARD: Final[Codec[HoldShard]] = Codec(HoldShard)
SHARD_ORDER: Final[Codec[ShardOrder]] = Codec(ShardOrder)
RELAYED_ORDER: Final[Codec[RelayedOrder]] = Codec(RelayedOrder)
SHARD_HELD: Final[Codec[ShardHeld]] = Codec(ShardHeld)
