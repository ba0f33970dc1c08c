"""A set of known Cargos, looked up by name, name@version or digest. Pure."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePath

from cargos.errors import UnknownCargo
from cargos.manifest import Manifest
from protocol.codec import excerpt
from protocol.ids import CargoDigest

_NUMBERS = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class CargoEntry:
    """A Cargo and where its manifest lies. `base`: the directory of the manifest file, which relative
    `file:` sources start from; None if it did not come from this machine's disk, and then sources that
    reach into this machine are refused.
    """

    manifest: Manifest
    digest: CargoDigest
    base: PurePath | None = None

    @classmethod
    def of(cls, manifest: Manifest, base: PurePath | None = None) -> CargoEntry:
        return cls(manifest, manifest.digest, base)


class Catalogue:
    """Cargos in the order given. Raises ValueError if two have the same name and version but differ."""

    def __init__(self, entries: Iterable[CargoEntry]) -> None:
        self._entries: list[CargoEntry] = []
        self._by_key: dict[str, CargoEntry] = {}
        for entry in entries:
            if entry.digest in self._by_key:
                continue
            key = f"{entry.manifest.name}@{entry.manifest.version}"
            if key in self._by_key:
                raise ValueError(f"two Cargos are named {key}: {self._by_key[key].digest} and {entry.digest}")
            self._by_key[key] = self._by_key[entry.digest] = entry
            self._entries.append(entry)

    def __iter__(self) -> Iterator[CargoEntry]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, reference: str) -> CargoEntry | None:
        """By `name` (the highest version), `name@version` or digest."""
        found = self._by_key.get(reference)
        if found is not None:
            return found
        named = [entry for entry in self._entries if entry.manifest.name == reference]
        return max(named, key=lambda entry: _version_key(entry.manifest.version), default=None)

    def lookup(self, reference: str) -> CargoEntry:
        """As `get`. Raises UnknownCargo, with the nearest name known."""
        found = self.get(reference)
        if found is not None:
            return found
        names = sorted({entry.manifest.name for entry in self._entries})
        close = difflib.get_close_matches(reference[:128], names, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(names) or 'none'}."
        raise UnknownCargo(f"no Cargo {excerpt(reference[:128])!r}", hint)


def _version_key(version: str) -> tuple[tuple[int, ...], bool, str]:
    """Order of versions: by their leading numbers; a release after its pre-releases."""
    core, dash, _ = version.partition("-")
    return tuple(int(number) for number in _NUMBERS.findall(core.partition("+")[0])), not dash, version
