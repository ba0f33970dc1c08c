"""What jobs tell of Islands, for their karma: work that consumers really got, and promises broken.

Work is counted from what this gateway saw: tokens that it took, prompts no longer than they can be, and the
size of the Cargo's weights as its manifest (locked by the digest) says. A Cargo whose manifest nobody here
knows earns nothing yet: an unknown size would be the Island's claim.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from cargos.manifest import Manifest, Sharding
from cargos.resolve import builtin_catalogue
from node.coordination.coordinator import CoordinatorService
from protocol.ids import CargoDigest, PeerId
from protocol.jobs import Usage
from protocol.ring import Chain
from protocol.work import Work
from routing.chains.shares import StageDone, shares
from routing.coordinator_events import WorkSeen
from routing.job_events import StageSeen
from routing.karma import work_units
from routing.placement import most_prompt_tokens

#: Manifests of Cargos that are remembered.
MAX_MANIFESTS: Final = 4096


class WorkBook:
    """Tells the coordinator's witness."""

    def __init__(self, coordinator: CoordinatorService) -> None:
        self._coordinator = coordinator
        self._weights: dict[str, int] = {}
        self._sharding: dict[str, Sharding] = {}
        for entry in builtin_catalogue():
            self.learn(entry.manifest)

    def lacks(self, digest: str) -> bool:
        """Whether the Cargo's manifest is still to be asked for."""
        return digest not in self._weights and len(self._weights) < MAX_MANIFESTS

    def learn(self, manifest: Manifest) -> None:
        """A Cargo's manifest was seen; its digest is the Cargo's."""
        self._weights.setdefault(manifest.digest, manifest.total_bytes)
        if manifest.sharding is not None:
            self._sharding.setdefault(manifest.digest, manifest.sharding)

    def sharding(self, digest: str) -> Sharding | None:
        """How the layers of a Cargo can be spread; None: its manifest is not known, or says nothing of it."""
        return self._sharding.get(digest)

    def done(self, peer: PeerId, cargo: CargoDigest, work: Work, usage: Usage, tokens: int) -> None:
        """A job ended well there. `tokens`: what the consumer took, of all Islands together."""
        self._coordinator.note_work(WorkSeen(peer, work_units=self._units(cargo, work, usage, tokens)))

    def done_by_chain(
        self,
        chain: Chain,
        stages: Iterable[StageSeen],
        work: Work,
        usage: Usage,
        tokens: int,
    ) -> None:
        """A job ended well on a chain. Each stage earns by what it signed for; who signed nothing earns
        nothing, and nobody else earns it instead.
        """
        units = self._units(CargoDigest(chain.cargo), work, usage, tokens)
        rows = usage.prompt_tokens + usage.completion_tokens
        signed = {stage.index: stage for stage in stages if stage.receipt is not None and not stage.failed}
        done: list[StageDone] = []
        for n, stage in enumerate(chain.stages):
            receipt = signed[n].receipt if n in signed else None
            kept = rows if receipt is None else min(rows, receipt.kept)
            sampled = usage.completion_tokens if n == len(chain.stages) - 1 else 0
            done.append(StageDone(stage.last - stage.first, kept, sampled))
        for n, share in enumerate(shares(units, done)):
            if n in signed and share:
                self._coordinator.note_work(WorkSeen(PeerId(signed[n].peer), work_units=share))

    def _units(self, cargo: CargoDigest, work: Work, usage: Usage, tokens: int) -> int:
        generated = min(usage.generated_tokens, tokens)
        prompt = min(usage.prompt_tokens, most_prompt_tokens(work)) - usage.cached_tokens
        return work_units(self._weights.get(cargo, 0), generated, max(0, prompt))

    def failed(self, peer: PeerId, *, timeout: bool) -> None:
        """It let a job down."""
        self._coordinator.note_work(WorkSeen(peer, failures=0 if timeout else 1, timeouts=1 if timeout else 0))
