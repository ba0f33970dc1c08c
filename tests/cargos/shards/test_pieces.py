"""Files in pieces: nothing wrong gets in, nothing right is lost, whoever is killed when."""

import hashlib
import os
import signal
import subprocess
import sys

import msgspec
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from cargos.errors import CargoError, StoreUnusable, WrongContent
from cargos.manifest import CargoFile
from cargos.shards import pieces as module
from cargos.shards.pieces import (
    PieceFile,
    check_list,
    hash_pieces,
    list_sha256,
    piece_bytes_for,
    pieces_of_ranges,
    remove_pieces,
)

PIECE = 1 << 14


def file_of(data, piece=PIECE):
    hashes = b"".join(hashlib.sha256(data[at : at + piece]).digest() for at in range(0, len(data), piece))
    file = CargoFile(
        name="x",
        role="model",
        size_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        sources=("file:x",),
        piece_bytes=piece,
        pieces_sha256=list_sha256(hashes),
    )
    return file, hashes


DATA = os.urandom(9 * PIECE + 77)
FILE, HASHES = file_of(DATA)


def piece(index):
    return DATA[index * PIECE : (index + 1) * PIECE]


async def test_pieces_come_in_any_order_and_are_read_while_more_come(tmp_path):
    assert PieceFile.look(tmp_path, FILE) is None
    async with PieceFile.held(tmp_path, FILE) as ours:
        assert (ours.pieces, ours.size_of(0), ours.size_of(9)) == (10, PIECE, 77)
        assert ours.bits() == b"\0\0"
        await ours.learn(HASHES)
        for index in (9, 0, 8, 0):
            await ours.put(index, piece(index))
        assert ours.bits() == b"\x01\x03"
        assert ours.missing([0, 1, 8, 9, 2]) == (1, 2)
        other = PieceFile.look(tmp_path, FILE)
        assert other is not None
        assert other.bits() == b"\x01\x03"
        assert [other.has(index) for index in (0, 1, 9, 10, -1)] == [True, False, True, False, False]
        assert other.hashes() == HASHES
        await ours.put(1, piece(1))
        assert other.has(1)
        assert other.read(100, 2 * PIECE - 100) == DATA[100 : 2 * PIECE]
        for offset, size in ((0, 3 * PIECE), (9 * PIECE, 78), (-1, 1), (len(DATA), 1)):
            with pytest.raises(CargoError):
                other.read(offset, size)
        other.close()
        other.close()
    async with PieceFile.held(tmp_path, FILE) as ours:
        assert ours.bits() == b"\x03\x03"
        assert remove_pieces(tmp_path, FILE) > 0
    assert PieceFile.look(tmp_path, FILE) is None


async def test_nothing_wrong_gets_in(tmp_path):
    async with PieceFile.held(tmp_path, FILE) as ours:
        with pytest.raises(CargoError, match="before the piece list"):
            await ours.put(0, piece(0))
        for wrong in (b"", HASHES[:-32], HASHES[:-1] + b"x", HASHES + bytes(32)):
            with pytest.raises(WrongContent, match="piece list"):
                await ours.learn(wrong)
        await ours.learn(HASHES)
        for index, data in ((0, piece(1)), (0, piece(0)[:-1]), (9, piece(9) + b"0"), (0, b"")):
            with pytest.raises(WrongContent, match=f"piece {index} of x"):
                await ours.put(index, data)
        for index in (-1, 10):
            with pytest.raises(IndexError):
                await ours.put(index, piece(0))
        assert ours.bits() == b"\0\0"


async def test_one_writer_at_a_time(tmp_path):
    waited = trio.Event()

    async def second(task_status):
        async with PieceFile.held(tmp_path, FILE, waited.set) as ours:
            assert ours.has(3)
            task_status.started()

    async with trio.open_nursery() as nursery, PieceFile.held(tmp_path, FILE) as ours:
        nursery.start_soon(nursery.start, second)
        with trio.fail_after(20):
            await waited.wait()
        await ours.learn(HASHES)
        await ours.put(3, piece(3))


async def test_after_a_loss_of_power_marked_pieces_are_hashed_again(tmp_path, monkeypatch):
    async with PieceFile.held(tmp_path, FILE) as ours:
        await ours.learn(HASHES)
        for index in range(10):
            await ours.put(index, piece(index))
        path = ours.path
    with path.open("r+b") as data:
        data.seek(4 * PIECE)
        data.write(bytes(PIECE))  # never reached the disk
    monkeypatch.setattr(module, "_boot", lambda: b"another boot".ljust(64, b"\0"))
    assert PieceFile.look(tmp_path, FILE) is None
    async with PieceFile.held(tmp_path, FILE) as ours:
        assert ours.missing(range(10)) == (4,)
    assert PieceFile.look(tmp_path, FILE) is not None
    path.with_suffix(".list").write_bytes(HASHES[:-1])
    monkeypatch.setattr(module, "_boot", lambda: b"and another".ljust(64, b"\0"))
    async with PieceFile.held(tmp_path, FILE) as ours:
        assert ours.hashes() is None
        assert ours.bits() == b"\0\0"


@pytest.mark.parametrize("damage", ["data", "map", "map length"])
async def test_what_somebody_damaged_is_begun_again(damage, tmp_path):
    async with PieceFile.held(tmp_path, FILE) as ours:
        await ours.learn(HASHES)
        await ours.put(0, piece(0))
        path = ours.path
    if damage == "data":
        path.write_bytes(b"short")
    elif damage == "map":
        path.with_suffix(".map").write_bytes(b"\xff" * 66)
    else:
        path.with_suffix(".map").write_bytes(path.with_suffix(".map").read_bytes() + b"\xff" * 9)
    async with PieceFile.held(tmp_path, FILE) as ours:
        assert ours.bits() in (b"\0\0", b"\1\0")
        assert ours.has(0) == (damage != "data")
        for index in ours.missing(range(10)):
            await ours.put(index, piece(index))
        assert ours.read(0, len(DATA)) == DATA


WRITER = """
import sys, trio
from pathlib import Path
from cargos.shards.pieces import PieceFile
import msgspec
from cargos.manifest import CargoFile
file = msgspec.json.decode(Path(sys.argv[1], "file.json").read_bytes(), type=CargoFile)
data = Path(sys.argv[1], "whole").read_bytes()
async def main():
    async with PieceFile.held(Path(sys.argv[1]), file) as ours:
        await ours.learn(Path(sys.argv[1], "hashes").read_bytes())
        for index in range(file.pieces):
            await ours.put(index, data[index * file.piece_bytes : (index + 1) * file.piece_bytes])
            print(index, flush=True)
trio.run(main)
"""


def test_a_killed_process_loses_nothing_it_was_told_is_kept(tmp_path):
    (tmp_path / "whole").write_bytes(DATA)
    (tmp_path / "hashes").write_bytes(HASHES)
    (tmp_path / "file.json").write_bytes(msgspec.json.encode(FILE))
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        for line in writer.stdout:
            if int(line) == 4:
                writer.send_signal(signal.SIGKILL)
                break

    async def look():
        async with PieceFile.held(tmp_path, FILE) as ours:
            assert not ours.missing(range(5))
            for index in range(10):
                if ours.has(index):
                    assert ours.read(index * PIECE, ours.size_of(index)) == piece(index)

    trio.run(look)


async def test_without_pieces_in_the_manifest(tmp_path):
    bare = msgspec.structs.replace(FILE, piece_bytes=0, pieces_sha256="")
    assert PieceFile.look(tmp_path, bare) is None
    with pytest.raises(CargoError, match="no pieces"):
        async with PieceFile.held(tmp_path, bare):
            pass


async def test_a_store_that_can_not_be_written(tmp_path):
    (tmp_path / "pieces").write_bytes(b"a file in its place")
    with pytest.raises(StoreUnusable):
        async with PieceFile.held(tmp_path, FILE):
            pass


def test_lists_of_whole_files(tmp_path):
    (tmp_path / "x").write_bytes(DATA)
    done = []
    assert hash_pieces(tmp_path / "x", PIECE, done.append) == (HASHES, FILE.sha256)
    assert done[-1] == len(DATA)
    assert sorted(done) == done
    check_list(FILE, HASHES)
    assert [piece_bytes_for(1 << n) >> 20 for n in (10, 30, 34, 36)] == [1, 1, 2, 4]


@given(
    ranges=st.lists(
        st.tuples(st.integers(0, 5000), st.integers(1, 900)).map(lambda pair: (pair[0], sum(pair))), max_size=9
    ),
    size=st.sampled_from([1, 7, 64]),
)
def test_pieces_of_ranges_cover_them_and_no_more(ranges, size):
    got = pieces_of_ranges(ranges, size)
    wanted = {at // size for start, end in ranges for at in range(start, end)}
    assert got == tuple(sorted(wanted))


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(st.tuples(st.integers(0, 9), st.booleans(), st.booleans()), max_size=12))
def test_any_history(steps, tmp_path_factory):
    """Right and wrong pieces, taken up again in between: what is marked is right, what was put is marked."""
    root = tmp_path_factory.mktemp("pieces")

    async def run():
        kept = set()
        at = 0
        while True:
            async with PieceFile.held(root, FILE) as ours:
                await ours.learn(HASHES)
                assert {index for index in range(10) if ours.has(index)} == kept
                while at < len(steps):
                    index, right, again = steps[at]
                    at += 1
                    if right:
                        await ours.put(index, piece(index))
                        kept.add(index)
                    else:
                        with pytest.raises(WrongContent):
                            await ours.put(index, bytes(ours.size_of(index)))
                    if again:
                        break
                else:
                    for index in kept:
                        assert ours.read(index * PIECE, ours.size_of(index)) == piece(index)
                    return

    trio.run(run)
