"""The engine of a head: beside its layers it samples, and says which rows it wants next.

A job asks for rows (`Ask`): all its tokens first, then the last one with drafts behind it. Its next tokens
are made when all rows that it asked for are there, not before: whatever the ring had under way for it has
arrived then, so rows of drafts that were wrong can not be taken for the answer to a later question.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence as Items
from typing import Final

from msgspec.structs import replace

from cargos.runtimes.llama.native import GrammarTooCostly, Model
from cargos.runtimes.llama.patience import Patience
from cargos.runtimes.llama.sampling import BadLogits
from cargos.runtimes.llama.sequence import Sequence
from cargos.runtimes.llama.wire import Update
from cargos.runtimes.shards.draft import RowCosts, Speculation
from cargos.runtimes.shards.draft_model import DraftModel, ModelDrafter
from cargos.runtimes.shards.engine import StageEngine, grid_step
from cargos.runtimes.shards.native import StageContext
from cargos.runtimes.shards.resident import Resident
from cargos.runtimes.shards.schedule import MAX_TOGETHER
from cargos.runtimes.shards.wire import Ask, Fault, Feed, Job, Stage

#: A trip that took longer than the shortest raises the estimate by this part of the difference.
_TRIP_FADES: Final = 8

#: Questions with drafts before one is asked without, to see what that takes now. Where drafts double the speed
#: that costs less than a percent.
_BARE_EVERY: Final = 64


class _Voice:
    """A job: its sequence (None while it is prepared), and what it has asked for."""

    def __init__(self, job: Job) -> None:
        self.sequence: Sequence | None = None
        self.may_draft = job.drafts and not job.work.deterministic
        self.speculation: Speculation | None = None
        self.drafter: ModelDrafter | None = None
        self.asked = 0  # the position after the last row it asked for; 0: it has not asked
        self.drafts: deque[int] = deque()  # asked for behind the tokens, not looked at yet
        self.strayed = False  # a draft was wrong: the rows behind it mean nothing
        self.known = 0  # tokens when it asked
        self.trip_ns = 0  # as the ring measures it; 0: unknown
        self.asked_ns = 0
        self.own_trip_ns = 0  # the shortest time from a question to its answer lately
        self.sent = 0  # drafts with the question that was asked
        self.sent_ns = 0
        self.bare_ns = 0  # from a question without drafts to its tokens; 0: unknown
        self.since_bare = _BARE_EVERY
        self.extra_ns = 0  # what drafts add to that, smoothed as `trip_ns` is, which has it in it
        # What it took, for the job's account: questions, guesses sent along, and those that were right.
        self.traversals = self.drafted = self.right = 0

    @property
    def last(self) -> int:
        """The position of the newest token: the row there makes the next one."""
        return len(self.sequence.tokens) - 1 if self.sequence is not None else 0

    def heard(self, now_ns: int) -> None:
        """All rows that it asked for have come."""
        took_ns, self.asked_ns = now_ns - self.asked_ns, 0
        shortest_ns = min(took_ns, self.own_trip_ns or took_ns)
        self.own_trip_ns = shortest_ns + (took_ns - shortest_ns) // _TRIP_FADES

    @property
    def plain_trip_ns(self) -> int:
        """A traversal without drafts; 0: unknown."""
        trip_ns = self.trip_ns or self.own_trip_ns
        return max(trip_ns - self.extra_ns, trip_ns // 2)

    def answered(self, now_ns: int, expected_ns: int) -> tuple[int, int] | None:
        """The tokens of a question are made: (drafts, what they added), if it can be told. `expected_ns`: what
        they should add by what was known.
        """
        took_ns, sent, self.sent_ns = now_ns - self.sent_ns, self.sent, 0
        self.extra_ns += (expected_ns - self.extra_ns) // _TRIP_FADES
        if sent:
            self.since_bare += 1
            return sent, took_ns - self.bare_ns
        self.since_bare = 0
        self.bare_ns += (took_ns - self.bare_ns) // _TRIP_FADES if self.bare_ns else took_ns
        return None


class HeadEngine(StageEngine):
    is_head = True

    def __init__(self, model: Model, stage: Stage) -> None:
        super().__init__(model, stage)
        self._voices: dict[int, _Voice] = {}
        self._queue: deque[int] = deque()
        self.asks: list[Ask] = []
        self.updates: list[Update] = []
        self.patience: Final = Patience()
        self._row_costs = RowCosts()
        self._draft_model = (
            DraftModel(
                stage.draft_path,
                model,
                sequences=stage.slots,
                context_length=stage.context_length,
                threads=stage.threads,
            )
            if stage.draft_path
            else None
        )

    # --- commands -------------------------------------------------------------------------------

    def expect(self, job: Job) -> None:
        """A job is being prepared. Rows for it may come already: stages that have them from before it was
        this head's replay them at once.
        """
        self.close(job.id)
        self._residents[job.id] = Resident(job.id, job.dtype, 0, deterministic=job.work.deterministic)
        self._voices[job.id] = _Voice(job)

    def admit(self, sequence: Sequence) -> None:
        """It is prepared."""
        voice = self._voices.get(sequence.key)
        resident = self._residents.get(sequence.key)
        if voice is None or resident is None:
            sequence.close()
            return
        voice.sequence = sequence
        resident.prompt = len(sequence.job.prompt)
        if voice.may_draft:
            if self._draft_model is not None:
                job = sequence.job
                voice.drafter = self._draft_model.drafter(job.work.sampling, len(job.prompt))
            voice.speculation = Speculation(*([voice.drafter] if voice.drafter is not None else []))
        if sequence.done is not None:
            self._tell(sequence)
            self.close(sequence.key)
        else:
            self._queue.append(sequence.key)

    def grant(self, key: int, until: int) -> None:
        voice = self._voices.get(key)
        if voice is not None and voice.sequence is not None:
            voice.sequence.granted = max(voice.sequence.granted, until)

    def feed(self, command: Feed) -> None:
        voice = self._voices.get(command.id)
        if voice is not None and command.trip_ns:
            voice.trip_ns = command.trip_ns
        super().feed(command)
        resident = self._residents.get(command.id)
        if voice is not None and resident is not None and voice.asked_ns and resident.until >= voice.asked:
            voice.heard(time.monotonic_ns())

    def close(self, key: int) -> None:
        voice = self._voices.pop(key, None)
        if voice is not None and voice.sequence is not None:
            voice.sequence.close()
        if voice is not None and voice.drafter is not None:
            voice.drafter.close()
        if key in self._queue:
            self._queue.remove(key)
        super().close(key)

    def shut(self) -> None:
        if self._draft_model is not None:
            self._draft_model.close()
        super().shut()

    # --- asking ---------------------------------------------------------------------------------

    def ask(self) -> None:
        """Give places to who waits for one, and ask for the rows that are needed next."""
        for key in list(self._queue):
            if self._settle(self._residents[key]):
                self._queue.remove(key)
        for key, voice in self._voices.items():
            if self._may_ask(key, voice):
                self._ask(key, voice)

    def _may_ask(self, key: int, voice: _Voice) -> bool:
        """Whether it is time: at once for a job that has a place, later when a token was made and more are
        granted.
        """
        sequence = voice.sequence
        if sequence is None or sequence.done is not None or self._residents[key].context is None:
            return False
        return not voice.asked or (len(sequence.tokens) > voice.known and sequence.may_go_on)

    def _ask(self, key: int, voice: _Voice) -> None:
        sequence = voice.sequence
        if sequence is None:
            return
        tokens = sequence.tokens
        begins = not voice.asked
        position = 0 if begins else voice.last
        if not begins:
            self._residents[key].cut(position)  # what is left of drafts that were wrong
        drafts = self._draft(voice, sequence, begins=begins)
        voice.drafts = deque(drafts)
        voice.traversals += 1
        voice.drafted += len(drafts)
        voice.strayed = False
        voice.known = len(tokens)
        voice.asked = len(tokens) + len(drafts)
        voice.sent = len(drafts)
        voice.asked_ns = voice.sent_ns = 0 if begins else time.monotonic_ns()
        self.asks.append(Ask(key, position, (*tokens[position:], *drafts), len(sequence.job.prompt)))

    def _draft(self, voice: _Voice, sequence: Sequence, *, begins: bool) -> list[int]:
        speculation = voice.speculation
        if speculation is None:
            return []
        if begins:
            speculation.extend(sequence.tokens)
            return []
        speculation.verified(sequence.tokens[voice.known :])
        # A draft makes one token more at most: with all of them right there must be leave and room for it.
        spare = min(sequence.granted, sequence.job.room) - sequence.made - 1
        if voice.since_bare >= _BARE_EVERY:
            return []  # what drafts add can be told only if it is known what there is without
        rows_ns, sharing = self._row_costs.times(self._row_ns()), len(self._voices)
        return speculation.draft(voice.plain_trip_ns, rows_ns, min(spare, MAX_TOGETHER - 1), sharing=sharing)

    def _row_ns(self) -> int:
        """One row more through the whole ring, as estimated from this stage's pace."""
        pace = self.meter.pace
        # A handful of rows gains half of what a large batch would: kernels for few rows read weights for each.
        return (pace.layer_ns + pace.prefill_layer_ns) // 2 * self._stage.layers + pace.vocabulary_ns

    # --- hearing --------------------------------------------------------------------------------

    def _computable(self, resident: Resident) -> tuple[int, int]:
        voice = self._voices[resident.key]
        sequence = voice.sequence
        if sequence is None or not voice.asked or voice.known != len(sequence.tokens):
            return 0, 0
        before, wanted = voice.last - resident.have, voice.asked - resident.have
        if before < 0:
            return 0, 0
        answered = resident.pending >= wanted and sequence.may_go_on
        if resident.deterministic:
            passes = grid_step(resident.have, resident.prompt) <= before
            return (resident.pending, wanted) if passes or answered else (0, 0)
        # With drafts in it, the answer is taken as a whole. Without, it is one row; rows before it come along.
        if answered and (not before or wanted == before + 1):
            return wanted, wanted
        return min(resident.pending, before), before

    def _outputs(self, resident: Resident, first: int, count: int) -> Items[int]:
        voice = self._voices[resident.key]
        if voice.strayed or not voice.asked:
            return ()
        return [i for i in range(count) if voice.last <= first + i < voice.asked]

    def _computed(self, resident: Resident, context: StageContext, outputs: Items[tuple[int, int]]) -> None:
        voice = self._voices[resident.key]
        sequence = voice.sequence
        if sequence is None:
            return
        sequence.started(time.monotonic_ns())
        sequence.in_memory = resident.have
        if not outputs and sequence.made == len(sequence.job.resume):
            self.updates.append(sequence.prompt_update())
        for position, index in outputs:
            if sequence.done is not None or voice.strayed or position != voice.last:
                break
            self._hear(voice, sequence, context, index)
        if outputs and voice.sent_ns:
            self._learn(voice)

    def _learn(self, voice: _Voice) -> None:
        """From what the question took of which these were the tokens."""
        expected_ns = self._row_costs.times(self._row_ns())[voice.sent - 1] if voice.sent else 0
        seen = voice.answered(time.monotonic_ns(), expected_ns)
        if seen is not None and len(self._voices) == 1:  # else it was others who were waited for
            self._row_costs.note(*seen)

    def _hear(self, voice: _Voice, sequence: Sequence, context: StageContext, index: int) -> None:
        """Make the token that follows the newest one."""
        try:
            with self.patience.on(sequence.key):
                sequence.advance(context.logits(index), time.monotonic_ns)
        except GrammarTooCostly as error:
            self.updates.append(Update(sequence.key, failed=str(error)))
            voice.strayed = True
            self._over.append(sequence.key)
            return
        except BadLogits as error:
            # Rows from elsewhere may hold anything: it is not this worker's memory that is damaged.
            self.faults.append(Fault(sequence.key, "invalid", str(error)))
            voice.strayed = True
            self._over.append(sequence.key)
            return
        if sequence.done is None:
            voice.strayed = not voice.drafts or voice.drafts.popleft() != sequence.tokens[-1]
            voice.right += not voice.strayed
        else:
            self._over.append(sequence.key)
        self._tell(sequence)

    def _tell(self, sequence: Sequence) -> None:
        update = sequence.update()
        if update is None:
            return
        voice = self._voices.get(sequence.key)
        if update.done is not None and voice is not None:
            usage = replace(
                update.done.usage,
                traversals=voice.traversals,
                drafts=voice.drafted,
                drafts_right=voice.right,
            )
            update = replace(update, done=replace(update.done, usage=usage))
        self.updates.append(update)
