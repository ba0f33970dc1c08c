"""Chains of Islands against one Island with the whole model, in one interleaved run on one machine.

    python -m bench chain [--rounds N] [--stages 2 3] [--quick]

Everything is the real thing: a gateway and an OpenAI client per mesh, a process per Island, one thread per
engine. What is printed are ratios of tokens/s to the whole model's in the same round. One session: the stages
work one after the other, so a ratio near 1 says that cutting and passing on cost little. Eight sessions:
stages work at the same time, and where the machine has a core for each the chain is the faster one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import ExitStack

from bench.chain_mesh import CARGO, Mesh, checked, open_chain, open_whole, prose
from bench.figures import header, median, row
from protocol.dice import Dice

SESSIONS = 8
TOKENS = 48
SHORT_WORDS = 24
LONG_WORDS = 240


def generation(mesh: Mesh, dice: Dice) -> float:
    """Tokens/s behind the first one of a stream that is alone."""
    return checked(mesh.ask(prose(dice, SHORT_WORDS), TOKENS)).decode_tps


def generation_of_many(mesh: Mesh, dice: Dice) -> float:
    """Tokens/s of all streams, from the first token of any to the last of all."""
    answers = mesh.ask_many([prose(dice, SHORT_WORDS) for _ in range(SESSIONS)], TOKENS)
    took = max(answer.arrivals[-1] for answer in answers) - min(answer.arrivals[0] for answer in answers)
    return sum(answer.tokens for answer in answers) / took


def prefill(mesh: Mesh, dice: Dice) -> float:
    """Prompt tokens/s until the first token is there."""
    answer = checked(mesh.ask(prose(dice, LONG_WORDS), 1))
    return answer.prompt_tokens / (answer.ended - answer.began)


def prefill_of_many(mesh: Mesh, dice: Dice) -> float:
    answers = mesh.ask_many([prose(dice, LONG_WORDS) for _ in range(SESSIONS)], 1)
    took = max(answer.ended for answer in answers) - min(answer.began for answer in answers)
    return sum(answer.prompt_tokens for answer in answers) / took


MEASURES: dict[str, Callable[[Mesh, Dice], float]] = {
    "generation, 1 session": generation,
    f"generation, {SESSIONS} sessions": generation_of_many,
    "prefill, 1 session": prefill,
    f"prefill, {SESSIONS} sessions": prefill_of_many,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench chain", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--cargo", default=CARGO)
    parser.add_argument("--quick", action="store_true", help="one round, to see that it runs")
    arguments = parser.parse_args(argv)
    rounds = 1 if arguments.quick else arguments.rounds
    header(f"chains against the whole model, {arguments.cargo}")
    with ExitStack() as stack:
        sides = {"whole": stack.enter_context(open_whole(arguments.cargo))}
        for stages in arguments.stages:
            sides[f"{stages} stages"] = stack.enter_context(open_chain(arguments.cargo, stages))
        for name, mesh in sides.items():
            print(f"  {name}: {mesh.layout_words()}")
        dice = Dice(11)
        for mesh in sides.values():  # caches and measured speeds of before the first round
            generation(mesh, dice)
        seen: dict[tuple[str, str], list[float]] = {}
        names = list(sides)
        for index in range(rounds):
            for measure, run in MEASURES.items():
                for name in names[index % len(names) :] + names[: index % len(names)]:
                    seen.setdefault((measure, name), []).append(run(sides[name], dice))
        row(
            f"of the whole model's tokens/s, {rounds} rounds", *(f"{name}" for name in names[1:]), "whole (1/s)"
        )
        for measure in MEASURES:
            whole = seen[measure, "whole"]
            ratios = [
                median([a / b for a, b in zip(seen[measure, name], whole, strict=True)]) for name in names[1:]
            ]
            row(measure, *(f"{ratio:.2f}" for ratio in ratios), f"{median(whole):.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
