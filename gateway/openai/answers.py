"""The two sinks: an answer sent as it comes, and one sent whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec
import trio
from starlette.types import Send

from gateway.http import encode_headers, header_safe
from gateway.openai.errors import error_of
from gateway.openai.render import DONE, Answer
from gateway.openai.runner import ChoiceRun, placement_headers, usage_of
from gateway.service import Completed, Failed, Placed, Released

_STREAM_HEADERS: Final = (
    ("content-type", "text/event-stream; charset=utf-8"),
    ("cache-control", "no-cache"),
    ("x-accel-buffering", "no"),  # nginx would hold tokens back
)
KEEP_ALIVE: Final = b": keep-alive\n\n"


class StreamSink:
    """Server-sent events. The response starts with the first token, so that a failure before has its status."""

    def __init__(
        self,
        send: Send,
        answer: Answer,
        runs: Sequence[ChoiceRun],
        *,
        keep_alive_s: float,
        headers: Sequence[tuple[str, str]],
    ) -> None:
        self._send = send
        self._answer = answer
        self._choices = answer.stream_choices()
        self._runs = runs
        self._keep_alive_s = keep_alive_s
        self._headers = headers
        self._lock = trio.Lock()  # one writer at a time: choices, keep-alive, failure
        self._open = len(runs)
        self.started = False
        self._closed = False
        self._last_write_s = 0.0

    async def released(self, run: ChoiceRun, event: Released) -> None:
        data = self._choices[run.index].tokens(event.tokens)
        if data:
            await self._write(data)

    async def handed_over(self, event: Placed) -> None:
        """A comment in a begun stream: clients skip it, people and `archi chat` see it."""
        if self.started:
            await self._write(
                b": hand-over %d island=%b\n\n" % (event.hand_over, header_safe(event.island).encode())
            )

    async def completed(self, run: ChoiceRun, event: Completed) -> None:
        data = self._choices[run.index].finish(event.finish, event.tail)
        self._open -= 1
        if self._open:
            await self._write(data)
            return
        if self._answer.plan.include_usage:
            data += self._answer.usage_chunk(usage_of(self._answer.plan, self._runs))
        await self._write(data + DONE, last=True)

    async def failed(self, event: Failed) -> None:
        async with self._lock:
            if self._closed:
                return
            self._closed = True
            if self.started:
                error = error_of(event, prompt_param=self._answer.plan.prompt_param)
                body = b"data: " + msgspec.json.encode({"error": error.as_dict()}) + b"\n\n"
                await self._send({"type": "http.response.body", "body": body})

    async def keep_alive(self) -> None:
        while True:
            now_s = trio.current_time()
            due_s = self._last_write_s + self._keep_alive_s if self.started else now_s + self._keep_alive_s
            if now_s >= due_s:
                if not self._lock.locked():  # else a write is under way, or waits for a slow consumer
                    await self._write(KEEP_ALIVE)
                due_s = trio.current_time() + self._keep_alive_s
            await trio.sleep_until(due_s)

    async def _write(self, data: bytes, *, last: bool = False) -> None:
        try:
            self._lock.acquire_nowait()  # without the checkpoint that `async with` costs for each token
        except trio.WouldBlock:
            await self._lock.acquire()
        try:
            if self._closed:
                return
            self._closed = last
            if not self.started:
                self.started = True
                headers = [*_STREAM_HEADERS, *placement_headers(self._runs), *self._headers]
                await self._send(
                    {"type": "http.response.start", "status": 200, "headers": encode_headers(headers)}
                )
            await self._send({"type": "http.response.body", "body": data, "more_body": not last})
            self._last_write_s = trio.current_time()
        finally:
            self._lock.release()


class WholeSink:
    """Gathers the choices. What it holds is bounded by the context length times the number of choices."""

    def __init__(self, answer: Answer) -> None:
        self._choices = answer.whole_choices()
        self.finished: list[dict[str, Any]] = [{} for _ in self._choices]

    async def released(self, run: ChoiceRun, event: Released) -> None:
        self._choices[run.index].tokens(event.tokens)

    async def handed_over(self, event: Placed) -> None:
        """Nobody sees it yet."""

    async def completed(self, run: ChoiceRun, event: Completed) -> None:
        self.finished[run.index] = self._choices[run.index].finish(event.finish, event.tail)

    async def failed(self, event: Failed) -> None:
        """The endpoint makes the response of it."""

    async def keep_alive(self) -> None:
        """A whole answer has no place for comments."""
