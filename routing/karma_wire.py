"""Karma statements as they travel: signed envelopes, gossip items, and the record in the DHT.

A statement's issuer and sequence number are the envelope's own, so nobody can state in another's name or
replay an old number as new. Peers are named by their public keys (32 bytes), which the envelope needs anyway.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, ClassVar, Final

from msgspec import Meta

from protocol.codec import Codec, Message, encode
from protocol.envelope import CLOCK_TOLERANCE_NS, Envelope, Opened, Signer, open_untrusted
from protocol.errors import Fault, ProtocolError
from protocol.ids import PUBLIC_KEY_BYTES, PeerId, peer_id_of, public_key_of_untrusted
from protocol.instants import UnixNs
from routing.gossip_messages import Item, Opener, Opening
from routing.gossip_peers import KindPolicy
from routing.karma import Counters, KarmaPolicy, Past, Statement, join

#: Kind of the envelope, and of the gossip items that hold one.
KARMA_KIND: Final = "karma"

#: A body of two rows of counters and a key: at most 140 bytes; doubled for fields that come later.
MAX_STATEMENT_BYTES: Final = 288

#: The same in its envelope.
MAX_SEALED_BYTES: Final = 640

#: An hour at light speed is beyond the solar system; what was measured over a network fits in 32 bits of
#: microseconds.
MAX_RTT_US: Final = (1 << 32) - 1

#: DHT namespace of karma records; a record's name is its subject's peer id.
KARMA_NAMESPACE: Final = "karma"

#: Statements in one DHT record: the publisher's own, and those of the issuers it trusts most. Eight are as many
#: independent opinions as an Island has coordinators, and keep a record under 6 KiB.
MAX_RECORD_STATEMENTS: Final = 8


class StatementBody(Message, frozen=True, gc=False, tag="ks", array_like=True):
    """The signed part; see routing.karma.Statement for the fields."""

    max_bytes: ClassVar[int] = MAX_STATEMENT_BYTES

    subject: Annotated[bytes, Meta(min_length=PUBLIC_KEY_BYTES, max_length=PUBLIC_KEY_BYTES)]
    counters: Counters
    past: Past
    min_rtt_us: Annotated[int, Meta(ge=0, le=MAX_RTT_US)] = 0


class KarmaRecord(Message, frozen=True, gc=False, tag="kr"):
    """What a coordinator publishes in the DHT about one peer: sealed statements, its own first."""

    max_bytes: ClassVar[int] = MAX_RECORD_STATEMENTS * MAX_SEALED_BYTES + 64

    statements: Annotated[
        tuple[Annotated[bytes, Meta(max_length=MAX_SEALED_BYTES)], ...], Meta(max_length=MAX_RECORD_STATEMENTS)
    ]


_BODY: Final[Codec[StatementBody]] = Codec(StatementBody)
_ENVELOPE: Final[Codec[Envelope]] = Codec(Envelope)
KARMA_RECORD: Final[Codec[KarmaRecord]] = Codec(KarmaRecord)


def seal_statement(signer: Signer, statement: Statement[PeerId], policy: KarmaPolicy) -> Envelope:
    """Sign a statement of ours. It expires `keep_epochs` after its epoch. Raises ValueError if it is not the
    signer's.
    """
    if statement.issuer != signer.peer:
        raise ValueError(f"{statement.issuer} can not be signed for by {signer.peer}")
    body = StatementBody(
        public_key_of_untrusted(statement.subject),
        statement.counters,
        statement.past,
        min(statement.min_rtt_us, MAX_RTT_US),
    )
    expires = UnixNs((statement.epoch + 1 + policy.keep_epochs) * policy.epoch_ns)
    return signer.seal(KARMA_KIND, body, sequence=statement.sequence, expires_unix_ns=expires)


def open_statement_untrusted(envelope: Envelope, policy: KarmaPolicy, now: UnixNs) -> Statement[PeerId]:
    """The statement in an envelope from anywhere.

    Raises ProtocolError: as `open_untrusted`; UNEXPECTED if the issuer speaks of itself; EXPIRED if it is from
    the future by more than the clocks' tolerance.
    """
    opened: Opened[StatementBody] = open_untrusted(envelope, KARMA_KIND, _BODY, now)
    if opened.sequence > policy.sequence_at(UnixNs(now + CLOCK_TOLERANCE_NS)):
        raise ProtocolError(Fault.EXPIRED, "the statement is from the future")
    subject = peer_id_of(opened.body.subject)
    if subject == opened.issuer:
        raise ProtocolError(Fault.UNEXPECTED, "a peer can not state its own karma")
    body = opened.body
    return Statement(opened.issuer, subject, opened.sequence, body.counters, body.past, body.min_rtt_us)


# --- gossip ---------------------------------------------------------------------------------------


def karma_item(envelope: Envelope) -> Item:
    """The gossip item of a sealed statement of ours."""
    body = _BODY.decode_untrusted(envelope.body)
    return Item(KARMA_KIND, envelope.issuer, body.subject, envelope.sequence, encode(envelope))


def karma_kind(policy: KarmaPolicy) -> KindPolicy:
    """The bounds of karma items, for a gossip machine."""
    return KindPolicy((policy.keep_epochs + 2) * policy.epoch_ns, MAX_SEALED_BYTES)


def karma_opener(policy: KarmaPolicy) -> Opener:
    """What a gossip machine needs to take karma items: `Opening.body` is the `Statement[PeerId]`."""

    def open_item_untrusted(item: Item, now: UnixNs) -> Opening:
        envelope = _sealed_untrusted(item.payload)
        if (item.origin, item.version) != (envelope.issuer, envelope.sequence):
            raise ProtocolError(Fault.WRONG_ISSUER, "the item is not what its envelope says")
        statement = open_statement_untrusted(envelope, policy, now)
        if public_key_of_untrusted(statement.subject) != item.name:
            raise ProtocolError(Fault.UNEXPECTED, "the item is about another subject")
        return Opening(UnixNs(envelope.expires_unix_ns), statement)

    return open_item_untrusted


def _sealed_untrusted(data: bytes) -> Envelope:
    if len(data) > MAX_SEALED_BYTES:
        raise ProtocolError(
            Fault.OVERSIZE, f"a sealed statement of {len(data)} bytes exceeds {MAX_SEALED_BYTES}"
        )
    return _ENVELOPE.decode_untrusted(data)


# --- the record in the DHT ------------------------------------------------------------------------


def karma_record(own: Envelope | None, others: Sequence[tuple[int, Envelope]]) -> KarmaRecord | None:
    """What to publish about a subject: our own statement, then others' by falling trust (`others` holds trust
    and envelope, all about that subject), `MAX_RECORD_STATEMENTS` in all. None if there is nothing worth
    telling: a record that only repeats strangers is noise.
    """
    ranked = sorted((row for row in others if row[0] > 0), key=lambda row: (-row[0], row[1].issuer))
    chosen = [envelope for _, envelope in ranked if own is None or envelope.issuer != own.issuer]
    if own is not None:
        chosen.insert(0, own)
    if not chosen:
        return None
    return KarmaRecord(tuple(encode(envelope) for envelope in chosen[:MAX_RECORD_STATEMENTS]))


def merge_records_untrusted(
    records: Iterable[bytes], subject: PeerId, policy: KarmaPolicy, now: UnixNs
) -> list[Statement[PeerId]]:
    """The statements about `subject` in records that were read back, the standing one of each issuer, by
    issuer.

    What does not decode, is not signed, has expired or speaks of somebody else is left out: whoever stores a
    record can withhold, but not invent. Raises nothing.
    """
    standing: dict[PeerId, Statement[PeerId]] = {}
    for data in records:
        try:
            record = KARMA_RECORD.decode_untrusted(data)
        except ProtocolError:
            continue
        for sealed in record.statements:
            try:
                statement = open_statement_untrusted(_sealed_untrusted(sealed), policy, now)
            except ProtocolError:
                continue
            if statement.subject == subject:
                held = standing.get(statement.issuer)
                standing[statement.issuer] = statement if held is None else join(held, statement)
    return [standing[issuer] for issuer in sorted(standing)]
