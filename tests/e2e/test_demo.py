"""The demo as a newcomer meets it: what it prints, what it answers, how it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import time
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
        assert closing.split(":")[0].strip("[") in {"coral", "atoll"}

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
        demo.wait_line(lambda line: "is lost" in line)
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
