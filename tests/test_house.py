"""Rules of the house that no linter knows."""

from __future__ import annotations

import importlib.metadata
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"protocol", "node", "dht", "routing", "cargos", "gateway", "browser_island", "sim"}


def test_no_dependency_brings_a_package_of_our_names() -> None:
    for name, distributions in importlib.metadata.packages_distributions().items():
        if name in PACKAGES:
            assert set(distributions) == {"archipelag"}, f"{name} also comes from {distributions}"
    for name in PACKAGES:
        for site in {Path(str(d.locate_file(""))) for d in importlib.metadata.distributions()}:
            assert not (site / name).is_dir() or site == ROOT, f"{site / name} shadows ours"


def test_lock_files_name_hashes_and_no_registry() -> None:
    locks = [
        *ROOT.glob("locks/*.txt"),
        *ROOT.glob("tests/**/package-lock.json"),
        *ROOT.glob("sdk/*/package-lock.json"),
    ]
    assert locks
    for lock in locks:
        text = lock.read_text()
        if lock.suffix == ".json":
            assert '"integrity"' in text
            assert '"resolved": "http' not in text, lock
        else:
            assert "://" not in text, lock
            requirements = [line for line in text.splitlines() if "==" in line]
            assert len(requirements) <= text.count("--hash=sha256:"), lock


def test_files_stay_readable() -> None:
    """About 500 lines: a longer file holds two ideas. A table of test cases may be somewhat longer."""
    listed = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    lengths = {name: len((ROOT / name).read_text().splitlines()) for name in listed if (ROOT / name).exists()}
    assert not {n: c for n, c in lengths.items() if c > (720 if n.startswith("tests/") else 540)}
