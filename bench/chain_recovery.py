"""Stages killed in mid-answer: how long the consumer's stream pauses, and whether the text is the same.

    python -m bench chain_recovery [--kills 50] [--stages 2] [--quick]

Each stage has a spare that holds the same layers. An answer is streamed undisturbed; then again, and at a
random token the process of a random stage is killed. The longest pause between two pieces, and whether text and
number of tokens are those of the undisturbed run. Then the Island comes back, and the next one dies.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from bench.chain_client import Answer, checked
from bench.chain_mesh import CARGO, Mesh, open_chain
from bench.figures import header, median, percentile, row
from protocol.dice import Dice

TOKENS = 40
#: The usual pause between two pieces is told beside the pauses of deaths.
PROMPTS = (
    "Why is the sea salty?",
    "Write a short story about a lighthouse keeper.",
    "List some uses for a brick.",
    "Explain how a sailing boat can move against the wind.",
    "Describe a harbour at dawn.",
)


class Deaths:
    """What was seen of them."""

    def __init__(self) -> None:
        self.gaps: dict[str, list[float]] = {}
        self.usual: list[float] = []
        self.equal = self.whole = self.kills = self.late = 0

    def note(self, place: str, calm: Answer, struck: Answer) -> None:
        self.kills += 1
        self.usual.append(calm.longest_gap_s)
        self.gaps.setdefault(place, []).append(struck.longest_gap_s)
        self.equal += struck.text == calm.text
        self.whole += not struck.error and struck.tokens == calm.tokens

    def tell(self) -> None:
        row("longest pause in an answer, s", "p50", "p99", "max", "deaths")
        everywhere = [gap for gaps in self.gaps.values() for gap in gaps]
        if not everywhere:
            return
        for label, gaps in (*sorted(self.gaps.items()), ("all", everywhere), ("nobody dies", self.usual)):
            row(
                label,
                f"{median(gaps):.2f}",
                f"{percentile(gaps, 0.99):.2f}",
                f"{max(gaps):.2f}",
                str(len(gaps)),
            )
        row("answers with every token", f"{self.whole} of {self.kills}")
        row("texts equal to the undisturbed ones", f"{self.equal} of {self.kills}")
        if self.late:
            row("deaths that came after the last token", str(self.late))


def strike(mesh: Mesh, deaths: Deaths, dice: Dice, *, deterministic: bool) -> None:
    """One answer in peace, the same once more with a death, and the dead one back."""
    prompt, seed = dice.choice(PROMPTS), dice.below(1 << 40)
    fields: dict[str, Any] = {"temperature": 0.8, "seed": seed, "deterministic": deterministic}
    calm = checked(mesh.ask(prompt, TOKENS, **fields))
    moment = 1 + dice.below(TOKENS - 10)
    victims: list[tuple[str, str]] = []

    def at(answer: Answer) -> None:
        if len(answer.pieces) >= moment and not victims:
            serving = mesh.serving()
            index = dice.below(len(serving))
            place = "head" if index == len(serving) - 1 else ("first stage" if index == 0 else "middle stage")
            victims.append((place, serving[index]))
            mesh.kill_island(serving[index])

    struck = mesh.ask(prompt, TOKENS, at=at, **fields)
    if not victims:
        deaths.late += 1
        return
    place, victim = victims[0]
    deaths.note(place, calm, struck)
    if struck.error or struck.text != calm.text:
        print(f"  {place} {victim} at piece {moment}: {struck.error or 'another text'}", flush=True)
    mesh.restart_island(victim)
    mesh.wait_spares()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench chain_recovery", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--cargo", default=CARGO)
    parser.add_argument("--sampled-freely", action="store_true", help="without `deterministic`")
    parser.add_argument("--limit-s", type=float, default=3600, help="stop striking after so long")
    parser.add_argument("--quick", action="store_true", help="three deaths, to see that it runs")
    arguments = parser.parse_args(argv)
    kills = 3 if arguments.quick else arguments.kills
    mode = "sampled freely" if arguments.sampled_freely else "deterministic"
    header(f"deaths in a chain of {arguments.stages} with a spare for each stage, {arguments.cargo}, {mode}")
    deaths, dice = Deaths(), Dice(20261122)
    began = time.monotonic()
    with open_chain(arguments.cargo, arguments.stages, spares=True) as mesh:
        print(f"  {mesh.layout_words()}")
        while deaths.kills < kills and time.monotonic() - began < arguments.limit_s:
            strike(mesh, deaths, dice, deterministic=not arguments.sampled_freely)
    deaths.tell()
    return 0


if __name__ == "__main__":
    sys.exit(main())
