"""A lock between processes of one machine, waited for without blocking trio. POSIX (flock).

The kernel drops it when its holder dies, however it dies. Lock files stay: to delete one while another
process is about to lock it would let two in.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import trio

from cargos.part import store_errors

#: How often a waiter looks again: short beside any download, and cheap (one system call).
POLL_S: Final = 0.2


@asynccontextmanager
async def file_lock(path: Path, waiting: Callable[[], None] | None = None) -> AsyncGenerator[None]:
    """Hold the exclusive lock of this path. `waiting` is called before each further look while another
    process (or task) holds it. Raises StoreUnusable.
    """
    with store_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while not _try_lock(descriptor, path):
            if waiting is not None:
                waiting()
            await trio.sleep(POLL_S)
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, path: Path) -> bool:
    with store_errors(path):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True
