"""Ids, dice, instants, envelopes."""

from __future__ import annotations

import contextlib
import dataclasses

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.adverts import HELLO, Hello
from protocol.dice import Dice, draw_u64, draw_unit
from protocol.envelope import CLOCK_TOLERANCE_NS, Envelope, Signer, open_untrusted
from protocol.errors import Fault, ProtocolError
from protocol.ids import (
    cargo_digest_of,
    cargo_digest_untrusted,
    peer_id_of,
    peer_id_untrusted,
    public_key_of_untrusted,
)
from protocol.instants import SECOND_NS, UnixNs, seconds_to_ns

SIGNER = Signer(bytes(range(32)))
NOW = UnixNs(1_800_000_000 * SECOND_NS)
BODY = Hello("coral", "0.1.0", ("island",))


def sealed(**changes: object) -> Envelope:
    made = SIGNER.seal("greeting", BODY, sequence=7, expires_unix_ns=UnixNs(NOW + SECOND_NS))
    return msgspec.structs.replace(made, **changes)


# --- ids ---


@given(st.binary(min_size=32, max_size=32))
def test_a_peer_id_is_its_key(key: bytes) -> None:
    name = peer_id_of(key)
    assert name.startswith("12D3KooW")
    assert public_key_of_untrusted(name) == key


@given(st.text(max_size=80))
def test_any_text_is_a_peer_id_or_a_protocol_error(text: str) -> None:
    with contextlib.suppress(ProtocolError):
        assert peer_id_of(public_key_of_untrusted(text)) == text


@pytest.mark.parametrize(
    "text", ["", "12D3KooW", "Qm" + "1" * 44, SIGNER.peer + "1", " " + SIGNER.peer, SIGNER.peer + "\n"]
)
def test_what_is_no_peer_id(text: str) -> None:
    with pytest.raises(ProtocolError):
        peer_id_untrusted(text)


def test_digest_and_job_id_admit_one_spelling() -> None:
    digest = cargo_digest_of(b"x")
    assert cargo_digest_untrusted(digest) == digest
    for wrong in (digest.upper(), digest + "\n", digest[:-1], digest.removeprefix("sha256:")):
        with pytest.raises(ProtocolError):
            cargo_digest_untrusted(wrong)


# --- dice ---


def test_dice_replay_and_streams_differ() -> None:
    one, two, other = Dice(1, 2), Dice(1, 2), Dice(1, 3)
    first = [one.u64() for _ in range(5)]
    assert first == [two.u64() for _ in range(5)]
    assert first != [other.u64() for _ in range(5)]
    assert first == [draw_u64(1, 2, i) for i in range(5)]


def test_dice_throw_the_same_on_every_machine() -> None:
    # Fixed by the algorithm (BLAKE2b, RFC 7693), not by this machine: simulations must be citable.
    assert draw_u64(0, 0, 0) == 2891389769238885931  # b2sum -l 64 of 24 zero bytes
    assert draw_unit(42, 7, 3) == 0.13493790263588556


@given(st.integers(0, 2**64 - 1), st.integers(1, 2**63))
def test_below_stays_below(seed: int, bound: int) -> None:
    assert 0 <= Dice(seed).below(bound) < bound


@given(st.integers(0, 2**64 - 1), st.lists(st.integers(), max_size=20), st.integers(0, 25))
def test_sample_takes_different_items(seed: int, items: list[int], count: int) -> None:
    taken = Dice(seed).sample(list(enumerate(items)), count)
    assert len(taken) == len(set(taken)) == min(count, len(items))


def test_unit_is_uniform_enough() -> None:
    dice = Dice(5)
    draws = [dice.unit() for _ in range(20_000)]
    assert abs(sum(draws) / len(draws) - 0.5) < 0.01
    assert abs(sum(draw < 0.1 for draw in draws) / len(draws) - 0.1) < 0.01


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0, 1e10])
def test_durations_are_finite(bad: float) -> None:
    with pytest.raises(ValueError, match="duration"):
        seconds_to_ns(bad)


# --- envelopes ---


def test_an_envelope_opens() -> None:
    opened = open_untrusted(sealed(), "greeting", HELLO, NOW)
    assert opened.issuer == SIGNER.peer
    assert opened.sequence == 7
    assert opened.body == BODY


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"sequence": 8}, Fault.SIGNATURE),
        ({"expires_unix_ns": NOW + 2 * SECOND_NS}, Fault.SIGNATURE),
        ({"body": b"\x80"}, Fault.SIGNATURE),
        ({"issuer": Signer(b"2" * 32).public_key}, Fault.SIGNATURE),
        ({"signature": bytes(64)}, Fault.SIGNATURE),
        ({"signature": bytes(63)}, Fault.MALFORMED),
        ({"issuer": b""}, Fault.MALFORMED),
        ({"sequence": -1}, Fault.MALFORMED),
        ({"sequence": 1 << 63}, Fault.MALFORMED),
        ({"kind": "other"}, Fault.UNEXPECTED),
    ],
)
def test_a_changed_envelope_does_not_open(changes: dict[str, object], fault: Fault) -> None:
    with pytest.raises(ProtocolError) as caught:
        open_untrusted(sealed(**changes), "greeting", HELLO, NOW)
    assert caught.value.fault is fault


def test_a_signature_for_one_kind_is_none_for_another() -> None:
    with pytest.raises(ProtocolError) as caught:
        open_untrusted(sealed(kind="farewell"), "farewell", HELLO, NOW)
    assert caught.value.fault is Fault.SIGNATURE


def test_expiry_with_tolerance() -> None:
    late = UnixNs(NOW + SECOND_NS + CLOCK_TOLERANCE_NS)
    open_untrusted(sealed(), "greeting", HELLO, late)
    with pytest.raises(ProtocolError) as caught:
        open_untrusted(sealed(), "greeting", HELLO, UnixNs(late + 1))
    assert caught.value.fault is Fault.EXPIRED


def test_a_signer_never_shows_its_key() -> None:
    assert repr(SIGNER) == f"Signer({SIGNER.peer})"
    assert not dataclasses.is_dataclass(SIGNER)
