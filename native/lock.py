"""Renews the lock files: what `make lock` runs. Needs `uv` (pip install uv) for one lock that fits every
platform; the lock files themselves are plain requirements with hashes, installed by pip.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "locks"

COMMON = (
    *("--quiet", "--universal", "--python-version", "3.11", "--generate-hashes", "--no-annotate"),
    *("--no-emit-index-url", "--custom-compile-command", "make lock"),
)
TARGETS = (
    (["locks/build.in"], "build.txt"),
    (["--no-deps", "locks/native.in"], "native.txt"),
    (["pyproject.toml", "--extra", "dev"], "dev.txt"),
    (["pyproject.toml"], "run.txt"),
)


def main() -> int:
    uv = shutil.which("uv")
    if uv is None:
        print("lock: uv is needed:  pip install uv", file=sys.stderr)
        return 1
    for sources, target in TARGETS:
        command = [uv, "pip", "compile", *COMMON, *sources, "-o", str(LOCKS / target), *sys.argv[1:]]
        if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
            return 1
        print(f"lock: locks/{target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
