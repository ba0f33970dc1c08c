"""Slices of models on this machine: cut from the whole file if it is here, else from the pieces that they need.

ROOT/shards/abcd....FIRST-LAST.VERSION.gguf    a slice, by the SHA-256 of the whole file
ROOT/shards/....ok                             what it looked like when it was made; touched when it is wanted
ROOT/pieces/                                   pieces of whole files; they are kept, other Islands want them

Slices are cheap to make again as long as the pieces are here, so `prune` removes those that were not wanted for
longest. A slice that some process holds open (`in_use`: a lock that the kernel drops with its holder) stays.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Final, TypeAlias

import msgspec
import trio

from cargos.errors import CargoError, FetchFailed, SourceFailed, StoreUnusable
from cargos.from_peers import PieceFetcher
from cargos.locator import HttpLocator, HubLocator, is_local, parse_locator_untrusted
from cargos.lock import file_lock
from cargos.manifest import ROLE_DRAFT, CargoFile, Manifest, Sharding
from cargos.part import store_errors
from cargos.progress import FetchProgress, FetchState, ProgressCallback
from cargos.shards.architectures import CanNotCut
from cargos.shards.cut import read_header, write_slice
from cargos.shards.gguf import Header, Incomplete, parse_header_untrusted
from cargos.shards.layout import Model, model_of, ranges_of, slice_of
from cargos.shards.pieces import PieceFile, pieces_of_ranges, remove_pieces
from cargos.sources.ranges import fetch_list, fetch_pieces
from cargos.store import SPACE_MARGIN_BYTES, CargoStore, lies_here
from protocol.limits import MIB

#: Raised when slices are cut in another way, so that old ones are not taken for new ones.
CUT_VERSION: Final = 1
#: What is wanted of a file first: the header of a model with a vocabulary of 50,000, or this share of a small
#: file. Then three times as much.
FIRST_HEADER_BYTES: Final = 2 * MIB
FIRST_HEADER_SHARE: Final = 16
HEADER_GROWTH: Final = 3
#: A slice that was wanted so lately may be about to be opened.
FRESH_S: Final = 600
#: How often the progress of a fetch from peers is told.
_TELL_S: Final = 0.25

_Remote: TypeAlias = HttpLocator | HubLocator


class _Made(msgspec.Struct, frozen=True):
    """What a slice looked like when it was made. Any change of the file changes one of these."""

    size: int
    mtime_ns: int
    inode: int


@dataclass(frozen=True, slots=True)
class Removed:
    """A slice that `prune` removed."""

    name: str
    freed_bytes: int


class ShardStore:
    """Slices of the Cargos of a store. Cheap to make."""

    def __init__(self, store: CargoStore) -> None:
        self._store: Final = store
        self._folder: Final = store.root / "shards"

    async def ensure(
        self,
        manifest: Manifest,
        first: int,
        last: int,
        *,
        base: PurePath | None = None,
        progress: ProgressCallback | None = None,
        fetch_pieces: PieceFetcher | None = None,
    ) -> Path:
        """The slice of layers `first` to `last` (exclusive) of the Cargo's model, made if it is not there yet.

        From the whole file if it is here; else from the pieces that the slice needs, which `fetch_pieces` may
        bring (from peers), or else servers that know Range; else from the whole file, fetched as ever. `base`
        as in `CargoStore.ensure`. Raises CanNotCut, FetchFailed, StoreUnusable, CargoError.
        """
        sharding, file = _model_file(manifest)
        if not 0 <= first < last <= sharding.layers:
            raise CanNotCut(f"{manifest.name} has layers 0 to {sharding.layers}, not {first} to {last}")
        tell = progress or _ignore
        target = self.path(file, first, last)
        if not await trio.to_thread.run_sync(_looks_made, target):
            with store_errors(self._folder):
                for folder in (self._folder, self._store.root / "locks"):
                    await trio.to_thread.run_sync(
                        lambda folder=folder: folder.mkdir(parents=True, exist_ok=True)
                    )

            def waiting() -> None:
                tell(FetchProgress(target.name, "", 0, None, "waiting"))

            async with file_lock(self._store.root / "locks" / f"{target.name}.lock", waiting):
                if not await trio.to_thread.run_sync(_looks_made, target):
                    job = _Job(self._store, manifest, sharding, file, base, tell, fetch_pieces)
                    await job.make(target, first, last)
        await trio.to_thread.run_sync(_touch, target)
        tell(FetchProgress(target.name, "", 1, 1, "done"))
        return target

    async def ensure_draft(
        self,
        manifest: Manifest,
        *,
        base: PurePath | None = None,
        progress: ProgressCallback | None = None,
        fetch_pieces: PieceFetcher | None = None,
    ) -> Path | None:
        """The small model that heads of this Cargo may draft with (the file with the role 'draft'); None if the
        Cargo has none. Raises FetchFailed, StoreUnusable.
        """
        file = manifest.file_with_role(ROLE_DRAFT)
        if file is None:
            return None
        return await self._store.ensure_file(file, base=base, progress=progress, peers=fetch_pieces)

    def path(self, file: CargoFile, first: int, last: int) -> Path:
        """Where the slice is, if it is there."""
        return self._folder / f"{file.sha256}.{first}-{last}.v{CUT_VERSION}.gguf"

    @contextmanager
    def in_use(self, path: Path) -> Generator[None]:
        """While entered, no process removes this slice. Raises StoreUnusable."""
        with store_errors(path):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with store_errors(path):
                fcntl.flock(descriptor, fcntl.LOCK_SH)  # only `prune` locks exclusively, for an instant
            yield
        finally:
            os.close(descriptor)

    async def prune(self, limit_bytes: int) -> list[Removed]:
        """Remove slices of any Cargo, the one wanted longest ago first, until all take no more than this; but
        none that is in use, or was wanted a moment ago. Raises StoreUnusable.
        """
        return await trio.to_thread.run_sync(self._prune, limit_bytes)

    def _prune(self, limit_bytes: int) -> list[Removed]:
        slices: list[tuple[float, Path, int]] = []
        with store_errors(self._folder):
            for path in self._folder.glob("*.gguf"):
                with suppress(FileNotFoundError):  # another process prunes, too
                    slices.append((_wanted_at(path), path, path.stat().st_blocks * 512))
        total = sum(size for _, _, size in slices)
        fresh = time.time() - FRESH_S
        removed: list[Removed] = []
        for wanted_at, path, size in sorted(slices):
            if total <= limit_bytes or wanted_at > fresh:
                break
            if _remove_unless_used(path):
                removed.append(Removed(path.name, size))
                total -= size
        return removed

    async def forget(self, manifest: Manifest) -> int:
        """Delete all slices of the Cargo, and the pieces of its files unless somebody is fetching some.

        Returns the bytes freed. Raises StoreUnusable.
        """
        freed = await trio.to_thread.run_sync(self.remove, manifest)
        for file in manifest.files:
            if file.pieces and (self._store.root / "pieces" / f"{file.sha256}.data").exists():
                with suppress(_Busy):
                    async with PieceFile.held(self._store.root, file, _refuse):
                        freed += await trio.to_thread.run_sync(remove_pieces, self._store.root, file)
        return freed

    def remove(self, manifest: Manifest, keep: tuple[int, int] | None = None) -> int:
        """Delete the Cargo's slices, but the one of layers `keep`. Returns the bytes freed. Blocking.

        An engine that has one open keeps what it mapped. Raises StoreUnusable.
        """
        freed = 0
        for file in manifest.files:
            kept = None if keep is None else self.path(file, *keep)
            for path in self._folder.glob(f"{file.sha256}.*.gguf"):
                if path != kept:
                    with suppress(OSError):
                        freed += path.stat().st_blocks * 512
                    with store_errors(path):
                        path.with_suffix(".ok").unlink(missing_ok=True)
                        path.unlink(missing_ok=True)
        return freed


@dataclass(slots=True)
class _Job:
    """Making one slice, with its lock held."""

    _store: CargoStore
    _manifest: Manifest
    _sharding: Sharding
    _file: CargoFile
    _base: PurePath | None
    _tell: ProgressCallback
    _fetch: PieceFetcher | None
    _causes: list[tuple[str, SourceFailed]] = field(default_factory=list[tuple[str, SourceFailed]])

    async def make(self, target: Path, first: int, last: int) -> None:
        whole = await trio.to_thread.run_sync(self._store.verified_path, self._file)
        if whole is None and await self._make_of_pieces(target, first, last):
            return
        if whole is None:
            whole = await self._fetch_whole()
        header = await trio.to_thread.run_sync(read_header, whole)
        await self._cut(whole, self._checked(header), target, first, last)

    async def _fetch_whole(self) -> Path:
        try:
            paths = await self._store.ensure(self._manifest, base=self._base, progress=self._tell, drafts=False)
        except FetchFailed as error:
            causes = tuple(self._causes) + tuple(zip(self._file.sources, error.causes, strict=False))
            raise FetchFailed(self._file.name, causes) from error
        return paths[self._file.name]

    def _checked(self, header: Header) -> Model:
        """The model, if it is the one that the manifest describes to planners."""
        model, told = model_of(header), self._sharding
        if (model.name, model.layers, model.width) != (told.architecture, told.layers, told.width):
            raise CargoError(
                f"{self._manifest.name}: the model is {model.name} with {model.layers} layers of {model.width},"
                f" the manifest says {told.architecture}, {told.layers}, {told.width}",
                "'archi-node cargo pieces FILE' prints the right section for its author.",
            )
        return model

    async def _cut(self, source: Path, model: Model, target: Path, first: int, last: int) -> None:
        wanted = slice_of(model, first, last)
        self._say("", 0, wanted.size_bytes, "cutting")
        for left in target.parent.glob(f"{target.name}.*.new"):
            with suppress(OSError):  # of one that was killed while it wrote: we hold its lock
                left.unlink()
        self._check_space(sum(part.size for part in wanted.segments))
        await trio.to_thread.run_sync(write_slice, source, target, wanted)
        await trio.to_thread.run_sync(_note, target)

    # --- out of pieces ----------------------------------------------------------------------------

    async def _make_of_pieces(self, target: Path, first: int, last: int) -> bool:
        """False if the pieces are not to be had."""
        file = self._file
        remotes = self._remotes()
        if not file.pieces or (self._base is not None and lies_here(file)):
            return False
        if self._fetch is None and not remotes:
            return False

        def waiting() -> None:
            self._say("", 0, None, "waiting")

        async with PieceFile.held(self._store.root, file, waiting) as pieces:
            header = await self._header(pieces, remotes)
            if header is None:
                return False
            model = self._checked(header)
            wanted = pieces_of_ranges(ranges_of(model, first, last), file.piece_bytes)
            if not await self._obtain(pieces, wanted, remotes):
                return False
            await self._cut(pieces.path, model, target, first, last)
        return True

    def _remotes(self) -> list[tuple[str, _Remote]]:
        """Sources that may know Range. A manifest from elsewhere names none on this machine."""
        found: list[tuple[str, _Remote]] = []
        for source in self._file.sources:
            locator = parse_locator_untrusted(source)
            if isinstance(locator, HttpLocator | HubLocator) and (
                self._base is not None or not is_local(locator)
            ):
                found.append((source, locator))
        return found

    async def _header(self, pieces: PieceFile, remotes: Sequence[tuple[str, _Remote]]) -> Header | None:
        """The file's header, of as many pieces as it takes."""
        size = min(FIRST_HEADER_BYTES, -(-pieces.size_bytes // FIRST_HEADER_SHARE))
        while True:
            wanted = pieces_of_ranges([(0, size)], pieces.piece_bytes)
            if not await self._obtain(pieces, wanted, remotes):
                return None
            size = min((wanted[-1] + 1) * pieces.piece_bytes, pieces.size_bytes)
            try:
                data = await trio.to_thread.run_sync(pieces.read, 0, size)
                return await trio.to_thread.run_sync(parse_header_untrusted, data, pieces.size_bytes)
            except Incomplete as error:
                size = min(max(error.needed, HEADER_GROWTH * size), pieces.size_bytes)

    async def _obtain(
        self, pieces: PieceFile, wanted: Sequence[int], remotes: Sequence[tuple[str, _Remote]]
    ) -> bool:
        """Have these pieces. False if not all are to be had."""
        missing = pieces.missing(wanted)
        if missing:
            self._check_space(sum(map(pieces.size_of, missing)))
        if missing and self._fetch is not None:
            await self._ask_peers(self._fetch, missing, pieces, wanted)
            missing = pieces.missing(wanted)
        for source, locator in remotes:
            if missing:
                try:
                    await self._obtain_from(source, locator, pieces, wanted)
                except SourceFailed as error:
                    self._causes.append((source, error))
                missing = pieces.missing(wanted)
        if missing and self._fetch is not None:
            self._causes.append(("peers", SourceFailed(f"no peer had {len(missing)} of {len(wanted)} pieces")))
        return not missing

    async def _ask_peers(
        self, fetch: PieceFetcher, missing: Sequence[int], pieces: PieceFile, wanted: Sequence[int]
    ) -> None:
        async def report() -> None:
            while True:
                self._say("peers", *_have(pieces, wanted), "downloading")
                await trio.sleep(_TELL_S)

        failure: CargoError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(report)
            try:
                await fetch(self._file, missing, pieces)
            except CargoError as error:  # raised outside, so that it comes without a group
                failure = error
            nursery.cancel_scope.cancel()
        if isinstance(failure, SourceFailed):
            self._causes.append(("peers", failure))
        elif failure is not None:
            raise failure

    async def _obtain_from(
        self, source: str, locator: _Remote, pieces: PieceFile, wanted: Sequence[int]
    ) -> None:
        settings = self._store.settings
        if pieces.hashes() is None:
            await pieces.learn(await fetch_list(locator, self._file, settings))

        async def put(index: int, data: bytes) -> None:
            await pieces.put(index, data)
            self._say(source, *_have(pieces, wanted), "downloading")

        await fetch_pieces(locator, self._file, pieces.missing(wanted), put, settings)

    def _say(self, source: str, done: int, total: int | None, state: FetchState) -> None:
        self._tell(FetchProgress(self._file.name, source, done, total, state))

    def _check_space(self, needed: int) -> None:
        with store_errors(self._store.root):
            free = shutil.disk_usage(self._store.root).free
        if free < needed + SPACE_MARGIN_BYTES:
            raise StoreUnusable(
                f"the disk of {self._store.root} has {free // MIB} MiB free, "
                f"{-(-(needed + SPACE_MARGIN_BYTES) // MIB)} MiB are needed",
                "Free some space, or point ARCHI_CACHE at another disk.",
            )


def _model_file(manifest: Manifest) -> tuple[Sharding, CargoFile]:
    file = manifest.file_with_role("model")
    if manifest.sharding is None or file is None:
        raise CanNotCut(
            f"the manifest of {manifest.name} does not say how its layers can be spread",
            "'archi-node cargo pieces FILE' prints the section that says it, for the manifest's author.",
        )
    return manifest.sharding, file


def _have(pieces: PieceFile, wanted: Sequence[int]) -> tuple[int, int]:
    """Bytes that are here, and bytes wanted."""
    total = sum(map(pieces.size_of, wanted))
    return total - sum(map(pieces.size_of, pieces.missing(wanted))), total


def _seen(path: Path) -> _Made:
    info = path.stat()
    return _Made(info.st_size, info.st_mtime_ns, info.st_ino)


def _looks_made(path: Path) -> bool:
    try:
        return msgspec.json.decode(path.with_suffix(".ok").read_bytes(), type=_Made) == _seen(path)
    except (OSError, msgspec.DecodeError):
        return False


def _touch(path: Path) -> None:
    """It is wanted now."""
    with suppress(OSError):  # a store that can only be read has nothing to remove, either
        os.utime(path.with_suffix(".ok"))


def _wanted_at(path: Path) -> float:
    """Civil time, seconds. One without its note is half made, or half removed."""
    try:
        return path.with_suffix(".ok").stat().st_mtime
    except FileNotFoundError:
        return path.stat().st_mtime


def _remove_unless_used(path: Path) -> bool:
    """Whoever opens it after this finds nothing and makes it anew."""
    with store_errors(path):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.with_suffix(".ok").unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        except BlockingIOError:
            return False
        finally:
            os.close(descriptor)
    return True


def _note(path: Path) -> None:
    with store_errors(path):
        note = path.with_suffix(".ok")
        new = note.with_suffix(".ok.new")
        new.write_bytes(msgspec.json.encode(_seen(path)))
        new.replace(note)


class _Busy(CargoError):
    """Another process holds it."""


def _refuse() -> None:
    raise _Busy("another process is fetching pieces of it")


def _ignore(_: FetchProgress) -> None:
    pass
