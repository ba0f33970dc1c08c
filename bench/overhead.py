"""What gateway and mesh add to an answer, beside what LiteLLM's proxy adds.

    python -m bench overhead [--rounds N]

Four ways to the same model, one thread each, interleaved in one run with the same prompts: llama.cpp's own
server called directly; LiteLLM's proxy in front of that server; our gateway in front of an Island; and our
engine called directly in its own process, without HTTP, gateway or mesh (the floor for ours). Overheads are
differences of medians over the rounds: proxy minus its own backend, like with like.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import re
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import trio

from bench.figures import header, median, percentile, row
from bench.llama_server import start_litellm, start_llama_server
from cargos.resolve import resolve_cargo
from cargos.runtimes.base import Finished, RuntimeSpec, Tokens
from cargos.runtimes.llama import LlamaRuntime, open_llama
from cargos.store import CargoStore
from protocol.dice import Dice
from protocol.work import ChatMessage, ChatPrompt, Generation, Sampling

MODEL = "smollm2-135m"
KEY = "ak_bench_0123456789abcdef"
TOKENS = 32
SYSTEM = "You are a helpful assistant."


@dataclass
class Seen:
    """Times of one way, in milliseconds."""

    ttft: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    median_gaps: list[float] = field(default_factory=list)

    def add(self, began: float, arrivals: list[float]) -> None:
        self.ttft.append((arrivals[0] - began) * 1e3)
        gaps = [(b - a) * 1e3 for a, b in itertools.pairwise(arrivals)]
        self.gaps.extend(gaps)
        self.median_gaps.append(median(gaps))


def request_body(prompt: str) -> bytes:
    return json.dumps(
        {
            "model": MODEL,
            "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}],
            "stream": True,
            "max_tokens": TOKENS,
            "temperature": 0,
            "seed": 1,
        }
    ).encode()


class Http:
    """One request on a fresh connection that was made beforehand: the client costs the same for each way."""

    def __init__(self, port: int, key: str) -> None:
        self._port = port
        self._headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}

    def ask(self, prompt: str, seen: Seen | None) -> None:
        body = request_body(prompt)
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)
        connection.connect()
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        began = time.perf_counter()
        connection.request("POST", "/v1/chat/completions", body, self._headers)
        response = connection.getresponse()
        if response.status != 200:
            raise SystemExit(f"{response.status}: {response.read()[:500]!r}")
        arrivals: list[float] = []
        while line := response.readline():
            if line.startswith(b"data: {"):
                choices = json.loads(line[6:])["choices"]
                if choices and choices[0]["delta"].get("content"):
                    arrivals.append(time.perf_counter())
        connection.close()
        if seen is not None and len(arrivals) > 2:
            seen.add(began, arrivals)


async def ask_engine(runtime: LlamaRuntime, prompt: str, seen: Seen | None) -> None:
    messages = (ChatMessage("system", SYSTEM), ChatMessage("user", prompt))
    work = Generation(ChatPrompt(messages), Sampling(seed=1, temperature=0), max_tokens=TOKENS)
    began = time.perf_counter()
    arrivals: list[float] = []
    async with runtime.session(work, granted=TOKENS) as session:
        while not isinstance(event := await session.receive(), Finished):
            if isinstance(event, Tokens):
                arrivals.extend(time.perf_counter() for token in event.tokens if token.text)
    if seen is not None and len(arrivals) > 2:
        seen.add(began, arrivals)


def start_demo() -> tuple[subprocess.Popen[str], int]:
    demo = subprocess.Popen(
        [
            *(sys.executable, "-m", "gateway.archi", "demo", "--islands", "1", "--port", "0"),
            *("--no-question", "--key", KEY, "--set-gateway", "http.requests_per_minute=0"),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert demo.stdout is not None
    for line in demo.stdout:
        if found := re.match(r"ready http://127\.0\.0\.1:(\d+)/v1 key", line):
            return demo, int(found[1])
    raise SystemExit("the demo did not start")


async def measure(rounds: int) -> dict[str, Seen]:
    entry = resolve_cargo(MODEL)
    files = await CargoStore().ensure(entry.manifest)
    model = next(iter(files.values()))
    spec = RuntimeSpec(
        MODEL, {"model.gguf": str(model)}, 2048, system_prompt=entry.manifest.defaults.system_prompt, slots=1
    )
    running: list[subprocess.Popen[bytes] | subprocess.Popen[str]] = []
    dice = Dice(7)
    words = [
        "harbour",
        "salt",
        "wind",
        "tide",
        "rope",
        "sail",
        "gull",
        "pier",
        "storm",
        "chart",
        "lamp",
        "reef",
    ]
    try:
        server, server_port = start_llama_server(Path(model))
        running.append(server)
        proxy, proxy_port = start_litellm(server_port, MODEL, KEY)
        running.append(proxy)
        demo, demo_port = start_demo()
        running.append(demo)
        ways = {"llama.cpp server": Http(server_port, "none"), "LiteLLM": Http(proxy_port, KEY)}
        ways["archipelag"] = Http(demo_port, KEY)
        seen = {name: Seen() for name in (*ways, "our engine, no gateway")}
        async with open_llama(spec) as runtime:
            await runtime.ready()
            for index in range(rounds + 3):
                counted = index >= 3
                order = dice.sample(list(seen), len(seen))
                for name in order:
                    # Prompts of one length, but none twice: a server must not find it in its cache.
                    prompt = f"{' '.join(dice.sample(words, 8))}? Tell me about {dice.choice(words)}."
                    target = seen[name] if counted else None
                    if name in ways:
                        await trio.to_thread.run_sync(ways[name].ask, prompt, target)
                    else:
                        await ask_engine(runtime, prompt, target)
                if counted and index % 10 == 0:
                    print(f"  round {index - 2} of {rounds}", flush=True)
    finally:
        for process in reversed(running):
            process.terminate()
            process.wait(30)
    return seen


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench overhead", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=60)
    arguments = parser.parse_args(argv)
    header("gateway and mesh overhead")
    seen = trio.run(measure, arguments.rounds)
    row("milliseconds", "TTFT p50", "p99", "gap p50", "p99")
    for name, way in seen.items():
        cells = (median(way.ttft), percentile(way.ttft, 0.99), median(way.gaps), percentile(way.gaps, 0.99))
        row(name, *(f"{cell:.2f}" for cell in cells))
    pairs = {"LiteLLM": "llama.cpp server", "archipelag": "our engine, no gateway"}
    added = {
        name: (
            median(seen[name].ttft) - median(seen[base].ttft),
            median(seen[name].gaps) - median(seen[base].gaps),
        )
        for name, base in pairs.items()
    }
    for name, (ttft, gap) in added.items():
        row(f"{name} adds to {pairs[name]}", f"{ttft:+.2f}", "", f"{gap:+.3f}")
    direct = seen["llama.cpp server"]
    row(
        "archipelag against llama.cpp's server",
        f"{median(seen['archipelag'].ttft) - median(direct.ttft):+.2f}",
        "",
        f"{median(seen['archipelag'].gaps) - median(direct.gaps):+.3f}",
    )
    ours, theirs = added["archipelag"], added["LiteLLM"]
    for label, index in (("TTFT", 0), ("gap", 1)):
        ratio = f"{theirs[index] / ours[index]:.1f} x" if ours[index] > 0 else "ours adds nothing measurable"
        row(f"LiteLLM's added {label} over ours", ratio)
    return 0


if __name__ == "__main__":
    sys.exit(main())
