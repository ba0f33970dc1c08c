"""What Islands, coordinators and gateways say to each other. Each message is a datagram: it may be lost, come
twice or late; the machines in `routing` (coordinator, affiliation, following) acknowledge and repeat.

    Island  -> coordinator   AdvertPut, AdvertKeep, AdvertWithdrawn      <- AdvertTaken, Declined
    gateway -> coordinator   FindIslands                                 <- IslandsFound, Declined
                             Follow, Unfollow, PushTaken                 <- Following, IslandsPushed, Declined

In the node each travels as a notice of METHOD_COORDINATION on the kept RPC stream, so the sender is authentic;
what somebody else said (an Island's advert shown by a coordinator) is in a signed envelope.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, TypeAlias

from msgspec import Meta

from protocol.adverts import ASK_TOKENS, MAX_ASK_UCR, Coordinate, CountryCode
from protocol.codec import Codec, Message
from protocol.envelope import Envelope
from protocol.limits import (
    MAX_ADDRESS_CHARS,
    MAX_ADDRESSES,
    MAX_ADVERT_BYTES,
    MAX_CONTEXT_TOKENS,
    MAX_ENVELOPE_OVERHEAD_BYTES,
    MAX_NAME_CHARS,
    MAX_REMOTE_TEXT_CHARS,
    MAX_RPC_BYTES,
)
from protocol.work import Part

METHOD_COORDINATION: Final = "coordination"
SUMMARY_KIND: Final = "coordinator-summary"

#: Islands in one answer or one push. A message of MAX_RPC_BYTES holds some 200 usual adverts.
MAX_ISLANDS_PER_MESSAGE: Final = 256

#: Other coordinators that an answer may name, and the size of what they say of themselves.
MAX_REFERRALS: Final = 4
MAX_SUMMARY_BYTES: Final = 32 * 1024

#: Cargos that a coordinator's summary lists, those with most Islands first: 256 take some 25 KiB.
MAX_SUMMARY_CARGOS: Final = 256

#: Countries or unions of countries that a request may name.
MAX_JURISDICTIONS: Final = 16

#: Leases and retry hints: no one asks for more than an hour.
MAX_LEASE_MS: Final = 3_600_000

#: One round trip cannot take longer than a minute: the call would have been given up.
MAX_SHOWN_RTT_NS: Final = 60 * 10**9

Number = Annotated[int, Meta(ge=0, lt=1 << 53)]
"""Chosen by the sender of a request, repeated in its answer."""
CargoName = Annotated[str, Meta(min_length=1, max_length=2 * MAX_NAME_CHARS + 1)]
"""A Cargo's digest, its name, or name@version."""

_Sequence = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
_Count = Annotated[int, Meta(ge=0, le=1_000_000)]
_LeaseMs = Annotated[int, Meta(ge=0, le=MAX_LEASE_MS)]
_ShortName = Annotated[str, Meta(max_length=MAX_NAME_CHARS)]
_Tokens = Annotated[int, Meta(ge=0, le=MAX_CONTEXT_TOKENS)]
_PriceUcr = Annotated[int, Meta(ge=0, le=MAX_ASK_UCR * MAX_CONTEXT_TOKENS // ASK_TOKENS)]

# --- an Island and its coordinators ---------------------------------------------------------------


class AdvertPut(Message, frozen=True, gc=False, tag="ap"):
    """Here is my advert."""

    max_bytes: ClassVar[int] = MAX_ADVERT_BYTES + MAX_ENVELOPE_OVERHEAD_BYTES + 64

    call: Number
    envelope: Envelope


class AdvertKeep(Message, frozen=True, gc=False, tag="ak"):
    """I live, and my advert with this number still holds. Unsigned: the stream is the Island's own."""

    call: Number
    sequence: _Sequence


class AdvertTaken(Message, frozen=True, gc=False, tag="at"):
    """What I have of you: the advert with this number. 0: none, send it."""

    call: Number
    sequence: _Sequence


class AdvertWithdrawn(Message, frozen=True, gc=False, tag="aw"):
    """I leave this coordinator (not the network). Not acknowledged: silence says the same, later."""


class Declined(Message, frozen=True, gc=False, tag="no"):
    """The request `call` is not served. `code`: full, too-fast, invalid, unknown-cargo."""

    call: Number
    code: Annotated[str, Meta(max_length=32)]
    retry_ms: _LeaseMs = 0
    detail: Annotated[str, Meta(max_length=MAX_REMOTE_TEXT_CHARS)] = ""


# --- gateways and coordinators --------------------------------------------------------------------


class Wanted(Part, frozen=True, gc=False, omit_defaults=True):
    """Which Islands a gateway can use; the coordinator leaves out what does not fit by the claims, so that
    the answer's room is not wasted. The gateway judges itself again, on evidence. `max_price_ucr`: for the
    job of this shape, micro-credits; 0: any. `jurisdictions`: any of these; empty: anywhere.
    """

    prompt_tokens: _Tokens = 0
    output_tokens: _Tokens = 0
    max_price_ucr: _PriceUcr = 0
    jurisdictions: Annotated[tuple[_ShortName, ...], Meta(max_length=MAX_JURISDICTIONS)] = ()
    gpu: bool = False
    coordinate: Coordinate = 0


class SeenIsland(Part, frozen=True, gc=False, omit_defaults=True):
    """An Island as a coordinator sees it: its own words, and the smallest round trip that the coordinator has
    measured to it (0: none). `age_ms`: how long ago this advert came in.
    """

    envelope: Envelope
    rtt_ns: Annotated[int, Meta(ge=0, le=MAX_SHOWN_RTT_NS)] = 0
    age_ms: _LeaseMs = 0


_Islands = Annotated[tuple[SeenIsland, ...], Meta(max_length=MAX_ISLANDS_PER_MESSAGE)]
_Limit = Annotated[int, Meta(ge=1, le=MAX_ISLANDS_PER_MESSAGE)]


class FindIslands(Message, frozen=True, gc=False, tag="fi"):
    """Which Islands run this Cargo?"""

    call: Number
    cargo: CargoName
    wanted: Wanted = Wanted()
    limit: _Limit = 16


class IslandsFound(Message, frozen=True, gc=False, tag="if"):
    """The best of them first. `known`: how many this coordinator has that fit. `coordinators`: summaries of
    others that may have more.
    """

    max_bytes: ClassVar[int] = MAX_RPC_BYTES

    call: Number
    islands: _Islands
    known: _Count
    coordinators: Annotated[tuple[Envelope, ...], Meta(max_length=MAX_REFERRALS)] = ()


class Follow(Message, frozen=True, gc=False, tag="fo"):
    """Tell me of Islands with this Cargo (a digest) as they come, change and go; or: go on telling me.
    `have`: the number of the last push that I took from this subscription, 0 if none.
    """

    call: Number
    cargo: CargoName
    limit: _Limit
    have: Number = 0


class Following(Message, frozen=True, gc=False, tag="fg"):
    """Subscribed for `lease_ms`. `islands`: how many there are now, also beyond the limit."""

    call: Number
    cargo: CargoName
    lease_ms: _LeaseMs
    islands: _Count


class Unfollow(Message, frozen=True, gc=False, tag="uf"):
    """No more of this Cargo. Not acknowledged: the subscription expires anyway."""

    cargo: CargoName


class IslandsPushed(Message, frozen=True, gc=False, tag="ip"):
    """News of a followed Cargo. `push` grows from each to the next; one is under way at a time. `lost`: public
    keys of Islands that are gone or no longer have the Cargo. `anew`: forget what I told before.
    """

    max_bytes: ClassVar[int] = MAX_RPC_BYTES

    push: Number
    cargo: CargoName
    islands: _Islands
    lost: Annotated[tuple[Annotated[bytes, Meta(max_length=32)], ...], Meta(max_length=MAX_ISLANDS_PER_MESSAGE)]
    anew: bool = False


class PushTaken(Message, frozen=True, gc=False, tag="pt"):
    push: Number
    cargo: CargoName


# --- coordinators about themselves ----------------------------------------------------------------


class CargoCount(Part, frozen=True, gc=False, array_like=True):
    """How many Islands of a coordinator have a Cargo, and with how many it is ready."""

    digest: Annotated[str, Meta(min_length=71, max_length=71)]
    name: _ShortName
    version: _ShortName
    islands: _Count
    ready: _Count


class CoordinatorSummary(Message, frozen=True, gc=False, tag="cs"):
    """Signed by the coordinator, gossiped among coordinators, shown to gateways. `cargos`: those with most
    Islands; `islands`: of all. `full`: it takes no more Islands.
    """

    max_bytes: ClassVar[int] = MAX_SUMMARY_BYTES

    name: _ShortName
    addresses: Annotated[
        tuple[Annotated[str, Meta(max_length=MAX_ADDRESS_CHARS)], ...], Meta(max_length=MAX_ADDRESSES)
    ]
    region: _ShortName = ""
    country: CountryCode = ""
    coordinate: Coordinate = 0
    islands: _Count = 0
    full: bool = False
    cargos: Annotated[tuple[CargoCount, ...], Meta(max_length=MAX_SUMMARY_CARGOS)] = ()


ToCoordinator: TypeAlias = (
    AdvertPut | AdvertKeep | AdvertWithdrawn | FindIslands | Follow | Unfollow | PushTaken
)
FromCoordinator: TypeAlias = AdvertTaken | Declined | IslandsFound | Following | IslandsPushed
CoordinationMessage: TypeAlias = ToCoordinator | FromCoordinator

COORDINATION: Final[Codec[CoordinationMessage]] = Codec(CoordinationMessage)
SUMMARY: Final[Codec[CoordinatorSummary]] = Codec(CoordinatorSummary)
