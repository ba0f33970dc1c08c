from __future__ import annotations

import contextlib
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dht import messages as m
from dht.limits import MAX_CONTACTS, MAX_RECORDS_IN_ANSWER
from dht.records import seal_record
from dht.wire import DHT_CODEC, Contact, from_wire_untrusted, to_wire
from protocol.envelope import Signer
from protocol.errors import ProtocolError
from protocol.instants import UnixNs

HEAD = (7, 1 << 62, 250, False)
KEY = (1 << 256) - 5


def contact_of(peer: int) -> Contact:
    return Contact(f"peer-{peer}", (f"/ip4/10.0.0.{peer}/tcp/1",))


def intern(contact: Contact) -> int | None:
    number = contact.peer.removeprefix("peer-")
    return int(number) if number.isascii() and number.isdecimal() else None


@pytest.fixture
def every_message(signer: Callable[[str], Signer]) -> list[m.DhtMessage]:
    record = seal_record(signer("a"), "karma", "x", b"v", sequence=3, expires_unix_ns=UnixNs(1 << 61))
    return [
        m.Ping(*HEAD),
        m.Pong(*HEAD),
        m.Pong(*HEAD, (1, 2), (5, 0)),
        m.FindNode(*HEAD, KEY),
        m.FindNode(*HEAD, 0),
        m.Nodes(*HEAD, (1, 2), (5, 0)),
        m.FindRecords(*HEAD, KEY),
        m.Records(*HEAD, (1,), (5,), (record, record)),
        m.FindProvidersOf(*HEAD, KEY),
        m.Providers(*HEAD, (1,), (5,), (2, 3), (9, 0)),
        m.Store(*HEAD, record),
        m.AddProvider(*HEAD, KEY),
        m.Kept(*HEAD, int(m.Outcome.FULL)),
        m.GetPage(*HEAD, 0, 1 << 256),
        m.GetPage(*HEAD, 5, KEY),
        m.CompareTables(*HEAD, (1, (1 << 62) - 1)),
        m.Page(*HEAD, (1, 2), (0, 0), True),
        m.Differences(*HEAD, (0, 255)),
    ]


def test_every_message_survives_the_wire(every_message: list[m.DhtMessage]) -> None:
    assert {type(x) for x in every_message} == {
        *m.DhtQuery.__args__,
        *m.DhtAnswer.__args__,
    }
    for message in every_message:
        data = DHT_CODEC.encode(to_wire(message, contact_of))
        assert from_wire_untrusted(DHT_CODEC.decode_untrusted(data), intern) == message


def test_contacts_that_are_not_accepted_are_left_out_with_their_coordinates() -> None:
    wire = to_wire(m.Nodes(*HEAD, (1, 2, 3), (11, 12, 13)), contact_of)
    back = from_wire_untrusted(wire, lambda contact: None if contact.peer == "peer-2" else intern(contact))
    assert back == m.Nodes(*HEAD, (1, 3), (11, 13))


def test_an_answer_of_the_largest_k_fits() -> None:
    many = tuple(range(MAX_CONTACTS))

    def wordy(peer: int) -> Contact:
        return Contact(f"peer-{peer}", ("/dns4/" + "x" * 240,) * 8)

    data = DHT_CODEC.encode(to_wire(m.Nodes(*HEAD, many, many), wordy))
    assert len(DHT_CODEC.decode_untrusted(data).n) == MAX_CONTACTS  # type: ignore[union-attr]


def test_a_usual_answer_is_small() -> None:
    def usual(peer: int) -> Contact:
        return Contact("12D3KooW" + "a" * 44, (f"/ip4/203.0.113.{peer}/tcp/4001",))

    data = DHT_CODEC.encode(to_wire(m.Nodes(*HEAD, tuple(range(20)), (1 << 62,) * 20), usual))
    assert len(data) < 2200
    assert len(DHT_CODEC.encode(to_wire(m.FindNode(*HEAD, KEY), usual))) < 100


def altered(message: m.DhtMessage, **changes: object) -> bytes:
    plain = msgspec.msgpack.decode(DHT_CODEC.encode(to_wire(message, contact_of)))
    return msgspec.msgpack.encode({**plain, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"c": -1},
        {"c": 1 << 53},
        {"x": -1},
        {"x": 1 << 63},
        {"e": 1001},
        {"e": "many"},
        {"u": 3},
        {"k": b"short"},
        {"k": b"x" * 33},
        {"type": "nonsense"},
    ],
)
def test_values_out_of_range_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ProtocolError):
        DHT_CODEC.decode_untrusted(altered(m.FindNode(*HEAD, KEY), **changes))


def test_lists_that_are_too_long_are_refused(signer: Callable[[str], Signer]) -> None:
    record = seal_record(signer("a"), "karma", "x", b"v" * 4096, sequence=3, expires_unix_ns=UnixNs(1 << 61))
    many = (1,) * (MAX_CONTACTS + 1)
    with pytest.raises(ProtocolError):
        DHT_CODEC.decode_untrusted(DHT_CODEC.encode(to_wire(m.Nodes(*HEAD, many, many), contact_of)))
    full = m.Records(*HEAD, (), (), (record,) * MAX_RECORDS_IN_ANSWER)
    wire = DHT_CODEC.decode_untrusted(DHT_CODEC.encode(to_wire(full, contact_of)))
    with pytest.raises(ProtocolError):
        from_wire_untrusted(wire, intern)  # each is small enough, all together are not
    with pytest.raises(ProtocolError):
        DHT_CODEC.decode_untrusted(altered(m.Ping(*HEAD)) + b"\x00")


def test_a_page_end_that_is_no_key_is_refused() -> None:
    wire = DHT_CODEC.decode_untrusted(altered(m.GetPage(*HEAD, 0, KEY), z=b"abc"))
    with pytest.raises(ProtocolError):
        from_wire_untrusted(wire, intern)


def decode_all(data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        from_wire_untrusted(DHT_CODEC.decode_untrusted(data), intern)


@given(st.binary(max_size=300))
@settings(max_examples=300, deadline=None)
def test_no_bytes_break_the_decoder(data: bytes) -> None:
    decode_all(data)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_no_damage_to_a_message_breaks_the_decoder(data: st.DataObject) -> None:
    record = seal_record(Signer(b"s" * 32), "karma", "x", b"v", sequence=3, expires_unix_ns=UnixNs(1 << 61))
    messages: list[m.DhtMessage] = [
        m.Providers(*HEAD, (1,), (5,), (2, 3), (9, 0)),
        m.Records(*HEAD, (1,), (5,), (record,)),
        m.CompareTables(*HEAD, (1, 2)),
        m.GetPage(*HEAD, 5, KEY),
    ]
    encoded = bytearray(DHT_CODEC.encode(to_wire(data.draw(st.sampled_from(messages)), contact_of)))
    for _ in range(data.draw(st.integers(1, 6))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(encoded)))
    decode_all(bytes(encoded[:cut]))
    decode_all(bytes(encoded))


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(1 << 63), (1 << 64) - 1)
        | st.binary(max_size=40)
        | st.text(max_size=9),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from("cxeuknrpozdsm"), inner),
        max_leaves=20,
    ),
    st.sampled_from(["find", "nodes", "records", "providers", "put", "kept", "page", "compare", "differ"]),
)
@settings(max_examples=200, deadline=None)
def test_no_structure_breaks_the_decoder(value: object, tag: str) -> None:
    body = value if isinstance(value, dict) else {"n": value}
    decode_all(msgspec.msgpack.encode({"type": tag, "c": 1, "x": 1, "e": 1, "u": False, **body}))
