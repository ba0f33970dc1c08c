"""A Cargo that names a model to draft with, over Islands in the delay laboratory: peers give it to the head."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import pytest
import trio

from bench.chain_client import checked
from bench.chain_draft import DRAFT, TARGET, drafted, written
from bench.chain_latency import delays
from bench.chain_mesh import NAMES, Mesh, memory_mib, shape_of
from bench.lab import Lab, why_unavailable
from cargos.manifest import ROLE_DRAFT
from cargos.resolve import resolve_cargo
from cargos.store import CargoStore

pytestmark = [
    pytest.mark.model,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(why_unavailable() is not None, reason=why_unavailable() or ""),
]

STAGES = 2
SLOTS = 2


def blobs(store: Path) -> set[str]:
    """Whole files in a store."""
    return {path.name for path in (store / "blobs").glob("*/*") if len(path.name) == 64}


@pytest.fixture
def seed(tmp_path: Path) -> Path:
    """A store with both models."""
    own, seeded = CargoStore(), tmp_path / "seed"
    for cargo in (TARGET, DRAFT):
        manifest = resolve_cargo(cargo).manifest
        trio.run(own.ensure, manifest)
        for file in manifest.files:
            for path in (own.root / "blobs").glob(f"*/{file.sha256}*"):
                target = seeded / path.relative_to(own.root)
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(path, target)
                except OSError:  # another file system
                    target.write_bytes(path.read_bytes())
    return seeded


@pytest.fixture
def mesh(tmp_path: Path, seed: Path) -> Generator[Mesh]:
    """No process of it reaches any network but the laboratory's: what an Island has, it has from a peer."""
    with written(drafted()) as cargo, Lab(delays(STAGES + 1, 0)) as lab:
        name = resolve_cargo(cargo).manifest.name
        room_mib = memory_mib(shape_of(cargo, slots=SLOTS), STAGES)
        with Mesh(cargo, name, lab=lab) as made:
            holder, *islands = NAMES[: STAGES + 1]
            made.start_island(holder, "shards.memory_mib=1", cache=seed)  # room for nothing, but it gives
            made.islands[holder].wait_line("listening ")  # who asks too early tries again after a minute
            for island in islands:
                settings = (f"shards.slots={SLOTS}", f"shards.memory_mib={room_mib}")
                made.start_island(island, *settings, cache=tmp_path / island)
            made.wait_answers()
            lab.set_delays(delays(STAGES + 1, 60))
            yield made


def test_the_head_drafts_with_what_a_peer_gave_it(mesh: Mesh, tmp_path: Path) -> None:
    draft, target = drafted().file_with_role(ROLE_DRAFT), drafted().file_with_role("model")
    assert draft is not None
    assert target is not None
    (first, *_), (head, from_layer, _) = mesh.layout()[0]
    assert blobs(tmp_path / head) == {draft.sha256}, "the draft, and of the large model no more than its layers"
    assert blobs(tmp_path / first) == set(), "who is not the head needs neither"
    slices = [path.name for path in (tmp_path / head / "shards").glob("*.gguf")]
    assert len(slices) == 1
    assert f".{from_layer}-30." in slices[0]

    checked(mesh.ask("Count to ten.", 12))  # the way is measured
    answer = checked(mesh.ask("Tell me about the sea.", 40))
    own = answer.usage["archipelag"]
    assert answer.tokens == 40
    assert 0 < own["drafts_right"] <= own["drafts"]
    assert own["traversals"] == 40 - own["drafts_right"]
