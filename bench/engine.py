"""Tokens/s of an Island's engine against bare llama.cpp, in one interleaved run.

    python bench/engine.py MODEL.gguf [--rounds 5] [--tokens 96] [--threads 1]

Both decode the same number of streams greedily with the same context settings. "Bare" is a loop of
llama_decode and argmax in this process; "engine" is everything between: LlamaRuntime, worker process, sampler,
detokenizer, pipe. Goals: 0.95 at one stream, 0.90 at four and eight.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import trio

from bench.figures import header, model_path
from cargos.runtimes.base import Finished, RuntimeSpec, Session, Tokens
from cargos.runtimes.llama import open_llama
from cargos.runtimes.llama.engine import N_BATCH
from cargos.runtimes.llama.native import Context, Model
from cargos.runtimes.llama.runtime import LlamaRuntime
from protocol.dice import Dice
from protocol.work import Generation, Sampling, TokenPrompt

STREAMS = (1, 4, 8)
GOALS = {1: 0.95, 4: 0.90, 8: 0.90}
PROMPT_TOKENS = 24
CONTEXT_LENGTH = 2048


def make_prompts(dice: Dice, n: int, n_vocab: int) -> list[list[int]]:
    return [[dice.below(n_vocab) for _ in range(PROMPT_TOKENS)] for _ in range(n)]


def bare(context: Context, prompts: list[list[int]], tokens: int) -> float:
    """Decoded tokens/s."""
    context.clear()
    n = len(prompts)
    last: list[int] = []
    for i, prompt in enumerate(prompts):
        context.decode(prompt, range(len(prompt)), [i] * len(prompt), [len(prompt) - 1])
        last.append(int(context.logits(len(prompt) - 1).argmax()))
    began = time.perf_counter()
    for step in range(tokens):
        context.decode(last, [PROMPT_TOKENS + step] * n, range(n), range(n))
        last = [int(context.logits(i).argmax()) for i in range(n)]
    return n * tokens / (time.perf_counter() - began)


async def engine(runtime: LlamaRuntime, prompts: list[list[int]], tokens: int, temperature: float) -> float:
    """Decoded tokens/s, from the moment that every stream has its first token."""
    waiting = len(prompts)
    go = trio.Event()
    began = 0.0

    async def stream(prompt: list[int]) -> None:
        nonlocal waiting, began
        sampling = Sampling(seed=1, temperature=temperature)
        work = Generation(TokenPrompt(tuple(prompt)), sampling, max_tokens=tokens + 1, ignore_eos=True)
        async with runtime.session(work, granted=1) as session:
            await first_token(session)
            waiting -= 1
            if not waiting:
                began = time.perf_counter()
                go.set()
            await go.wait()
            session.grant(tokens + 1)
            while not isinstance(await session.receive(), Finished):
                pass

    async with trio.open_nursery() as nursery:
        for prompt in prompts:
            nursery.start_soon(stream, prompt)
    return len(prompts) * tokens / (time.perf_counter() - began)


async def first_token(session: Session) -> None:
    while not isinstance(await session.receive(), Tokens):
        pass


async def measure(path: str, rounds: int, tokens: int, threads: int) -> None:
    model = Model([path])
    context = Context(
        model,
        context_length=CONTEXT_LENGTH,
        n_seq=8,
        n_batch=N_BATCH,
        threads=threads,
        flash_attention=True,
    )
    dice = Dice(7)
    spec = RuntimeSpec("bench", {"model.gguf": path}, CONTEXT_LENGTH, threads=threads)
    results: dict[tuple[str, int], list[float]] = {}
    async with open_llama(spec) as runtime:
        await runtime.ready()
        for _ in range(rounds):
            for n in STREAMS:
                prompts = make_prompts(dice, n, model.n_vocab)
                speed = await trio.to_thread.run_sync(bare, context, prompts, tokens)
                results.setdefault(("bare", n), []).append(speed)
                for name, temperature in (("greedy", 0.0), ("sampled", 0.8)):
                    prompts = make_prompts(dice, n, model.n_vocab)
                    results.setdefault((name, n), []).append(
                        await engine(runtime, prompts, tokens, temperature)
                    )
    print(f"{tokens} tokens a stream, {rounds} rounds, {threads} thread(s); medians, tokens/s of all streams")
    print(f"{'streams':>7} {'bare':>8} {'greedy':>8} {'ratio':>6} {'sampled':>8} {'ratio':>6}  goal")
    for n in STREAMS:
        plain = statistics.median(results["bare", n])
        row = f"{n:>7} {plain:>8.1f}"
        for name in ("greedy", "sampled"):
            ratios = [a / b for a, b in zip(results[name, n], results["bare", n], strict=True)]
            row += f" {statistics.median(results[name, n]):>8.1f} {statistics.median(ratios):>6.3f}"
        print(f"{row}  {GOALS[n]:.2f}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench engine", description="an Island against bare llama.cpp"
    )
    parser.add_argument("model", nargs="?", help="a GGUF file (default: SmolLM2 from the store)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    header("the engine")
    trio.run(measure, options.model or model_path(), options.rounds, options.tokens, options.threads)
    return 0


if __name__ == "__main__":
    sys.exit(main())
