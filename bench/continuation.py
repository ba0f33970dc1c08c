"""How often does a job that moved to another engine go on as if it had not? In one run, seeded.

    python bench/continuation.py MODEL.gguf [--prompts 12] [--tokens 48]

Each prompt is answered once undisturbed (alone). Then it is resumed from a random token of that answer: alone,
among seven other jobs, and in deterministic mode among seven others. Printed: the share of resumed answers
whose rest is equal to the undisturbed one's, and the share of equal tokens before the first difference.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

import msgspec
import trio

from bench.figures import header, model_path
from cargos.runtimes.base import Finished, RuntimeSpec, Tokens
from cargos.runtimes.llama import open_llama
from cargos.runtimes.llama.runtime import LlamaRuntime
from protocol.dice import Dice
from protocol.work import ChatMessage, ChatPrompt, Generation, Sampling

SUBJECTS = ("the sea", "bread", "a lost key", "winter", "trains", "an old map", "coffee", "bridges")
ASKS = ("Write a short story about", "Explain to a child", "List five facts about", "Write a poem about")
NEIGHBOURS = 7


@dataclass
class Tally:
    whole: int = 0
    equal: int = 0
    due: int = 0
    runs: int = 0

    def note(self, got: list[int], expected: list[int]) -> None:
        same = next((i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), None)
        same = min(len(got), len(expected)) if same is None else same
        self.runs += 1
        self.whole += got == expected
        self.equal += same
        self.due += len(expected)

    def row(self, name: str) -> str:
        share = self.equal / self.due if self.due else 1.0
        return f"{name:<44} {self.whole:>3} of {self.runs:<3} equal to the end; {share:7.1%} of tokens equal"


def job(dice: Dice, temperature: float, tokens: int) -> Generation:
    text = f"{dice.choice(ASKS)} {dice.choice(SUBJECTS)}, and mention the number {dice.below(1000)}."
    messages = (ChatMessage("system", "You are a helpful assistant."), ChatMessage("user", text))
    sampling = Sampling(seed=dice.below(1 << 32), temperature=temperature)
    return Generation(ChatPrompt(messages), sampling, max_tokens=tokens)


async def answer(runtime: LlamaRuntime, work: Generation, resume: list[int]) -> list[int]:
    ids = list(resume)
    async with runtime.session(work, resume=tuple(resume), granted=1 << 17) as session:
        while not isinstance(event := await session.receive(), Finished):
            if isinstance(event, Tokens):
                ids += [token.id for token in event.tokens]
    return ids


async def crowded(runtime: LlamaRuntime, dice: Dice, work: Generation, resume: list[int]) -> list[int]:
    """Answered while NEIGHBOURS other jobs run from before its start until after its end."""
    result: list[int] = []
    fresh: list[int] = []
    async with trio.open_nursery() as nursery:
        for _ in range(NEIGHBOURS):
            endless = msgspec.structs.replace(job(dice, 1.0, 1900), ignore_eos=True)
            nursery.start_soon(answer, runtime, endless, fresh)
        await trio.sleep(0.2)
        result = await answer(runtime, work, resume)
        nursery.cancel_scope.cancel()
    return result


async def measure(path: str, prompts: int, tokens: int) -> None:
    spec = RuntimeSpec("continuation", {"model.gguf": path}, 2048)
    async with open_llama(spec) as runtime:
        await runtime.ready()
        for name, temperature in (("greedy", 0.0), ("temperature 0.8", 0.8)):
            dice = Dice(2024)
            alone, batch, fixed = Tally(), Tally(), Tally()
            for _ in range(prompts):
                work = job(dice, temperature, tokens)
                whole = await answer(runtime, work, [])
                cut = 1 + dice.below(max(1, len(whole) - 1))
                alone.note((await answer(runtime, work, whole[:cut]))[cut:], whole[cut:])
                batch.note((await crowded(runtime, dice, work, whole[:cut]))[cut:], whole[cut:])
                exact = msgspec.structs.replace(work, deterministic=True)
                whole = await answer(runtime, exact, [])
                cut = 1 + dice.below(max(1, len(whole) - 1))
                fixed.note((await crowded(runtime, dice, exact, whole[:cut]))[cut:], whole[cut:])
            print(alone.row(f"{name}: resumed alone"))
            print(batch.row(f"{name}: resumed among {NEIGHBOURS} others"))
            print(fixed.row(f"{name}: deterministic, among {NEIGHBOURS} others"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench continuation", description="how often continuations agree"
    )
    parser.add_argument("model", nargs="?", help="a GGUF file (default: SmolLM2 from the store)")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=48)
    options = parser.parse_args(argv)
    header("continuations")
    trio.run(measure, options.model or model_path(), options.prompts, options.tokens)
    return 0


if __name__ == "__main__":
    sys.exit(main())
