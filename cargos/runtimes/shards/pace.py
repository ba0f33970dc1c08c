"""How fast a stage is: nanoseconds for a row in a layer, alone and among many, and in the vocabulary head."""

from __future__ import annotations

from typing import Final

from cargos.runtimes.shards.wire import Pace

#: Weight of a new measurement: half of an old value is forgotten after 14 steps.
_EWMA: Final = 0.05

#: From so many rows in one go on it counts as a measurement of large batches; fewer pay mostly overhead.
MANY: Final = 16


def _smoothed(old: int, new: int) -> int:
    return new if not old else max(1, old + round(_EWMA * (new - old)))


class Meter:
    """`layers`: of this stage."""

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._layer_ns = 0
        self._prefill_layer_ns = 0
        self.vocabulary_ns = 0

    def note(self, rows: int, outputs: int, duration_ns: int) -> None:
        """One go of `rows` rows, `outputs` of which went through the vocabulary head."""
        if rows == 1 and outputs:
            # What of it the vocabulary took is not seen; it slows down and recovers with the layers.
            known_ns = self._layer_ns * self._layers + self.vocabulary_ns
            if self._layer_ns and self.vocabulary_ns:
                self._layer_ns = _smoothed(self._layer_ns, self._layer_ns * duration_ns // known_ns)
                self.vocabulary_ns = _smoothed(self.vocabulary_ns, self.vocabulary_ns * duration_ns // known_ns)
            return
        layers_ns = max(1, duration_ns - outputs * self.vocabulary_ns)
        each_ns = max(1, layers_ns // (rows * self._layers))
        if rows == 1:
            self._layer_ns = _smoothed(self._layer_ns, each_ns)
        elif rows >= MANY:
            self._prefill_layer_ns = _smoothed(self._prefill_layer_ns, each_ns)

    @property
    def pace(self) -> Pace:
        return Pace(self._layer_ns, self._prefill_layer_ns, self.vocabulary_ns)

    @property
    def prefill_tps(self) -> float:
        """Rows a second through all layers of this stage, many at a time; 0.0: unknown."""
        return 1e9 / (self._prefill_layer_ns * self._layers) if self._prefill_layer_ns else 0.0
