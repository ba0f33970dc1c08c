"""Statements on the wire: signed, about others, of their time; and whatever bytes come in, only ProtocolError
goes out."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.codec import encode
from protocol.envelope import Envelope, Signer
from protocol.errors import Fault, ProtocolError
from protocol.ids import PeerId
from protocol.instants import SECOND_NS, UnixNs
from routing.gossip_messages import GOSSIP_CODEC, Item, Push
from routing.karma import MAX_COUNTER, SEQUENCE_BITS, Counters, KarmaPolicy, Past, Statement
from routing.karma_wire import (
    KARMA_RECORD,
    MAX_RECORD_STATEMENTS,
    MAX_RTT_US,
    MAX_SEALED_BYTES,
    KarmaRecord,
    karma_item,
    karma_opener,
    karma_record,
    merge_records_untrusted,
    open_statement_untrusted,
    seal_statement,
)

POLICY = KarmaPolicy()
EPOCH = 80_000
NOW = UnixNs(EPOCH * POLICY.epoch_ns + 3600 * SECOND_NS)
ISSUERS = [Signer(bytes([i]) * 32) for i in range(1, 13)]
ONE, TWO = ISSUERS[:2]
ISLAND = Signer(b"i" * 32).peer


def stated(signer: Signer = ONE, subject: PeerId = ISLAND, *, n: int = 0, **said: int) -> Statement[PeerId]:
    return Statement(signer.peer, subject, (EPOCH << SEQUENCE_BITS) + n, Counters(**said))


def sealed(signer: Signer = ONE, **said: int) -> Envelope:
    return seal_statement(signer, stated(signer, **said), POLICY)


def test_round_trip() -> None:
    statement = Statement(
        ONE.peer, ISLAND, EPOCH << SEQUENCE_BITS, Counters(1, 2, 3, 4, 5, 6, 7), Past(8, 9, 10), 11
    )
    assert open_statement_untrusted(seal_statement(ONE, statement, POLICY), POLICY, NOW) == statement


def test_the_largest_statement_fits_its_bounds() -> None:
    statement = Statement(
        ONE.peer,
        ISLAND,
        EPOCH << SEQUENCE_BITS,
        Counters(*[MAX_COUNTER] * 7),
        Past(*[MAX_COUNTER] * 3),
        MAX_RTT_US,
    )
    envelope = seal_statement(ONE, statement, POLICY)
    assert len(envelope.body) <= 140
    assert len(encode(envelope)) <= MAX_SEALED_BYTES // 2 + 40


def fault_of(envelope: Envelope, now: UnixNs = NOW) -> Fault:
    with pytest.raises(ProtocolError) as caught:
        open_statement_untrusted(envelope, POLICY, now)
    return caught.value.fault


def test_forgeries_are_refused() -> None:
    envelope = sealed(work_units=5)
    assert fault_of(msgspec.structs.replace(envelope, issuer=TWO.public_key)) is Fault.SIGNATURE
    assert fault_of(msgspec.structs.replace(envelope, sequence=envelope.sequence + 1)) is Fault.SIGNATURE
    assert fault_of(msgspec.structs.replace(envelope, kind="advert")) is Fault.UNEXPECTED
    assert fault_of(seal_statement(ONE, stated(subject=ONE.peer), POLICY)) is Fault.UNEXPECTED
    far = UnixNs(NOW + POLICY.epoch_ns)
    early = seal_statement(ONE, stated(n=1 << 24), POLICY)
    assert fault_of(early) is Fault.EXPIRED
    assert open_statement_untrusted(early, POLICY, far).sequence == early.sequence
    assert fault_of(envelope, UnixNs(NOW + (POLICY.keep_epochs + 2) * POLICY.epoch_ns)) is Fault.EXPIRED


def test_nobody_signs_for_another() -> None:
    with pytest.raises(ValueError, match="can not be signed"):
        seal_statement(TWO, stated(ONE), POLICY)


def test_an_item_is_what_its_envelope_says() -> None:
    opener = karma_opener(POLICY)
    item = karma_item(sealed(failures=2))
    assert opener(item, NOW).body == stated(failures=2)
    lies = [
        {"origin": TWO.public_key},
        {"version": item.version + 1},
        {"name": TWO.public_key},
        {"payload": b""},
        {"payload": b"x" * (MAX_SEALED_BYTES + 1)},
        {"payload": item.payload[:-1] + bytes([item.payload[-1] ^ 1])},
    ]
    for lie in lies:
        with pytest.raises(ProtocolError):
            opener(msgspec.structs.replace(item, **lie), NOW)


# --- the record -----------------------------------------------------------------------------------


def test_a_record_is_our_word_then_those_we_trust_most() -> None:
    others = [(i, sealed(signer, work_units=i)) for i, signer in enumerate(ISSUERS)]
    record = karma_record(sealed(ONE, work_units=99), others)
    assert record is not None
    assert len(record.statements) == MAX_RECORD_STATEMENTS
    assert len(encode(record)) <= KarmaRecord.max_bytes
    merged = merge_records_untrusted([encode(record)], ISLAND, POLICY, NOW)
    chosen = {ONE.peer, *(signer.peer for signer in ISSUERS[-7:])}
    assert {statement.issuer for statement in merged} == chosen
    assert [s.issuer for s in merged] == sorted(chosen)
    assert next(s for s in merged if s.issuer == ONE.peer).counters.work_units == 99


def test_nothing_to_tell_is_no_record() -> None:
    assert karma_record(None, []) is None
    assert karma_record(None, [(0, sealed())]) is None
    assert karma_record(None, [(1, sealed())]) is not None


def test_records_read_back_merge_and_invent_nothing() -> None:
    old = encode(sealed(ONE, n=1, work_units=1))
    new = encode(sealed(ONE, n=2, work_units=2))
    forged = encode(msgspec.structs.replace(sealed(TWO, work_units=9), signature=bytes(64)))
    elsewhere = encode(seal_statement(TWO, stated(TWO, ONE.peer), POLICY))
    records = [encode(KarmaRecord(row)) for row in ((new,), (old, forged), (elsewhere, b"junk", b""))]
    for order in (records, records[::-1]):
        [statement] = merge_records_untrusted([b"", *order, b"\xff" * 50], ISLAND, POLICY, NOW)
        assert statement.counters.work_units == 2


# --- bytes ----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=700))
def test_any_bytes_are_survived(data: bytes) -> None:
    opener = karma_opener(POLICY)
    item = karma_item(sealed())
    with pytest.raises(ProtocolError):
        opener(msgspec.structs.replace(item, payload=data), NOW)
    assert merge_records_untrusted([data], ISLAND, POLICY, NOW) == []
    try:
        GOSSIP_CODEC.decode_untrusted(data)
        KARMA_RECORD.decode_untrusted(data)
    except ProtocolError:
        pass


@settings(deadline=None, max_examples=300)
@given(st.integers(0, 10**6), st.binary(min_size=1, max_size=4), st.sampled_from(["flip", "cut", "grow"]))
def test_damaged_messages_are_refused_or_harmless(place: int, noise: bytes, how: str) -> None:
    """Start from valid bytes: most damage lands behind the first checks."""
    opener = karma_opener(POLICY)
    good = karma_item(sealed(work_units=7))
    data = bytearray(GOSSIP_CODEC.encode(Push((good,))))
    at = place % len(data)
    if how == "flip":
        data[at : at + len(noise)] = noise
    elif how == "cut":
        del data[at : at + len(noise)]
    else:
        data[at:at] = noise
    try:
        message = GOSSIP_CODEC.decode_untrusted(data)
    except ProtocolError:
        return
    for item in message.items if isinstance(message, Push) else ():
        assert isinstance(item, Item)
        try:
            opening = opener(item, NOW)
        except ProtocolError:
            continue
        assert opening.body == stated(work_units=7)
