"""What an Island tells its coordinators about itself, and how they greet each other.

An advert is a signed, numbered, expiring statement. Its speeds and its place are claims: placement starts
from them and corrects them by what it measures. Every field that came after the first release has a default,
so that older peers are understood and newer ones too (unknown fields are ignored).
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal

from msgspec import Meta

from protocol.codec import Codec, Message
from protocol.instants import SECOND_NS
from protocol.limits import (
    MAX_ADDRESS_CHARS,
    MAX_ADDRESSES,
    MAX_ADVERT_BYTES,
    MAX_ADVERT_CARGOS,
    MAX_CONTEXT_TOKENS,
    MAX_NAME_CHARS,
)
from protocol.work import Part

ADVERT_KIND: Final = "island-advert"

#: RPC methods of any peer (hello; bye: I close this link for want of use; stay: I need this link).
METHOD_HELLO: Final = "hello"
METHOD_BYE: Final = "bye"
METHOD_STAY: Final = "stay"

#: A book drops an Island that gives no sign of life for this long, unless its owner says otherwise.
ADVERT_TTL_NS: Final = 10 * SECOND_NS

#: 1 PiB: no machine has more to say.
MAX_ADVERT_MEMORY_MIB: Final = 1 << 30

#: Prices are asked per this many tokens, so that whole micro-credits are fine enough (a chat costs credits).
ASK_TOKENS: Final = 1000

#: A million credits for one unit: no ask is higher, and sums over a job stay below 2**63.
MAX_ASK_UCR: Final = 10**12

#: An availability schedule repeats weekly; minutes are counted from Monday 00:00 UTC.
WEEK_MINUTES: Final = 7 * 24 * 60

#: Three windows a day: mornings, evenings, nights.
MAX_WINDOWS: Final = 21

#: More graphics memory, bandwidth (MB/s) and threads than any machine has.
MAX_ADVERT_THREADS: Final = 65_536
MAX_BANDWIDTH_MBPS: Final = 1 << 30

#: Runtime types that one Island may name; there are six.
MAX_RUNTIMES: Final = 16

#: As protocol/ring.py: four times the layers of the deepest model known.
MAX_SHARD_LAYERS: Final = 512

_Nanos = Annotated[int, Meta(ge=0, lt=1 << 53)]
_Rate = Annotated[float, Meta(ge=0, le=1e9)]
_Count = Annotated[int, Meta(ge=0, le=1_000_000)]
_ShortName = Annotated[str, Meta(max_length=MAX_NAME_CHARS)]
_Address = Annotated[str, Meta(max_length=MAX_ADDRESS_CHARS)]
_Mib = Annotated[int, Meta(ge=0, le=MAX_ADVERT_MEMORY_MIB)]
_Ask = Annotated[int, Meta(ge=0, le=MAX_ASK_UCR)]
Coordinate = Annotated[int, Meta(ge=0)]
"""A packed network coordinate (dht/coordinates.py), 64 bits, which is all that MessagePack has; 0: unknown."""
CountryCode = Annotated[str, Meta(max_length=2)]
"""ISO 3166-1 alpha-2 in capitals, or empty: unknown."""


class ShardRange(Part, frozen=True, gc=False, omit_defaults=True):
    """A part of a Cargo: layers `first` to `last` (exclusive) of `layers`. With `first == last` the Island
    holds nothing yet, but offers `room_mib` for weights and memory of sequences.

    `layer_ns`: time for one row through one layer, alone; `prefill_layer_ns`: per row in a large batch; both
    measured by the Island at start and since, and corrected by those who feed it. `vocabulary_ns`: time for
    one row in the head, if it has the last layer. `idle`: nobody has used these layers for long; their memory
    (`OfferedCargo.memory_mib`) counts as room for other Cargos, beside `room_mib`, once those are asked for.
    """

    first: Annotated[int, Meta(ge=0, le=MAX_SHARD_LAYERS)]
    last: Annotated[int, Meta(ge=0, le=MAX_SHARD_LAYERS)]
    layers: Annotated[int, Meta(ge=1, le=MAX_SHARD_LAYERS)]
    room_mib: _Mib = 0
    layer_ns: _Nanos = 0
    prefill_layer_ns: _Nanos = 0
    vocabulary_ns: _Nanos = 0
    idle: bool = False


class OfferedCargo(Part, frozen=True, gc=False, omit_defaults=True):
    """A Cargo that the Island runs. `name` is the manifest's (the model name that consumers use).

    `decode_tps`: tokens/s of one sequence alone; `prefill_tps`: prompt tokens/s; measured at start and since.
    `prompt_ask_ucr`, `output_ask_ucr`: asking prices, micro-credits per ASK_TOKENS tokens; `unit_ask_ucr`:
    per work unit, for Cargos whose work is not tokens. `memory_mib`, `vram_mib`: what it takes up here; 0:
    unknown. `shard`: the Island has only a part of it, or room for one; None: all of it.
    """

    digest: Annotated[str, Meta(min_length=71, max_length=71)]
    name: _ShortName
    version: _ShortName
    runtime: _ShortName
    state: Literal["loading", "ready", "failed"]
    context_length: Annotated[int, Meta(ge=0, le=MAX_CONTEXT_TOKENS)]
    slots: _Count
    active: _Count
    queued: _Count
    decode_tps: _Rate
    prefill_tps: _Rate
    publisher: _ShortName = ""
    prompt_ask_ucr: _Ask = 0
    output_ask_ucr: _Ask = 0
    unit_ask_ucr: _Ask = 0
    memory_mib: _Mib = 0
    vram_mib: _Mib = 0
    shard: ShardRange | None = None


class Hardware(Part, frozen=True, gc=False, omit_defaults=True):
    """What the machine has. `memory_mib`, `vram_mib`: in total; `bandwidth_mbps`: of the memory that weights
    are read from, MB/s. All claims; 0 and "" say unknown.
    """

    threads: Annotated[int, Meta(ge=0, le=MAX_ADVERT_THREADS)] = 0
    memory_mib: _Mib = 0
    gpu: _ShortName = ""
    vram_mib: _Mib = 0
    bandwidth_mbps: Annotated[int, Meta(ge=0, le=MAX_BANDWIDTH_MBPS)] = 0


class Window(Part, frozen=True, gc=False, array_like=True):
    """Open from `start` (minutes since Monday 00:00 UTC) for `minutes`; may run over the week's end."""

    start: Annotated[int, Meta(ge=0, lt=WEEK_MINUTES)]
    minutes: Annotated[int, Meta(ge=1, le=WEEK_MINUTES)]


class IslandAdvert(Message, frozen=True, gc=False, omit_defaults=True, tag="advert"):
    """What an Island says of itself. `memory_mib`, `vram_mib`: free now. `load_permille`: how busy the
    machine is with anything at all. `addresses`: where it can be dialled, relayed addresses included.
    `schedule`: when it takes jobs; empty: always.
    """

    max_bytes: ClassVar[int] = MAX_ADVERT_BYTES

    name: _ShortName
    cargos: Annotated[tuple[OfferedCargo, ...], Meta(max_length=MAX_ADVERT_CARGOS)]
    region: _ShortName = ""
    memory_mib: Annotated[int, Meta(ge=0, le=MAX_ADVERT_MEMORY_MIB)] = 0
    version: _ShortName = ""
    draining: bool = False
    addresses: Annotated[tuple[_Address, ...], Meta(max_length=MAX_ADDRESSES)] = ()
    country: CountryCode = ""
    hardware: Hardware = Hardware()
    runtimes: Annotated[tuple[_ShortName, ...], Meta(max_length=MAX_RUNTIMES)] = ()
    vram_mib: _Mib = 0
    load_permille: Annotated[int, Meta(ge=0, le=1000)] = 0
    schedule: Annotated[tuple[Window, ...], Meta(max_length=MAX_WINDOWS)] = ()
    coordinate: Coordinate = 0


class Hello(Message, frozen=True, gc=False, tag="hello"):
    """First call on a kept stream, both ways: who I am for people, the roles I play, and where I can be
    dialled.

    Said again when it changes.
    """

    name: _ShortName
    version: _ShortName
    roles: Annotated[tuple[_ShortName, ...], Meta(max_length=8)] = ()
    addresses: Annotated[tuple[_Address, ...], Meta(max_length=MAX_ADDRESSES)] = ()


class Accepted(Message, frozen=True, gc=False, tag="ok"):
    """The empty answer."""


ADVERT: Final[Codec[IslandAdvert]] = Codec(IslandAdvert)
HELLO: Final[Codec[Hello]] = Codec(Hello)
ACCEPTED: Final[Codec[Accepted]] = Codec(Accepted)
