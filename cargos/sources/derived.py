"""`join:` and `f16:`: files that are made here of what other sources hold."""

from __future__ import annotations

import shutil
import stat
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final, TypeAlias

import trio

from cargos.errors import CargoError, SourceFailed, StoreUnusable, WrongContent
from cargos.locator import FileLocator, HalvesLocator, JoinedLocator, WheelLocator
from cargos.part import Part, store_errors
from cargos.progress import Report
from cargos.sources.settings import FetchSettings
from cargos.sources.wheel import EXTRACT_BYTES, download_wheel, open_member, wheel_faults

#: Where a file lies already that a manifest in the store names by this source.
Known: TypeAlias = Callable[[str], Path | None]


@dataclass(frozen=True, slots=True)
class Workplace:
    """`base`: the directory that a relative `file:` starts from. `scratch`: a folder for passing things."""

    report: Report
    settings: FetchSettings
    base: Path | None
    scratch: Path


_HINT: Final = "The source holds something else than the manifest's author had."


async def fetch_joined(locator: JoinedLocator, part: Part, place: Workplace) -> None:
    """Append what the parts hold, in order. What came of an earlier attempt is dropped: where in the parts it
    ended is not known. Raises SourceFailed, WrongContent, StoreUnusable.
    """
    if part.offset:
        await part.restart()
    for index, source in enumerate(locator.parts):
        left = part.file.size_bytes - part.offset
        path = await _local(source, str(index), left, place)
        await _each(path, part.write)
        place.report("copying", part.offset, part.file.size_bytes)
        await trio.to_thread.run_sync(shutil.rmtree, place.scratch / str(index))


async def fetch_halves(locator: HalvesLocator, part: Part, place: Workplace, known: Known) -> None:
    """Rewrite the GGUF at the source. Raises SourceFailed, WrongContent, StoreUnusable."""
    # Here, not above: numpy is slow to import, and few fetches need it.
    from cargos.shards.cut import read_header  # noqa: PLC0415
    from cargos.shards.halves import halves_of, write_halves  # noqa: PLC0415

    path = await trio.to_thread.run_sync(known, locator.text)
    if path is None:
        path = await _whole(locator, part.file.size_bytes, place)
    if part.offset:
        await part.restart()
    try:
        header = await trio.to_thread.run_sync(read_header, path)
        halves = halves_of(header)
        if halves.size_bytes != part.file.size_bytes:
            raise WrongContent(part.file.name, f"{part.file.size_bytes} bytes", f"{halves.size_bytes} as F16")
        chunks = write_halves(path, halves)
        while data := await trio.to_thread.run_sync(next, chunks, b""):
            await part.write(data)
            place.report("rewriting", part.offset, part.file.size_bytes)
    except (SourceFailed, StoreUnusable):
        raise
    except (CargoError, OSError) as error:
        raise SourceFailed(f"what {locator.text} holds can not be rewritten: {error}", _HINT) from error


async def _whole(locator: HalvesLocator, limit: int, place: Workplace) -> Path:
    """The quantised file as one on this machine."""
    source = locator.source
    if not isinstance(source, JoinedLocator):
        return await _local(source, "whole", limit, place)
    target = place.scratch / "joined.gguf"
    with store_errors(target):
        writer = target.open("wb")
    with writer:

        async def append(data: bytes) -> None:
            with store_errors(target):
                await trio.to_thread.run_sync(_append, writer, data, limit)

        for index, one in enumerate(source.parts):
            path = await _local(one, str(index), limit, place)
            await _each(path, append)
    return target


async def _local(source: FileLocator | WheelLocator, name: str, limit: int, place: Workplace) -> Path:
    """A file of at most `limit` bytes that holds it: its own, or one in the folder `name` of the workplace."""
    folder = place.scratch / name
    with store_errors(folder):
        await trio.to_thread.run_sync(folder.mkdir)
    if isinstance(source, WheelLocator):
        wheel = await download_wheel(source, limit, place.report, place.settings, folder)
        target = folder / "member"
        with wheel_faults(wheel):
            stream, size = await trio.to_thread.run_sync(open_member, wheel, source)
        if size > limit:
            stream.close()
            raise SourceFailed(f"{source.member} has {size} bytes, at most {limit} are expected", _HINT)
        place.report("extracting", 0, size)
        await trio.to_thread.run_sync(_extract, wheel, stream, target)
        return target
    if place.base is None:
        raise SourceFailed("a manifest from elsewhere may not read files of this machine")
    path = place.base / source.path
    try:
        info = await trio.to_thread.run_sync(path.stat)
    except OSError as error:
        raise SourceFailed(
            f"can not read {path}: {error.strerror}", "Check the path and its rights."
        ) from error
    if not stat.S_ISREG(info.st_mode):
        raise SourceFailed(f"{path} is not a regular file")
    if info.st_size > limit:
        raise SourceFailed(f"{path} has {info.st_size} bytes, at most {limit} are expected", _HINT)
    return path


def _extract(wheel: Path, stream: IO[bytes], target: Path) -> None:
    with stream, store_errors(target), target.open("wb") as file:
        while True:
            with wheel_faults(wheel):
                data = stream.read(EXTRACT_BYTES)
            if not data:
                return
            file.write(data)


async def _each(path: Path, write: Callable[[bytes], Awaitable[None]]) -> None:
    """Pass the file on, in pieces of some MiB."""
    chunks = _read_all(path)
    try:
        while data := await trio.to_thread.run_sync(next, chunks, b""):
            await write(data)
    except OSError as error:
        raise SourceFailed(f"reading {path.name} failed: {error.strerror}", "Check the disk.") from error


def _read_all(path: Path) -> Iterator[bytes]:
    with path.open("rb", buffering=0) as file:
        while data := file.read(EXTRACT_BYTES):
            yield data


def _append(writer: IO[bytes], data: bytes, limit: int) -> None:
    if writer.tell() + len(data) > limit:
        raise SourceFailed(f"the parts have more than {limit} bytes together", _HINT)
    writer.write(data)
    writer.flush()  # so that a full disk shows here
