"""Stages joined back to back say what the whole model says."""

from __future__ import annotations

import msgspec
import pytest
import trio

from cargos.runtimes.base import RuntimeSpec
from cargos.runtimes.llama import open_llama
from protocol.work import Generation, Sampling, TextPrompt

QUESTIONS = ["What is the capital of France?", "Write a story about the sea.", "List three colours."]


@pytest.fixture
def works(chat):
    """Greedy and seeded, batched and deterministic."""
    return [
        chat(QUESTIONS[0], max_tokens=12),
        chat(QUESTIONS[1], temperature=0.9, seed=5, top_k=40, repeat_penalty=1.1, max_tokens=20),
        chat(QUESTIONS[1], temperature=0.8, seed=6, max_tokens=16, deterministic=True),
        chat(QUESTIONS[2], max_tokens=16, deterministic=True),
    ]


@pytest.fixture
async def whole(smollm2_path, works, ask):
    """What the whole model answers."""
    spec = RuntimeSpec("whole", {"m.gguf": str(smollm2_path)}, 320, slots=4, threads=1)
    async with open_llama(spec) as runtime:
        return [await ask(runtime, work) for work in works]


@pytest.mark.model
@pytest.mark.parametrize("cuts", [(15,), (9, 20)])
async def test_a_chain_says_what_the_whole_model_says(ring, works, whole, cuts):
    async with ring(*cuts) as chain:
        for work, expected in zip(works, whole, strict=True):
            ids, finished = await chain.ask(work)
            assert ids == expected.ids
            assert finished.finish == expected.finished.finish
            assert finished.tail == expected.finished.tail
            assert finished.output_hash == expected.finished.output_hash
            assert finished.prompt_hash == expected.finished.prompt_hash
        assert not chain.refused


@pytest.mark.model
async def test_sessions_at_once_do_not_disturb_each_other(ring, works, whole):
    async with ring(15) as chain:
        answers = {}

        async def one(n: int) -> None:
            answers[n] = await chain.ask(works[n % len(works)], name=f"s{n}")

        async with trio.open_nursery() as nursery:
            for n in range(4):
                nursery.start_soon(one, n)
        for n in range(4):
            assert answers[n][0] == whole[n % len(works)].ids
        batched = [event for index, event in chain.computed if index == 0]
        assert {event.session for event in batched} == {f"s{n}" for n in range(4)}


@pytest.mark.model
async def test_another_architecture_too(ring, ask, gemma_path):
    """Sliding windows, scaled embeddings, residuals far beyond half precision."""
    prompt = TextPrompt("The capital of France is Paris. The capital of Italy is Rome. The capital of")
    works = [
        Generation(prompt, Sampling(seed=1, temperature=0.0), max_tokens=10, deterministic=True),
        Generation(prompt, Sampling(seed=7, temperature=0.9), max_tokens=10, deterministic=True),
    ]
    spec = RuntimeSpec("whole", {"m.gguf": str(gemma_path)}, 320, slots=2, threads=1)
    async with open_llama(spec) as runtime:
        whole = [await ask(runtime, work) for work in works]
    async with ring(7, 12, model=gemma_path, layers=18) as chain:
        for work, expected in zip(works, whole, strict=True):
            ids, _ = await chain.ask(work)
            assert ids == expected.ids
    async with ring(9, model=gemma_path, layers=18, dtype="f16s") as chain:
        ids, _ = await chain.ask(msgspec.structs.replace(works[0], deterministic=False, max_tokens=4))
        assert ids == whole[0].ids[:4]
