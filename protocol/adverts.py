"""What an Island tells its coordinators about itself, and how they greet each other.

An advert is a signed, numbered, expiring statement. Its speeds are claims: placement starts from them
and corrects them by what it measures.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal

from msgspec import Meta

from protocol.codec import Codec, Message
from protocol.instants import SECOND_NS
from protocol.limits import (
    MAX_ADVERT_BYTES,
    MAX_ADVERT_CARGOS,
    MAX_CONTEXT_TOKENS,
    MAX_NAME_CHARS,
)
from protocol.work import Part

ADVERT_KIND: Final = "island-advert"

#: RPC methods of a coordinator (advert, withdraw) and of any peer (hello).
METHOD_ADVERT: Final = "advert"
METHOD_HELLO: Final = "hello"

#: An advert is repeated at this interval, sooner when load changes, and dropped after ADVERT_TTL_NS.
ADVERT_INTERVAL_NS: Final = 2 * SECOND_NS
ADVERT_TTL_NS: Final = 10 * SECOND_NS

#: 1 PiB: no machine has more to say.
MAX_ADVERT_MEMORY_MIB: Final = 1 << 30

_Rate = Annotated[float, Meta(ge=0, le=1e9)]
_Count = Annotated[int, Meta(ge=0, le=1_000_000)]
_ShortName = Annotated[str, Meta(max_length=MAX_NAME_CHARS)]


class OfferedCargo(Part, frozen=True, gc=False):
    """A Cargo that the Island runs. `name` is the manifest's (the model name that consumers use).

    `decode_tps`: tokens/s of one sequence alone; `prefill_tps`: prompt tokens/s; measured at start and since.
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


class IslandAdvert(Message, frozen=True, gc=False, tag="advert"):
    max_bytes: ClassVar[int] = MAX_ADVERT_BYTES

    name: _ShortName
    cargos: Annotated[tuple[OfferedCargo, ...], Meta(max_length=MAX_ADVERT_CARGOS)]
    region: _ShortName = ""
    memory_mib: Annotated[int, Meta(ge=0, le=MAX_ADVERT_MEMORY_MIB)] = 0
    version: _ShortName = ""
    draining: bool = False


class Hello(Message, frozen=True, gc=False, tag="hello"):
    """First call on a kept stream, both ways: who I am for people, and the roles I play."""

    name: _ShortName
    version: _ShortName
    roles: Annotated[tuple[_ShortName, ...], Meta(max_length=8)] = ()


class Accepted(Message, frozen=True, gc=False, tag="ok"):
    """The empty answer."""


ADVERT: Final[Codec[IslandAdvert]] = Codec(IslandAdvert)
HELLO: Final[Codec[Hello]] = Codec(Hello)
ACCEPTED: Final[Codec[Accepted]] = Codec(Accepted)
