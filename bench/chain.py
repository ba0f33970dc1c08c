"""Chains of Islands against one Island with the whole model, in one interleaved run on one machine.

    python -m bench chain [--rounds N] [--stages 2 3] [--quick]

Everything is the real thing: a gateway and an OpenAI client per mesh, a process per Island, one thread per
engine. What is printed are ratios of tokens/s to the whole model's in the same round. One session: the stages
work one after the other, so a ratio near 1 says that cutting and passing on cost little. Eight sessions:
stages work at the same time, and where the machine has a core for each the chain is the faster one.

With --rpc llama.cpp's own way to spread layers runs beside it, against llama.cpp's own server with the whole
model (both built on first use). It has neither authentication nor recovery, so it is a measure of speed only.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench.chain_client import Client, checked, prose
from bench.chain_mesh import CARGO, open_chain, open_whole
from bench.figures import header, median, model_path, row
from bench.llama_server import start_llama_rpc, start_llama_server
from protocol.dice import Dice

WHOLE = "whole"
LLAMA = "llama.cpp"
SESSIONS = 8
TOKENS = 48
SHORT_WORDS = 24
LONG_WORDS = 120


def generation(client: Client, dice: Dice) -> float:
    """Tokens/s behind the first one of a stream that is alone."""
    return checked(client.ask(prose(dice, SHORT_WORDS), TOKENS)).decode_tps


def generation_of_many(client: Client, dice: Dice) -> float:
    """Tokens/s of all streams, from the first token of any to the last of all."""
    answers = client.ask_many([prose(dice, SHORT_WORDS) for _ in range(SESSIONS)], TOKENS)
    took = max(answer.arrivals[-1] for answer in answers) - min(answer.arrivals[0] for answer in answers)
    return sum(answer.tokens for answer in answers) / took


def prefill(client: Client, dice: Dice) -> float:
    """Prompt tokens/s until the first token is there."""
    answer = checked(client.ask(prose(dice, LONG_WORDS), 1))
    return answer.prompt_tokens / (answer.ended - answer.began)


def prefill_of_many(client: Client, dice: Dice) -> float:
    answers = client.ask_many([prose(dice, LONG_WORDS) for _ in range(SESSIONS)], 1)
    took = max(answer.ended for answer in answers) - min(answer.began for answer in answers)
    return sum(answer.prompt_tokens for answer in answers) / took


MEASURES: dict[str, Callable[[Client, Dice], float]] = {
    "generation, 1 session": generation,
    f"generation, {SESSIONS} sessions": generation_of_many,
    "prefill, 1 session": prefill,
    f"prefill, {SESSIONS} sessions": prefill_of_many,
}


@contextmanager
def llama_cpp(model: Path, machines: int) -> Generator[Client]:
    """llama.cpp's server with the whole model (0 machines), or with its layers on so many others."""
    processes, port = [], 0
    try:
        if machines:
            processes, port = start_llama_rpc(model, machines, slots=SESSIONS)
        else:
            server, port = start_llama_server(model, slots=SESSIONS)
            processes = [server]
        yield Client("127.0.0.1", port, "whatever")
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure(sides: dict[str, Client], rounds: int) -> dict[tuple[str, str], list[float]]:
    """By measure and side: tokens/s of each round."""
    dice = Dice(11)
    for client in sides.values():  # caches and measured speeds of before the first round
        generation(client, dice)
    seen: dict[tuple[str, str], list[float]] = {}
    names = list(sides)
    for index in range(rounds):
        for measure_name, run in MEASURES.items():
            for name in names[index % len(names) :] + names[: index % len(names)]:
                seen.setdefault((measure_name, name), []).append(run(sides[name], dice))
    return seen


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench chain", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--cargo", default=CARGO)
    parser.add_argument("--rpc", action="store_true", help="llama.cpp's RPC backend beside it")
    parser.add_argument("--quick", action="store_true", help="one round, to see that it runs")
    arguments = parser.parse_args(argv)
    rounds = 1 if arguments.quick else arguments.rounds
    header(f"chains against the whole model, {arguments.cargo}")
    with ExitStack() as stack:
        meshes = {WHOLE: stack.enter_context(open_whole(arguments.cargo))}
        for stages in arguments.stages:
            meshes[f"{stages} stages"] = stack.enter_context(open_chain(arguments.cargo, stages))
        for name, mesh in meshes.items():
            print(f"  {name}: {mesh.layout_words()}")
        sides: dict[str, Client] = {**meshes}
        against = dict.fromkeys(list(meshes)[1:], WHOLE)
        if arguments.rpc:
            model = Path(model_path(arguments.cargo))
            sides[LLAMA] = stack.enter_context(llama_cpp(model, 0))
            for stages in arguments.stages:
                sides[f"RPC, {stages}"] = stack.enter_context(llama_cpp(model, stages))
                against[f"RPC, {stages}"] = LLAMA
        seen = measure(sides, rounds)
    row(f"of the whole model's tokens/s, {rounds} rounds", *against, "whole (1/s)")
    for measured in MEASURES:
        cells = [
            median([a / b for a, b in zip(seen[measured, name], seen[measured, whole], strict=True)])
            for name, whole in against.items()
        ]
        row(measured, *(f"{cell:.2f}" for cell in cells), f"{median(seen[measured, WHOLE]):.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
