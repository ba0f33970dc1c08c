"""The demo as a newcomer meets it: what it prints, what it answers, how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from fcntl import ioctl
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = [pytest.mark.model, pytest.mark.timeout(300)]


def alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    return False


def wait_gone(pids: list[int], timeout_s: float = 20) -> list[int]:
    deadline = time.monotonic() + timeout_s
    while (left := [pid for pid in pids if alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def pids_of(demo: Any) -> list[int]:
    return [int(line.rsplit(" ", 1)[1]) for line in demo.lines if " pid " in line]


@pytest.fixture(autouse=True)
def own_runtime_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The file for `archi chat` of a demo that its owner runs meanwhile is left alone."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "archipelag" / "demo.json"


class OnTerminal:
    """A demo on a narrow terminal, and every byte that it wrote there."""

    def __init__(self, *flags: str, **environment: str) -> None:
        self.master, slave = pty.openpty()
        ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gateway.archi", "demo", "--port", "0", *flags],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "", "LINES": "", **environment},
        )
        self.slave = slave
        self.output = b""

    def read_until(self, wanted: bytes, timeout_s: float = 120) -> None:
        deadline = time.monotonic() + timeout_s
        while wanted not in self.output:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.master], [], [], left)[0]:
                pytest.fail(f"{wanted!r} did not come:\n{self.output.decode(errors='replace')}")
            self.output += os.read(self.master, 65536)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)


def test_on_a_terminal(own_runtime_dir: Path) -> None:
    """Lines for scripts stay exact beside the live table; a death shows in it; a killed gateway ends it all."""
    demo = OnTerminal("--islands", "2")
    try:
        before = termios.tcgetattr(demo.slave)
        demo.read_until(b"Ctrl-C stops all")
        demo.read_until(b"archi-node run --name")
        lines = demo.output.split(b"\r\n")
        exact = rb"gateway pid \d+|island \w+ pid \d+|ready http://[\d.]+:\d+/v1 key ak_[\w-]+"
        kept = [line.decode() for line in lines if re.fullmatch(exact, line)]
        assert [line.split()[0] for line in kept] == ["gateway", "island", "island", "ready"]
        pids = [int(line.split()[-1]) for line in kept[:3]]
        _, url, _, key = kept[3].split()
        assert json.loads(own_runtime_dir.read_text()) == {"url": url, "key": key, "pid": demo.process.pid}

        chat = [sys.executable, "-m", "gateway.archi", "chat", "-p", "What is the capital of France?"]
        found = subprocess.run(chat, capture_output=True, text=True, timeout=60, check=True)
        assert "tokens/s" in found.stdout

        os.kill(pids[1], signal.SIGKILL)
        demo.read_until(b"killed by SIGKILL")
        os.kill(pids[0], signal.SIGKILL)
        demo.read_until(b"error: the gateway: killed by SIGKILL")
        assert demo.process.wait(30) == 1
        assert wait_gone(pids) == []
        assert not own_runtime_dir.exists()
        assert termios.tcgetattr(demo.slave) == before
        shown, hidden = demo.output.rfind(b"\x1b[?25h"), demo.output.rfind(b"\x1b[?25l")
        assert shown > hidden, "the cursor is gone"
    finally:
        demo.close()


def test_ctrl_c_before_anything_is_ready(program_class: Any) -> None:
    demo = program_class("gateway.archi", "demo", "--islands", "1", "--port", "0")
    try:
        demo.wait_line(lambda line: line.startswith("island "))
        pids = pids_of(demo)
        assert demo.stop(signal.SIGINT) == 0
        assert wait_gone(pids) == []
        assert not any("Traceback" in line for line in demo.lines)
    finally:
        demo.kill()


def test_a_reader_that_has_gone_ends_the_demo(program_class: Any) -> None:
    demo = subprocess.Popen(
        [sys.executable, "-m", "gateway.archi", "demo", "--islands", "1", "--port", "0", "--no-question"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert demo.stdout is not None
    pid = int(demo.stdout.readline().split()[-1])
    demo.stdout.close()
    assert demo.stderr is not None
    assert demo.stderr.read() == b""
    demo.stderr.close()
    assert demo.wait(30) == 0
    assert wait_gone([pid]) == []


def test_the_demo_answers_and_ends_cleanly(program_class: Any) -> None:
    demo = program_class("gateway.archi", "demo", "--islands", "2", "--port", "0")
    try:
        ready = demo.wait_line(lambda line: line.startswith("ready ")).split()
        assert ready[2] == "key"
        url, key = ready[1], ready[3]
        demo.wait_line(lambda line: "Ask it yourself" in line)
        assert any(line.startswith("gateway pid ") for line in demo.lines)
        assert sum(line.startswith("island ") and " pid " in line for line in demo.lines) == 2
        # The first answer came from the real model, and the closing line says who gave it.
        closing = next(line for line in demo.lines if line.startswith("[") and "tokens/s" in line)
        assert closing.split(" ")[0].strip("[") in {"coral", "atoll"}

        body = {
            "model": "smollm2-135m",
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
        }
        body |= {"temperature": 0, "max_tokens": 30}
        headers = {"Authorization": f"Bearer {key}"}
        answer = httpx.post(f"{url}/chat/completions", json=body, headers=headers, timeout=60)
        assert "Paris" in answer.json()["choices"][0]["message"]["content"]

        pids = pids_of(demo)
        os.kill(pids[1], signal.SIGKILL)
        demo.wait_line(lambda line: "killed by SIGKILL" in line)
        demo.wait_line(lambda line: "the gateway lost" in line)
        again = httpx.post(f"{url}/chat/completions", json=body, headers=headers, timeout=60)
        assert again.status_code == 200
        assert demo.stop(signal.SIGINT) == 0
        assert wait_gone(pids) == []
    finally:
        demo.kill()


def test_children_do_not_outlive_a_killed_demo(program_class: Any) -> None:
    demo = program_class("gateway.archi", "demo", "--islands", "1", "--port", "0", "--no-question")
    try:
        demo.wait_line(lambda line: line.startswith("ready "))
        pids = pids_of(demo)
    finally:
        demo.kill()
    assert wait_gone(pids) == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--islands", "0"], "--islands must be between"),
        (["--cargo", "smolm2-135m"], "Did you mean 'smollm2-135m'"),
        (["--set-gateway", "jobs.nonsense=1"], "there is no setting"),
        (["--set-island", "engine.threds=1"], "did you mean 'engine.threads'"),
        (["--data-dir", "/dev/null"], "/dev/null/gateway: Not a directory; choose another place"),
    ],
)
def test_bad_input_is_one_clear_error(program_class: Any, flags: list[str], said: str) -> None:
    demo = program_class("gateway.archi", "demo", "--port", "0", *flags)
    try:
        demo.wait_line(lambda line: said in line)
        assert demo.process.wait(60) != 0
    finally:
        demo.kill()
    assert not any("Traceback" in line for line in demo.lines)
    assert not any("no Island is left" in line for line in demo.lines)  # its end is told once


def test_a_terminal_that_is_closed_leaves_nothing(own_runtime_dir: Path, tmp_path: Path) -> None:
    """No process, no folder, no file for `archi chat`."""
    folders = tmp_path / "folders"
    folders.mkdir()
    kept = tmp_path / "kept"
    demo = OnTerminal("--islands", "1", "--no-question", "--data-dir", str(kept), TMPDIR=str(folders))
    try:
        demo.read_until(b"Ctrl-C stops all")
        pids = [int(pid) for pid in re.findall(rb" pid (\d+)\r", demo.output)]
        assert len(pids) == 2
        assert len(list(folders.glob("archipelag-demo-*"))) == 1
        demo.process.send_signal(signal.SIGHUP)
        os.close(demo.master)
        demo.master = os.open(os.devnull, os.O_RDONLY)
        demo.process.wait(30)
        assert wait_gone(pids) == []
        assert not list(folders.glob("archipelag-demo-*"))
        assert not own_runtime_dir.exists()
        for name in ("gateway", "coral"):  # what was asked for stays
            lines = (kept / name / "log.jsonl").read_text().splitlines()
            assert "listening" in {json.loads(line)["event"] for line in lines}
    finally:
        demo.close()
