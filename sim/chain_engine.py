"""The engine of a stage, modelled: rows take time, rows of several sessions go through together.

A step computes at most 63 rows, of whichever sessions wait. Its first row takes `layer_ns` in each layer (the
weights are read), each further one `row_ns`. In a head each sequence of the step costs `head_ns` beside it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from routing.chains.costs import CHUNK_ROWS


@dataclass(slots=True)
class Piece:
    """Rows of a session that wait, or are being computed."""

    session: str
    position: int
    rows: int
    since: int


class StageEngine:
    """Times in ns. `slots`: sessions at a time, a head's own included."""

    def __init__(self, layer_ns: int, row_ns: int, head_ns: int, slots: int) -> None:
        self.layer_ns = layer_ns
        self.row_ns = row_ns
        self.head_ns = head_ns
        self.slots = slots
        self.layers = 0
        self.is_head = False
        self.busy_ns = 0
        self.sessions: dict[str, None] = {}
        self._waiting: deque[Piece] = deque()
        self._step: list[Piece] = []
        self._began = 0
        self._ends: int | None = None

    @property
    def ends(self) -> int | None:
        """When the step at hand is done."""
        return self._ends

    def hold(self, layers: int, *, is_head: bool) -> None:
        """It has so many layers from now on; sessions of before are gone."""
        self.layers, self.is_head = layers, is_head
        for session in list(self.sessions):
            self.close(session)

    def open(self, session: str) -> bool:
        """From nothing. Whether there was a slot."""
        if session not in self.sessions and len(self.sessions) >= self.slots:
            return False
        self._drop(session)
        self.sessions[session] = None
        return True

    def close(self, session: str) -> None:
        self.sessions.pop(session, None)
        self._drop(session)

    def feed(self, now: int, session: str, position: int, rows: int) -> None:
        """Give it rows; `finished` tells when they are done."""
        self._waiting.append(Piece(session, position, rows, now))
        self._begin(now)

    def finished(self, now: int) -> list[tuple[Piece, int, int]]:
        """What is done: (rows, ns in the engine, ns waited). Begins the next step."""
        if self._ends is None or now < self._ends:
            return []
        took = self._ends - self._began
        done = [(piece, took, self._began - piece.since) for piece in self._step]
        self._step, self._ends = [], None
        self._begin(now)
        return done

    def _drop(self, session: str) -> None:
        """Nothing of it may be told any more; a step that has begun takes its time all the same."""
        self._waiting = deque(piece for piece in self._waiting if piece.session != session)
        self._step = [piece for piece in self._step if piece.session != session]

    def _begin(self, now: int) -> None:
        if self._ends is not None or not self._waiting:
            return
        rows = 0
        while self._waiting and rows < CHUNK_ROWS:
            piece = self._waiting[0]
            take = min(piece.rows, CHUNK_ROWS - rows)
            self._step.append(Piece(piece.session, piece.position, take, piece.since))
            rows += take
            if take == piece.rows:
                self._waiting.popleft()
            else:
                piece.position += take
                piece.rows -= take
        took = self.layers * (self.layer_ns + (rows - 1) * self.row_ns)
        if self.is_head:
            took += self.head_ns * len({piece.session for piece in self._step})
        self.busy_ns += took
        self._began, self._ends = now, now + took
