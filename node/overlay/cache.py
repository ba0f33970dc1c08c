"""What the overlay keeps across restarts: peers that it met, and what the DHT machine wants kept.

Files in the data directory, each written whole (a draft, then a rename), so that a kill leaves the old one or
the new one. What is read back is checked like bytes from the network: a damaged file is worth nothing, no
crash.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Annotated, ClassVar, Final

import structlog
from msgspec import Meta

from protocol.codec import Codec, Message, encode
from protocol.errors import ProtocolError
from protocol.limits import KIB, MAX_ADDRESS_CHARS, MIB
from protocol.work import Part

#: Peers remembered. Of 256 that were there last week, some are there today.
MAX_CACHED_PEERS: Final = 256

#: Addresses of one of them.
MAX_CACHED_ADDRESSES: Final = 4

#: Values that the machine may have kept, and the bytes of one.
MAX_KEPT_VALUES: Final = 64
MAX_KEPT_VALUE_BYTES: Final = 8 * MIB

_FOLDER: Final = "overlay"
_PEERS: Final = "peers"
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}\Z")

_log = structlog.get_logger("overlay")


class CachedPeer(Part, frozen=True, gc=False):
    peer: Annotated[str, Meta(max_length=64)]
    addresses: Annotated[
        tuple[Annotated[str, Meta(max_length=MAX_ADDRESS_CHARS)], ...], Meta(max_length=MAX_CACHED_ADDRESSES)
    ]


class PeerCache(Message, frozen=True, gc=False, tag="peers"):
    """Best first."""

    max_bytes: ClassVar[int] = 512 * KIB

    peers: Annotated[tuple[CachedPeer, ...], Meta(max_length=MAX_CACHED_PEERS)]


PEER_CACHE: Final[Codec[PeerCache]] = Codec(PeerCache)


class OverlayFiles:
    """The overlay's folder in a data directory. Failing to write is told in the log, and no reason to stop."""

    def __init__(self, data_dir: Path) -> None:
        self._folder = data_dir / _FOLDER
        self._complained = False

    def load_peers_untrusted(self) -> tuple[CachedPeer, ...]:
        """The peers of last time; none if there is no such file or it is damaged."""
        data = self._read(_PEERS, PeerCache.max_bytes)
        if data is None:
            return ()
        try:
            return PEER_CACHE.decode_untrusted(data).peers
        except ProtocolError as error:
            _log.warning("peer cache is damaged", file=str(self._folder / _PEERS), reason=error.detail)
            return ()

    def save_peers(self, peers: tuple[CachedPeer, ...]) -> None:
        self._write(_PEERS, encode(PeerCache(peers[:MAX_CACHED_PEERS])))

    def load_values_untrusted(self) -> dict[str, bytes]:
        """What `save_value` kept, by its key."""
        found: dict[str, bytes] = {}
        if self._folder.is_dir():
            for file in sorted(self._folder.glob("value-*"))[:MAX_KEPT_VALUES]:
                name = file.name.removeprefix("value-")
                data = self._read(file.name, MAX_KEPT_VALUE_BYTES) if _NAME.match(name) else None
                if data is not None:
                    found[name] = data
        return found

    def save_value(self, key: str, value: bytes) -> None:
        """Raises ValueError for a key that is no file name or a value that is too large: a bug of ours."""
        if not _NAME.match(key) or len(value) > MAX_KEPT_VALUE_BYTES:
            raise ValueError(f"{key!r} of {len(value)} bytes can not be kept")
        self._write(f"value-{key}", value)

    def _read(self, name: str, limit: int) -> bytes | None:
        try:
            with (self._folder / name).open("rb") as file:
                data = file.read(limit + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._complain(name, error)
            return None
        return data if len(data) <= limit else None

    def _write(self, name: str, data: bytes) -> None:
        draft = self._folder / f".{name}.draft"
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(self._folder / name)
            self._complained = False
        except OSError as error:
            self._complain(name, error)
            with suppress(OSError):
                draft.unlink()  # half of it helps nobody, least of all on a full disk

    def _complain(self, name: str, error: OSError) -> None:
        if not self._complained:
            _log.warning("overlay file", file=str(self._folder / name), reason=error.strerror)
        self._complained = True
