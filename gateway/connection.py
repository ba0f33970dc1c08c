"""How `archi chat` finds a demo that runs on this machine: a file with its address and key.

It lies in the user's runtime directory (else the cache directory), mode 0600, and names the demo's process, so
that a file left behind by a killed demo is known for what it is.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec

MAX_FILE_BYTES: Final = 16 * 1024


class Connection(msgspec.Struct, frozen=True):
    """`url` with its /v1; `pid`: of the demo."""

    url: str
    key: str
    pid: int


def connection_path(environ: Mapping[str, str]) -> Path:
    base = environ.get("XDG_RUNTIME_DIR") or environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "archipelag" / "demo.json"


def write_connection(path: Path, connection: Connection) -> None:
    """The file appears whole, readable by its owner only; a later demo's replaces it. Raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(msgspec.json.encode(connection))
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def read_connection(path: Path) -> Connection | None:
    """The running demo's, or None: no file, not ours alone, not one of these, or its demo is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        private = status.st_uid == os.getuid() and not stat.S_IMODE(status.st_mode) & 0o077
        if not private or not stat.S_ISREG(status.st_mode):
            return None  # somebody else could have written it, and would get the conversation
        try:
            found = msgspec.json.decode(file.read(MAX_FILE_BYTES), type=Connection)
            os.kill(found.pid, 0)
        except (msgspec.DecodeError, OSError, OverflowError):
            return None
    return found


def remove_connection(path: Path) -> None:
    """Remove the file if it is this process's own."""
    found = read_connection(path)
    if found is not None and found.pid == os.getpid():
        with suppress(OSError):
            path.unlink()
