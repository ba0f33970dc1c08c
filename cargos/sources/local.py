"""`file:`: copy a file of this machine."""

from __future__ import annotations

import os
import stat
from io import FileIO
from pathlib import Path
from typing import Final

import trio

from cargos.errors import SourceFailed, WrongContent
from cargos.locator import FileLocator
from cargos.part import Part
from cargos.progress import Report
from protocol.limits import MIB

COPY_BYTES: Final = 4 * MIB


async def fetch_file(locator: FileLocator, part: Part, report: Report, base: Path | None) -> None:
    """Copy the rest. `base` None: the manifest came from elsewhere and may not read files here.

    Raises SourceFailed (WrongContent if the length differs), StoreUnusable.
    """
    if base is None:
        raise SourceFailed(
            "a manifest that does not lie on this machine may not read files of it",
            "Save the manifest here and name it by its path.",
        )
    path = base / locator.path
    handle = await trio.to_thread.run_sync(_open, path, part)
    try:
        while not part.complete:
            data = await trio.to_thread.run_sync(_read, handle, part)
            if not data:
                return
            await part.write(data)
            report("copying", part.offset, part.file.size_bytes)
    finally:
        handle.close()


def _open(path: Path, part: Part) -> FileIO:
    try:
        # Non-blocking, so that a pipe in the file's place does not hold us for ever.
        handle = FileIO(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb")
    except OSError as error:
        raise SourceFailed(
            f"can not read {path}: {error.strerror}", "Check the path and its rights."
        ) from error
    info = os.fstat(handle.fileno())
    if not stat.S_ISREG(info.st_mode):
        handle.close()
        raise SourceFailed(f"{path} is not a regular file")
    if info.st_size != part.file.size_bytes:
        handle.close()
        raise WrongContent(part.file.name, f"{part.file.size_bytes} bytes", f"{info.st_size} bytes in {path}")
    return handle


def _read(handle: FileIO, part: Part) -> bytes:
    try:
        handle.seek(part.offset)
        return handle.read(min(COPY_BYTES, part.file.size_bytes - part.offset)) or b""
    except OSError as error:
        raise SourceFailed(f"reading failed: {error.strerror}", "Check the disk.") from error
