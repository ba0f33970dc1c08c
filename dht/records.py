"""Signed records: what one is, and the bounded store of those that others asked us to keep.

A record is an envelope (protocol/envelope.py) of kind `dht-record`. Its key is the hash of (namespace, name),
so a record can not be put where it does not belong. Namespaces say who may write: in "peer" only the peer of
that name; in the others every issuer has one record of its own beside those of the others (statements about
somebody). Of one issuer's records at a key the highest sequence number stands; the owner repeats it until it
expires.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, ClassVar, Final, NamedTuple, TypeAlias

from msgspec import Meta

from dht.keys import key_of_record
from dht.limits import (
    MAX_NAMESPACE_CHARS,
    MAX_RECORD_BYTES_IN_ANSWER,
    MAX_RECORD_NAME_CHARS,
    MAX_RECORD_TTL_NS,
    MAX_RECORD_VALUE_BYTES,
    MAX_RECORDS,
    MAX_RECORDS_IN_ANSWER,
    MAX_RECORDS_PER_ISSUER,
    MAX_RECORDS_PER_KEY,
    MAX_RECORDS_PER_SENDER,
    MAX_STORED_RECORD_BYTES,
    SWEEP_GAP_NS,
)
from dht.messages import Outcome
from protocol.codec import Codec, Message
from protocol.envelope import Envelope, Opened, Signer, open_untrusted
from protocol.errors import Fault, ProtocolError
from protocol.ids import PeerId
from protocol.instants import SECOND_NS, UnixNs

RECORD_KIND: Final = "dht-record"

#: What has expired is dropped this often.
_SWEEP_NS: Final = 60 * SECOND_NS

#: Only the peer itself writes at its name.
NAMESPACE_PEER: Final = "peer"
#: Statements about a peer, one per issuer.
NAMESPACE_KARMA: Final = "karma"


class RecordBody(Message, frozen=True, gc=False, tag="dht-record"):
    """`value` is the namespace's own business."""

    max_bytes: ClassVar[int] = MAX_RECORD_VALUE_BYTES + 1024

    namespace: Annotated[str, Meta(min_length=1, max_length=MAX_NAMESPACE_CHARS)]
    name: Annotated[str, Meta(min_length=1, max_length=MAX_RECORD_NAME_CHARS)]
    value: Annotated[bytes, Meta(max_length=MAX_RECORD_VALUE_BYTES)]

    @property
    def key(self) -> int:
        return key_of_record(self.namespace, self.name)


RECORD: Final[Codec[RecordBody]] = Codec(RecordBody)

Check: TypeAlias = Callable[[Envelope, UnixNs], Opened[RecordBody]]
"""Opens a record's envelope or raises ProtocolError. The simulator may pass one without signatures."""


def seal_record(
    signer: Signer, namespace: str, name: str, value: bytes, *, sequence: int, expires_unix_ns: UnixNs
) -> Envelope:
    """A record of ours. Raises ValueError if it is too large or we may not write there."""
    if namespace == NAMESPACE_PEER and name != signer.peer:
        raise ValueError("in the namespace 'peer' a node writes only under its own name")
    if not 1 <= len(namespace) <= MAX_NAMESPACE_CHARS or not 1 <= len(name) <= MAX_RECORD_NAME_CHARS:
        raise ValueError("namespace or name is empty or too long")
    if len(value) > MAX_RECORD_VALUE_BYTES:
        raise ValueError(f"a record's value has at most {MAX_RECORD_VALUE_BYTES} bytes, not {len(value)}")
    body = RecordBody(namespace, name, value)
    return signer.seal(RECORD_KIND, body, sequence=sequence, expires_unix_ns=expires_unix_ns)


def open_record_untrusted(envelope: Envelope, now: UnixNs) -> Opened[RecordBody]:
    """Verify a record from anywhere: signature, expiry, owner. Raises ProtocolError."""
    opened = open_untrusted(envelope, RECORD_KIND, RECORD, now)
    owner_rule(opened)
    return opened


def owner_rule(opened: Opened[RecordBody]) -> None:
    """Raises ProtocolError (WRONG_ISSUER) if the issuer may not write under this name."""
    if opened.body.namespace == NAMESPACE_PEER and opened.body.name != opened.issuer:
        raise ProtocolError(Fault.WRONG_ISSUER, "only the peer itself writes in the namespace 'peer'")


class Held(NamedTuple):
    """A stored record. `expires_unix_ns`: when we drop it."""

    envelope: Envelope
    sequence: int
    expires_unix_ns: int
    sender: int


class RecordStore:
    """Records by key and issuer. Whether we should hold a key at all, the caller decides first."""

    __slots__ = ("_by_issuer", "_by_key", "_by_sender", "_bytes", "_count", "_swept_unix_ns")

    def __init__(self) -> None:
        self._by_key: dict[int, dict[PeerId, Held]] = {}
        self._by_issuer: dict[PeerId, int] = {}
        self._by_sender: dict[int, int] = {}
        self._count = 0
        self._bytes = 0
        self._swept_unix_ns = 0

    def __len__(self) -> int:
        return self._count

    def put_opened(self, envelope: Envelope, opened: Opened[RecordBody], sender: int, now: UnixNs) -> Outcome:
        """Keep a record that `Check` has opened, if it is newer and the bounds allow it."""
        key = opened.body.key
        issuer = opened.issuer
        held = self._by_key.get(key, {}).get(issuer)
        if held is not None and opened.sequence <= held.sequence:
            same = opened.sequence == held.sequence and envelope.signature == held.envelope.signature
            return Outcome.TAKEN if same else Outcome.OLDER
        self._expire_some(now)
        if held is None and not self._has_room(key, issuer, sender):
            if 0 <= now - self._swept_unix_ns < SWEEP_GAP_NS:
                return Outcome.FULL
            self.expire(now)
            if not self._has_room(key, issuer, sender):
                return Outcome.FULL
        grown = self._bytes + len(envelope.body) - (len(held.envelope.body) if held else 0)
        if grown > MAX_STORED_RECORD_BYTES:
            return Outcome.FULL
        if held is not None:
            self._forget(key, issuer)
        expires = min(opened.expires_unix_ns, now + MAX_RECORD_TTL_NS)
        self._by_key.setdefault(key, {})[issuer] = Held(envelope, opened.sequence, expires, sender)
        self._by_issuer[issuer] = self._by_issuer.get(issuer, 0) + 1
        self._by_sender[sender] = self._by_sender.get(sender, 0) + 1
        self._count += 1
        self._bytes += len(envelope.body)
        return Outcome.TAKEN

    def _has_room(self, key: int, issuer: PeerId, sender: int) -> bool:
        return (
            self._count < MAX_RECORDS
            and len(self._by_key.get(key, ())) < MAX_RECORDS_PER_KEY
            and self._by_issuer.get(issuer, 0) < MAX_RECORDS_PER_ISSUER
            and self._by_sender.get(sender, 0) < MAX_RECORDS_PER_SENDER
        )

    def get(self, key: int, now: UnixNs) -> tuple[Envelope, ...]:
        """Records at a key that hold now, oldest issuer first, as many as an answer takes."""
        found: list[Envelope] = []
        size = 0
        for held in self._by_key.get(key, {}).values():
            size += len(held.envelope.body) + 256
            if held.expires_unix_ns > now and size <= MAX_RECORD_BYTES_IN_ANSWER:
                found.append(held.envelope)
                if len(found) == MAX_RECORDS_IN_ANSWER:
                    break
        return tuple(found)

    def keys(self) -> Iterable[int]:
        return self._by_key.keys()

    def _expire_some(self, now: UnixNs) -> None:
        """A full sweep at most once a minute, so that storing stays cheap."""
        if not 0 <= now - self._swept_unix_ns < _SWEEP_NS:  # or the clock was set back
            self.expire(now)

    def expire(self, now: UnixNs) -> None:
        """Drop what has expired."""
        self._swept_unix_ns = now
        gone = [
            (key, issuer)
            for key, of_issuers in self._by_key.items()
            for issuer, held in of_issuers.items()
            if held.expires_unix_ns <= now
        ]
        for key, issuer in gone:
            self._forget(key, issuer)

    def _forget(self, key: int, issuer: PeerId) -> None:
        of_issuers = self._by_key[key]
        held = of_issuers.pop(issuer)
        if not of_issuers:
            del self._by_key[key]
        _count_down(self._by_issuer, issuer)
        sender_left = self._by_sender[held.sender] - 1
        if sender_left:
            self._by_sender[held.sender] = sender_left
        else:
            del self._by_sender[held.sender]
        self._count -= 1
        self._bytes -= len(held.envelope.body)


def _count_down(counts: dict[PeerId, int], name: PeerId) -> None:
    left = counts[name] - 1
    if left:
        counts[name] = left
    else:
        del counts[name]


def newest_of_each(opened: Iterable[tuple[Envelope, Opened[RecordBody]]]) -> dict[PeerId, Envelope]:
    """Of several records at one key, the newest of each issuer, in the order in which issuers first came."""
    best: dict[PeerId, tuple[int, Envelope]] = {}
    for envelope, what in opened:
        known = best.get(what.issuer)
        if known is None or what.sequence > known[0]:
            best[what.issuer] = (what.sequence, envelope)
    return {issuer: envelope for issuer, (_, envelope) in best.items()}
