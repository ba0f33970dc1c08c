"""Deterministic jobs: killed at any token and continued elsewhere, the whole is equal bit for bit."""

from __future__ import annotations

import pytest
import trio

from cargos.runtimes.llama import open_llama

pytestmark = pytest.mark.model


@pytest.fixture
async def runtime(llama_spec):
    async with open_llama(llama_spec()) as runtime:
        with trio.fail_after(60):
            await runtime.ready()
        yield runtime


@pytest.mark.parametrize("temperature", [0.0, 0.8])
async def test_resumed_at_every_third_token(runtime, ask, chat, temperature):
    work = chat("Write a story about the sea.", temperature=temperature, max_tokens=21, deterministic=True)
    whole = await ask(runtime, work)
    assert len(whole.ids) == 21
    for cut in range(0, 21, 3):
        rest = await ask(runtime, work, resume=whole.ids[:cut])
        assert rest.ids == whole.ids[cut:]
        assert [t.text for t in rest.tokens] == [t.text for t in whole.tokens[cut:]]
        assert rest.finished.output_hash == whole.finished.output_hash
        assert rest.finished.usage.generated_tokens == 21 - cut


@pytest.mark.parametrize("temperature", [0.0, 0.8])
async def test_among_seven_others(runtime, ask, chat, temperature):
    work = chat("Write a poem about bread.", temperature=temperature, max_tokens=20, deterministic=True)
    whole = await ask(runtime, work)
    async with trio.open_nursery() as nursery:
        for n in range(7):
            endless = chat(f"Story {n}.", temperature=1.0, seed=n, max_tokens=400, ignore_eos=True)
            nursery.start_soon(ask, runtime, endless)
        while runtime.load().active < 7:  # noqa: ASYNC110  (load() is all there is to watch)
            await trio.sleep(0.01)
        for cut in (0, 7, 13):
            rest = await ask(runtime, work, resume=whole.ids[:cut])
            assert rest.ids == whole.ids[cut:]
        nursery.cancel_scope.cancel()


async def test_log_probabilities_are_equal_too(runtime, ask, chat):
    work = chat("Name a colour.", temperature=0.8, max_tokens=12, deterministic=True, top_logprobs=2)
    whole = await ask(runtime, work)
    rest = await ask(runtime, work, resume=whole.ids[:5])
    assert rest.tokens == whole.tokens[5:]


async def test_more_deterministic_jobs_than_lanes(runtime, ask, chat):
    work = chat("Name a colour.", max_tokens=10, deterministic=True)
    whole = await ask(runtime, work)
    results = []

    async def one() -> None:
        results.append((await ask(runtime, work)).ids)

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(one)
    assert results == [whole.ids] * 5


async def test_a_prompt_of_many_chunks(runtime, ask, chat):
    work = chat("Summarise: " + "The ship sails on the sea. " * 30, max_tokens=8, deterministic=True)
    whole = await ask(runtime, work)
    assert any(p.done < p.total for p in whole.progress)
    rest = await ask(runtime, work, resume=whole.ids[:3])
    assert rest.ids == whole.ids[3:]
