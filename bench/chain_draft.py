"""What a Cargo's small model for drafts brings: the same chain without drafts, with lookup alone, and with it.

    python -m bench chain_draft [--rtts 0 50 100] [--stages 3] [--sampled | --greedy] [--quick]

The Cargo is the catalogue's SmolLM2-135M rewritten as F16, with the Q4_1 file of the same model as its draft.
That is a draft as good as there can be: it says nearly what the large one says and costs a third of it. What it
is right about, and how many traversals a token takes, stands beside the ratios; they decide what another pair
would bring. Distances as in `chain_latency`; at 0 the policy must leave the model alone.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from bench.chain_client import checked
from bench.chain_latency import ORDINARY, delays
from bench.chain_mesh import Mesh, open_chain
from bench.figures import header, median, row
from bench.lab import Lab, why_unavailable
from cargos.manifest import ROLE_DRAFT, Manifest, canonical_json
from cargos.resolve import resolve_cargo

TARGET = "smollm2-135m-f16"
DRAFT = "smollm2-135m"

TOKENS = 64


def drafted(target: str = TARGET, draft: str = DRAFT) -> Manifest:
    """The Cargo `target` with the model of `draft` to draft with. Raises SystemExit if they do not fit."""
    large, small = resolve_cargo(target).manifest, resolve_cargo(draft).manifest
    weights, sharding, spread = small.file_with_role("model"), large.sharding, small.sharding
    if weights is None or sharding is None or spread is None:
        raise SystemExit(f"the manifests of {target} and {draft} do not say what they take up")
    return msgspec.structs.replace(
        large,
        name=f"{target}-drafted",
        files=(*large.files, msgspec.structs.replace(weights, role=ROLE_DRAFT)),
        sharding=msgspec.structs.replace(
            sharding,
            head_bytes=sharding.head_bytes + weights.size_bytes,
            draft_kv_bytes=spread.kv_bytes * spread.layers,
        ),
    )


@contextmanager
def written(manifest: Manifest) -> Generator[str]:
    """A file with the manifest, for a while."""
    with tempfile.TemporaryDirectory(prefix="archipelag-bench-") as folder:
        path = Path(folder) / f"{manifest.name}.json"
        path.write_text(canonical_json(manifest), encoding="utf-8")
        yield str(path)


@dataclass
class Figures:
    """Of one side and kind of text: speed against the side without drafts, and what became of its drafts."""

    faster: list[float] = field(default_factory=list[float])
    traversals: list[float] = field(default_factory=list[float])
    drafted: int = 0
    right: int = 0
    equal: int = 0

    def note(self, usage: dict[str, Any], faster: float, *, equal: bool) -> None:
        self.faster.append(faster)
        self.equal += equal
        own = usage["archipelag"]
        self.traversals.append(own["traversals"] / usage["completion_tokens"])
        self.drafted += own["drafts"]
        self.right += own["drafts_right"]


def measure(sides: dict[str, Mesh], *, rounds: int, tokens: int, greedy: bool) -> dict[str, Figures]:
    """The first side is what the others are compared with."""
    found: dict[str, Figures] = {side: Figures() for side in sides}
    fields: dict[str, Any] = {} if greedy else {"temperature": 0.8}
    for index in range(rounds):
        prompt = f"{ORDINARY[index % len(ORDINARY)]} ({index})"
        base_s, text = 0.0, ""
        for side, mesh in sides.items():
            answer = checked(mesh.ask(prompt, tokens, seed=index, **fields))
            took_s = 1 / answer.decode_tps
            base_s, text = base_s or took_s, text or answer.text
            found[side].note(answer.usage, base_s / took_s, equal=answer.text == text)
    return found


def tell(words: str, found: dict[str, Figures]) -> None:
    row(words, "speed", "least", "most", "turns/token", "right", "equal text")
    for side, figures in found.items():
        right = f"{figures.right}/{figures.drafted}" if figures.drafted else "-"
        row(
            f"  {side}",
            *(f"{value:.2f}" for value in (median(figures.faster), min(figures.faster), max(figures.faster))),
            f"{median(figures.traversals):.2f}",
            right,
            f"{figures.equal} of {len(figures.faster)}",
        )
    sys.stdout.flush()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench chain_draft", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--rtts", type=float, nargs="+", default=[0.0, 50.0, 100.0], metavar="MS")
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--quick", action="store_true", help="one round, to see that it runs")
    arguments = parser.parse_args(argv)
    if reason := why_unavailable():
        print(f"no delay laboratory here: {reason}", file=sys.stderr)
        return 0
    stages, rtts = arguments.stages, arguments.rtts
    rounds, tokens = (1, 16) if arguments.quick else (arguments.rounds, arguments.tokens)
    header(f"a small model that drafts, chain of {stages}, {TARGET} with {DRAFT}")
    with ExitStack() as stack:
        with_model = stack.enter_context(written(drafted()))
        labs = [stack.enter_context(Lab(delays(stages, 0))) for _ in range(3)]
        sides: dict[str, Mesh] = {}
        for lab, (side, cargo, drafts) in zip(
            labs,
            (
                ("no drafts", with_model, False),
                ("lookup", TARGET, True),
                ("lookup and model", with_model, True),
            ),
            strict=True,
        ):
            sides[side] = stack.enter_context(
                open_chain(cargo, stages, drafts=drafts, activations="f32", lab=lab)
            )
            print(f"  {side}: {sides[side].layout_words()}")
        for rtt_ms in rtts:
            for lab in labs:
                lab.set_delays(delays(stages, rtt_ms))
            for mesh in sides.values():  # round trips are measured anew
                checked(mesh.ask("Count to ten.", 16))
            for greedy in (True, False):
                kind = "greedy" if greedy else "sampled at 0.8"
                tell(
                    f"{rtt_ms:.0f} ms a round trip, {kind}",
                    measure(sides, rounds=rounds, tokens=tokens, greedy=greedy),
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
