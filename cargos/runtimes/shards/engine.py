"""The engine of a stage: rows of many sessions in one step, each session's memory its own.

One thread owns it. A step runs one batch of the sessions that share a context, and one piece of each
deterministic session, which has a context to itself, computes its prompt on a fixed grid and later rows one
by one, so that a replay makes the same numbers bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final, Literal

import numpy as np

from cargos.runtimes.llama.engine import N_BATCH
from cargos.runtimes.llama.native import Model, NativeError
from cargos.runtimes.llama.schedule import gap
from cargos.runtimes.shards.native import Rows, StageContext, Values, layers_of, width_of
from cargos.runtimes.shards.pace import Meter
from cargos.runtimes.shards.resident import Resident
from cargos.runtimes.shards.schedule import MAX_TOGETHER, Group, Waiting, choose, groups
from cargos.runtimes.shards.wire import Done, Fault, Feed, Open, Stage
from cargos.shards import dtypes
from protocol.errors import ProtocolError
from protocol.ring import MAX_FEED_BYTES

#: Rows of a deterministic session's prompt in one go, from positions divisible by it. Part of the definition of
#: deterministic results (the same as a whole model's): never change it.
GRID: Final = 32

#: Rows whose logits one go may give out; each takes memory for a whole vocabulary.
_MAX_OUTPUTS: Final = MAX_TOGETHER

#: The measurement at start stops early on slow machines: the first real session measures on.
_WARM_UP_NS: Final = 2_000_000_000

#: How often the vocabulary head is measured at start; the fastest counts.
_VOCABULARY_ROWS: Final = 3


def grid_step(have: int, prompt: int) -> int:
    """Rows of a deterministic session in its next step."""
    return min(prompt, (have // GRID + 1) * GRID) - have if have < prompt else 1


class StageEngine:
    """Raises NativeError where the library fails (the worker then ends and is restarted)."""

    is_head: bool = False

    def __init__(self, model: Model, stage: Stage) -> None:
        self._model = model
        self._stage = stage
        self._layers = layers_of(model)
        self.width: Final = width_of(model)
        if self._layers != stage.last - stage.first:
            raise NativeError(
                f"{stage.path} has {self._layers} layers, not {stage.last - stage.first}"
                f" ({stage.first} to {stage.last})"
            )
        if (N_BATCH + GRID * stage.lanes) * self.width * 4 > MAX_FEED_BYTES + MAX_FEED_BYTES // 2:
            raise NativeError(f"{stage.path}: rows of {self.width} values are too long for the ring")
        self._context = self._new_context(stage.slots, max(N_BATCH, stage.slots), flash_attention=True)
        self._lanes: list[StageContext] = []
        self._residents: dict[int, Resident] = {}
        self.meter: Final = Meter(self._layers)
        self.done: list[Done] = []
        self.faults: list[Fault] = []
        self._over: list[int] = []  # to be closed at the end of the step

    def _new_context(self, n_seq: int, n_batch: int, *, flash_attention: bool) -> StageContext:
        return StageContext(
            self._model,
            context_length=self._stage.context_length,
            n_seq=n_seq,
            n_batch=n_batch,
            threads=self._stage.threads,
            flash_attention=flash_attention,
            takes_tokens=self._stage.first == 0,
            is_head=self.is_head,
            max_outputs=_MAX_OUTPUTS + n_seq,
        )

    # --- commands -------------------------------------------------------------------------------

    @property
    def active(self) -> int:
        return len(self._residents)

    def open(self, command: Open) -> None:
        self.close(command.id)
        resident = Resident(command.id, command.dtype, command.prompt, deterministic=command.deterministic)
        self._residents[command.id] = resident
        if not self._settle(resident):
            self._refuse(resident, "busy", "all places are taken")

    def feed(self, command: Feed) -> None:
        resident = self._residents.get(command.id)
        if resident is None:
            return  # refused or closed meanwhile
        if command.position + command.rows > self._stage.context_length:
            self._refuse(resident, "invalid", f"more than {self._stage.context_length} rows")
            return
        try:
            values = self._values_untrusted(resident, command)
            resident.feed(command.position, values, time.monotonic_ns())
        except (ProtocolError, ValueError) as error:
            self._refuse(resident, "invalid", str(error))

    def _values_untrusted(self, resident: Resident, command: Feed) -> Values:
        """Raises ProtocolError, or ValueError for token ids that are none."""
        if self._stage.first:
            return dtypes.decode_untrusted(resident.dtype, command.payload, command.rows, self.width)
        if len(command.payload) != 4 * command.rows:
            raise ValueError(f"{len(command.payload)} bytes for {command.rows} token ids")
        ids = np.frombuffer(command.payload, "<u4")
        if (ids >= self._model.n_vocab).any():
            raise ValueError(f"a token id that is not below the vocabulary's {self._model.n_vocab}")
        return ids.astype(np.int32)

    def close(self, key: int) -> None:
        """Forget a session; its place is free at once. Unknown keys are none of our business any more."""
        resident = self._residents.pop(key, None)
        if resident is not None:
            self._vacate(resident)

    def export(self, key: int) -> tuple[int, bytes]:
        """Rows in a session's memory, and the memory. (0, b"") if there is none."""
        resident = self._residents.get(key)
        if resident is None or resident.context is None or not resident.have:
            return 0, b""
        return resident.have, resident.context.export(resident.sequence)

    def load_memory(self, key: int, rows: int, data: bytes) -> str:
        """Put exported memory into an open session. Why not, or ''."""
        resident = self._residents.get(key)
        if resident is None or resident.context is None:
            return "the session is not open"
        if not 0 < rows <= self._stage.context_length:
            return f"a memory of {rows} rows"
        resident.cut(0)
        if not resident.context.load(resident.sequence, data):
            return "this is no memory of this slice"
        resident.have = rows
        return ""

    # --- places ---------------------------------------------------------------------------------

    def _settle(self, resident: Resident) -> bool:
        """Give it a place if there is one."""
        if resident.deterministic:
            taken = {id(r.context) for r in self._residents.values()}
            lane = next((lane for lane in self._lanes if id(lane) not in taken), None)
            if lane is None and len(self._lanes) < self._stage.lanes:
                lane = self._new_context(1, GRID, flash_attention=False)
                self._lanes.append(lane)
            if lane is None:
                return False
            lane.clear()
            resident.context, resident.sequence = lane, 0
            return True
        busy = self._busy()
        place = next((i for i in range(self._stage.slots) if i not in busy), None)
        if place is None:
            return False
        self._context.cut(place, 0)
        resident.context, resident.sequence = self._context, place
        return True

    def _busy(self) -> dict[int, Resident]:
        return {r.sequence: r for r in self._residents.values() if r.context is self._context}

    def _vacate(self, resident: Resident) -> None:
        if resident.context is self._context:
            self._context.cut(resident.sequence, 0)
        resident.context = None

    def _close_gaps(self) -> None:
        """Move sessions together: only neighbouring places are computed in one go."""
        while self._model.memory_is_positional:
            busy = self._busy()
            move = gap([place in busy for place in range(self._stage.slots)])
            if move is None:
                return
            source, target = move
            resident = busy[source]
            if resident.have:
                self._context.copy(source, target, resident.have)
                self._context.cut(source, 0)
            resident.sequence = target

    def _refuse(self, resident: Resident, code: Literal["busy", "invalid"], detail: str) -> None:
        self.close(resident.key)
        self.faults.append(Fault(resident.key, code, detail))

    # --- what a head does besides ---------------------------------------------------------------

    def _computable(self, resident: Resident) -> tuple[int, int]:
        """Rows that may be computed now, and how many of them belong together."""
        return resident.pending, resident.front

    def _outputs(self, resident: Resident, first: int, count: int) -> Sequence[int]:  # noqa: ARG002  (a head's concern)
        """Which of these rows' logits are needed, counted from `first`."""
        return ()

    def _computed(self, resident: Resident, context: StageContext, outputs: Sequence[tuple[int, int]]) -> None:
        """Rows up to `have` are in memory; `outputs`: (position, batch index of its logits)."""

    # --- steps ----------------------------------------------------------------------------------

    def has_work(self) -> bool:
        """Whether a step would compute something."""
        return any(map(self._may_step, self._residents.values()))

    def _may_step(self, resident: Resident) -> bool:
        if resident.context is None:
            return False
        rows, _ = self._computable(resident)
        if resident.deterministic:
            return rows >= grid_step(resident.have, resident.prompt)
        return rows > 0

    def step(self) -> bool:
        """Compute something, if there is anything to compute."""
        worked = self._step_batch()
        for resident in list(self._residents.values()):
            if resident.deterministic and resident.context is not None:
                worked = self._step_alone(resident) or worked
        for key in self._over:
            self.close(key)
        self._over.clear()
        return worked

    def _step_batch(self) -> bool:
        waiting: list[Waiting] = []
        for r in self._residents.values():
            if r.context is self._context:
                rows, front = self._computable(r)
                if rows:
                    waiting.append(Waiting(r.key, rows, front, r.have < r.prompt, r.since_ns))
        if not waiting:
            return False
        self._close_gaps()
        shares = choose(
            waiting, room=self._context.n_batch, urgent=_MAX_OUTPUTS, prefill_tps=self.meter.prefill_tps
        )
        began_ns = time.monotonic_ns()
        parties = {self._residents[key].sequence: self._residents[key] for key, _ in shares}
        started = {r.key: (r.have, r.since_ns) for r in parties.values()}
        out: dict[int, list[Rows]] = {key: [] for key in started}
        for group in groups((self._residents[key].sequence, count) for key, count in shares):
            self._run_group(group, parties, out)
        duration_ns = time.monotonic_ns() - began_ns
        for key, (first, since_ns) in started.items():
            self._report(self._residents[key], first, out[key], duration_ns, began_ns - since_ns)
        return True

    def _run_group(self, group: Group, parties: dict[int, Resident], out: dict[int, list[Rows]]) -> None:
        residents = [parties[group.first + i] for i in range(group.count)]
        self._run(self._context, residents, group.each, out)

    def _run(
        self, context: StageContext, residents: list[Resident], each: int, out: dict[int, list[Rows]]
    ) -> None:
        """`each` rows of each of these sessions in one go."""
        taken = [r.take(each) for r in residents]
        values = taken[0] if len(taken) == 1 else np.concatenate(taken)
        firsts = [r.have for r in residents]
        positions = [first + i for first in firsts for i in range(each)]
        sequences = [r.sequence for r in residents for _ in range(each)]
        wanted = [[n * each + i for i in self._outputs(r, r.have, each)] for n, r in enumerate(residents)]
        indices = [index for some in wanted for index in some]
        began_ns = time.monotonic_ns()
        rows = context.run(values, positions, sequences, indices)
        self.meter.note(len(positions), len(indices), time.monotonic_ns() - began_ns)
        for n, resident in enumerate(residents):
            resident.have += each
            if rows is not None:
                out[resident.key].append(rows[n * each : (n + 1) * each])
            self._computed(resident, context, [(positions[i], i) for i in wanted[n]])

    def _step_alone(self, resident: Resident) -> bool:
        rows, _ = self._computable(resident)
        count = grid_step(resident.have, resident.prompt)
        context = resident.context
        if rows < count or context is None:
            return False
        began_ns = time.monotonic_ns()
        since_ns, first = resident.since_ns, resident.have
        out: dict[int, list[Rows]] = {resident.key: []}
        self._run(context, [resident], count, out)
        took_ns = time.monotonic_ns() - began_ns
        self._report(resident, first, out[resident.key], took_ns, began_ns - since_ns)
        return True

    def _report(self, resident: Resident, first: int, rows: list[Rows], took_ns: int, waited_ns: int) -> None:
        payload = b""
        if rows:
            try:
                payload = dtypes.encode(resident.dtype, np.concatenate(rows))
            except ValueError as error:
                self._refuse(resident, "invalid", f"the layers made {error}")
                return
        count = resident.have - first
        self.done.append(Done(resident.key, first, count, payload, took_ns, max(0, waited_ns)))

    # --- start ----------------------------------------------------------------------------------

    def warm_up(self) -> None:
        """Measure the pace on made-up rows, and leave no trace in the memory."""
        began = time.monotonic_ns()
        position = 0
        for turn, count in enumerate((16, 48, *[1] * 12)):
            if position + count + _VOCABULARY_ROWS > self._stage.context_length:
                break
            at = time.monotonic_ns()
            self._context.run(self._made_up(position, count), range(position, position + count), [0] * count)
            if turn:  # the first go pays for pages that are not in memory yet
                self.meter.note(count, 0, time.monotonic_ns() - at)
            position += count
            if time.monotonic_ns() - began > _WARM_UP_NS and count == 1:
                break
        if self.is_head:
            self._measure_vocabulary(position)
        self._context.clear()

    def _measure_vocabulary(self, position: int) -> None:
        plain = self.meter.pace.layer_ns * self._layers
        best: int | None = None
        for _ in range(_VOCABULARY_ROWS):
            at = time.monotonic_ns()
            self._context.run(self._made_up(position, 1), [position], [0], [0])
            took = time.monotonic_ns() - at
            best = took if best is None else min(best, took)
            position += 1
        self.meter.vocabulary_ns = max(1, (best or 0) - plain)

    def _made_up(self, start: int, count: int) -> Values:
        if self._stage.first == 0:
            return np.array([(7919 * i) % self._model.n_vocab for i in range(start, start + count)], np.int32)
        rows = np.arange(count * self.width, dtype=np.float32).reshape(count, self.width)
        return np.sin(rows + start).astype(np.float32)

    def shut(self) -> None:
        for lane in self._lanes:
            lane.close()
        self._context.close()
