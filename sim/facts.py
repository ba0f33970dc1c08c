"""run.json: what a run was and what came out, enough to cite it, to repeat it and to compare it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import msgspec

from sim.settings import ScenarioError

#: Version of run.json.
FORMAT: Final = 1


class Figure(msgspec.Struct, frozen=True):
    value: float
    unit: str
    better: str = ""


class Traffic(msgspec.Struct, frozen=True):
    """Inputs of one kind; `bytes` of messages only."""

    count: int
    bytes: int


class VariantFacts(msgspec.Struct, frozen=True):
    """`wall_s`, `cpu_s`, `us_per_event` (CPU), `bytes_per_node`: of the machine that ran it, no part of the
    history.
    """

    name: str
    sha256: str
    events: int
    metrics: dict[str, Figure]
    notes: list[str] = []
    messages: dict[str, Traffic] = {}
    wall_s: float = 0.0
    cpu_s: float = 0.0
    us_per_event: float = 0.0
    bytes_per_node: float = 0.0


class RunFacts(msgspec.Struct, frozen=True):
    """`scenario`: all settings that differ from the defaults. `point`: of a sweep."""

    format: int
    name: str
    scenario: dict[str, Any]
    complete: bool
    events: int
    sha256: str
    variants: list[VariantFacts]
    files: list[str] = []
    versions: dict[str, str] = {}
    point: dict[str, Any] = {}


def read_facts(folder: Path) -> RunFacts:
    """The run.json of an output folder (or the file itself). Raises ScenarioError."""
    file = folder / "run.json" if folder.is_dir() else folder
    try:
        return msgspec.json.decode(file.read_bytes(), type=RunFacts)
    except OSError as error:
        raise ScenarioError(
            f"{file}: {error.strerror}; give folders that `archi-sim run --out DIR` wrote"
        ) from error
    except msgspec.DecodeError as error:
        raise ScenarioError(f"{file}: not the run.json of a run: {error}") from error


def write_facts(file: Path, facts: RunFacts) -> None:
    file.write_bytes(msgspec.json.format(msgspec.json.encode(facts), indent=2) + b"\n")
