"""The set-up (`native/prepare.py`) when somebody ends it: with all that it started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

#: As the set-up runs a build: a command with a child of its own, which writes and then works on.
PROGRAM = """
import os, signal, sys
sys.path.insert(0, "native")
import prepare
signal.signal(signal.SIGTERM, signal.default_int_handler)
with prepare.running(["sh", "-c", "sleep 600 & echo $! $$; wait"], dict(os.environ)) as (_, lines):
    for line in lines:
        print(line, end="", flush=True)
"""


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_set_up_leaves_no_build_behind(sent: signal.Signals) -> None:
    setup = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert setup.stdout is not None
    with setup.stdout:
        pids = [int(word) for word in setup.stdout.readline().split()]
    assert len(pids) == 2
    try:
        setup.send_signal(sent)
        assert setup.wait(30) != 0
        deadline = time.monotonic() + 30
        while any(map(alive, pids)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(map(alive, pids))
    finally:
        for pid in pids:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
