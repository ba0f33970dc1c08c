"""One stage by itself: truncation, memory given away and taken, what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio

from cargos.runtimes.base import RuntimeFailed
from cargos.runtimes.shards import SessionMemory, open_stage
from cargos.runtimes.shards.base import Computed, Refused

TOKENS = [504, 4314, 282, 260, 1215, 314, 253, 1109, 30, 198, 504, 2101]


def ids(tokens) -> bytes:
    return b"".join(token.to_bytes(4, "little") for token in tokens)


class Watched:
    """A stage and all that it says."""

    def __init__(self) -> None:
        self.events = []
        self.moved = trio.lowlevel.ParkingLot()

    def on_event(self, event) -> None:
        self.events.append(event)
        self.moved.unpark_all()

    async def until(self, there: Callable[[], object]):
        with trio.fail_after(30):
            while not (found := there()):
                await self.moved.park()
        return found

    def rows(self, session: str) -> list[bytes]:
        """Its rows so far, as one who passes them on would have them."""
        have: list[bytes] = []
        for event in self.events:
            if isinstance(event, Computed) and event.session == session:
                size = len(event.payload) // event.rows
                del have[event.position :]
                have += [event.payload[i * size : (i + 1) * size] for i in range(event.rows)]
        return have

    async def rows_to(self, session: str, count: int) -> list[bytes]:
        await self.until(lambda: len(self.rows(session)) == count)
        return self.rows(session)

    def refusals(self) -> list[Refused]:
        return [event for event in self.events if isinstance(event, Refused)]


@pytest.fixture
async def first(stage_spec):
    """The first half of the model."""
    watched = Watched()
    async with open_stage(stage_spec(0, 15, slots=3), watched.on_event) as stage:
        await stage.ready()
        yield stage, watched


@pytest.mark.model
async def test_rows_are_forgotten_from_the_position_of_a_feed_on(first):
    stage, seen = first
    for name in ("a", "b"):
        stage.open(name, dtype="f32", prompt=6, deterministic=False)
    stage.feed("a", 0, 8, ids(TOKENS[:8]))
    await seen.rows_to("a", 8)
    stage.feed("a", 6, 3, ids([1, 2, 3]))  # drafts
    await seen.rows_to("a", 9)
    stage.feed("a", 7, 5, ids(TOKENS[7:12]))  # all of these are void, and one before
    stage.feed("a", 6, 6, ids(TOKENS[6:12]))
    stage.feed("b", 0, 12, ids(TOKENS))
    assert await seen.rows_to("a", 12) == await seen.rows_to("b", 12)


@pytest.mark.model
@pytest.mark.parametrize("deterministic", [False, True])
async def test_a_sessions_memory_moves_to_another_place_and_nothing_changes(first, deterministic):
    stage, seen = first
    for name in ("a", "b"):
        stage.open(name, dtype="f32", prompt=8, deterministic=deterministic)
    stage.feed("a", 0, 9, ids(TOKENS[:9]))
    await seen.rows_to("a", 9)
    memory = await stage.export("a")
    assert memory.rows == 9
    await stage.import_memory("b", memory)
    for name in ("a", "b"):
        stage.feed(name, 9, 1, ids(TOKENS[9:10]))
        stage.feed(name, 10, 2, ids(TOKENS[10:12]))
    await seen.rows_to("a", 12)
    await seen.until(
        lambda: any(
            isinstance(e, Computed) and e.session == "b" and e.position + e.rows == 12 for e in seen.events
        )
    )
    theirs = {}
    for event in seen.events:
        if isinstance(event, Computed) and event.session == "b":
            size = len(event.payload) // event.rows
            theirs |= {event.position + i: event.payload[i * size : (i + 1) * size] for i in range(event.rows)}
    assert [theirs[i] for i in (9, 10, 11)] == seen.rows("a")[9:]
    assert (await stage.export("nobody")).rows == 0
    with pytest.raises(RuntimeFailed, match="no memory of this slice"):
        await stage.import_memory("b", SessionMemory(9, memory.data[:-10]))
    with pytest.raises(RuntimeFailed, match="not open"):
        await stage.import_memory("nobody", memory)


@pytest.mark.model
async def test_what_makes_no_sense_is_refused_and_the_others_go_on(first):
    stage, seen = first
    stage.open("good", dtype="f32", prompt=4, deterministic=False)
    bad = {
        "gap": (5, 1, ids([1])),
        "size": (0, 2, ids([1])),
        "id": (0, 1, ids([1 << 30])),
        "long": (0, 4000, ids([1] * 4000)),
    }
    for name, (position, rows, payload) in bad.items():
        stage.open(name, dtype="f32", prompt=1, deterministic=False)
        stage.feed(name, position, rows, payload)
        refused = await seen.until(lambda name=name: [r for r in seen.refusals() if r.session == name])
        assert refused[0].code == "invalid"
        stage.feed(name, 0, 1, ids([1]))  # it is closed: this is for nobody
    stage.feed("good", 0, 4, ids(TOKENS[:4]))
    await seen.rows_to("good", 4)
    assert {event.session for event in seen.events if isinstance(event, Computed)} == {"good"}
    assert stage.load().active == 1
    assert stage.load().restarts == 0


@pytest.mark.model
async def test_a_stage_that_is_full_says_so_and_has_room_after_a_close(first):
    stage, seen = first
    for name in "abcd":
        stage.open(name, dtype="f32", prompt=1, deterministic=False)
    refused = await seen.until(seen.refusals)
    assert [(r.session, r.code) for r in refused] == [("d", "busy")]
    stage.close("b")
    stage.open("d", dtype="f32", prompt=1, deterministic=False)
    for name in "acd":
        stage.feed(name, 0, 2, ids(TOKENS[:2]))
    rows = [await seen.rows_to(name, 2) for name in "acd"]
    assert rows[0] == rows[1] == rows[2]
    stage.open("a", dtype="f32", prompt=1, deterministic=False)  # again, from nothing
    stage.feed("a", 1, 1, ids(TOKENS[1:2]))
    await seen.until(lambda: len(seen.refusals()) == 2)


@pytest.mark.model
async def test_sessions_move_together_when_one_between_them_ends(first):
    """What is in memory moves along."""
    stage, seen = first
    for name in "abc":
        stage.open(name, dtype="f32", prompt=4, deterministic=False)
        stage.feed(name, 0, 6, ids(TOKENS[:6]))
    for name in "abc":
        await seen.rows_to(name, 6)
    stage.close("b")
    for name in "ac":
        stage.feed(name, 6, 6, ids(TOKENS[6:]))
    assert await seen.rows_to("a", 12) == await seen.rows_to("c", 12)
    stage.open("d", dtype="f32", prompt=4, deterministic=False)
    stage.feed("d", 0, 12, ids(TOKENS))
    assert await seen.rows_to("d", 12) == seen.rows("a")


@pytest.mark.model
async def test_rows_that_are_no_numbers_are_refused(stage_spec, bytes_of_row):
    seen = Watched()
    async with open_stage(stage_spec(15, 20), seen.on_event) as stage:
        for dtype in ("f32", "f16s", "q8x"):
            stage.open(dtype, dtype=dtype, prompt=1, deterministic=False)
            stage.feed(dtype, 0, 1, b"\xff" * bytes_of_row(dtype))
            refused = await seen.until(lambda dtype=dtype: [r for r in seen.refusals() if r.session == dtype])
            assert refused[0].code == "invalid"
        # A number so large that the layers overflow must not end the worker either.
        stage.open("huge", dtype="f32", prompt=1, deterministic=False)
        stage.feed("huge", 0, 1, b"\xff\xff\x7f\x7f" * 576)
        await seen.until(
            lambda: [e for e in seen.events if isinstance(e, Refused | Computed) and e.session == "huge"]
        )
        assert stage.load().restarts == 0
