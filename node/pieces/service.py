"""Weights from peers: what is here is served and told to the overlay, what is missing is fetched from others.

async with open_pieces(host, overlay, store, PiecesConfig()) as pieces:
    pieces.know(*manifest.files)
    await store.ensure(manifest, peers=pieces.fetch_pieces)
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

import structlog
import trio

from cargos.errors import StoreUnusable
from cargos.manifest import CargoFile
from cargos.shards.pieces import PieceFile
from cargos.store import CargoStore
from dht.keys import key_of_file
from node.overlay.overlay import Overlay
from node.p2p import Host
from node.p2p.host import plain_errors
from node.pieces.fetch import FetchCounters, PieceFetch
from node.pieces.limits import FetchLimits, ServeLimits
from node.pieces.network import OverlayNetwork
from node.pieces.server import PieceServer
from node.pieces.sources import Shelf
from node.pieces.suspects import Suspects
from protocol.pieces import PIECES_PROTOCOL

#: What the store holds is looked at this often: other processes fetch and remove, too.
LOOK_S: Final = 30.0
#: And not more often than this, however fast pieces come.
SETTLE_S: Final = 0.5

#: Under which the overlay keeps what this service provides.
TOPIC: Final = "pieces"

_log = structlog.get_logger("pieces")


@dataclass(frozen=True, slots=True)
class PiecesConfig:
    """`serve`: give to others what is here."""

    serve: bool = True
    serve_limits: ServeLimits = field(default_factory=ServeLimits)
    fetch_limits: FetchLimits = field(default_factory=FetchLimits)


@asynccontextmanager
async def open_pieces(
    host: Host, overlay: Overlay, store: CargoStore, config: PiecesConfig
) -> AsyncGenerator[PieceService]:
    """Take part in the exchange of pieces."""
    with plain_errors():
        async with trio.open_nursery() as nursery:
            service = PieceService(host, overlay, store, config)
            nursery.start_soon(service.run)
            try:
                yield service
            finally:
                nursery.cancel_scope.cancel()


class PieceService:
    """Made by `open_pieces`."""

    def __init__(self, host: Host, overlay: Overlay, store: CargoStore, config: PiecesConfig) -> None:
        self.fetched: Final = FetchCounters()
        self._overlay = overlay
        self._config = config
        self._shelf = Shelf(store)
        self._network = OverlayNetwork(host, overlay)
        limits = config.fetch_limits
        self._suspects = Suspects(limits.ban_s, limits.max_banned)
        self._news = trio.Event()
        self._here: frozenset[str] = frozenset()
        self.server: Final = PieceServer(self._shelf.open, config.serve_limits)
        if config.serve:
            host.handle(PIECES_PROTOCOL, self.server.handle, bulk=True)

    @property
    def here(self) -> frozenset[str]:
        """The files (SHA-256) of which something is here, as last told to the overlay."""
        return self._here

    def know(self, *files: CargoFile) -> None:
        """These files may come into the store, whole or in pieces: what is there of them is served."""
        if self._shelf.know(*files):
            self._news.set()

    def note_change(self) -> None:
        """Something came into the store; it is told to others now rather than later."""
        self._news.set()

    async def fetch_pieces(self, file: CargoFile, wanted: Sequence[int], piece_file: PieceFile) -> None:
        """Bring what peers have of these pieces; what is there already is not fetched again. What could not be
        had is missing afterwards. Raises StoreUnusable.
        """
        self.know(file)
        missing = await trio.to_thread.run_sync(piece_file.missing, wanted)
        if not missing:
            return
        first = True

        def note(_: int) -> None:
            nonlocal first
            if first and file.sha256 not in self._here:
                first = False
                self._news.set()

        fetch = PieceFetch(
            self._network,
            file,
            missing,
            piece_file,
            limits=self._config.fetch_limits,
            suspects=self._suspects,
            counters=self.fetched,
            seed=int.from_bytes(secrets.token_bytes(8), "little"),
            note=note,
        )
        before = self.fetched.bytes
        left = await fetch.run()
        if self.fetched.bytes > before:
            _log.info(
                "pieces from peers", file=file.name, pieces=len(missing) - len(left), missing=len(left) or None
            )
        self._news.set()

    async def run(self) -> None:
        """Tell the overlay what is here. Until cancelled."""
        while self._config.serve:
            self._news = trio.Event()
            try:
                self._here = await trio.to_thread.run_sync(self._shelf.look)
            except StoreUnusable as error:
                _log.warning("what is in the store can not be seen", reason=error.problem)
                self._here = frozenset()
            self._overlay.provide_all(TOPIC, map(key_of_file, self._here))
            await trio.sleep(SETTLE_S)
            with trio.move_on_after(LOOK_S):
                await self._news.wait()
