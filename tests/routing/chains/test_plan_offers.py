"""From adverts to holders and rooms: requirements are a filter at each stage, measurements beat claims."""

from __future__ import annotations

import pytest

from protocol.adverts import IslandAdvert, OfferedCargo, ShardRange
from protocol.ids import CargoDigest
from protocol.instants import SECOND_NS, Instant
from protocol.ring import StageWork
from routing.chains.costs import UNKNOWN_LAYER_NS, Speed, measured_layer_ns
from routing.chains.offers import held_ranges, holders_of, rooms_of
from routing.chains.plan import ModelShape
from routing.islands import IslandBook
from routing.placement import JobShape, Query
from routing.requirements import ANYTHING, Outlook, Requirements

CARGO = CargoDigest("sha256:" + "c" * 64)
NOW = Instant(100 * SECOND_NS)
LATER = Instant(101 * SECOND_NS)
MS = 1_000_000
MIB = 1 << 20


def advert(first=0, last=4, *, draining=False, room_mib=0, layer_ns=2 * MS, **changes):
    shard = ShardRange(first, last, 8, room_mib, layer_ns, layer_ns // 4, 3 * MS)
    fields = {
        "digest": CARGO,
        "name": "m",
        "version": "1",
        "runtime": "llmcpp",
        "state": "ready",
        "context_length": 2048,
        "slots": 4,
        "active": 1,
        "queued": 0,
        "decode_tps": 0.0,
        "prefill_tps": 0.0,
        "shard": shard,
    }
    offered = OfferedCargo(**{**fields, **changes})
    return IslandAdvert(name="x", cargos=(offered,), draining=draining, addresses=("/ip4/192.0.2.1/tcp/1",))


def book_of(**islands):
    book = IslandBook()
    for peer, said in islands.items():
        book.admit(NOW, peer, said, 1)
    return book


def query(requirements=ANYTHING, excluded=frozenset(), **outlook):
    return Query(JobShape(CARGO, 100, 100), Outlook(**outlook), excluded, requirements)


def test_ready_layers_become_a_holder():
    book = book_of(a=advert(queued=1))
    book.reserve("a")
    (holder,) = holders_of(LATER, book.offers(CARGO), query(karma_of=lambda peer: 700))
    assert (holder.peer, holder.first, holder.last) == ("a", 0, 4)
    assert (holder.slots, holder.active, holder.karma_milli) == (4, 2, 700)
    assert holder.speed == Speed(2 * MS, MS // 2, 3 * MS)
    assert holder.load_age_ns == SECOND_NS
    assert holder.addresses == ("/ip4/192.0.2.1/tcp/1",)
    assert not holder.suspect
    book.suspect(LATER, "a")
    assert holders_of(LATER, book.offers(CARGO), query())[0].suspect


def test_who_has_all_or_nothing_or_is_not_ready_is_no_holder():
    book = book_of(
        whole=advert(shard=None),
        room=advert(0, 0, room_mib=100),
        loading=advert(state="loading"),
        failed=advert(state="failed"),
        leaving=advert(draining=True),
        left=advert(),
    )
    assert [h.peer for h in holders_of(NOW, book.offers(CARGO), query(excluded=frozenset({"left"})))] == []
    assert [r.peer for r in rooms_of(NOW, book.offers(CARGO), query())] == ["room"]
    # What is being loaded counts when layers are given out, what leaves or failed does not.
    assert [h.peer for h in held_ranges(book.offers(CARGO))] == ["loading", "left"]
    assert [h.peer for h in held_ranges(book.offers(CARGO), ["left"])] == ["loading"]


@pytest.mark.parametrize("of", [holders_of, rooms_of])
def test_requirements_are_a_filter(of):
    first_last = (0, 4) if of is holders_of else (0, 0)
    book = book_of(
        cheap=advert(*first_last, room_mib=100, output_ask_ucr=10),
        dear=advert(*first_last, room_mib=100, output_ask_ucr=10_000),
    )

    def peers(asked):
        return [each.peer for each in of(NOW, book.offers(CARGO), asked)]

    assert peers(query()) == ["cheap", "dear"]
    assert peers(query(Requirements(max_price_ucr=100))) == ["cheap"]
    karma = {"cheap": 100, "dear": 5000}
    assert peers(query(Requirements(karma_floor_milli=1000), karma_of=karma.__getitem__)) == ["dear"]
    assert peers(query(Requirements(gpu=True))) == []
    assert peers(query(excluded=frozenset({"cheap"}))) == ["dear"]


def test_what_was_measured_beats_what_is_claimed():
    book = book_of(a=advert(layer_ns=2 * MS), b=advert(0, 0, room_mib=7, layer_ns=2 * MS))
    measured = {"a": 6 * MS, "b": 1 * MS}
    (holder,) = holders_of(NOW, book.offers(CARGO), query(), measured.__getitem__)
    assert holder.speed == Speed(6 * MS, 3 * MS // 2, 9 * MS)  # three times as slow in everything
    (room,) = rooms_of(NOW, book.offers(CARGO), query(), measured.__getitem__)
    assert room.speed == Speed(1 * MS, MS // 2, 3 * MS)  # a quick row says nothing of prompts
    assert room.room_bytes == 7 * MIB


def test_nothing_known_is_slow():
    speed = Speed.of(ShardRange(0, 4, 8))
    assert speed.token_layer_ns == UNKNOWN_LAYER_NS
    assert speed.chunk_layer_ns == 63 * UNKNOWN_LAYER_NS
    assert speed.head_ns > speed.token_layer_ns


def test_a_hop_less_the_way_is_the_layers():
    work = StageWork(peer="p", index=1, first=4, last=8, hop_ns=50 * MS)
    assert measured_layer_ns(work, 30 * MS) == 5 * MS
    assert measured_layer_ns(work, None) == 50 * MS // 4
    assert measured_layer_ns(work, 90 * MS) == 50 * MS // 4 // 4  # the estimate of the way was too long
    assert measured_layer_ns(StageWork(peer="p", index=1, first=4, last=8), 1) == 0


def test_a_models_parts_are_counted_at_its_ends():
    class Sizes:
        layer_bytes = (10, 20, 30)
        embedding_bytes = 100
        head_bytes = 200
        kv_bytes = 2
        draft_kv_bytes = 5

    shape = ModelShape.of_sharding(Sizes(), slots=2, context=3)
    assert shape.layer_bytes == (22, 32, 42)
    assert shape.bytes_of(0, 1) == 122
    assert shape.bytes_of(1, 2) == 32
    assert shape.bytes_of(1, 3) == 32 + 42 + 200 + 5 * 6
    assert shape.total_bytes == shape.bytes_of(0, 3) == 22 + 32 + 42 + 330
    with pytest.raises(ValueError, match="layers"):
        ModelShape([], 1, 1)
    with pytest.raises(ValueError, match="negative"):
        ModelShape([1, -1], 1, 1)
