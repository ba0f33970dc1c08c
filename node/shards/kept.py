"""Which layers this Island holds, kept across restarts: a small file in the data directory, written whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Final

import msgspec
import structlog
from msgspec import Meta

from protocol.adverts import MAX_ADVERT_CARGOS
from protocol.limits import KIB
from protocol.ring import MAX_LAYERS

FILE_NAME: Final = "shards.json"

#: An entry has some 200 bytes.
_MAX_FILE_BYTES: Final = MAX_ADVERT_CARGOS * KIB

_Layer = Annotated[int, Meta(ge=0, le=MAX_LAYERS)]

_log = structlog.get_logger("shards")


class KeptShard(msgspec.Struct, frozen=True):
    """`owner`: the coordinator that ordered it."""

    first: _Layer
    last: _Layer
    owner: Annotated[str, Meta(max_length=64)]


Kept = dict[Annotated[str, Meta(max_length=71)], KeptShard]


def read_kept(directory: Path) -> dict[str, KeptShard]:
    """By Cargo. A file that is damaged is worth nothing, and no reason to stop."""
    path = directory / FILE_NAME
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
        return msgspec.json.decode(data, type=Kept)
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.DecodeError) as error:
        _log.warning("held shards are not known any more", file=str(path), reason=str(error))
        return {}


def write_kept(directory: Path, kept: dict[str, KeptShard]) -> None:
    """Failing is told in the log: the Island goes on, and must be told again after its next start."""
    path = directory / FILE_NAME
    new = path.with_name(f"{FILE_NAME}.{os.getpid()}.new")
    try:
        new.write_bytes(msgspec.json.encode(kept))
        new.replace(path)
    except OSError as error:
        _log.warning("held shards can not be written down", file=str(path), reason=error.strerror)
