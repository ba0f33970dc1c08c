"""Keys from the configuration; the rate limiter on a clock of the test's own."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway import rate_limit
from gateway.keys import ApiKey, KeyConfigError, KeyRing, hash_of_key, new_key
from gateway.rate_limit import MINUTE_NS, RateLimiter, limit_headers
from protocol.instants import SECOND_NS


def test_new_keys():
    first, second = new_key(), new_key()
    assert first != second
    assert first.startswith("ak_")
    assert len(first) == 46


def test_from_config():
    key = new_key()
    other = new_key()
    ring = KeyRing.from_config(
        [
            {"name": "ann", "key": key},
            {"name": "bob", "sha256": hashlib.sha256(other.encode()).hexdigest(), "requests_per_minute": 5},
        ]
    )
    ann = ring.identify_untrusted(f"Bearer {key}")
    assert ann == ApiKey("ann", hash_of_key(key))
    bob = ring.identify_untrusted(f"bearer  {other} ")
    assert bob is not None
    assert (bob.name, bob.requests_per_minute) == ("bob", 5)
    assert key not in repr(ann)


GOOD = "ak_a-key-that-is-long-enough"


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        ([], "open = true"),
        ([{"name": "a"}], "either key or sha256"),
        ([{"name": "a", "key": GOOD, "sha256": "0" * 64}], "either key or sha256"),
        ([{"key": GOOD}], "name"),
        ([{"name": "", "key": GOOD}], "name"),
        ([{"name": "a", "key": "short"}], "at least 16"),
        ([{"name": "a", "key": 5}], "at least 16"),
        ([{"name": "a", "sha256": "ABC"}], "64 lower-case"),
        ([{"name": "a", "key": GOOD, "requests_per_minute": -1}], "requests_per_minute"),
        ([{"name": "a", "key": GOOD, "requests_per_minute": True}], "requests_per_minute"),
        ([{"name": "a", "key": GOOD, "rpm": 1}], "unknown field 'rpm'"),
        ([{"name": "a", "key": GOOD}, {"name": "a", "key": GOOD + "2"}], "two keys"),
        ([{"name": "a", "key": GOOD}, {"name": "b", "key": GOOD}], "the same as 'a'"),
    ],
)
def test_what_can_not_be_used_is_explained(entries, told):
    with pytest.raises(KeyConfigError, match=told):
        KeyRing.from_config(entries)


@settings(deadline=None)
@given(st.none() | st.text(max_size=600))
def test_identify_survives_anything(authorization):
    assert KeyRing.from_config([{"name": "a", "key": GOOD}]).identify_untrusted(authorization) is None


def test_a_minutes_allowance_then_one_per_step():
    limiter = RateLimiter()
    start = 1000 * SECOND_NS
    for left in (2, 1, 0):
        allowance = limiter.take("a", 3, start)
        assert (allowance.wait_ns, allowance.remaining) == (0, left)
    refused = limiter.take("a", 3, start)
    assert refused.wait_ns == MINUTE_NS // 3
    assert limiter.take("b", 3, start).wait_ns == 0
    assert limiter.take("a", 3, start + refused.wait_ns - 1).wait_ns == 1
    assert limiter.take("a", 3, start + refused.wait_ns).wait_ns == 0
    assert limiter.take("a", 3, start + refused.wait_ns).wait_ns > 0
    full_again = start + refused.wait_ns + MINUTE_NS
    assert limiter.take("a", 3, full_again).remaining == 2


@settings(deadline=None)
@given(st.integers(1, 50), st.lists(st.integers(0, 90 * SECOND_NS), min_size=1, max_size=200))
def test_never_more_than_twice_the_limit_in_a_minute_and_waiting_helps(limit, gaps):
    limiter = RateLimiter()
    now = 0
    passed: list[int] = []
    for gap in gaps:
        now += gap % (3 * MINUTE_NS // limit)
        allowance = limiter.take("a", limit, now)
        assert 0 <= allowance.remaining < limit
        if allowance.wait_ns == 0:
            passed.append(now)
        else:
            now += allowance.wait_ns
            assert limiter.take("a", limit, now).wait_ns == 0
            passed.append(now)
        # A burst of `limit`, and what a minute gives back.
        assert sum(1 for at in passed if at > now - MINUTE_NS) <= 2 * limit


def test_forgets_the_idle(monkeypatch):
    monkeypatch.setattr(rate_limit, "MAX_CONSUMERS", 3)
    limiter = RateLimiter()
    for consumer in "aabcd":
        limiter.take(consumer, 2, 0)
    assert limiter.take("b", 2, 0).remaining == 0  # remembered
    assert limiter.take("a", 2, 0).remaining == 1  # forgotten, so it starts afresh


def test_headers():
    allowance = RateLimiter().take("a", 100, 0)
    assert dict(limit_headers(allowance)) == {
        "x-ratelimit-limit-requests": "100",
        "x-ratelimit-remaining-requests": "99",
        "x-ratelimit-reset-requests": "0.600s",
    }
