"""A file on its way into the store: written, hashed and bounded as it comes."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Generator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Final

import trio

from cargos.errors import StoreUnusable, WrongContent
from cargos.manifest import CargoFile
from protocol.limits import MIB

#: Bytes gathered before a thread writes and hashes them: a hop costs 40 us, hashing 1 MiB about 1 ms.
FLUSH_BYTES: Final = MIB
#: Bytes hashed per hop when a file is read back; between hops a cancellation is noticed.
READ_BYTES: Final = 32 * MIB


@contextmanager
def store_errors(path: Path) -> Generator[None]:
    """Turn what the operating system says of the store's own disk into StoreUnusable."""
    try:
        yield
    except OSError as error:
        raise _unusable(error, path) from error


def _unusable(error: OSError, path: Path) -> StoreUnusable:
    where = error.filename or path
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = "Free some space, or point ARCHI_CACHE at another disk; what was fetched so far is kept."
        return StoreUnusable(f"the disk of {path} is full", hint)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        hint = "Make it writable for this user, or point ARCHI_CACHE at a folder that is."
        return StoreUnusable(f"no permission to write {where}", hint)
    return StoreUnusable(f"{where}: {error.strerror or error}", "Check the disk and ARCHI_CACHE.")


class Part:
    """The bytes of one file so far, in `path`. Made by `Part.open`; the caller holds the file's lock."""

    def __init__(self, path: Path, file: CargoFile, handle: FileIO) -> None:
        self.path: Final = path
        self.file: Final = file
        #: Whether some of it is from before this was opened.
        self.resumed = False
        #: Whether anything changed since.
        self.touched = False
        self._handle = handle
        self._hash = hashlib.sha256()
        self._offset = 0
        self._buffer = bytearray()

    @classmethod
    async def open(cls, path: Path, file: CargoFile) -> Part:
        """Take up what an earlier attempt left (hashing it), or begin. Raises StoreUnusable."""
        part = cls(path, file, await trio.to_thread.run_sync(_open, path))
        try:
            size = await trio.to_thread.run_sync(lambda: os.fstat(part._handle.fileno()).st_size)
            if size > file.size_bytes:
                await part.restart()
                size = 0
            while part._offset < size:
                await trio.to_thread.run_sync(part._read_back)
            part.resumed = part._offset > 0
            part.touched = False
        except BaseException:
            part._handle.close()
            raise
        return part

    @property
    def offset(self) -> int:
        """Bytes received so far: where the next one belongs."""
        return self._offset + len(self._buffer)

    @property
    def complete(self) -> bool:
        return self.offset == self.file.size_bytes

    async def write(self, data: bytes) -> None:
        """Append. Raises WrongContent if the file would exceed its size, StoreUnusable."""
        if self.offset + len(data) > self.file.size_bytes:
            raise WrongContent(self.file.name, f"{self.file.size_bytes} bytes", "more")
        self.touched = True
        self._buffer += data
        if len(self._buffer) >= FLUSH_BYTES:
            await trio.to_thread.run_sync(self._flush)

    async def restart(self) -> None:
        """Drop everything received so far."""
        await trio.to_thread.run_sync(self._truncate)

    async def aclose(self) -> None:
        """Keep what is there for a later attempt. Safe to call twice, completes even when cancelled."""
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._close)

    async def discard(self) -> None:
        """Leave nothing behind."""
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._discard)

    async def sha256(self) -> str:
        """Of all bytes received, in hex; they are on the disk when this returns. Raises StoreUnusable."""
        await trio.to_thread.run_sync(self._sync)
        return self._hash.hexdigest()

    def _read_back(self) -> None:
        with store_errors(self.path):
            self._handle.seek(self._offset)
            data = self._handle.read(min(READ_BYTES, self.file.size_bytes - self._offset))
        if not data:
            raise StoreUnusable(f"{self.path} shrank while it was read", "Is another program cleaning up?")
        self._hash.update(data)
        self._offset += len(data)

    def _flush(self) -> None:
        if not self._buffer:
            return
        data, self._buffer = self._buffer, bytearray()  # on an error it is lost, and not tried again
        view = memoryview(data)
        with store_errors(self.path):
            self._handle.seek(self._offset)
            while view:
                view = view[self._handle.write(view) or 0 :]
        self._hash.update(data)
        self._offset += len(data)

    def _truncate(self) -> None:
        with store_errors(self.path):
            self._handle.truncate(0)
        self._buffer.clear()
        self._offset = 0
        self._hash = hashlib.sha256()
        self.resumed = False
        self.touched = True

    def _sync(self) -> None:
        self._flush()
        with store_errors(self.path):
            os.fsync(self._handle.fileno())

    def _close(self) -> None:
        if self._handle.closed:
            return
        try:
            self._flush()
        finally:
            self._handle.close()

    def _discard(self) -> None:
        self._buffer.clear()
        self._handle.close()
        with store_errors(self.path):
            self.path.unlink(missing_ok=True)


def _open(path: Path) -> FileIO:
    with store_errors(path):
        # Unbuffered: what was written is in the kernel's hands, so that a killed process loses nothing.
        return FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b")
