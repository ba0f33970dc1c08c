"""From what a person wrote (a name, a digest, a path) to a Cargo. Reads manifests from disk."""

from __future__ import annotations

import functools
from importlib import resources
from pathlib import Path
from typing import Final

from cargos.catalogue import CargoEntry, Catalogue
from cargos.errors import CargoError, ManifestError, UnknownCargo
from cargos.manifest import Manifest
from cargos.manifest_text import MAX_MANIFEST_BYTES, Format, parse_manifest_untrusted

FORMATS: Final[dict[str, Format]] = {".toml": "toml", ".json": "json"}


@functools.cache
def builtin_catalogue() -> Catalogue:
    """The Cargos that ship with the package."""
    folder = resources.files("cargos.builtin")
    names = sorted(item.name for item in folder.iterdir() if item.name.endswith(".toml"))
    manifests = (parse_manifest_untrusted((folder / name).read_bytes(), "toml") for name in names)
    return Catalogue(CargoEntry.of(manifest) for manifest in manifests)


def load_manifest(path: Path) -> Manifest:
    """The manifest in a .toml or .json file. Raises UnknownCargo (no such file), ManifestError."""
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise ManifestError("", f"{path} is neither .toml nor .json", "Rename the manifest for its format.")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise UnknownCargo(f"can not read {path}: {error.strerror}", "Check the path.") from error
    return parse_manifest_untrusted(data, kind)


def resolve_cargo(reference: str | Path, catalogue: Catalogue | None = None) -> CargoEntry:
    """The Cargo of this name, name@version, digest or path to a manifest file.

    A `Path`, and text that ends in .toml or .json or has a '/', is a path; all else is looked up in
    `catalogue` (default: the shipped one). Raises UnknownCargo, ManifestError.
    """
    if isinstance(reference, str) and "/" not in reference and not reference.endswith(tuple(FORMATS)):
        try:
            return (builtin_catalogue() if catalogue is None else catalogue).lookup(reference)
        except CargoError as error:
            hint = f"{error.hint} A path to a manifest file works too, with a '/' or its .toml/.json ending."
            raise UnknownCargo(error.problem, hint) from error
    path = Path(reference)
    return CargoEntry.of(load_manifest(path), path.resolve().parent)
