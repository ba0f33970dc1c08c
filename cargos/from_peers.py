"""A whole file in pieces: from peers, and what they lack from servers that know Range."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, TypeAlias

import trio

from cargos.errors import CargoError, SourceFailed
from cargos.locator import HttpLocator, HubLocator, is_local, parse_locator_untrusted
from cargos.manifest import CargoFile
from cargos.progress import FetchProgress, ProgressCallback
from cargos.shards.pieces import PieceFile
from cargos.sources.ranges import fetch_pieces
from cargos.sources.settings import FetchSettings

#: Brings pieces of a file from peers, those of them that are to be had. Raises StoreUnusable.
PieceFetcher: TypeAlias = Callable[[CargoFile, Sequence[int], PieceFile], Awaitable[None]]

#: How often the progress of a fetch from peers is told.
_TELL_S: Final = 0.25


async def fill_from_peers(
    pieces: PieceFile,
    base: Path | None,
    tell: ProgressCallback,
    peers: PieceFetcher,
    settings: FetchSettings,
) -> None:
    """Have all pieces. `base` as in `CargoStore.ensure`.

    Raises SourceFailed if not all are to be had (those that came stay for the next time), StoreUnusable.
    """
    file = pieces.file
    everything = range(file.pieces)

    def report(source: str) -> None:
        left = sum(map(pieces.size_of, pieces.missing(everything)))
        tell(FetchProgress(file.name, source, file.size_bytes - left, file.size_bytes, "downloading"))

    async def report_often() -> None:
        while True:
            report("peers")
            await trio.sleep(_TELL_S)

    failure: CargoError | None = None
    if missing := pieces.missing(everything):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(report_often)
            try:
                await peers(file, missing, pieces)
            except CargoError as error:  # raised outside, so that it comes without a group
                failure = error
            nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
    missing = pieces.missing(everything)
    if missing and len(missing) < file.pieces and pieces.hashes() is not None:
        await _fill_from_servers(pieces, base, settings, report)
        missing = pieces.missing(everything)
    if missing:
        raise SourceFailed(f"no peer has {len(missing)} of the {file.pieces} pieces")
    tell(FetchProgress(file.name, "peers", file.size_bytes, file.size_bytes, "checking"))


async def _fill_from_servers(
    pieces: PieceFile, base: Path | None, settings: FetchSettings, report: Callable[[str], None]
) -> None:
    """Only what peers lack. Where no server knows Range, the whole file will be asked of the sources."""
    for source in pieces.file.sources:
        locator = parse_locator_untrusted(source)
        if not isinstance(locator, HttpLocator | HubLocator) or (base is None and is_local(locator)):
            continue

        async def put(index: int, data: bytes, source: str = source) -> None:
            await pieces.put(index, data)
            report(source)

        with suppress(SourceFailed):
            await fetch_pieces(locator, pieces.file, pieces.missing(range(pieces.pieces)), put, settings)
            return
