"""A real model over three Islands, each a process of its own with too little memory for it, through the OpenAI
client, with Islands killed in mid-sentence.
"""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from itertools import pairwise
from pathlib import Path

import openai
import pytest

pytestmark = [pytest.mark.model, pytest.mark.slow]

CARGO = "smollm2-135m-f16"
KEY = "ak_0123456789abcdef0123"
#: A machine with two busy cores loads six times a hundred megabytes, and computes seven thousand layers.
READY_S = 240
TOKENS = 40
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


class Demo:
    """`archi demo`, and what its lines say."""

    def __init__(self, folder: Path, islands: int, memory_mb: int) -> None:
        command = [sys.executable, "-m", "gateway.archi", "demo", "--no-question", "--port", "0", "--key", KEY]
        command += ["--islands", str(islands), "--memory-mb", str(memory_mb), "--cargo", CARGO]
        self.process = subprocess.Popen(  # noqa: S603 - our own program
            [*command, "--data-dir", str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **ONE_THREAD, "XDG_RUNTIME_DIR": str(folder)},
        )
        self.lines: list[str] = []
        self.pids: dict[str, int] = {}
        self.held: dict[str, tuple[int, int]] = {}
        self._news: queue.Queue[None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            if found := re.match(r"island (\S+) pid (\d+)$", line):
                self.pids[found[1]] = int(found[2])
            elif found := re.match(r"island (\S+) layers (\d+)-(\d+) of 30( spare)?$", line):
                self.held[found[1]] = (int(found[2]), int(found[3]))
            self._news.put(None)
        self.process.stdout.close()
        self._news.put(None)

    def wait(self, condition: Callable[[], object], what: str) -> None:
        until = time.monotonic() + READY_S
        while not condition():
            assert time.monotonic() < until, f"{what}\n" + "\n".join(self.lines)
            assert self.process.poll() is None or condition(), "\n".join(self.lines)
            try:
                self._news.get(timeout=0.5)
            except queue.Empty:
                continue

    @property
    def url(self) -> str:
        return next((line.split()[1] for line in self.lines if line.startswith("ready ")), "")

    def kill(self, name: str) -> None:
        os.kill(self.pids[name], signal.SIGKILL)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        finally:
            self.process.kill()
            self._reader.join(10)


@pytest.fixture
def start(tmp_path: Path) -> Generator[Callable[[int, int], Demo]]:
    running: list[Demo] = []

    def begin(islands: int, memory_mb: int) -> Demo:
        running.append(Demo(tmp_path, islands, memory_mb))
        return running[-1]

    yield begin
    for demo in running:
        demo.end()


def ask(demo: Demo, *, kill: int | None = None) -> tuple[str, dict[str, object]]:
    """The whole answer and its usage. `kill`: the chain's stage with this index dies after a third of it."""
    client = openai.OpenAI(base_url=demo.url, api_key=KEY, max_retries=0, timeout=120)
    raw = client.chat.completions.with_raw_response.create(
        model=CARGO,
        messages=[{"role": "user", "content": "Tell me a story about the sea."}],
        max_tokens=TOKENS,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"deterministic": True},
    )
    stages = [part.split()[0] for part in raw.headers["x-archipelag-stages"].split(", ")]
    pieces: list[str] = []
    usage: dict[str, object] = {}
    for chunk in raw.parse():
        if chunk.usage is not None:
            usage = chunk.usage.model_dump()
        if chunk.choices and chunk.choices[0].delta.content:
            pieces.append(chunk.choices[0].delta.content)
            if kill is not None and len(pieces) == TOKENS // 3:
                demo.kill(stages[kill])
    return "".join(pieces), usage


def test_any_stage_may_be_killed_in_mid_sentence_and_the_sentence_goes_on(start) -> None:
    demo = start(6, 150)
    demo.wait(lambda: demo.url, "it was never ready")
    demo.wait(lambda: len(demo.held) == 6, "three spares should hold layers, too")
    ranges = sorted(set(demo.held.values()))
    assert (ranges[0][0], ranges[-1][1], len(ranges)) == (0, 29, 3)
    assert all(b[0] == a[1] + 1 for a, b in pairwise(ranges))
    wanted, usage = ask(demo)
    own = usage["archipelag"]
    assert [s["first_layer"] for s in own["stages"]] == [first for first, _ in ranges]
    for stage, (hand_overs, lost) in ((1, (0, 1)), (2, (1, 0)), (0, (0, 1))):
        answer, usage = ask(demo, kill=stage)
        assert answer == wanted, f"stage {stage} died, and something else was said"
        assert usage["completion_tokens"] == TOKENS
        assert (usage["archipelag"]["hand_overs"], usage["archipelag"]["stages_lost"]) == (hand_overs, lost)
    answer, _ = ask(demo)
    assert answer == wanted


def test_too_little_memory_ends_with_a_way_out(start) -> None:
    demo = start(2, 150)
    demo.process.wait(READY_S)
    demo.end()
    (error,) = [line for line in demo.lines if line.startswith("error: ")]
    assert demo.process.returncode == 1
    assert "--islands 3" in error
    assert "--memory-mb" in error
