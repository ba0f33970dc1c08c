"""What the laboratory needs of the machine, and its router, compiled when first wanted."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

_SOURCE = Path(__file__).with_name("router.c")
#: Beside everything else that is fetched or built for this checkout.
_BUILD = Path(__file__).parents[2] / ".cache" / "lab"


class LabUnavailable(RuntimeError):
    """This machine or this user can not run the laboratory. The message says why and what to do."""


def why_unavailable() -> str | None:
    """The reason, as tests give it for skipping; None if all is well."""
    if sys.platform != "linux":
        return "the delay laboratory needs Linux's network namespaces"
    if os.geteuid() != 0:
        return "the delay laboratory makes network namespaces: it must run as root"
    for program, package in (("gcc", "gcc"), ("nsenter", "util-linux"), ("unshare", "util-linux")):
        if shutil.which(program) is None:
            return f"the delay laboratory needs {program} (Debian: apt-get install {package})"
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"the delay laboratory needs TUN devices: /dev/net/tun: {error.strerror}"
    if subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False).returncode != 0:
        return "the delay laboratory makes network namespaces, which this container forbids (CAP_SYS_ADMIN)"
    return None


def router_program() -> Path:
    """The compiled router. Raises LabUnavailable with the compiler's words."""
    source = _SOURCE.read_bytes()
    program = _BUILD / f"router-{hashlib.sha256(source).hexdigest()[:16]}"
    if program.exists():
        return program
    _BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=_BUILD) as folder:
        draft = Path(folder) / "router"
        done = subprocess.run(
            ["gcc", "-O2", "-Wall", "-Wextra", "-o", str(draft), str(_SOURCE)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise LabUnavailable(f"gcc could not compile the laboratory's router:\n{done.stderr}")
        draft.rename(program)  # two at once: both are the same
    return program
