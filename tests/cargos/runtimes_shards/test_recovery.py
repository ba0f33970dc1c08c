"""Workers die: the ring's logs and the jobs' tokens bring everything back; it costs a pause."""

from __future__ import annotations

import os
import signal

import pytest
import trio

from cargos.runtimes.base import JobRefused
from cargos.runtimes.shards import ShardOptions, open_stage
from cargos.runtimes.shards.base import Computed, Lost


@pytest.mark.model
@pytest.mark.parametrize("victim", [0, 1, 2])
@pytest.mark.parametrize("deterministic", [False, True])
async def test_any_stage_killed_in_mid_token_costs_a_pause_and_no_token(ring, chat, victim, deterministic):
    work = chat(
        "Write a story about the sea.", temperature=0.8, seed=3, max_tokens=16, deterministic=deterministic
    )
    async with ring(9, 20) as chain:
        undisturbed, _ = await chain.ask(work, name="first")
        first = chain.stages[victim].worker_pid

        def kill(made: int) -> None:
            if made == 6:
                os.kill(first, signal.SIGKILL)

        ids, finished = await chain.ask(work, name="second", on_token=kill)
        assert chain.lost == 1
        assert chain.stages[victim].worker_pid != first
        assert chain.stages[victim].load().restarts == 1
        assert ids == undisturbed
        assert finished.usage.completion_tokens == 16


@pytest.mark.model
async def test_a_new_head_is_fed_by_replay_and_goes_on_where_the_old_one_stopped(ring, chat):
    """Rows come that it did not ask for yet, and in pieces; the next token is made when all are there."""
    work = chat("Write a story about the sea.", temperature=0.8, seed=3, max_tokens=14)
    async with ring(15) as chain:
        whole, _ = await chain.ask(work, name="old")
        some, _ = await chain.ask(work, name="other", until=5)
        assert some == whole[:5]
        rows = {}
        for index, event in chain.computed:
            if index == 0 and event.session == "old":
                size = len(event.payload) // event.rows
                rows |= {
                    event.position + i: event.payload[i * size : (i + 1) * size] for i in range(event.rows)
                }
        prompt = chain.wanted[0].prompt
        have = [rows[i] for i in range(prompt + 5)]
        chain.wanted.clear()
        got = []
        async with chain.head.submit(
            "new", work, dtype="f32", resume=tuple(some), granted=99, trip_ns=lambda: 0
        ) as session:
            for at in range(0, len(have), 7):
                part = have[at : at + 7]
                chain.head.feed("new", at, len(part), b"".join(part))
            with trio.fail_after(30):
                while not got:
                    event = await session.receive()
                    got = [token.id for token in getattr(event, "tokens", ())]
        assert got[0] == whole[5]
        asked, following = chain.wanted[:2]
        assert (asked.position, asked.tokens[prompt:]) == (0, tuple(some))
        assert (following.position, following.tokens) == (prompt + 5, (whole[5],))


@pytest.mark.model
async def test_what_a_stage_is_told_while_it_loads_is_done_then(stage_spec):
    send, receive = trio.open_memory_channel(99)

    def on_event(event) -> None:
        if isinstance(event, Computed):
            send.send_nowait(event)
        elif isinstance(event, Lost):
            lost.set()

    lost = trio.Event()

    async with open_stage(stage_spec(0, 15), on_event, ShardOptions()) as stage:
        stage.open("s", dtype="f32", prompt=3, deterministic=False)
        stage.feed("s", 0, 3, b"".join(n.to_bytes(4, "little") for n in (1, 2, 3)))
        assert stage.load().state == "loading"
        with trio.fail_after(30):
            first = await receive.receive()
        assert (first.position, first.rows) == (0, 3)
        os.kill(stage.worker_pid, signal.SIGKILL)
        with trio.fail_after(30):
            await lost.wait()
        stage.open("s", dtype="f32", prompt=3, deterministic=False)
        stage.feed("s", 0, 3, b"".join(n.to_bytes(4, "little") for n in (1, 2, 3)))
        with trio.fail_after(30):
            again = await receive.receive()
        assert again.payload == first.payload
        load = stage.load()
        assert load.state == "ready"
        assert load.width == 576
        assert min(load.layer_ns, load.prefill_layer_ns) > 0
        assert load.vocabulary_ns == 0


@pytest.mark.model
async def test_a_refused_job_leaves_the_head_as_it_was(ring, chat):
    async with ring(15) as chain:
        with pytest.raises(JobRefused, match="context length"):
            await chain.ask(chat("hello " * 2000), name="long")
        ids, _ = await chain.ask(chat("What is the capital of France?", max_tokens=4), name="next")
        assert len(ids) == 4
        assert chain.head.load().vocabulary_ns > 0
