"""Files in pieces that are verified one by one: a file of which only some pieces are here, on disk.

    ROOT/pieces/abcd....data    the file, with holes where pieces are missing
    ROOT/pieces/abcd....list    the piece list: 32 bytes for each piece (docs/cargos.md)
    ROOT/pieces/abcd....map     which pieces are here, one bit each, and when that was written down

A piece is written only after its hash was found right, and marked after it was written. A killed process loses
nothing by that. After a loss of power marks may be on the disk without their pieces: so the map names the
boot in which it was written, and pieces marked in an earlier one are hashed again first.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

import trio

from cargos.errors import CargoError, StoreUnusable, WrongContent
from cargos.lock import file_lock
from cargos.manifest import MAX_PIECE_BYTES, CargoFile
from cargos.part import store_errors
from protocol.limits import MIB
from protocol.pieces import HASH_BYTES

#: Files up to this size in pieces of 1 MiB, up to 16 times as much in pieces of 2 MiB, others in the largest.
SMALL_FILE_BYTES: Final = 1 << 30
_BOOT: Final = Path("/proc/sys/kernel/random/boot_id")
#: Bytes in the map before the bits: the boot's id, 36 characters, padded.
_MAP_HEAD: Final = 64


def piece_bytes_for(size_bytes: int) -> int:
    """The piece size that suits a file."""
    if size_bytes <= SMALL_FILE_BYTES:
        return MIB
    return 2 * MIB if size_bytes <= 16 * SMALL_FILE_BYTES else MAX_PIECE_BYTES


def list_sha256(hashes: bytes) -> str:
    """The manifest's `pieces_sha256` of this piece list."""
    return hashlib.sha256(hashes).hexdigest()


def hash_pieces(
    path: Path, piece_bytes: int, progress: Callable[[int], None] | None = None
) -> tuple[bytes, str]:
    """The piece list of a whole file, and the file's SHA-256 in hex. Raises OSError.

    `progress` is told the bytes done so far. For worker threads: a second per GB.
    """
    whole = hashlib.sha256()
    hashes: list[bytes] = []
    done = 0
    with path.open("rb", buffering=0) as file:
        while data := _read_fully(file.fileno(), done, piece_bytes):
            whole.update(data)
            hashes.append(hashlib.sha256(data).digest())
            done += len(data)
            if progress is not None:
                progress(done)
    return b"".join(hashes), whole.hexdigest()


def pieces_of_ranges(ranges: Iterable[tuple[int, int]], piece_bytes: int) -> tuple[int, ...]:
    """The pieces that hold these bytes ((start, end) each), in rising order."""
    wanted: set[int] = set()
    for start, end in ranges:
        wanted.update(range(start // piece_bytes, -(-end // piece_bytes)))
    return tuple(sorted(wanted))


class PieceFile:
    """A file with a piece list, of which some pieces are here. Its methods may be called from any thread.

    `PieceFile.held` to write, alone among all processes; `PieceFile.look` to read what is there, also while
    another process writes.
    """

    def __init__(self, folder: Path, file: CargoFile, data: int, marks: int, *, writable: bool) -> None:
        self.file: Final = file
        self.path: Final = _paths(folder, file)[0]
        self._list_path: Final = _paths(folder, file)[1]
        self._data = data
        self._marks = marks
        self._writable = writable
        self._lock = threading.Lock()
        self._bits = bytearray(-(-file.pieces // 8))
        self._hashes: bytes | None = None

    @classmethod
    @asynccontextmanager
    async def held(
        cls, root: Path, file: CargoFile, waiting: Callable[[], None] | None = None
    ) -> AsyncGenerator[PieceFile]:
        """Hold the file for writing; `waiting` is called now and then while another process does. `root`: the
        store's. Raises StoreUnusable, CargoError (the file has no piece list).
        """
        if not file.pieces:
            raise CargoError(
                f"the manifest names no pieces of {file.name}", "'archi-node cargo pieces FILE' makes them."
            )
        folder = root / "pieces"
        with store_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            (root / "locks").mkdir(exist_ok=True)
        async with file_lock(root / "locks" / f"{file.sha256}.pieces.lock", waiting):
            piece_file = await trio.to_thread.run_sync(cls._open_to_write, folder, file)
            try:
                yield piece_file
            finally:
                piece_file.close()

    @classmethod
    def look(cls, root: Path, file: CargoFile) -> PieceFile | None:
        """What is here of it, to read; None if there is nothing, or nothing sure."""
        folder = root / "pieces"
        data_path, _, map_path = _paths(folder, file)
        if not file.pieces:
            return None
        try:
            data = os.open(data_path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            marks = os.open(map_path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            os.close(data)
            return None
        found = cls(folder, file, data, marks, writable=False)
        if os.pread(marks, _MAP_HEAD, 0) != _boot() or os.fstat(data).st_size != file.size_bytes:
            found.close()
            return None
        return found

    @classmethod
    def _open_to_write(cls, folder: Path, file: CargoFile) -> PieceFile:
        data_path, _, map_path = _paths(folder, file)
        with store_errors(data_path):
            data = os.open(data_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                marks = os.open(map_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except BaseException:
                os.close(data)
                raise
            piece_file = cls(folder, file, data, marks, writable=True)
            try:
                piece_file._take_up()
            except BaseException:
                piece_file.close()
                raise
        return piece_file

    # --- what it is -------------------------------------------------------------------------------

    @property
    def size_bytes(self) -> int:
        return self.file.size_bytes

    @property
    def piece_bytes(self) -> int:
        return self.file.piece_bytes

    @property
    def pieces(self) -> int:
        return self.file.pieces

    def size_of(self, index: int) -> int:
        """Bytes of a piece. Raises IndexError."""
        if not 0 <= index < self.pieces:
            raise IndexError(f"piece {index} of {self.pieces}")
        return min(self.piece_bytes, self.size_bytes - index * self.piece_bytes)

    # --- what is here -----------------------------------------------------------------------------

    def has(self, index: int) -> bool:
        """Whether this piece is here."""
        if not 0 <= index < self.pieces:
            return False
        if self._writable:
            return bool(self._bits[index // 8] & 1 << index % 8)
        byte = os.pread(self._marks, 1, _MAP_HEAD + index // 8)
        return bool(byte and byte[0] & 1 << index % 8)

    def bits(self) -> bytes:
        """All pieces that are here: piece i is bit `i % 8` (1 << it) of byte `i // 8`."""
        if self._writable:
            with self._lock:
                return bytes(self._bits)
        return os.pread(self._marks, len(self._bits), _MAP_HEAD).ljust(len(self._bits), b"\0")

    def missing(self, wanted: Iterable[int]) -> tuple[int, ...]:
        """Those of `wanted` that are not here, in order."""
        bits = self.bits()
        return tuple(index for index in wanted if not bits[index // 8] & 1 << index % 8)

    def hashes(self) -> bytes | None:
        """The piece list; None while it is not known."""
        if self._hashes is None:
            self._hashes = _read_list(self._list_path, self.file)
        return self._hashes

    def read(self, offset: int, size: int) -> bytes:
        """Exactly these bytes, all of pieces that are here. Raises CargoError, OSError."""
        if offset < 0 or size < 0 or offset + size > self.size_bytes:
            raise CargoError(f"{self.file.name} has no bytes {offset} to {offset + size}")
        if self.missing(pieces_of_ranges([(offset, offset + size)], self.piece_bytes)):
            raise CargoError(f"not all of bytes {offset} to {offset + size} of {self.file.name} are here")
        data = _read_fully(self._data, offset, size)
        if len(data) != size:
            raise CargoError(f"{self.path} shrank while it was read", "Is another program cleaning up?")
        return data

    # --- what comes -------------------------------------------------------------------------------

    async def learn(self, hashes: bytes) -> None:
        """Take the piece list. Raises WrongContent if it is not the manifest's, StoreUnusable."""
        await trio.to_thread.run_sync(self.learn_sync, hashes)

    async def put(self, index: int, data: bytes) -> None:
        """Verify a piece and keep it. Raises WrongContent, StoreUnusable, CargoError (no piece list yet)."""
        await trio.to_thread.run_sync(self.put_sync, index, data)

    def learn_sync(self, hashes: bytes) -> None:
        """`learn`, blocking."""
        check_list(self.file, hashes)
        with store_errors(self._list_path):
            new = self._list_path.with_name(f"{self._list_path.name}.{os.getpid()}.new")
            new.write_bytes(hashes)
            new.replace(self._list_path)  # if it is damaged later, its hash tells
        self._hashes = hashes

    def put_sync(self, index: int, data: bytes) -> None:
        """`put`, blocking."""
        size, hashes = self.size_of(index), self.hashes()
        if hashes is None:
            raise CargoError(f"a piece of {self.file.name} came before the piece list")
        expected = hashes[index * HASH_BYTES : (index + 1) * HASH_BYTES]
        got = hashlib.sha256(data).digest()
        if len(data) != size or got != expected:
            name = f"piece {index} of {self.file.name}"
            raise WrongContent(name, f"{size} bytes, sha256 {expected.hex()}", f"{len(data)}, {got.hex()}")
        with store_errors(self.path), self._lock:
            if self._bits[index // 8] & 1 << index % 8:
                return
            _write_fully(self._data, index * self.piece_bytes, data)
            self._mark(index, here=True)

    def close(self) -> None:
        """Let go of the file. Safe to call twice."""
        with self._lock:
            if self._data >= 0:
                os.close(self._data)
                os.close(self._marks)
                self._data = self._marks = -1

    def _mark(self, index: int, *, here: bool) -> None:
        bit = 1 << index % 8
        self._bits[index // 8] = self._bits[index // 8] | bit if here else self._bits[index // 8] & ~bit
        _write_fully(self._marks, _MAP_HEAD + index // 8, self._bits[index // 8 : index // 8 + 1])

    def _take_up(self) -> None:
        """What an earlier process left."""
        boot = _boot()
        head = os.pread(self._marks, _MAP_HEAD, 0)
        fits = os.fstat(self._data).st_size == self.size_bytes
        marked = _read_fully(self._marks, _MAP_HEAD, len(self._bits)) if fits else b""
        self._bits[: len(marked)] = marked
        for index in range(self.pieces, 8 * len(self._bits)):  # bits of no piece
            self._bits[index // 8] &= ~(1 << index % 8)
        if head != boot:
            self._hash_again()
        os.truncate(self._data, self.size_bytes)
        os.truncate(self._marks, 0)
        _write_fully(self._marks, 0, boot + self._bits)

    def _hash_again(self) -> None:
        hashes = self.hashes()
        for index in range(self.pieces):
            if not self._bits[index // 8] & 1 << index % 8:
                continue
            data = _read_fully(self._data, index * self.piece_bytes, self.size_of(index))
            right = hashes is not None and (
                hashlib.sha256(data).digest() == hashes[index * HASH_BYTES : (index + 1) * HASH_BYTES]
            )
            if not right:
                self._bits[index // 8] &= ~(1 << index % 8)


def check_list(file: CargoFile, hashes: bytes) -> None:
    """Raises WrongContent if this is not the file's piece list."""
    if len(hashes) != file.pieces * HASH_BYTES or list_sha256(hashes) != file.pieces_sha256:
        raise WrongContent(
            f"the piece list of {file.name}",
            f"{file.pieces * HASH_BYTES} bytes, sha256 {file.pieces_sha256}",
            f"{len(hashes)}, {list_sha256(hashes)}",
        )


def remove_pieces(root: Path, file: CargoFile) -> int:
    """Delete what is here of it in pieces; the caller holds it. Returns the bytes freed."""
    freed = 0
    for path in _paths(root / "pieces", file):
        with suppress(OSError):
            freed += path.stat().st_blocks * 512
        with store_errors(path):
            path.unlink(missing_ok=True)
    return freed


def _paths(folder: Path, file: CargoFile) -> tuple[Path, Path, Path]:
    stem = folder / file.sha256
    return stem.with_suffix(".data"), stem.with_suffix(".list"), stem.with_suffix(".map")


def _read_list(path: Path, file: CargoFile) -> bytes | None:
    try:
        hashes = path.read_bytes()
        check_list(file, hashes)
    except (OSError, WrongContent):
        return None
    return hashes


def _boot() -> bytes:
    """What tells this run of the machine from others; different each time where it can not be told."""
    try:
        name = _BOOT.read_text("ascii").strip()
    except OSError:
        name = os.urandom(16).hex()
    return name.encode().ljust(_MAP_HEAD, b"\0")[:_MAP_HEAD]


def _read_fully(descriptor: int, offset: int, size: int) -> bytes:
    """`size` bytes, or as many as there are."""
    data = os.pread(descriptor, size, offset)
    while data and len(data) < size:
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def _write_fully(descriptor: int, offset: int, data: bytes | bytearray) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        if not written:
            raise StoreUnusable("the disk takes no more bytes", "Free some space.")
        view, offset = view[written:], offset + written
