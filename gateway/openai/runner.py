"""Runs a request's jobs, all choices at once, as long as its consumer is there.

    one nursery:  a task per choice   job events -> sink
                  a watcher           http.disconnect -> cancel everything
                  a keep-alive task   silence -> comment (streams only)

Backpressure: a choice's task takes the next event only when the sink has taken the last one, and the sink
waits for the consumer; what is not taken pauses the Island. Nothing in between grows.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, cast

import trio
from starlette.types import Receive

from gateway.http import header_safe
from gateway.metrics import GatewayMetrics
from gateway.openai.plan import Plan
from gateway.service import Completed, Failed, InferenceService, JobEvent, Placed, Preparing, Released


@dataclass(slots=True)
class ChoiceRun:
    """What is known of one choice. Times on the gateway's monotonic clock, ns; 0: not yet."""

    index: int
    arrived_ns: int
    placed: Placed | None = None
    hand_overs: int = 0
    first_ns: int = 0
    last_ns: int = 0
    tokens: int = 0
    completed: Completed | None = None


class Sink(Protocol):
    """Where events of all choices go."""

    async def released(self, run: ChoiceRun, event: Released) -> None: ...

    async def handed_over(self, event: Placed) -> None: ...

    async def completed(self, run: ChoiceRun, event: Completed) -> None: ...

    async def failed(self, event: Failed) -> None:
        """One choice failed. After this returns the others are cancelled, none of them in mid-write."""
        ...

    async def keep_alive(self) -> None:
        """Runs beside the choices; may return at once."""
        ...


Outcome: TypeAlias = Literal["completed", "disconnected"] | Failed


class Runner:
    """One request's jobs."""

    def __init__(
        self, service: InferenceService, plan: Plan, metrics: GatewayMetrics, *, arrived_ns: int
    ) -> None:
        self._service = service
        self._plan = plan
        self._metrics = metrics
        self.runs = tuple(ChoiceRun(i, arrived_ns) for i in range(len(plan.works)))
        self._open = len(self.runs)  # choices without an end
        self._running = len(self.runs)  # tasks
        self._settled = False  # the outcome stands: what is left is to tell it
        self._outcome: Outcome = "completed"

    async def run(self, sink: Sink, receive: Receive) -> Outcome:
        """Until all choices are complete, one has failed, or the consumer has left."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch, receive, nursery.cancel_scope)
            nursery.start_soon(sink.keep_alive)
            for run in self.runs:
                nursery.start_soon(self._choice, run, sink, nursery.cancel_scope)
        if self._outcome == "disconnected":
            self._metrics.disconnects.inc()
        return self._outcome

    async def _watch(self, receive: Receive, scope: trio.CancelScope) -> None:
        """Cancels all when the consumer leaves.

        The server also reports a disconnect when the response is complete; by then nothing may be cancelled, or
        the server's own work on the connection, under way inside our last `send`, would be cut off.
        """
        while (await receive())["type"] != "http.disconnect":
            pass
        if not self._settled:
            self._outcome = "disconnected"
            scope.cancel()

    async def _choice(self, run: ChoiceRun, sink: Sink, scope: trio.CancelScope) -> None:
        work = self._plan.works[run.index]
        with self._metrics.jobs_in_flight.track_inprogress():
            async with (
                self._service.run(self._plan.model, work, deadline_ns=self._plan.deadline_ns) as job,
                _closed_in_the_end(aiter(job)) as events,
            ):
                failed = await self._events(run, events, sink)
        self._running -= 1
        if failed or self._running == 0:
            scope.cancel()

    async def _events(self, run: ChoiceRun, events: AsyncIterator[JobEvent], sink: Sink) -> bool:
        """Takes them all. Returns whether this choice's failure is the request's, and has been told."""
        async for event in events:
            match event:
                case Released():
                    self._count(run, event)
                    await sink.released(run, event)
                case Placed():
                    run.placed = event
                    self._metrics.placed(event.queue_ns)
                    if event.hand_over:
                        run.hand_overs = event.hand_over
                        self._metrics.hand_overs.inc()
                        await sink.handed_over(event)
                case Preparing():
                    pass
                case Completed():
                    self._end(run, event)
                    await sink.completed(run, event)
                    return False
                case Failed():
                    self._metrics.failed(event.code)
                    if self._settled:  # another choice failed first
                        return False
                    self._settled = True
                    self._outcome = event
                    await sink.failed(event)
                    return True
        raise RuntimeError("a job ended without Completed or Failed")

    def _count(self, run: ChoiceRun, event: Released) -> None:
        now_ns = time.monotonic_ns()
        count = len(event.tokens)
        if run.tokens == 0:
            run.first_ns = now_ns
            self._metrics.first_token(now_ns - run.arrived_ns)
        else:
            self._metrics.tokens(now_ns - run.last_ns, count)
        run.last_ns = now_ns
        run.tokens += count

    def _end(self, run: ChoiceRun, event: Completed) -> None:
        run.completed = event
        self._open -= 1
        self._settled = self._settled or self._open == 0
        run.hand_overs = max(run.hand_overs, event.hand_overs)
        self._metrics.prompt_tokens.inc(event.usage.prompt_tokens)
        self._metrics.completion_tokens.inc(event.usage.completion_tokens)
        self._metrics.drafts.inc(event.usage.drafts)
        self._metrics.drafts_right.inc(event.usage.drafts_right)


@asynccontextmanager
async def _closed_in_the_end(events: AsyncIterator[JobEvent]) -> AsyncGenerator[AsyncIterator[JobEvent]]:
    """A generator that is left in the middle must not wait for the collector."""
    try:
        yield events
    finally:
        if isinstance(events, AsyncGenerator):
            await cast("AsyncGenerator[JobEvent]", events).aclose()


def placement_headers(runs: Sequence[ChoiceRun]) -> list[tuple[str, str]]:
    """Which Island answers. Several choices: all Islands' names, and the first choice's figures."""
    placed = [run.placed for run in runs if run.placed is not None]
    if not placed:
        return []
    names = dict.fromkeys(header_safe(each.island) for each in placed)
    stages = placed[0].stages
    layers = ", ".join(f"{header_safe(each.island)} {each.first}-{each.last - 1}" for each in stages)
    return [
        ("x-archipelag-island", ", ".join(names)),
        ("x-archipelag-rtt-ms", f"{placed[0].rtt_ns / 1e6:.2f}"),
        ("x-archipelag-queue-ms", f"{placed[0].queue_ns / 1e6:.2f}"),
        *([("x-archipelag-stages", layers)] if layers else []),
    ]


def usage_of(plan: Plan, runs: Sequence[ChoiceRun]) -> dict[str, Any]:
    """`usage`, with this gateway's own measurements under `archipelag`.

    The prompt counts once for all its `n` choices. `tokens_per_second` is measured here, from first to last
    token of the first choice; None where there were not two of them.
    """
    done = [run.completed for run in runs if run.completed is not None]
    prompt = sum(each.usage.prompt_tokens for each in done[:: plan.n])
    cached = sum(each.usage.cached_tokens for each in done[:: plan.n])
    completion = sum(each.usage.completion_tokens for each in done)
    first = runs[0]
    spent_ns = first.last_ns - first.first_ns
    rate = round((first.tokens - 1) * 1e9 / spent_ns, 2) if first.tokens > 1 and spent_ns > 0 else None
    own: dict[str, Any] = {
        "island": first.completed.island if first.completed else None,
        "hand_overs": sum(run.hand_overs for run in runs),
        "tokens_per_second": rate,
        "ttft_ms": round((first.first_ns - first.arrived_ns) / 1e6, 2) if first.first_ns else None,
    }
    if first.placed is not None:
        own["rtt_ms"] = round(first.placed.rtt_ns / 1e6, 2)
        own["queue_ms"] = round(first.placed.queue_ns / 1e6, 2)
        stages = (first.completed.stages if first.completed else ()) or first.placed.stages
        if stages:
            own["stages"] = [
                {"island": stage.island, "first_layer": stage.first, "last_layer": stage.last - 1}
                for stage in stages
            ]
            own["stages_lost"] = sum(each.stages_lost for each in done)
            own["traversals"] = sum(each.usage.traversals for each in done)
            own["drafts"] = sum(each.usage.drafts for each in done)
            own["drafts_right"] = sum(each.usage.drafts_right for each in done)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
        "archipelag": own,
    }
