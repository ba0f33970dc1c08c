"""The worker dies, freezes, is never there: no job is lost, none runs for ever, nothing stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import trio
import trio.testing

from cargos.runtimes.base import Finished, JobRefused, Progress, RuntimeFailed, RuntimeSpec, Tokens
from cargos.runtimes.llama import open_llama
from cargos.runtimes.llama.runtime import LlamaOptions, model_paths
from protocol.work import Constraint

OPTIONS = LlamaOptions(silence_s=2.0)
ROOT = Path(__file__).resolve().parents[2]


async def to_the_end(session) -> None:
    while not isinstance(await session.receive(), Finished):
        pass


@pytest.mark.model
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP, signal.SIGABRT])
async def test_a_dead_or_frozen_worker_costs_a_pause_and_no_job(llama_spec, ask, chat, how):
    works = [
        chat("Write a story about the sea.", temperature=0.8, seed=n, max_tokens=30, deterministic=n < 2)
        for n in range(4)
    ]
    async with open_llama(llama_spec(), OPTIONS) as runtime:
        undisturbed = [await ask(runtime, work) for work in works]
        first = runtime.worker_pid
        results = {}
        seen = trio.Event()

        async def one(n: int) -> None:
            got = []
            async with runtime.session(works[n], granted=1 << 17) as session:
                while not isinstance(event := await session.receive(), Finished):
                    if isinstance(event, Tokens):
                        assert event.first == len(got)
                        got += event.tokens
                        if n == 0 and len(got) > 5:
                            seen.set()
                results[n] = (got, event)

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for n in range(4):
                    nursery.start_soon(one, n)
                await seen.wait()
                os.kill(first, how)
        assert runtime.worker_pid != first
        assert runtime.load().restarts == 1
        assert runtime.load().state == "ready"
        for n in range(4):
            tokens, finished = results[n]
            assert len(tokens) == 30 or finished.finish == "stop"
            assert finished.usage.generated_tokens == len(tokens)
            if works[n].deterministic:
                assert [t.id for t in tokens] == undisturbed[n].ids
                assert "".join(t.text for t in tokens) + finished.tail == undisturbed[n].text
    assert not psutil.pid_exists(first)


@pytest.mark.model
async def test_jobs_may_be_queued_while_loading_and_see_its_progress(llama_spec, chat):
    async with open_llama(llama_spec()) as runtime:
        assert runtime.load().state == "loading"
        async with runtime.session(chat("Hi", max_tokens=2), granted=9) as session:
            events = []
            with trio.fail_after(60):
                while not events or not isinstance(events[-1], Finished):
                    events.append(await session.receive())
            stages = {event.stage for event in events if isinstance(event, Progress)}
            assert "loading" in stages
            with pytest.raises(RuntimeError):
                await session.receive()


@pytest.mark.model
async def test_leaving_ends_the_worker_even_in_mid_job(llama_spec, chat):
    async with open_llama(llama_spec()) as runtime:
        await runtime.ready()
        pid = runtime.worker_pid
        async with runtime.session(chat("Hi", ignore_eos=True, max_tokens=400), granted=400) as session:
            await session.receive()
    assert not psutil.pid_exists(pid)  # not even as a zombie


@pytest.mark.model
async def test_the_users_exception_comes_out_as_it_is(llama_spec):
    with pytest.raises(KeyError, match="mine"):
        async with open_llama(llama_spec()):
            raise KeyError("mine")


@pytest.mark.model
async def test_the_worker_ends_with_its_parent(smollm2_path):
    script = f"""
import trio
from cargos.runtimes.base import RuntimeSpec
from cargos.runtimes.llama import open_llama
async def main():
    async with open_llama(RuntimeSpec("x", {{"m.gguf": {str(smollm2_path)!r}}}, 256, slots=1)) as runtime:
        await runtime.ready()
        print(runtime.worker_pid, flush=True)
        await trio.sleep_forever()
trio.run(main)
"""
    async with await trio.open_file(os.devnull, "wb") as null:
        parent = await trio.lowlevel.open_process(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=null.wrapped, cwd=ROOT
        )
    with trio.fail_after(60):
        line = b""
        while not line.endswith(b"\n"):
            line += await parent.stdout.receive_some()
        worker = psutil.Process(int(line))
        parent.kill()
        await parent.wait()
        # Nothing wakes us when somebody else's child ends.
        while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:  # noqa: ASYNC110  (see above)
            await trio.sleep(0.02)
    await parent.stdout.aclose()


async def test_a_model_that_does_not_load_is_a_clear_failure(tmp_path, chat):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(1000))
    missing = tmp_path / "missing.gguf"
    for path, words in ((broken, "can not load .*: gguf_init"), (missing, "no such model file")):
        async with open_llama(RuntimeSpec("toy", {"m.gguf": str(path)}, 512)) as runtime:
            with trio.fail_after(60), pytest.raises(RuntimeFailed, match=words):
                await runtime.ready()
            load = runtime.load()
            assert load.state == "failed"
            assert "toy" in load.detail
            assert load.restarts == 0
            async with runtime.session(chat("Hi"), granted=1) as session:
                with pytest.raises(RuntimeFailed, match=words):
                    await session.receive()


def test_which_files_are_the_model():
    assert model_paths({"readme.md": "/r", "a.gguf": "/a"}) == ("/a",)
    parts = {f"m-0000{n}-of-00003.gguf": f"/{n}" for n in (2, 1, 3)}
    assert model_paths(parts) == ("/1", "/2", "/3")
    for files in ({}, {"a.gguf": "/a", "b.gguf": "/b"}):
        with pytest.raises(RuntimeFailed):
            model_paths(files)


@pytest.mark.model
async def test_a_worker_that_dies_again_and_again_is_given_up(llama_spec, chat):
    async with open_llama(llama_spec(), LlamaOptions(max_restarts=1)) as runtime:
        await runtime.ready()
        with trio.fail_after(60):
            async with runtime.session(chat("Hi"), granted=0) as session:
                for _ in range(2):
                    await runtime.ready()
                    while not (pid := runtime.worker_pid) or runtime.load().state != "ready":  # noqa: ASYNC110  (all there is to watch)
                        await trio.sleep(0.01)
                    os.kill(pid, signal.SIGKILL)
                    while runtime.worker_pid == pid:  # noqa: ASYNC110  (as above)
                        await trio.sleep(0.01)
                with pytest.raises(RuntimeFailed, match="died 2 times"):
                    await to_the_end(session)
        assert runtime.load().state == "failed"


@pytest.mark.model
async def test_a_job_that_kills_workers_is_found_and_the_others_are_answered(
    llama_spec, ask, chat, monkeypatch
):
    """The killer is played from outside: whenever the worker has its job, the worker is killed."""
    async with open_llama(llama_spec(), LlamaOptions(max_restarts=8)) as runtime:
        await runtime.ready()
        poison = chat("I am the killer.", max_tokens=5)
        submit = runtime._jobs._to_worker

        def submit_and_kill(session) -> None:
            submit(session)
            if session.work is poison:
                os.kill(runtime.worker_pid, signal.SIGKILL)

        monkeypatch.setattr(runtime._jobs, "_to_worker", submit_and_kill)
        answers = []

        async def innocent(n: int) -> None:
            answers.append(await ask(runtime, chat("What is the capital of France?", seed=n)))

        with trio.fail_after(90):
            async with trio.open_nursery() as nursery:
                for n in range(3):
                    nursery.start_soon(innocent, n)
                await trio.testing.wait_all_tasks_blocked()
                async with runtime.session(poison, granted=9) as session:
                    with pytest.raises(RuntimeFailed, match="each time"):
                        await to_the_end(session)
        assert [a.text for a in answers] == ["The capital of France is Paris."] * 3
        assert (await ask(runtime, chat("Hi", max_tokens=1))).finished is not None


@pytest.mark.model
async def test_a_refusal_comes_while_others_work(llama_spec, ask, chat):
    async with open_llama(llama_spec()) as runtime, trio.open_nursery() as nursery:
        nursery.start_soon(ask, runtime, chat("Story.", ignore_eos=True, max_tokens=60))
        with pytest.raises(JobRefused):
            await ask(runtime, chat("hello " * 2000))


#: Grammars with ever more readings: at the first token, at a later one, and while they are parsed.
_DOUBLING = "\n".join([f"r{i} ::= r{i + 1} | r{i + 1} r{i + 1}" for i in range(30)])
HOSTILE_GRAMMARS = [
    "root ::= " + '("a"? ' * 900 + ")" * 900,
    'root ::= x*\nx ::= "a" y* | "a" x "b"\ny ::= "a" x | "a" y "c"',
    f'root ::= r0\n{_DOUBLING}\nr30 ::= "a"',
]


@pytest.mark.model
@pytest.mark.parametrize("grammar", HOSTILE_GRAMMARS)
async def test_a_hostile_grammar_costs_others_a_pause_at_most(llama_spec, ask, chat, grammar):
    async with open_llama(llama_spec(), LlamaOptions(silence_s=20)) as runtime:
        await runtime.ready()
        answers = []

        async def innocent() -> None:
            answers.append(await ask(runtime, chat("What is the capital of France?")))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(innocent)
            work = chat("aaaa", constraint=Constraint("gbnf", grammar), max_tokens=60, ignore_eos=True)
            try:
                await ask(runtime, work)
            except (JobRefused, RuntimeFailed) as error:
                assert "grammar" in str(error)
        assert answers[0].text == "The capital of France is Paris."
        assert runtime.load().restarts <= 1
