"""One program per data directory: two would share an identity and fight over its sockets and records.

The lock is the kernel's (flock): it goes with its holder, however that one dies. The file stays; to delete it
while another process is about to lock it would let two in.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

LOCK_NAME: Final = "lock"

#: A process id and a line's end.
_MAX_LOCK_BYTES: Final = 32


class DataDirError(Exception):
    """The data directory can not be used. The message says why and what to do."""


@contextmanager
def hold_data_dir(directory: Path) -> Generator[None]:
    """Make the directory (mode 0700) if need be, and keep everybody else out of it. Raises DataDirError."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(directory / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise DataDirError(f"{directory}: {error.strerror}; choose another with --data-dir") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, _MAX_LOCK_BYTES, 0).decode("ascii", "replace").strip()
            who = f"process {holder}" if holder.isdigit() else "another process"
            raise DataDirError(
                f"{who} already runs with the data directory {directory}; "
                f"stop it, or give this one its own with --data-dir"
            ) from None
        except OSError as error:
            raise DataDirError(f"{directory / LOCK_NAME}: {error.strerror}") from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)
