"""Requests and answers of `archi-node dht ...` on the control socket. Imports no network: commands answer at
once.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta

from dht.limits import MAX_RECORD_VALUE_BYTES
from node.snapshot import OverlaySnapshot

#: A record put by hand holds a day unless told otherwise.
DEFAULT_TTL_S: Final = 24 * 3600

_Name = Annotated[str, Meta(max_length=256)]


class NameParams(msgspec.Struct, frozen=True):
    """See `node.overlay.names`."""

    name: _Name


class RecordParams(msgspec.Struct, frozen=True):
    namespace: _Name
    name: _Name


class PutParams(msgspec.Struct, frozen=True):
    namespace: _Name
    name: _Name
    value: Annotated[bytes, Meta(max_length=MAX_RECORD_VALUE_BYTES)]
    ttl_s: Annotated[int, Meta(ge=1, le=48 * 3600)] = DEFAULT_TTL_S


class CostView(msgspec.Struct, frozen=True):
    took_ms: float
    hops: int
    queries: int
    failures: int


class ContactView(msgspec.Struct, frozen=True):
    """`rtt_ms`: measured, else estimated from coordinates; None: unknown."""

    peer: str
    key: str
    addresses: tuple[str, ...]
    rtt_ms: float | None
    connected: bool
    verified: bool = True


class TableView(msgspec.Struct, frozen=True):
    overlay: OverlaySnapshot
    peers: tuple[ContactView, ...]


class FindView(msgspec.Struct, frozen=True):
    key: str
    peers: tuple[ContactView, ...]
    cost: CostView


class RecordView(msgspec.Struct, frozen=True):
    """`value`: base64 in JSON."""

    issuer: str
    sequence: int
    expires_unix_s: int
    value: bytes


class RecordsView(msgspec.Struct, frozen=True):
    key: str
    records: tuple[RecordView, ...]
    cost: CostView


class StoredView(msgspec.Struct, frozen=True):
    key: str
    copies: int
    cost: CostView
