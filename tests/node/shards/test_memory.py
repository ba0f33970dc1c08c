"""Whose layers have the memory: who is idle, who gives way; and nothing thrashes. The clock is a number."""

from __future__ import annotations

from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cargos.manifest import Sharding
from node.shards.hosted import HostedShard
from node.shards.memory import UNUSED_S, ShardMemory
from protocol.limits import MIB
from routing.chains.costs import ModelShape

LAYERS, ROOM, IDLE_MINUTES = 10, 100, 5
IDLE_S = 60.0 * IDLE_MINUTES


def shard(layer_mib: int = 10) -> HostedShard:
    sharding = Sharding(
        architecture="llama",
        layers=LAYERS,
        width=64,
        layer_bytes=(layer_mib * MIB,) * LAYERS,
        embedding_bytes=0,
        head_bytes=0,
        kv_bytes=1,
    )
    shape = ModelShape(sharding.layer_bytes, 0, 0)
    return HostedShard(cast("Any", None), sharding, shape, 512)


def hold(one: HostedShard, last: int, now: float, *, used: bool = False) -> None:
    one.first, one.last = one.wanted = one.occupied = (0, last)
    one.state, one.ready_at = "ready", now
    if used:
        one.used_at = now


@pytest.fixture
def memory() -> ShardMemory:
    return ShardMemory(ROOM, idle_minutes=IDLE_MINUTES)


def test_layers_are_idle_once_they_were_of_no_use_for_long(memory: ShardMemory) -> None:
    one = shard()
    assert not memory.is_idle(one, 1e9), "room is no layers"
    hold(one, 5, 1000.0)
    assert not memory.is_idle(one, 1000.0 + UNUSED_S - 1)
    assert memory.is_idle(one, 1000.0 + UNUSED_S), "nobody came to use them"
    one.used_at = 1010.0
    assert not memory.is_idle(one, 1010.0 + IDLE_S - 1)
    assert memory.is_idle(one, 1010.0 + IDLE_S)
    for state in ("fetching", "loading"):
        one.state = state  # type: ignore[assignment]
        assert not memory.is_idle(one, 1e9)
    one.state = "failed"
    assert memory.is_idle(one, 1000.0)
    one.state, one.wanted = "ready", (5, 7)
    assert not memory.is_idle(one, 1e9), "it drains, and others come"
    never = ShardMemory(ROOM, idle_minutes=0)
    hold(one, 5, 0.0)
    assert not never.is_idle(one, 1e9)


def test_the_least_recently_used_give_way_and_no_more_than_must(memory: ShardMemory) -> None:
    old, older, busy, new = shard(), shard(), shard(), shard()
    shards = [old, older, busy, new]
    hold(old, 3, 200.0, used=True)
    hold(older, 3, 100.0, used=True)
    hold(busy, 2, 900.0, used=True)
    now = 1000.0
    assert memory.free_mib(new, shards) == 20
    assert memory.giving_way(new, 20, shards, now) == []
    assert memory.giving_way(new, 30, shards, now) == [older]
    assert memory.giving_way(new, 50, shards, now) == [older]
    assert memory.giving_way(new, 60, shards, now) == [older, old]
    assert memory.giving_way(new, 90, shards, now) is None
    older.wanted = old.wanted = (0, 0)
    new.wanted = (0, 8)
    assert memory.free_mib(busy, shards) == 20
    assert not memory.fits_now(new, shards), "their workers still have it"
    older.occupied = old.occupied = (0, 0)
    assert memory.fits_now(new, shards)


@given(
    asked=st.lists(st.tuples(st.integers(0, 2), st.floats(1, 120)), min_size=1, max_size=120),
    lasts=st.tuples(*[st.integers(4, LAYERS)] * 3),
)
def test_memory_changes_hands_once_in_the_idle_time_at_most(
    asked: list[tuple[int, float]], lasts: tuple[int, int, int]
) -> None:
    """Three Cargos of which any two may be too much, asked for in any order: what is used stays, and whoever is
    asked for again and again gets in once the others are idle.
    """
    memory = ShardMemory(ROOM, idle_minutes=IDLE_MINUTES)
    shards = [shard() for _ in range(3)]
    now = begun = 1000.0
    moves = 0
    for index, pause_s in asked:
        now += pause_s
        one = shards[index]
        if one.wanted == (0, 0):
            going = memory.giving_way(one, one.mib_of(0, lasts[index]), shards, now)
            if going is None:
                fitting = sum(
                    o.mib_of(*o.wanted) for o in shards if o is not one and not memory.is_idle(o, now)
                )
                assert fitting + one.mib_of(0, lasts[index]) > ROOM, "it was refused for nothing"
                continue
            for other in going:
                assert now - other.used_at >= IDLE_S, "it was in use"
                other.wanted = other.occupied = (0, 0)
                other.first = other.last = 0
                other.state = "room"
                moves += 1
            hold(one, lasts[index], now)
        one.used_at = now
        assert sum(o.mib_of(*o.wanted) for o in shards) <= ROOM
    assert moves <= 3 * (1 + (now - begun) / IDLE_S)
