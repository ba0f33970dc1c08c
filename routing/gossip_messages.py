"""What gossiping peers say to each other, and what the machine's user is told.

    Push     items in full, to a few neighbours as soon as they are known, or to who wanted them
    Have     the ids of items, to the other neighbours, a little later; or what a comparison found missing
    Want     send me these
    Prune    I had these already: from now on tell me ids only
    Digest   how many items I hold, and the sum of their ids: equal stores need no answer
    Sums     the same per bucket of ids: the answer, if they differ
    Compare  all my ids in these buckets, which differ

Items are opaque to the machine, except that of one (kind, origin, name) the highest version stands. A message
names no peer, so the same structs travel in the simulator and on the wire.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from typing import Annotated, ClassVar, Final, Generic, TypeAlias, TypeVar

import msgspec
from msgspec import Meta

from protocol.codec import Codec, Message
from protocol.errors import Fault
from protocol.instants import UnixNs
from protocol.limits import KIB
from protocol.work import Part

P = TypeVar("P")

#: Notices of this method on the kept RPC stream carry gossip.
METHOD_GOSSIP: Final = "gossip"

#: The largest item is a coordinator's summary (protocol.coordination.MAX_SUMMARY_BYTES) in its envelope.
MAX_ITEM_BYTES: Final = 40 * KIB

#: Items in one push, and their payloads' bytes together: half of an RPC body, so that one message fills no
#: queue.
MAX_PUSH_ITEMS: Final = 64
MAX_PUSH_BYTES: Final = 128 * KIB

#: Ids in one message: 36 KiB.
MAX_IDS: Final = 4096

#: Buckets of ids. A Sums message takes 2.3 KiB; a store of 65,536 items has 256 in a bucket.
BUCKETS: Final = 256

ID_BITS: Final = 63
_ID_MASK: Final = (1 << ID_BITS) - 1

ItemId = Annotated[int, Meta(ge=0, le=_ID_MASK)]
_Ids = Annotated[tuple[ItemId, ...], Meta(min_length=1, max_length=MAX_IDS)]
_PAYLOAD_OVERHEAD: Final = 256


class Item(Part, frozen=True, gc=False, array_like=True):
    """One thing to spread. `origin`: who made it (a public key); `name`: which of the origin's things of this
    kind.
    """

    kind: Annotated[str, Meta(min_length=1, max_length=32)]
    origin: Annotated[bytes, Meta(max_length=64)]
    name: Annotated[bytes, Meta(max_length=64)]
    version: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
    payload: Annotated[bytes, Meta(max_length=MAX_ITEM_BYTES)]

    @property
    def id(self) -> int:
        """63 bits of BLAKE2b over all fields: two items collide by chance never, by effort only with
        oneself.
        """
        kind = self.kind.encode()
        head = struct.pack("!BBBQ", len(kind), len(self.origin), len(self.name), self.version)
        data = b"".join((head, kind, self.origin, self.name, self.payload))
        return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") & _ID_MASK


class Push(Message, frozen=True, gc=False, tag="gp"):
    max_bytes: ClassVar[int] = MAX_PUSH_BYTES + MAX_PUSH_ITEMS * _PAYLOAD_OVERHEAD

    items: Annotated[tuple[Item, ...], Meta(min_length=1, max_length=MAX_PUSH_ITEMS)]


class Have(Message, frozen=True, gc=False, tag="gh"):
    """`missing`: a comparison showed that the receiver lacks them; otherwise they may be on their way to it."""

    ids: _Ids
    missing: bool = False


class Want(Message, frozen=True, gc=False, tag="gw"):
    """`graft`: and push to me at once from now on."""

    ids: _Ids
    graft: bool = False


class Prune(Message, frozen=True, gc=False, tag="gx"):
    pass


class Digest(Message, frozen=True, gc=False, tag="gd"):
    count: Annotated[int, Meta(ge=0, lt=1 << 53)]
    sum: ItemId


class Sums(Message, frozen=True, gc=False, tag="gs"):
    sums: Annotated[tuple[ItemId, ...], Meta(min_length=BUCKETS, max_length=BUCKETS)]


class Compare(Message, frozen=True, gc=False, tag="gc"):
    buckets: Annotated[
        tuple[Annotated[int, Meta(ge=0, lt=BUCKETS)], ...], Meta(min_length=1, max_length=BUCKETS)
    ]
    ids: Annotated[tuple[ItemId, ...], Meta(max_length=MAX_IDS)]


GossipMessage: TypeAlias = Push | Have | Want | Prune | Digest | Sums | Compare
GOSSIP_CODEC: Final[Codec[GossipMessage]] = Codec(GossipMessage)


class Opening(msgspec.Struct, frozen=True, gc=False):
    """What a verified item says. `body` is the opener's own, handed on in `Learnt`."""

    expires_unix_ns: UnixNs
    body: object


#: Verifies an item from anywhere, at this civil time. Raises ProtocolError and nothing else.
Opener: TypeAlias = Callable[[Item, UnixNs], Opening]


# --- commands and events --------------------------------------------------------------------------


class AddPeer(msgspec.Struct, Generic[P], frozen=True, gc=False):
    """A neighbour: another gossiping peer that can be sent to. Nothing happens while it is expelled."""

    peer: P


class RemovePeer(msgspec.Struct, Generic[P], frozen=True, gc=False):
    peer: P


class Publish(msgspec.Struct, frozen=True, gc=False):
    """Spread an item of our own. If our own opener refuses it (the clock was set back), `Refused` follows."""

    item: Item


class Reconsider(msgspec.Struct, frozen=True, gc=False):
    """Whose items are favoured has changed: ask again."""


GossipCommand: TypeAlias = AddPeer[P] | RemovePeer[P] | Publish | Reconsider


class Learnt(msgspec.Struct, frozen=True, gc=False):
    """A new item stands, from elsewhere. `body` is what the opener made of it."""

    item: Item
    body: object


class Refused(msgspec.Struct, frozen=True, gc=False):
    """An item of our own could not be published."""

    item: Item
    fault: Fault
    detail: str


class Expelled(msgspec.Struct, Generic[P], frozen=True, gc=False):
    """A neighbour lost its place: it sent what is invalid, or too much. It may be counted against it."""

    peer: P
    fault: Fault
    detail: str


class Thin(msgspec.Struct, frozen=True, gc=False):
    """A neighbour went and few are left: find others, or a few more deaths cut us off."""

    neighbours: int


GossipEvent: TypeAlias = Learnt | Refused | Expelled[P] | Thin
