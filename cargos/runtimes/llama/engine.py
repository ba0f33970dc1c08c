"""The engine: continuous batching of several jobs in one context, and the lanes of the deterministic ones.

One thread owns it. Each `step` runs at most one mixed batch (a token of each decoding sequence and a piece of
the prompts that wait) and one turn of each lane, and returns what all sequences have to say.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Final

from cargos.runtimes.llama.lane import Lane
from cargos.runtimes.llama.native import Context, GrammarTooCostly, Logits, Model
from cargos.runtimes.llama.patience import Patience
from cargos.runtimes.llama.schedule import (
    Candidate,
    Placement,
    Plan,
    SlotView,
    gap,
    place,
    plan,
)
from cargos.runtimes.llama.sequence import Sequence
from cargos.runtimes.llama.wire import Load, Update

#: Tokens in one batch. From 64 on llama.cpp's attention takes another path on CPUs (GGML_FA_TILE_Q), whose
#: sums round differently: below it a sequence's numbers were seen to be equal whatever else is in the
#: batch and however its prompt is cut, so that a continuation elsewhere agrees. It costs 5 % of prompt speed.
N_BATCH: Final = 63

#: Weight of a new speed measurement: half of an old value is forgotten after 14 steps.
_EWMA: Final = 0.05

#: A prompt step counts as a measurement of prompt speed from this size on; smaller ones pay mostly overhead.
_MIN_MEASURED_TOKENS: Final = 16

#: The measurement at start stops early on slow machines: the first real job measures on.
_WARM_UP_S: Final = 2.0


class Speed:
    """Tokens/s, smoothed."""

    __slots__ = ("tps",)

    def __init__(self) -> None:
        self.tps = 0.0

    def note(self, tokens: int, duration_s: float) -> None:
        now = tokens / max(duration_s, 1e-9)
        self.tps = now if self.tps == 0.0 else self.tps + _EWMA * (now - self.tps)


class Engine:
    """Raises NativeError where the library fails (the worker then ends and is restarted)."""

    def __init__(self, model: Model, load: Load) -> None:
        self._model = model
        self._slots = load.slots
        self._context = Context(
            model,
            context_length=load.context_length,
            n_seq=load.slots,
            n_batch=max(N_BATCH, load.slots),
            threads=load.threads,
            flash_attention=True,
        )
        self._lanes = [
            Lane(model, context_length=load.context_length, threads=load.threads) for _ in range(load.lanes)
        ]
        self._idle: list[list[int]] = [[] for _ in range(load.slots)]  # what free slots still hold
        self._used = [0] * load.slots
        self._clock = 0
        self._running: dict[int, Sequence] = {}  # by key, in order of admission
        self._queue: deque[Sequence] = deque()
        self._lane_queue: deque[Sequence] = deque()
        self._updates: list[Update] = []
        self.patience: Final = Patience()
        self.decode = Speed()
        self.prefill = Speed()

    # --- commands -------------------------------------------------------------------------------

    @property
    def active(self) -> int:
        return len(self._running) + sum(lane.sequence is not None for lane in self._lanes)

    @property
    def queued(self) -> int:
        return len(self._queue) + len(self._lane_queue)

    def add(self, sequence: Sequence) -> None:
        if sequence.done is not None:
            self._report(sequence)
            sequence.close()
        elif sequence.job.work.deterministic:
            self._lane_queue.append(sequence)
        else:
            self._queue.append(sequence)

    def grant(self, key: int, until: int) -> None:
        for sequence in self._all():
            if sequence.key == key:
                sequence.granted = max(sequence.granted, until)

    def cancel(self, key: int) -> None:
        """Forget a sequence; its slot is free at once. Unknown keys are none of our business any more."""
        for sequence in self._all():
            if sequence.key == key:
                self._remove(sequence)
                return

    def _all(self) -> list[Sequence]:
        laned = [lane.sequence for lane in self._lanes if lane.sequence is not None]
        return [*self._running.values(), *laned, *self._queue, *self._lane_queue]

    def _remove(self, sequence: Sequence) -> None:
        for queue in (self._queue, self._lane_queue):
            if sequence in queue:
                queue.remove(sequence)
        for lane in self._lanes:
            if lane.sequence is sequence:
                lane.release()
        if sequence.key in self._running:
            self._vacate(sequence)
        sequence.close()

    def _vacate(self, sequence: Sequence) -> None:
        """Its slot is free; what the memory holds of it stays for later prompts that begin alike."""
        del self._running[sequence.key]
        self._idle[sequence.slot] = sequence.tokens[: sequence.in_memory]
        self._touch(sequence.slot)
        sequence.slot = -1

    def _touch(self, slot: int) -> None:
        self._clock += 1
        self._used[slot] = self._clock

    # --- a step ---------------------------------------------------------------------------------

    def step(self) -> tuple[list[Update], bool]:
        """One turn. Updates of all sequences, and whether anything was done (if not: wait for a command)."""
        self._admit()
        worked = self._step_batch()
        for lane in self._lanes:
            worked = self._step_lane(lane) or worked
        updates, self._updates = self._updates, []
        return updates, worked

    def _report(self, sequence: Sequence) -> None:
        update = sequence.update()
        if update is not None:
            self._updates.append(update)

    def _admit(self) -> None:
        while self._queue:
            sequence = self._queue[0]
            placement = place(self._views(), sequence.tokens)
            if placement is None:
                return
            self._queue.popleft()
            self._seat(sequence, placement)
        for lane in self._lanes:
            if lane.sequence is None and self._lane_queue:
                lane.start(self._lane_queue.popleft())

    def _views(self) -> list[SlotView]:
        views = [
            SlotView(tokens, busy=False, used=used) for tokens, used in zip(self._idle, self._used, strict=True)
        ]
        for s in self._running.values():
            views[s.slot] = SlotView(s.tokens[: s.in_memory], busy=True, used=self._used[s.slot])
        return views

    def _seat(self, sequence: Sequence, placement: Placement) -> None:
        slot, shared = placement.slot, placement.shared
        if not self._model.memory_is_positional:
            shared = 0
        if shared and placement.donor != slot:
            kept = self._context.copy(placement.donor, slot, shared)
        else:
            kept = self._context.cut(slot, shared)
        if not kept:
            shared = 0
            self._context.cut(slot, 0)
        self._idle[slot] = []
        self._touch(slot)
        sequence.slot = slot
        sequence.in_memory = shared
        sequence.cached = shared
        self._running[sequence.key] = sequence

    def _close_gaps(self) -> None:
        """Move sequences together: only neighbouring slots are computed in one go."""
        while self._model.memory_is_positional:
            busy = {s.slot: s for s in self._running.values()}
            move = gap([slot in busy for slot in range(self._slots)])
            if move is None:
                return
            source, target = move
            sequence = busy[source]
            self._context.copy(source, target, sequence.in_memory)
            self._idle[target] = []
            self._idle[source] = sequence.tokens[: sequence.in_memory]
            self._touch(target)
            sequence.slot = target

    def _step_batch(self) -> bool:
        self._close_gaps()
        todo = self._plan()
        if not todo.shares:
            return False
        began = time.monotonic_ns()
        self._distribute(todo, self._decode(todo), began)
        return True

    def _plan(self) -> Plan:
        candidates = [
            Candidate(s.key, s.pending, prompting=s.pending > 1, granted=s.may_go_on)
            for s in self._running.values()
        ]
        return plan(candidates, n_batch=self._context.n_batch, prefill_tps=self.prefill.tps)

    def _decode(self, todo: Plan) -> dict[int, int]:
        """Run the batch. Batch index of the logits, by key of those sequences that may make a token."""
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        wanted: dict[int, int] = {}
        for key, count in sorted(todo.shares, key=lambda share: self._running[share[0]].slot):
            s = self._running[key]
            tokens += s.tokens[s.in_memory : s.in_memory + count]
            positions += range(s.in_memory, s.in_memory + count)
            slots += [s.slot] * count
            if count == s.pending:
                wanted[key] = len(tokens) - 1
        self._context.decode(tokens, positions, slots, list(wanted.values()))
        return wanted

    def _distribute(self, todo: Plan, wanted: dict[int, int], began_ns: int) -> None:
        for key, count in todo.shares:
            sequence = self._running[key]
            sequence.started(began_ns)
            sequence.in_memory += count
            index = wanted.get(key)
            if index is None:
                self._updates.append(sequence.prompt_update())
                continue
            with self.patience.on(key):
                ended = self._advance(sequence, self._context.logits(index))
            if ended:
                self._vacate(sequence)
                sequence.close()
        self._measure(todo, time.monotonic_ns() - began_ns)

    def _advance(self, sequence: Sequence, logits: Logits) -> bool:
        """Make a token and report it. True if the sequence ended."""
        try:
            sequence.advance(logits, time.monotonic_ns)
        except GrammarTooCostly as error:
            self._updates.append(Update(sequence.key, failed=str(error)))
            return True
        self._report(sequence)
        return sequence.done is not None

    def _measure(self, todo: Plan, duration_ns: int) -> None:
        if len(todo.shares) == 1 and todo.tokens == 1:
            self.decode.note(1, duration_ns / 1e9)
        elif todo.tokens >= _MIN_MEASURED_TOKENS and all(count > 1 for _, count in todo.shares):
            self.prefill.note(todo.tokens, duration_ns / 1e9)

    def _step_lane(self, lane: Lane) -> bool:
        sequence = lane.sequence
        if sequence is None:
            return False
        worked = lane.step()
        if not worked:
            return False
        if lane.logits is not None:
            with self.patience.on(sequence.key):
                ended = self._advance(sequence, lane.logits)
            if ended:
                lane.release()
                sequence.close()
        elif sequence.made == len(sequence.job.resume):
            self._updates.append(sequence.prompt_update())
        return True

    # --- start ----------------------------------------------------------------------------------

    def warm_up(self) -> None:
        """Measure both speeds on made-up tokens, and leave no trace in the memory."""
        began = time.monotonic()
        position = 0
        for count, speed in ((16, None), (48, self.prefill), *[(1, self.decode)] * 12):
            tokens = [(7919 * i) % self._model.n_vocab for i in range(position, position + count)]
            at = time.monotonic()
            self._context.decode(tokens, range(position, position + count), [0] * count, [count - 1])
            self._context.logits(count - 1).argmax()
            position += count
            if speed is not None:
                speed.note(count, time.monotonic() - at)
            elif time.monotonic() - began > _WARM_UP_S:
                self.prefill.note(count, time.monotonic() - at)
            if time.monotonic() - began > _WARM_UP_S and self.decode.tps > 0:
                break
        self._context.clear()

    def close(self) -> None:
        for lane in self._lanes:
            lane.close()
        self._context.close()
