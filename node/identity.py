"""The key that names this node, in a file of its own.

The file holds the 32-byte Ed25519 seed as hexadecimal text. Whoever reads it can be this node: sign its
receipts, take its karma and its earnings. So it is created readable by its owner only, and a file that
others can read is refused rather than repaired: the seed may already be known.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from protocol.envelope import SEED_BYTES, Signer
from protocol.ids import PeerId

_HEADING: Final = "archipelag-identity-1"
_SEED_TEXT: Final = re.compile(rf"{_HEADING}\n([0-9a-f]{{{2 * SEED_BYTES}}})\n\Z")

#: The file is one heading and 64 digits; more than this is some other file.
_MAX_FILE_BYTES: Final = 1024


class IdentityError(Exception):
    """The identity file can not be used. The message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this node is. `repr` shows the peer id only."""

    seed: bytes = field(repr=False)
    signer: Signer = field(init=False, repr=False, compare=False)
    peer: PeerId = field(init=False)

    def __post_init__(self) -> None:
        signer = Signer(self.seed)
        object.__setattr__(self, "signer", signer)
        object.__setattr__(self, "peer", signer.peer)


def new_identity() -> Identity:
    """A fresh identity that is kept nowhere (tests, benchmarks, throw-away clients)."""
    return Identity(secrets.token_bytes(SEED_BYTES))


def load_or_create_identity(path: Path) -> Identity:
    """The identity in this file; made and written first if there is none.

    The file appears complete or not at all, with mode 0600; missing directories are made with mode 0700.
    Two processes that start at once agree on one identity. Raises IdentityError.
    """
    try:
        found = _load(path)
        if found is not None:
            return found
        _make_directory(path.parent)
        return _create(path)
    except OSError as error:
        raise IdentityError(
            f"{path}: {error.strerror or error}; choose another place with data_dir, or fix its permissions"
        ) from error


def _load(path: Path) -> Identity | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise IdentityError(f"{path}: not a regular file; move it away and start again")
        mode = stat.S_IMODE(status.st_mode)
        if mode & 0o077:
            raise IdentityError(
                f"{path}: others may read this key (mode {mode:04o}). If nobody did: chmod 600 {path}. "
                f"If somebody may have: move it away; a new identity is made at the next start"
            )
        data = os.read(descriptor, _MAX_FILE_BYTES)
    finally:
        os.close(descriptor)
    match = _SEED_TEXT.match(data.decode("ascii", errors="replace"))
    if match is None:
        raise IdentityError(
            f"{path}: this is no identity file (a line '{_HEADING}' and {2 * SEED_BYTES} hexadecimal digits "
            f"were expected). Restore it from a backup, or move it away to become a new peer"
        )
    return Identity(bytes.fromhex(match[1]))


def _make_directory(directory: Path) -> None:
    missing: list[Path] = []
    while not directory.exists():
        missing.append(directory)
        directory = directory.parent
    for part in reversed(missing):
        part.mkdir(mode=0o700, exist_ok=True)
    if missing:
        return
    mode = directory.stat().st_mode
    if mode & 0o022 and not mode & stat.S_ISVTX:
        raise IdentityError(
            f"{directory}: others may replace files here (mode {stat.S_IMODE(mode):04o}); chmod 700 {directory}"
        )


def _create(path: Path) -> Identity:
    identity = new_identity()
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        with os.fdopen(os.open(draft, flags, 0o600), "w", encoding="ascii") as file:
            file.write(f"{_HEADING}\n{identity.seed.hex()}\n")
            file.flush()
            os.fsync(file.fileno())
        path.hardlink_to(draft)  # unlike a rename, fails if another process was faster
    except FileExistsError:
        winner = _load(path)
        if winner is None:
            raise
        return winner
    finally:
        draft.unlink(missing_ok=True)
    return identity
