"""What a token costs on a chain: the layers' time at each stage, the vocabulary at the head, and the hops.

A token goes once round the ring: from the head as a token id to stage 0, from stage to stage as activations,
until the head makes the next one of them. So its time is a sum over stages and hops, and the hop from the
head back to the first stage belongs to it. A prompt goes through in chunks, one stage working on the next
chunk while its successor works on the one before: its time is one chunk's way through all stages (the fill)
and, for every further chunk, the slowest stage's time.

All times are integer nanoseconds. What was measured by neighbours counts before what is claimed, and what
is not known at all is taken to be slow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, Protocol, TypeAlias, TypeVar

from protocol.adverts import ShardRange
from protocol.instants import MILLISECOND_NS
from protocol.ring import StageWork

P = TypeVar("P")

Rtt: TypeAlias = Callable[[P, P], int | None]
"""Round trip between two peers, ns: measured, else by network coordinates; None: not known."""

#: One row through one layer where nobody said or measured it: half a gigabyte of weights (a layer of a 70B
#: model in 4 bit) from slow memory (20 GB/s). Pessimistic, so that known Islands come first.
UNKNOWN_LAYER_NS: Final = 25 * MILLISECOND_NS

#: The vocabulary head costs about what this many layers cost (SmolLM2: 3, Gemma 270M: 8, a 70B model: 2).
VOCABULARY_LAYERS: Final = 4

#: Assumed where neither a measurement nor coordinates tell the distance: farther than most pairs on earth.
UNKNOWN_RTT_NS: Final = 250 * MILLISECOND_NS

#: Of a hop's time, what is work at the very least.
LEAST_WORK_DIVISOR: Final = 4

#: Rows that a stage computes in one step at most; a prompt's chunk (cargos/runtimes/shards).
CHUNK_ROWS: Final = 63


@dataclass(frozen=True, slots=True)
class Speed:
    """Of one Island. `layer_ns`: one row through one layer, alone; `prefill_layer_ns`: per row of a full chunk;
    `vocabulary_ns`: one row in the head. 0: not known.
    """

    layer_ns: int = 0
    prefill_layer_ns: int = 0
    vocabulary_ns: int = 0

    @staticmethod
    def of(shard: ShardRange, measured_layer_ns: int = 0) -> Speed:
        """What the advert claims; `measured_layer_ns` (0: nothing was measured) in place of its claim.

        Who is slower than it said is taken to read prompts as much slower.
        """
        claimed = shard.layer_ns
        if not measured_layer_ns:
            return Speed(claimed, shard.prefill_layer_ns, shard.vocabulary_ns)
        prefill, vocabulary = shard.prefill_layer_ns, shard.vocabulary_ns
        if claimed and measured_layer_ns > claimed:
            prefill = prefill * measured_layer_ns // claimed
            vocabulary = vocabulary * measured_layer_ns // claimed
        return Speed(measured_layer_ns, prefill, vocabulary)

    @property
    def token_layer_ns(self) -> int:
        return self.layer_ns or UNKNOWN_LAYER_NS

    @property
    def chunk_layer_ns(self) -> int:
        """A full chunk of a prompt through one layer."""
        return CHUNK_ROWS * (self.prefill_layer_ns or self.token_layer_ns)

    @property
    def head_ns(self) -> int:
        return self.vocabulary_ns or VOCABULARY_LAYERS * self.token_layer_ns


@dataclass(frozen=True, slots=True)
class Holder(Generic[P]):
    """An Island that has layers `first` to `last` (exclusive) loaded. `slots`: sessions it takes at a time;
    `active`: that it has now. `karma_milli`: thousandths of a point. `load_age_ns`: how old the word of its
    load is. `suspect`: it failed somebody lately; it comes after all others.
    """

    peer: P
    first: int
    last: int
    speed: Speed = Speed()
    slots: int = 1
    active: int = 0
    karma_milli: int = 0
    suspect: bool = False
    load_age_ns: int = 0
    addresses: tuple[str, ...] = ()

    @property
    def layers(self) -> int:
        return self.last - self.first

    @property
    def is_full(self) -> bool:
        return self.active >= max(1, self.slots)


@dataclass(frozen=True, slots=True)
class Room(Generic[P]):
    """An Island that would hold layers of the model: `room_bytes` for weights and memory of sequences."""

    peer: P
    room_bytes: int
    speed: Speed = Speed()
    karma_milli: int = 0
    suspect: bool = False


class Sizes(Protocol):
    """What a manifest says of a Cargo's layers (cargos.manifest.Sharding). Bytes."""

    @property
    def layer_bytes(self) -> tuple[int, ...]: ...

    @property
    def embedding_bytes(self) -> int: ...

    @property
    def head_bytes(self) -> int: ...

    @property
    def kv_bytes(self) -> int: ...

    @property
    def draft_kv_bytes(self) -> int: ...


class ModelShape:
    """What each part of a model takes up: weights, and the memory of `slots` sequences of `context` tokens."""

    __slots__ = ("_until", "embedding_bytes", "head_bytes", "layer_bytes", "layers")

    def __init__(self, layer_bytes: Sequence[int], embedding_bytes: int, head_bytes: int) -> None:
        """`layer_bytes`: of each layer with its keys and values. Raises ValueError if there are no layers or a
        size is negative.
        """
        if not layer_bytes or min(*layer_bytes, embedding_bytes, head_bytes) < 0:
            raise ValueError("a model has layers, and none of its parts has a negative size")
        self.layer_bytes: Final = tuple(layer_bytes)
        self.embedding_bytes: Final = embedding_bytes
        self.head_bytes: Final = head_bytes
        self.layers: Final = len(self.layer_bytes)
        until = [0]
        for size in self.layer_bytes:
            until.append(until[-1] + size)
        self._until: Final = tuple(until)

    @staticmethod
    def of_sharding(sharding: Sizes, *, slots: int, context: int) -> ModelShape:
        """`slots` sequences of `context` tokens at a time on each Island."""
        tokens = slots * context
        layers = [size + sharding.kv_bytes * tokens for size in sharding.layer_bytes]
        head_bytes = sharding.head_bytes + sharding.draft_kv_bytes * tokens
        return ModelShape(layers, sharding.embedding_bytes, head_bytes)

    def bytes_of(self, first: int, last: int) -> int:
        """What an Island needs for layers `first` to `last`, with the embedding or the head at the ends."""
        ends = (self.embedding_bytes if first == 0 else 0) + (self.head_bytes if last == self.layers else 0)
        return self._until[last] - self._until[first] + ends

    @property
    def total_bytes(self) -> int:
        return self.bytes_of(0, self.layers)


def one_way_ns(rtt_of: Rtt[P], a: P, b: P) -> int:
    """Half a round trip; to oneself nothing."""
    if a == b:
        return 0
    rtt_ns = rtt_of(a, b)
    return (UNKNOWN_RTT_NS if rtt_ns is None else rtt_ns) // 2


def stage_ns(speed: Speed, layers: int, *, is_head: bool, active: int = 0) -> int:
    """A token's time at a stage.

    Each of the `active` other sessions is elsewhere in its ring most of the time: of at least two stages it
    is at one. So it is taken to be in the way half of the time.
    """
    alone = speed.token_layer_ns * layers + (speed.head_ns if is_head else 0)
    return alone + alone * active // 2


def chunk_ns(speed: Speed, layers: int, *, active: int = 0) -> int:
    """A full chunk's time at a stage. The head computes the vocabulary for the last row only."""
    alone = speed.chunk_layer_ns * layers
    return alone + alone * active // 2


@dataclass(frozen=True, slots=True)
class ChainCost:
    """`token_ns`: each token, alone; `prefill_ns`: the prompt, until the first token is there;
    `bottleneck_ns`: a token's time at the slowest stage, which bounds the rate of all sessions together.
    """

    token_ns: int
    prefill_ns: int
    bottleneck_ns: int

    def total_ns(self, output_tokens: int) -> int:
        return self.prefill_ns + self.token_ns * max(0, output_tokens - 1)


def chunks_of(prompt_tokens: int) -> int:
    return max(1, -(-prompt_tokens // CHUNK_ROWS))


def cost_of(stages: Sequence[tuple[P, Speed, int, int]], rtt_of: Rtt[P], prompt_tokens: int = 1) -> ChainCost:
    """Of a chain. `stages`: (peer, speed, layers, active) in order, the head last."""
    last = len(stages) - 1
    computes = [
        stage_ns(speed, layers, is_head=n == last, active=active)
        for n, (_, speed, layers, active) in enumerate(stages)
    ]
    peers = [peer for peer, *_ in stages]
    hops = [one_way_ns(rtt_of, peers[n - 1], peers[n]) for n in range(len(peers))]
    chunks = [chunk_ns(speed, layers, active=active) for _, speed, layers, active in stages]
    further = chunks_of(prompt_tokens) - 1
    rows = min(prompt_tokens, CHUNK_ROWS)
    fill = sum(chunk * rows // CHUNK_ROWS for chunk in chunks) + sum(hops)
    head = stages[-1][1].head_ns
    return ChainCost(sum(computes) + sum(hops), fill + further * max(chunks) + head, max(computes))


def measured_layer_ns(work: StageWork, rtt_ns: int | None) -> int:
    """Time of a row in one layer as the stage before this one saw it: what is left of its hop without the round
    trip. 0 if it says nothing. A claim of the chain's own: weigh it as one.

    Round trips are estimates, often too long ones: at least a part of the hop is taken to be work, so that
    nobody seems to compute in no time.
    """
    layers = work.last - work.first
    if layers < 1 or not work.hop_ns:
        return 0
    return max(1, max(work.hop_ns - (rtt_ns or 0), work.hop_ns // LEAST_WORK_DIVISOR) // layers)
