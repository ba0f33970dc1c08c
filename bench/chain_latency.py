"""Tokens/s of a chain whose stages are far apart, as a share of what physics allows, with and without drafts.

    python -m bench chain_latency [--rtts 25 50 100] [--stages 3] [--quick]

Gateway and Islands stand in network namespaces with delays between them (bench/lab; the kernel's netem is not
in every kernel). The gateway is next to all of them, so that only the ring's hops count. The bound for one
session is one token per (the whole model's time for a token + one way over each hop of the ring); the whole
model is measured in the same run. Drafts go beyond the bound, since one traversal brings several tokens.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.chain_client import checked
from bench.chain_mesh import CARGO, Mesh, open_chain, open_whole
from bench.figures import header, median, row
from bench.lab import Lab, why_unavailable
from protocol.dice import Dice

TOKENS = 64

PASSAGE = (
    "Llamas are social animals and live with others as a herd. Their wool is soft and contains only a small "
    "amount of lanolin. Llamas can learn simple tasks after a few repetitions. When using a pack, they can "
    "carry about 25 to 30 percent of their body weight for 8 to 13 km."
)

#: Ordinary text is sampled: greedy, a small model soon repeats itself. What is sampled is a function of the
#: seed, so both sides say the same.
ORDINARY = (
    "Tell a short story about a lighthouse keeper and a storm.",
    "Explain how a sailing boat can move against the wind.",
    "Describe a harbour at dawn to somebody who has never seen the sea.",
)
REPETITIVE = (
    f"Repeat this text word for word:\n{PASSAGE}",
    f'Repeat this text word for word, replacing "Llamas" by "Alpacas":\n{PASSAGE}',
    f"Copy this list twice: {', '.join(f'item {i}' for i in range(1, 16))}",
)


def delays(stages: int, rtt_ms: float) -> NDArray[np.float64]:
    """Between Islands half the round trip each way; the gateway, node 0, is next to everybody."""
    matrix = np.full((stages + 1, stages + 1), rtt_ms / 2)
    matrix[0, :] = matrix[:, 0] = 0
    return matrix


def token_s(mesh: Mesh, prompt: str, number: int, *, greedy: bool, tokens: int) -> tuple[float, str]:
    """Seconds a token behind the first, and the text."""
    fields: dict[str, Any] = {} if greedy else {"temperature": 0.8}
    answer = checked(mesh.ask(f"{prompt} ({number})", tokens, **fields))
    return 1 / answer.decode_tps, answer.text


def measure(
    whole: Mesh, sides: dict[str, Mesh], rtt_ms: float, *, stages: int, rounds: int, tokens: int
) -> dict[str, list[float]]:
    """By side and kind of text: shares of the bound. Also which texts were equal."""
    shares: dict[str, list[float]] = {}
    dice = Dice(int(rtt_ms))
    for kind, prompts in (("ordinary", ORDINARY), ("repetitive", REPETITIVE)):
        for index in range(rounds):
            prompt, number = prompts[index % len(prompts)], dice.below(1000)
            greedy = kind == "repetitive"
            compute_s, text = token_s(whole, prompt, number, greedy=greedy, tokens=tokens)
            bound_s = compute_s + stages * rtt_ms / 2e3
            texts = {"the whole model's": text}
            for side, mesh in sides.items():
                took_s, ours = token_s(mesh, prompt, number, greedy=greedy, tokens=tokens)
                shares.setdefault(f"{kind}, {side}", []).append(bound_s / took_s)
                for other, theirs in texts.items():
                    shares.setdefault(f"{kind}, {side}: equal to {other}", []).append(float(ours == theirs))
                texts[f"that with {side}"] = ours
    return shares


def tell(rtt_ms: float, shares: dict[str, list[float]]) -> None:
    row(f"{rtt_ms:.0f} ms a round trip", "of the bound", "least", "most")
    for label, cells in shares.items():
        if "equal to" in label:
            row(f"  {label}", f"{sum(cells):.0f} of {len(cells)}")
        else:
            row(label, f"{median(cells):.2f}", f"{min(cells):.2f}", f"{max(cells):.2f}")
    sys.stdout.flush()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench chain_latency", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--rtts", type=float, nargs="+", default=[25.0, 50.0, 100.0], metavar="MS")
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--cargo", default=CARGO)
    parser.add_argument("--quick", action="store_true", help="one distance, one round, to see that it runs")
    arguments = parser.parse_args(argv)
    if reason := why_unavailable():
        print(f"no delay laboratory here: {reason}", file=sys.stderr)
        return 0
    rtts, rounds, tokens = arguments.rtts, arguments.rounds, arguments.tokens
    if arguments.quick:
        rtts, rounds, tokens = rtts[:1], 1, 16
    stages = arguments.stages
    header(f"a chain of {stages} with distance between its stages, {arguments.cargo}")
    near = delays(stages, 0)
    with (
        Lab(near) as plain_lab,
        Lab(near) as draft_lab,
        open_whole(arguments.cargo) as whole,
        open_chain(arguments.cargo, stages, lab=plain_lab, drafts=False) as plain,
        open_chain(arguments.cargo, stages, lab=draft_lab) as drafting,
    ):
        print(f"  {plain.layout_words()}")
        sides = {"no drafts": plain, "drafts": drafting}
        for rtt_ms in (0.0, *rtts):
            for lab in (plain_lab, draft_lab):
                lab.set_delays(delays(stages, rtt_ms))
            for mesh in sides.values():  # round trips are measured anew
                checked(mesh.ask("Count to ten.", 16))
            tell(rtt_ms, measure(whole, sides, rtt_ms, stages=stages, rounds=rounds, tokens=tokens))
    return 0


if __name__ == "__main__":
    sys.exit(main())
