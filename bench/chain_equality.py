"""Does a chain say what the whole model says? Token for token, from separate processes, over many prompts.

    python -m bench chain_equality [--cargo NAME ...] [--stages 2 3 4] [--activations f32 f16s] [--prompts 20]

One Island with the whole model answers each prompt, then chains of two, three and four Islands do, each
with too little memory for a shorter chain. Greedy and seeded; and `deterministic`, always to be equal. What
is printed is how many of the answers are equal to the whole model's, and where the others part first.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any, Final

from bench.chain_client import Answer, Client, checked
from bench.chain_mesh import open_chain, open_whole
from bench.figures import header, row

PROMPTS: Final = (
    "Explain in a few sentences why the sky is blue.",
    "Write a haiku about the sea.",
    "What is the capital of France, and what is it known for?",
    "List three uses for a brick.",
    "How does a sailing boat move against the wind?",
    "Tell me a short story about a lighthouse keeper.",
    "What is the difference between weather and climate?",
    "Give me a recipe for pancakes.",
    "Who was Marie Curie?",
    "Write a Python function that reverses a list.",
    "Why do leaves change their colour in autumn?",
    "Describe a market in the morning.",
    "What should I pack for a week in the mountains?",
    "How do bees find their way home?",
    "Summarise the plot of Romeo and Juliet.",
    "What is seven times eight, and how do you know?",
    "Write a letter to a friend who has moved away.",
    "Name five rivers and a city on each.",
    "How is glass made?",
    "Give three reasons to learn an instrument.",
)
MODES: Final[dict[str, dict[str, Any]]] = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 0.7, "top_p": 0.9, "seed": 11},
    "deterministic": {"temperature": 0.7, "top_p": 0.9, "seed": 11, "deterministic": True},
}


def answers(client: Client, mode: str, prompts: int, tokens: int) -> list[str]:
    """One after the other: nobody shares a batch with anybody."""
    return [checked(_ask(client, prompt, mode, tokens)).text for prompt in PROMPTS[:prompts]]


def _ask(client: Client, prompt: str, mode: str, tokens: int) -> Answer:
    return client.ask(prompt, tokens, **MODES[mode])


def compare(whole: list[str], chain: list[str]) -> str:
    """How many are equal; of the others, at which character the first one parts."""
    equal = sum(a == b for a, b in zip(whole, chain, strict=True))
    parted = [
        next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        for a, b in zip(whole, chain, strict=True)
        if a != b
    ]
    return f"{equal}/{len(whole)}" + (f" ({min(parted)})" if parted else "")


def _run(cargo: str, arguments: argparse.Namespace) -> None:
    modes: list[str] = arguments.modes
    with open_whole(cargo) as mesh:
        whole = {mode: answers(mesh, mode, arguments.prompts, arguments.tokens) for mode in modes}
    row(f"{cargo}, {arguments.tokens} tokens", *modes)
    for stages in arguments.stages:
        for dtype in arguments.activations:
            with open_chain(cargo, stages, drafts=arguments.drafts, activations=dtype) as mesh:
                cells = [
                    compare(whole[mode], answers(mesh, mode, arguments.prompts, arguments.tokens))
                    for mode in modes
                ]
                row(f"{mesh.layout_words()} {dtype}", *cells)
            sys.stdout.flush()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench chain_equality", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--cargo", nargs="+", default=["smollm2-135m", "gemma3-270m"])
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--activations", nargs="+", default=["f32", "f16s"], metavar="DTYPE")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--drafts", action="store_true", help="let heads draft")
    arguments = parser.parse_args(argv)
    header("chains against the whole model: equal answers (and the first character where others part)")
    for cargo in arguments.cargo:
        _run(cargo, arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
