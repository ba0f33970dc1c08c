"""The Island's side of a job stream, against gateways of every kind."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from cargos.runtimes.base import JobRefused, RuntimeFailed
from node.identity import new_identity
from node.jobs import BUSY_RETRY_MS, MAX_RESERVE_STREAMS, RESERVE_AFTER_S, JobService
from node.p2p import StreamBroken
from node.streams import MemoryStream, MessageStream, memory_stream_pair
from protocol.codec import LENGTH
from protocol.envelope import open_untrusted
from protocol.ids import CargoDigest
from protocol.instants import SECOND_NS, UnixNs
from protocol.jobs import (
    FROM_ISLAND,
    RECEIPT,
    RECEIPT_KIND,
    TO_ISLAND,
    FromIsland,
    JobAccept,
    JobCancel,
    JobDone,
    JobError,
    JobGrant,
    JobOffer,
    JobProgress,
    JobReject,
    JobTokens,
    ToIsland,
    token_hash,
)
from protocol.limits import MAX_CONTEXT_TOKENS, MAX_TOKEN_WINDOW, MAX_TOKENS_PER_FRAME
from protocol.work import Generation, Sampling, TextPrompt

ISLAND, GATEWAY = new_identity(), new_identity()
CARGO = CargoDigest("sha256:" + "c" * 64)
UNIX = UnixNs(1_800_000_000 * SECOND_NS)
blocked = trio.testing.wait_all_tasks_blocked


def offer(count: int = 5, **changes: Any) -> JobOffer:
    work = Generation(TextPrompt("hi"), Sampling(seed=3), max_tokens=count)
    return msgspec.structs.replace(JobOffer("1" * 32, CARGO, work), **changes)


@dataclass
class Line:
    """The gateway's end of one stream. `ended`: the Island's handler has returned."""

    raw: MemoryStream
    messages: MessageStream[ToIsland, FromIsland]
    ended: trio.Event

    async def send(self, message: ToIsland) -> None:
        await self.messages.send(message)

    async def receive(self) -> FromIsland | None:
        with trio.fail_after(30):
            return await self.messages.receive()

    async def rest(self) -> list[FromIsland]:
        """Everything up to the Island's end, after which the gateway ends too."""
        found: list[FromIsland] = []
        while (message := await self.receive()) is not None:
            found.append(message)
        await self.raw.aclose()
        with trio.fail_after(30):
            await self.ended.wait()
        return found


class Island:
    """A JobService with lines to it. Whatever a handler raises fails the test."""

    def __init__(self, nursery: trio.Nursery, runtime: Any, queue: int) -> None:
        self.nursery = nursery
        self.changes = 0
        self.unix = UNIX
        self.service = JobService(
            signer=ISLAND.signer,
            runtimes={CARGO: runtime},
            queue=queue,
            unix_now=lambda: self.unix,
            changed=self._changed,
        )

    def _changed(self) -> None:
        self.changes += 1

    def line(self, window: int = 256 * 1024) -> Line:
        near, far = memory_stream_pair(GATEWAY.peer, ISLAND.peer, window=window)
        line = Line(near, MessageStream(near, TO_ISLAND, FROM_ISLAND), trio.Event())

        async def serve() -> None:
            await self.service.handle(far)
            line.ended.set()

        self.nursery.start_soon(serve)
        return line


@pytest.fixture
def island(scripted_runtime: Callable[..., Any]):
    @asynccontextmanager
    async def make(runtime: Any = None, queue: int = 4) -> AsyncGenerator[Island]:
        async with trio.open_nursery() as nursery:
            yield Island(nursery, runtime or scripted_runtime(), queue)
            nursery.cancel_scope.cancel()

    return make


def tokens_of(messages: list[FromIsland]) -> list[int]:
    ids: list[int] = []
    for message in messages:
        if isinstance(message, JobTokens):
            assert message.first == len(ids)
            ids += [token.id for token in message.tokens]
    return ids


async def test_a_job_from_offer_to_receipt(island, scripted_runtime, ids_of) -> None:
    async with island(scripted_runtime(preparations=2)) as here:
        line = here.line()
        await line.send(offer(5, granted=64))
        said = await line.rest()
        assert [type(m) for m in said] == [JobAccept, *[JobProgress] * 2, *[JobTokens] * 5, JobDone]
        assert tokens_of(said) == ids_of(5)
        done = said[-1]
        assert isinstance(done, JobDone)
        opened = open_untrusted(done.receipt, RECEIPT_KIND, RECEIPT, UNIX)
        receipt = opened.body
        assert opened.issuer == ISLAND.peer
        assert (receipt.job, receipt.cargo, receipt.consumer) == ("1" * 32, CARGO, GATEWAY.peer)
        assert (receipt.first, receipt.completion_tokens, receipt.prompt_tokens) == (0, 5, 3)
        assert (receipt.seed, receipt.output_hash) == (3, token_hash(ids_of(5)))
        assert here.service.counters.done == here.service.counters.accepted == 1
        assert here.service.counters.tokens == 5
        assert here.service.jobs == {}
        assert here.changes == 2


async def test_a_resumed_job_starts_at_the_next_index(island, ids_of) -> None:
    async with island() as here:
        line = here.line()
        await line.send(offer(5, resume=tuple(ids_of(3))))
        said = await line.rest()
        assert [m.first for m in said if isinstance(m, JobTokens)] == [3, 4]
        done = said[-1]
        assert isinstance(done, JobDone)
        receipt = open_untrusted(done.receipt, RECEIPT_KIND, RECEIPT, UNIX).body
        assert (receipt.first, receipt.output_hash) == (3, token_hash(ids_of(5)))


async def test_receipts_are_numbered_beyond_those_of_an_earlier_run(island) -> None:
    numbers: list[int] = []
    for run in range(2):
        async with island() as here:
            for _ in range(2):
                line = here.line()
                await line.send(offer(1))
                done = (await line.rest())[-1]
                assert isinstance(done, JobDone)
                numbers.append(done.receipt.sequence)
            here.unix = UnixNs(UNIX + run)
    assert numbers[0] > UNIX
    assert numbers[1] > numbers[0]


async def test_a_clock_set_back_makes_no_job_end_before_it_began(island, scripted_runtime) -> None:
    runtime = scripted_runtime(may_reach=0)
    async with island(runtime) as here:
        line = here.line()
        await line.send(offer(1))
        await blocked()
        here.unix = UnixNs(UNIX - 3600 * SECOND_NS)
        runtime.proceed()
        done = (await line.rest())[-1]
        assert isinstance(done, JobDone)
        receipt = open_untrusted(done.receipt, RECEIPT_KIND, RECEIPT, UNIX).body
        assert receipt.started_unix_ns <= receipt.finished_unix_ns


async def test_refusals(island, scripted_runtime) -> None:
    runtime = scripted_runtime()
    async with island(runtime, queue=2) as here:

        async def answer(message: JobOffer) -> FromIsland | None:
            line = here.line()
            await line.send(message)
            said = await line.rest()
            assert len(said) == 1
            return said[0]

        other = await answer(offer(cargo="sha256:" + "d" * 64))
        assert isinstance(other, JobReject)
        assert other.code == "unknown-cargo"
        runtime.queued = 2
        assert await answer(offer()) == JobReject("busy", "2 jobs wait", BUSY_RETRY_MS)
        runtime.queued, runtime.state = 0, "failed"
        failed = await answer(offer())
        assert isinstance(failed, JobReject)
        assert failed.code == "unknown-cargo"
        runtime.state = "ready"
        here.service.draining = True
        draining = await answer(offer())
        assert isinstance(draining, JobReject)
        assert draining.code == "draining"
        assert here.service.counters.rejected == 4
        assert here.service.counters.accepted == 0


@pytest.mark.parametrize("queue", [0, 3])
async def test_a_burst_is_bounded_although_the_runtime_counts_late(
    island, scripted_runtime, queue: int
) -> None:
    """`load().queued` comes from another process: in a burst it says 0 to all of them."""
    async with island(scripted_runtime(may_reach=0, slots=2), queue=queue) as here:
        lines = [here.line() for _ in range(10)]
        for line in lines:
            await line.send(offer())
        first = [await line.receive() for line in lines]
        assert [isinstance(message, JobAccept) for message in first].count(True) == 2 + queue
        for line in lines:
            line.raw.reset()


async def test_the_engine_stops_at_what_is_granted(island, scripted_runtime, ids_of) -> None:
    runtime = scripted_runtime()
    async with island(runtime) as here:
        line = here.line()
        await line.send(offer(6, granted=2))
        await blocked()
        (session,) = runtime.sessions
        assert session.next == 2
        await line.send(JobGrant(4))
        await line.send(JobGrant(3))  # shrinks: means nothing
        await blocked()
        assert session.next == 4
        await line.send(JobGrant(60))
        assert tokens_of(await line.rest()) == ids_of(6)


async def test_a_gateway_that_grants_all_and_reads_nothing(island, scripted_runtime) -> None:
    runtime = scripted_runtime(burst=64)
    async with island(runtime) as here:
        line = here.line(window=2000)
        await line.send(offer(MAX_CONTEXT_TOKENS, granted=MAX_CONTEXT_TOKENS))
        await line.send(JobGrant(MAX_CONTEXT_TOKENS + 5))
        await blocked()
        (session,) = runtime.sessions
        assert session.granted <= session.next + MAX_TOKEN_WINDOW
        seen = 0
        while seen < 3 * MAX_TOKEN_WINDOW:  # it reads after all, and gets on
            message = await line.receive()
            seen += len(message.tokens) if isinstance(message, JobTokens) else 0
        assert session.granted <= seen + 2 * MAX_TOKEN_WINDOW
        line.raw.reset()
        await line.ended.wait()


async def test_grants_of_one_are_passed_on_in_steps_where_they_are_far_ahead(island, scripted_runtime) -> None:
    runtime = scripted_runtime(may_reach=0)
    async with island(runtime) as here:
        line = here.line()
        await line.send(offer(MAX_CONTEXT_TOKENS, granted=1))
        for until in range(2, 3 * MAX_TOKEN_WINDOW):
            await line.send(JobGrant(until))
            if until % 1000 == 0:
                await blocked()
        await blocked()
        assert runtime.sessions[0].granted == MAX_TOKEN_WINDOW
        line.raw.reset()


@pytest.mark.parametrize("way", ["cancel", "eof", "reset", "garbage", "second offer", "half a message"])
async def test_every_way_to_leave_frees_the_slot(island, scripted_runtime, way: str) -> None:
    runtime = scripted_runtime(may_reach=2)
    async with island(runtime) as here:
        line = here.line()
        await line.send(offer(5))
        await blocked()
        (session,) = runtime.sessions
        assert session.next == 2
        assert not session.ended.is_set()
        match way:
            case "cancel":
                await line.send(JobCancel())
            case "eof":
                await line.raw.send_eof()
            case "reset":
                line.raw.reset()
            case "garbage":
                await line.raw.send_all(LENGTH.pack(3) + b"\xc1\xc1\xc1")
            case "second offer":
                await line.send(offer(5))
            case _:
                await line.raw.send_all(LENGTH.pack(10) + b"xx")
                await line.raw.send_eof()
        with trio.fail_after(30):
            await session.ended.wait()
            await line.ended.wait()
        assert here.service.counters.cancelled == 1
        assert here.service.counters.done == 0
        assert here.service.jobs == {}
        if way in {"garbage", "second offer", "half a message"}:
            with pytest.raises(StreamBroken):
                await line.rest()


async def test_leaving_while_the_island_waits_to_send(island, scripted_runtime) -> None:
    """The slot is free at once, although the sender is stuck behind a full window."""
    for way in ("cancel", "reset"):
        runtime = scripted_runtime(burst=64)
        async with island(runtime) as here:
            line = here.line(window=2000)
            await line.send(offer(10_000, granted=10_000))
            await blocked()
            if way == "cancel":
                await line.send(JobCancel())
            else:
                line.raw.reset()
            with trio.fail_after(30):
                await runtime.sessions[0].ended.wait()
                await line.ended.wait()
            assert here.service.counters.cancelled == 1


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (JobRefused("invalid", "no such grammar"), JobError("invalid", "no such grammar", retryable=False)),
        (RuntimeFailed("it died " * 200), JobError("runtime", ("it died " * 200)[:500], retryable=True)),
    ],
)
@pytest.mark.parametrize("gone", [False, True])
async def test_what_the_runtime_raises_is_told(island, scripted_runtime, error, expected, gone) -> None:
    runtime = scripted_runtime(may_reach=1)
    async with island(runtime) as here:
        line = here.line()
        await line.send(offer(3))
        await blocked()
        runtime.error = error
        if gone:
            line.raw.reset()  # in the same moment: whoever is told of it is not there any more
        runtime.proceed(1)
        if gone:
            await line.ended.wait()
        else:
            assert (await line.rest())[-1] == expected
            assert here.service.counters.failed == 1


async def test_the_deadline_ends_the_job(island, scripted_runtime, autojump_clock) -> None:
    runtime = scripted_runtime(may_reach=1)
    async with island(runtime) as here:
        line = here.line()
        before = trio.current_time()
        await line.send(offer(3, deadline_ms=90_000))
        assert await line.receive() == JobAccept(0)
        await line.receive()
        await runtime.sessions[0].ended.wait()
        assert 89 < trio.current_time() - before < 91
        await line.ended.wait()


async def test_frames_are_bounded_whatever_the_runtime_hands_out(island, scripted_runtime, ids_of) -> None:
    async with island(scripted_runtime(burst=10_000)) as here:
        line = here.line()
        await line.send(offer(1000, granted=1000))
        said = await line.rest()
        assert tokens_of(said) == ids_of(1000)
        sizes = [len(m.tokens) for m in said if isinstance(m, JobTokens)]
        assert sizes == [MAX_TOKENS_PER_FRAME] * 3 + [1000 - 3 * MAX_TOKENS_PER_FRAME]


async def test_no_offer_no_job(island) -> None:
    async with island() as here:
        closed, wrong, garbage = here.line(), here.line(), here.line()
        await closed.raw.aclose()
        await wrong.send(JobGrant(3))
        await garbage.raw.send_all(b"GET / HTTP/1.1\r\n\r\n")
        with trio.fail_after(30):
            for line in (closed, wrong, garbage):
                await line.ended.wait()
        assert here.changes == 0
        for line in (wrong, garbage):
            with pytest.raises(StreamBroken):
                await line.receive()


async def test_a_reserve_of_streams_is_bounded_and_each_still_serves(island, ids_of, autojump_clock) -> None:
    async with island() as here:
        lines = [here.line() for _ in range(MAX_RESERVE_STREAMS + 10)]
        await trio.sleep(RESERVE_AFTER_S * 100)
        kept = [line for line in lines if not line.ended.is_set()]
        assert len(kept) == MAX_RESERVE_STREAMS
        await kept[0].send(offer(2))
        assert tokens_of(await kept[0].rest()) == ids_of(2)
        for line in kept:
            line.raw.reset()
            await line.ended.wait()
        again = here.line()
        await trio.sleep(RESERVE_AFTER_S * 2)
        assert not again.ended.is_set()  # the places were given back


async def test_a_gateway_that_never_closes_holds_no_task(island, autojump_clock) -> None:
    async with island() as here:
        line = here.line()
        await line.send(offer(1))
        while (await line.receive()) is not None:
            pass
        await line.ended.wait()
        assert here.service.jobs == {}


async def test_longest_resume(island, scripted_runtime) -> None:
    async with island(scripted_runtime()) as here:
        line = here.line()
        resume = tuple(range(MAX_CONTEXT_TOKENS))
        await line.send(offer(MAX_CONTEXT_TOKENS, resume=resume, granted=MAX_CONTEXT_TOKENS))
        done = (await line.rest())[-1]
        assert isinstance(done, JobDone)
        assert done.usage.generated_tokens == 0
