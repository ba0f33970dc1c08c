"""What strangers write is decoded or refused, never more."""

from __future__ import annotations

from contextlib import suppress

import trio
from hypothesis import example, given, settings
from hypothesis import strategies as st

from node.control import ControlMethods, ControlRefused, NoParams
from node.identity import new_identity
from node.overlay.addresses import (
    MAX_ADDRESSES_TAKEN,
    Scope,
    group_of_host,
    scope_of_remote,
    take_addresses_untrusted,
)
from node.overlay.book import AddressBook
from node.overlay.cache import PEER_CACHE
from node.overlay.names import key_of_name
from node.overlay.records import PEER_RECORD
from protocol.errors import ProtocolError

PEER = new_identity().peer
WORDS = st.sampled_from(
    [
        "",
        "ip4",
        "ip6",
        "dns",
        "tcp",
        "p2p",
        "p2p-circuit",
        "127.0.0.1",
        "::1",
        "8.8.8.8",
        "1",
        "0",
        "65536",
        PEER,
        "x",
    ]
)
ADDRESSES = st.one_of(st.text(max_size=300), st.lists(WORDS, max_size=12).map("/".join))

QUIET = settings(deadline=None, max_examples=150)


@QUIET
@given(st.lists(ADDRESSES, max_size=20), st.sampled_from(list(Scope)))
def test_addresses(texts: list[str], narrowest: Scope) -> None:
    taken = take_addresses_untrusted(PEER, texts, narrowest)
    assert len(taken) <= MAX_ADDRESSES_TAKEN
    assert len(set(taken)) == len(taken)
    assert all(text.endswith(f"/p2p/{PEER}") and "/dns" not in text for text in taken)
    assert take_addresses_untrusted(PEER, taken, narrowest) == taken


@QUIET
@given(st.one_of(st.text(max_size=70), st.just(PEER)), st.lists(ADDRESSES, max_size=10))
def test_contacts(name: str, addresses: list[str]) -> None:
    book = AddressBook(new_identity().peer)
    number = book.intern_untrusted(name, addresses, Scope.MACHINE)
    if number is not None:
        assert book.peer_of(number) == name == PEER
        assert book.addresses(number)
        assert book.group_of(number) >= 0
        book.own_word_untrusted(number, addresses, Scope.MACHINE)
        book.met(number, "127.0.0.1:1")


@QUIET
@given(st.text(max_size=60))
@example("[::1]:5")
@example("relayed by somebody")
def test_remotes(text: str) -> None:
    assert scope_of_remote(text) in Scope
    assert group_of_host(text) >= 0


@QUIET
@given(st.binary(max_size=300))
@example(b"\x82\xa4type\xa5peers\xa5peers\xc0")
def test_files_and_records(data: bytes) -> None:
    for codec in (PEER_CACHE, PEER_RECORD):
        with suppress(ProtocolError):
            codec.decode_untrusted(data)


@QUIET
@given(st.text(max_size=300))
def test_names(text: str) -> None:
    with suppress(ValueError):
        assert 0 <= key_of_name(text) < 1 << 256


@QUIET
@given(st.binary(max_size=200))
@example(b'{"method": "status", "params": 7}')
@example(b'{"method": 7}')
@example(b"[" * 5000)
def test_control_requests(line: bytes) -> None:
    methods = ControlMethods()

    async def status(_: NoParams) -> str:
        return "well"

    methods.serve("status", NoParams, status)

    async def ask() -> None:
        with suppress(ControlRefused):
            assert await methods.answer_untrusted(line) == "well"

    trio.run(ask)
