"""What can go wrong between a reference to a Cargo and its files on disk.

All of it is expected (a manifest from elsewhere, a server that cuts off, a full disk), so each error
says what was wrong and a way out. A bug of ours is none of these.
"""

from __future__ import annotations


class CargoError(Exception):
    """Base. `problem`: what is wrong. `hint`: what to do about it, may be empty."""

    def __init__(self, problem: str, hint: str = "") -> None:
        super().__init__(f"{problem}\n  {hint}" if hint else problem)
        self.problem = problem
        self.hint = hint


class ManifestError(CargoError):
    """A manifest breaks the schema. `path` names the field (`files[0].sha256`), '' is the whole."""

    def __init__(self, path: str, problem: str, hint: str = "") -> None:
        super().__init__(f"{path}: {problem}" if path else problem, hint)
        self.path = path


class UnknownCargo(CargoError):
    """No Cargo has this name or digest, or there is no such manifest file."""


class SourceFailed(CargoError):
    """One source could not deliver a file. Another may."""


class WrongContent(SourceFailed):
    """A source delivered other bytes than the manifest promises. `expected` and `got` are SHA-256 in hex
    or, for a wrong length, sizes in words.
    """

    def __init__(self, file: str, expected: str, got: str) -> None:
        super().__init__(
            f"{file}: wrong content: expected {expected}, got {got}",
            "The source holds another file than the manifest names; nothing of it was kept.",
        )
        self.file = file
        self.expected = expected
        self.got = got


class FetchFailed(CargoError):
    """No source could deliver the file. `causes` holds one error per source tried, in order."""

    def __init__(self, file: str, causes: tuple[tuple[str, SourceFailed], ...], hint: str = "") -> None:
        tried = "".join(
            f"\n  {source}\n    {str(cause).replace(chr(10), chr(10) + '  ')}" for source, cause in causes
        )
        super().__init__(f"{file}: no source could deliver it{tried}", hint)
        self.file = file
        self.causes = tuple(cause for _, cause in causes)


class StoreUnusable(CargoError):
    """The store's own disk says no: full, read-only, not ours."""
