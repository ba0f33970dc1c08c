"""Slices of models of which the pieces come from peers."""

from __future__ import annotations

from pathlib import Path, PurePath
from typing import Final

from cargos.manifest import Manifest
from cargos.progress import ProgressCallback
from cargos.shards.store import ShardStore
from cargos.store import PieceFetcher


class SlicesFromPeers:
    """A `ShardStore` that asks `fetch` for pieces before the sources; None: the sources alone."""

    def __init__(self, store: ShardStore, fetch: PieceFetcher | None) -> None:
        self._store: Final = store
        self._fetch: Final = fetch

    async def ensure(
        self,
        manifest: Manifest,
        first: int,
        last: int,
        *,
        base: PurePath | None = None,
        progress: ProgressCallback | None = None,
    ) -> Path:
        """See `ShardStore.ensure`."""
        return await self._store.ensure(
            manifest, first, last, base=base, progress=progress, fetch_pieces=self._fetch
        )
