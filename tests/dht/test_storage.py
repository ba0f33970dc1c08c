"""Records and provider records: what is kept, what is refused, what expires."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dht import limits
from dht.coordinates import pack
from dht.messages import Outcome
from dht.providers import ProviderStore
from dht.records import (
    NAMESPACE_KARMA,
    NAMESPACE_PEER,
    RECORD_KIND,
    RecordBody,
    RecordStore,
    newest_of_each,
    open_record_untrusted,
    seal_record,
)
from protocol.dice import Dice
from protocol.envelope import Envelope, Opened, Signer
from protocol.errors import Fault, ProtocolError
from protocol.ids import PeerId
from protocol.instants import SECOND_NS, Instant, UnixNs

NOW = UnixNs(1_800_000_000 * SECOND_NS)
HOUR = 3600 * SECOND_NS
Signers = Callable[[str], Signer]


def put(store: RecordStore, record: Envelope, *, sender: int = 1, now: int = NOW) -> Outcome:
    return store.put_opened(record, open_record_untrusted(record, UnixNs(now)), sender, UnixNs(now))


def karma(signer: Signer, about: str, sequence: int = 1, ttl_ns: int = HOUR, value: bytes = b"+1") -> Envelope:
    return seal_record(
        signer, NAMESPACE_KARMA, about, value, sequence=sequence, expires_unix_ns=UnixNs(NOW + ttl_ns)
    )


def fake(number: int, key_name: str, *, issuer: str = "", size: int = 1) -> tuple[Envelope, Opened[RecordBody]]:
    """A record as an opened one, without the cost of signing: for filling stores."""
    body = RecordBody(NAMESPACE_KARMA, key_name, b"")
    envelope = Envelope(b"k" * 32, RECORD_KIND, 1, NOW + HOUR, b"x" * size, number.to_bytes(64, "big"))
    return envelope, Opened(PeerId(issuer or f"issuer {number}"), 1, UnixNs(NOW + HOUR), body)


def test_a_record_lies_at_the_hash_of_its_name(signer: Signers) -> None:
    store = RecordStore()
    record = karma(signer("a"), "somebody")
    assert put(store, record) is Outcome.TAKEN
    (key,) = store.keys()
    assert key == RecordBody(NAMESPACE_KARMA, "somebody", b"").key
    assert store.get(key, NOW) == (record,)
    assert key != RecordBody(NAMESPACE_PEER, "somebody", b"").key


def test_only_the_peer_writes_under_its_own_name(signer: Signers) -> None:
    me, other = signer("me"), signer("other")
    own = seal_record(me, NAMESPACE_PEER, me.peer, b"", sequence=1, expires_unix_ns=UnixNs(NOW + HOUR))
    assert open_record_untrusted(own, NOW).issuer == me.peer
    with pytest.raises(ValueError, match="own name"):
        seal_record(other, NAMESPACE_PEER, me.peer, b"", sequence=1, expires_unix_ns=UnixNs(NOW + HOUR))
    body = RecordBody(NAMESPACE_PEER, me.peer, b"")
    forged = other.seal(RECORD_KIND, body, sequence=1, expires_unix_ns=UnixNs(NOW + HOUR))
    with pytest.raises(ProtocolError) as caught:
        open_record_untrusted(forged, NOW)
    assert caught.value.fault is Fault.WRONG_ISSUER


def test_a_higher_sequence_replaces_a_lower_is_refused_the_same_is_harmless(signer: Signers) -> None:
    store = RecordStore()
    old, new = karma(signer("a"), "x", 1), karma(signer("a"), "x", 2, value=b"+2")
    assert put(store, new) is Outcome.TAKEN
    assert put(store, old) is Outcome.OLDER
    assert put(store, new) is Outcome.TAKEN
    assert len(store) == 1
    twin = karma(signer("a"), "x", 2, value=b"-9")
    assert put(store, twin) is Outcome.OLDER
    assert store.get(RecordBody(NAMESPACE_KARMA, "x", b"").key, NOW) == (new,)


def test_issuers_stand_beside_each_other(signer: Signers) -> None:
    store = RecordStore()
    one, two = karma(signer("a"), "x"), karma(signer("b"), "x")
    put(store, one)
    put(store, two)
    assert store.get(RecordBody(NAMESPACE_KARMA, "x", b"").key, NOW) == (one, two)


def test_records_expire(signer: Signers) -> None:
    store = RecordStore()
    put(store, karma(signer("a"), "x", ttl_ns=10 * SECOND_NS))
    (key,) = store.keys()
    assert store.get(key, UnixNs(NOW + 11 * SECOND_NS)) == ()
    store.expire(UnixNs(NOW + 11 * SECOND_NS))
    assert len(store) == 0


def test_a_record_is_kept_two_days_at_most(signer: Signers) -> None:
    store = RecordStore()
    put(store, karma(signer("a"), "x", ttl_ns=1000 * HOUR))
    (key,) = store.keys()
    assert store.get(key, UnixNs(NOW + 47 * HOUR))
    assert not store.get(key, UnixNs(NOW + 49 * HOUR))


def test_a_key_holds_so_many_issuers() -> None:
    store = RecordStore()
    for i in range(limits.MAX_RECORDS_PER_KEY + 5):
        outcome = store.put_opened(*fake(i, "x"), i, NOW)
        assert outcome is (Outcome.TAKEN if i < limits.MAX_RECORDS_PER_KEY else Outcome.FULL)
    # Room comes when what is there expires.
    late = UnixNs(NOW + 2 * HOUR)
    envelope, opened = fake(999, "x")
    opened = Opened(opened.issuer, 1, UnixNs(late + HOUR), opened.body)
    assert store.put_opened(envelope, opened, 1, late) is Outcome.TAKEN


@pytest.mark.parametrize("by", ["issuer", "sender"])
def test_a_flooder_fills_its_own_share_only(by: str) -> None:
    store = RecordStore()
    bound = limits.MAX_RECORDS_PER_ISSUER
    for i in range(bound + 3):
        issuer = "same" if by == "issuer" else ""
        sender = 1 if by == "sender" else i
        outcome = store.put_opened(*fake(i, f"name {i}", issuer=issuer), sender, NOW)
        assert outcome is (Outcome.TAKEN if i < bound else Outcome.FULL)
    assert store.put_opened(*fake(10**6, "other"), 10**6, NOW) is Outcome.TAKEN


def test_all_records_have_a_bound_in_number_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dht.records.MAX_RECORDS", 10)
    monkeypatch.setattr("dht.records.MAX_STORED_RECORD_BYTES", 1000)
    store = RecordStore()
    assert store.put_opened(*fake(1, "a", size=900), 1, NOW) is Outcome.TAKEN
    assert store.put_opened(*fake(2, "b", size=200), 2, NOW) is Outcome.FULL
    for i in range(3, 12):
        assert store.put_opened(*fake(i, f"n{i}"), i, NOW) is Outcome.TAKEN
    assert store.put_opened(*fake(99, "z"), 99, NOW) is Outcome.FULL


def test_of_many_answers_the_newest_of_each_issuer_counts(signer: Signers) -> None:
    a1, a2, b1 = karma(signer("a"), "x", 1), karma(signer("a"), "x", 2), karma(signer("b"), "x", 1)
    opened = [(e, open_record_untrusted(e, NOW)) for e in (a1, b1, a2)]
    assert list(newest_of_each(opened).values()) == [a2, b1]


@given(st.binary(max_size=80), st.integers(0, 200))
@settings(max_examples=60, deadline=None)
def test_a_damaged_record_is_refused_not_a_crash(noise: bytes, at: int) -> None:
    record = karma(Signer(b"s" * 32), "x")
    body = record.body[: at % len(record.body)] + noise + record.body[at % len(record.body) :]
    damaged = Envelope(
        record.issuer, record.kind, record.sequence, record.expires_unix_ns, body, record.signature
    )
    if body != record.body:
        with pytest.raises(ProtocolError):
            open_record_untrusted(damaged, NOW)


# --- providers --------------------------------------------------------------------------------------

T0 = Instant(SECOND_NS)
TTL = 3600 * SECOND_NS


def provide(store: ProviderStore, key: int, peer: int, now: int = T0, group: int = 0, at: int = 0) -> Outcome:
    return store.add(key, peer, Instant(now), coordinate=at, ttl_ns=TTL, group=group)


def test_providers_are_told_until_they_expire() -> None:
    store = ProviderStore()
    provide(store, 7, 1)
    provide(store, 7, 2, now=T0 + TTL // 2)
    assert store.get(7, 0, T0, Dice(1))[0] == (1, 2)
    assert store.get(7, 0, Instant(T0 + TTL + 1), Dice(1))[0] == (2,)
    provide(store, 7, 2, now=T0 + TTL)  # repeated
    store.expire(Instant(T0 + TTL + TTL // 2 + 1))
    assert len(store) == 1


def test_a_full_key_refuses_newcomers_and_keeps_who_repeats() -> None:
    store = ProviderStore()
    for peer in range(limits.MAX_PROVIDERS_PER_KEY):
        assert provide(store, 7, peer) is Outcome.TAKEN
    assert provide(store, 7, 10_000) is Outcome.FULL
    assert provide(store, 7, 5, now=T0 + TTL // 2) is Outcome.TAKEN
    later = T0 + TTL + 1
    assert provide(store, 7, 10_000, now=later) is Outcome.TAKEN
    assert set(store.get(7, 0, Instant(later), Dice(1))[0]) == {5, 10_000}


def test_one_network_and_one_peer_have_shares() -> None:
    store = ProviderStore()
    taken = [provide(store, 7, peer, group=3) is Outcome.TAKEN for peer in range(100)]
    assert sum(taken) == limits.MAX_PROVIDERS_PER_GROUP
    assert provide(store, 7, 200, group=4) is Outcome.TAKEN
    taken = [provide(store, key, 300) is Outcome.TAKEN for key in range(1000)]
    assert sum(taken) == limits.MAX_KEYS_PER_PROVIDER


def test_providers_have_a_bound_and_a_full_store_is_not_searched_for_each_who_knocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dht.providers.MAX_PROVIDERS", 10)
    store = ProviderStore()
    sweeps = 0
    expire = ProviderStore.expire

    def counted(self: ProviderStore, now: Instant) -> None:
        nonlocal sweeps
        sweeps += 1
        expire(self, now)

    monkeypatch.setattr(ProviderStore, "expire", counted)
    for peer in range(100):
        now = Instant(peer * SECOND_NS // 1000)
        outcome = store.add(peer, peer, now, coordinate=0, ttl_ns=HOUR, group=0)
        assert outcome == (Outcome.TAKEN if peer < 10 else Outcome.FULL)
    assert store.add(7, 3, now, coordinate=0, ttl_ns=HOUR, group=0) == Outcome.TAKEN  # one that is here
    assert sweeps == 1
    late = Instant(2 * HOUR)
    assert store.add(7, 50, late, coordinate=0, ttl_ns=HOUR, group=0) == Outcome.TAKEN


def test_all_provider_records_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dht.providers.MAX_PROVIDER_RECORDS", 5)
    store = ProviderStore()
    taken = [provide(store, peer, peer) is Outcome.TAKEN for peer in range(9)]
    assert sum(taken) == 5


def test_an_answer_names_the_nearest_and_some_others() -> None:
    ms = 1_000_000
    store = ProviderStore()
    for peer in range(100):
        provide(store, 7, peer, at=pack(peer * 2 * ms, 0, 0, ms))
    peers, places = store.get(7, pack(0, 0, 0, ms), T0, Dice(1))
    assert len(peers) == len(places) == limits.MAX_PROVIDERS_IN_ANSWER
    half = limits.MAX_PROVIDERS_IN_ANSWER // 2
    assert peers[:half] == tuple(range(half))
    assert max(peers[half:]) > 40


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9), st.integers(0, 3)), max_size=80))
def test_counts_stay_true(steps: list[tuple[int, int, int]]) -> None:
    store = ProviderStore()
    model: dict[tuple[int, int], int] = {}
    now = int(T0)
    for key, peer, what in steps:
        now += TTL // 7
        if what < 2:
            provide(store, key, peer, now=now)
            model[key, peer] = now + TTL
        elif what == 2:
            store.forget(key, peer)
            model.pop((key, peer), None)
        else:
            store.expire(Instant(now))
            model = {name: until for name, until in model.items() if until > now}
        for k in range(6):
            told = set(store.get(k, 0, Instant(now), Dice(1))[0])
            assert told == {p for (kk, p), until in model.items() if kk == k and until > now}
    store.expire(Instant(now + 2 * TTL))
    assert len(store) == 0
