from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.identity import new_identity
from node.p2p import AddressInvalid, parse_address, parse_peer_address
from node.p2p.addresses import addresses_of

PEER = new_identity().peer


@pytest.mark.parametrize(
    "text",
    [
        "/ip4/127.0.0.1/tcp/0",
        f"/ip4/10.1.2.3/tcp/4001/p2p/{PEER}",
        f"/ip6/::1/tcp/65535/p2p/{PEER}",
        "/dns/gateway.example.org/tcp/443",
        "/dns4/localhost/tcp/1",
    ],
)
def test_addresses_come_out_as_they_went_in(text: str) -> None:
    assert str(parse_address(text)) == text


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "of the form"),
        ("127.0.0.1:4001", "of the form"),
        ("/ip4/127.0.0.1/udp/1", "of the form"),
        ("/ip4/127.0.0.1/tcp/1/ws/x", "of the form"),
        ("/ip4/1.2.3/tcp/1", "1.2.3"),
        ("/ip6/127.0.0.1/tcp/1", "127.0.0.1"),
        ("/ip4/127.0.0.1/tcp/65536", "port"),
        ("/ip4/127.0.0.1/tcp/-1", "port"),
        ("/ip4/127.0.0.1/tcp/\u0661", "port"),
        ("/unix/x/tcp/1", "dials"),
        ("/dns/a b/tcp/1", "host name"),
        ("/ip4/127.0.0.1/tcp/1/p2p/Qm", "peer id"),
        ("/ip4/127.0.0.1/tcp/1/p2p/" + "1" * 400, "too long"),
    ],
)
def test_bad_addresses_are_explained(text: str, why: str) -> None:
    with pytest.raises(AddressInvalid, match=why):
        parse_address(text)


@given(
    st.text(max_size=80)
    | st.lists(st.sampled_from(["", "ip4", "tcp", "1", "::", "dns", "p2p", PEER])).map("/".join)
)
def test_any_text_is_an_address_or_invalid(text: str) -> None:
    try:
        address = parse_address(text)
    except AddressInvalid:
        return
    assert parse_address(str(address)) == address


def test_a_peer_must_be_named_to_be_dialled() -> None:
    with pytest.raises(AddressInvalid, match="whom to expect"):
        parse_peer_address("/ip4/127.0.0.1/tcp/1")


def test_a_wildcard_becomes_addresses_that_others_can_dial() -> None:
    found = addresses_of(("0.0.0.0", 4001), PEER)
    assert found
    assert all("0.0.0.0" not in text and text.endswith(f"/tcp/4001/p2p/{PEER}") for text in found)
    assert "/ip4/127.0.0.1/" in found[-1]
