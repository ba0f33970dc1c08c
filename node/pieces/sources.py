"""What is here to be served: whole files of the store, and files of which some pieces are here. For threads."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

import trio

from cargos.errors import CargoError, WrongContent
from cargos.manifest import CargoFile
from cargos.shards.pieces import PieceFile, check_list, hash_pieces
from cargos.store import CargoStore
from node.pieces.server import PieceSource


class BlobSource:
    """A whole file. Raises OSError when it is opened, if it is gone."""

    def __init__(self, path: Path, file: CargoFile, hashes: bytes) -> None:
        self._file = file
        self._hashes = hashes
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    @property
    def size_bytes(self) -> int:
        return self._file.size_bytes

    @property
    def piece_bytes(self) -> int:
        return self._file.piece_bytes

    @property
    def pieces(self) -> int:
        return self._file.pieces

    def has(self, index: int) -> bool:
        return 0 <= index < self.pieces

    def bits(self) -> bytes:
        bits = bytearray(b"\xff" * (-(-self.pieces // 8)))
        if self.pieces % 8:
            bits[-1] = (1 << self.pieces % 8) - 1
        return bytes(bits)

    def hashes(self) -> bytes:
        return self._hashes

    def read(self, offset: int, size: int) -> bytes:
        data = os.pread(self._descriptor, size, offset)
        if len(data) != size:  # a blob is never written again; Linux reads up to 2 GiB at once
            raise CargoError(f"{self._file.name} shrank while it was read", "Is another program cleaning up?")
        return data

    def close(self) -> None:
        os.close(self._descriptor)


class Shelf:
    """The files of a store that have piece lists. `open` is `PieceServer`'s `find`."""

    def __init__(self, store: CargoStore) -> None:
        self._store: Final = store
        self._files: dict[str, CargoFile] = {}
        self._lists: dict[str, bytes] = {}
        self._wrong: set[CargoFile] = set()

    def know(self, *files: CargoFile) -> bool:
        """These files may be here, now or later. Whether any of them is news."""
        news = {
            file.sha256: file
            for file in files
            if file.pieces and file.sha256 not in self._files and file not in self._wrong
        }
        self._files |= news
        return bool(news)

    def open(self, sha256: str) -> PieceSource | None:
        """What is here of a file; None: nothing, or not known (yet)."""
        file = self._files.get(sha256)
        if file is None:
            return None
        hashes = self._lists.get(sha256)
        path = self._store.verified_path(file)
        if path is not None and hashes is not None:
            try:
                return BlobSource(path, file, hashes)
            except OSError:
                return None
        return PieceFile.look(self._store.root, file)

    def look(self) -> frozenset[str]:
        """The files of which something is here (SHA-256). May take a second per GB the first time: a file whose
        piece list is not known is hashed. Cancelled between pieces, if called by `trio.to_thread`.

        Raises StoreUnusable (the list of Cargos can not be read).
        """
        for cargo in self._store.list():
            self.know(*cargo.manifest.files)
        return frozenset(file.sha256 for file in tuple(self._files.values()) if self._is_here(file))

    def _is_here(self, file: CargoFile) -> bool:
        path = self._store.verified_path(file)
        if path is None:
            self._lists.pop(file.sha256, None)
            partial = PieceFile.look(self._store.root, file)
            if partial is None:
                return False
            try:
                return any(partial.bits()) and partial.hashes() is not None
            finally:
                partial.close()
        if file.sha256 not in self._lists:
            hashes = self._list(file, path)
            if hashes is None:
                # Not hashed again; another manifest may know better.
                self._wrong.add(file)
                del self._files[file.sha256]
                return False
            self._lists[file.sha256] = hashes
        return True

    def _list(self, file: CargoFile, path: Path) -> bytes | None:
        """The piece list of a whole file, kept beside it; None if the manifest's word on it is wrong."""
        kept = path.with_suffix(".pieces")
        try:
            hashes = kept.read_bytes()
            check_list(file, hashes)
        except (OSError, WrongContent):
            hashes, _ = hash_pieces(path, file.piece_bytes, lambda _: trio.from_thread.check_cancelled())
            try:
                check_list(file, hashes)
            except WrongContent:
                return None
            with suppress(OSError):  # a store that we may only read: hashed again after the next start
                new = kept.with_name(f"{kept.name}.{os.getpid()}.new")
                new.write_bytes(hashes)
                new.replace(kept)
        return hashes
