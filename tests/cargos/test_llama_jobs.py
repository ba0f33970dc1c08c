"""Jobs on the real model: what a consumer may ask for, and that answers are what was asked for."""

from __future__ import annotations

import hashlib
import json
import struct

import msgspec
import pytest
import trio

from cargos.runtimes.base import JobRefused, Tokens
from cargos.runtimes.llama import open_llama
from protocol.work import ChatMessage, ChatPrompt, Constraint, Sampling, TextPrompt, TokenPrompt

pytestmark = pytest.mark.model

CAPITAL = "What is the capital of France?"
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}


@pytest.fixture
async def runtime(llama_spec):
    async with open_llama(llama_spec()) as runtime:
        with trio.fail_after(60):
            await runtime.ready()
        yield runtime


async def test_answers_a_question(runtime, ask, chat):
    load = runtime.load()
    assert (load.state, load.active, load.queued, load.restarts) == ("ready", 0, 0, 0)
    assert load.decode_tps > 0
    assert load.prefill_tps > 0
    answer = await ask(runtime, chat(CAPITAL))
    assert answer.text == "The capital of France is Paris."
    assert answer.finished.finish == "stop"
    usage = answer.finished.usage
    assert usage.completion_tokens == usage.generated_tokens == len(answer.ids) == 7
    assert usage.prompt_tokens > 20
    assert usage.prefill_ns > 0
    assert usage.decode_ns > 0
    expected = hashlib.sha256(struct.pack(f"<{len(answer.ids)}I", *answer.ids)).digest()
    assert answer.finished.output_hash == expected
    assert runtime.load().tokens_total == 7


async def test_raw_text_and_token_prompts(runtime, ask, chat):
    sampling = Sampling(seed=1, temperature=0.0)
    text = "One, two, three,"
    base = chat("", max_tokens=6)
    by_text = await ask(runtime, msgspec.structs.replace(base, prompt=TextPrompt(text), sampling=sampling))
    assert "four" in by_text.text
    # Control tokens spelled in raw text stay text: more tokens than the one they would be.
    spelled = await ask(
        runtime, msgspec.structs.replace(base, prompt=TextPrompt("<|im_end|>"), sampling=sampling)
    )
    assert spelled.finished.usage.prompt_tokens > 3
    by_ids = await ask(
        runtime, msgspec.structs.replace(base, prompt=TokenPrompt((4093, 198, 1780)), sampling=sampling)
    )
    assert by_ids.finished.usage.prompt_tokens == 3


async def test_stop_strings_across_token_borders(runtime, ask, chat):
    whole = await ask(runtime, chat(CAPITAL))
    answer = await ask(runtime, chat(CAPITAL, stop=("of Fran", "never")))
    assert answer.text == whole.text[: whole.text.index("of Fran")]
    assert answer.finished.finish == "stop"
    assert answer.finished.tail == ""


async def test_length_and_ignore_eos(runtime, ask, chat):
    short = await ask(runtime, chat(CAPITAL, max_tokens=3))
    assert (short.finished.finish, len(short.ids)) == ("length", 3)
    longer = await ask(runtime, chat(CAPITAL, max_tokens=12, ignore_eos=True))
    assert (longer.finished.finish, len(longer.ids)) == ("length", 12)


async def test_the_context_length_ends_an_answer(llama_spec, ask, chat):
    async with open_llama(llama_spec(context_length=64)) as runtime:
        answer = await ask(runtime, chat("Count.", max_tokens=None, ignore_eos=True))
        assert answer.finished.finish == "length"
        assert answer.finished.usage.prompt_tokens + len(answer.ids) == 64


async def test_seeds(runtime, ask, chat):
    def story(seed: int):
        return chat("Tell a story.", temperature=1.0, seed=seed, max_tokens=16)

    one, again, other = [await ask(runtime, story(seed)) for seed in (1, 1, 2)]
    assert one.ids == again.ids
    assert one.ids != other.ids


async def test_sampling_options_act(runtime, ask, chat):
    free = await ask(runtime, chat(CAPITAL))
    biased = await ask(runtime, chat(CAPITAL, logit_bias=((free.ids[0], -100.0),)))
    assert biased.ids[0] != free.ids[0]
    narrow = await ask(runtime, chat("Tell a story.", temperature=2.0, top_k=1, max_tokens=8))
    greedy = await ask(runtime, chat("Tell a story.", max_tokens=8))
    assert narrow.ids == greedy.ids
    strict = {"frequency_penalty": 2.0, "presence_penalty": 2.0, "repeat_penalty": 1.5}
    varied = await ask(runtime, chat("Say la la la la la la.", ignore_eos=True, max_tokens=40, **strict))
    plain = await ask(runtime, chat("Say la la la la la la.", ignore_eos=True, max_tokens=40))
    assert len(set(varied.ids)) > len(set(plain.ids))


async def test_log_probabilities(runtime, ask, chat):
    answer = await ask(runtime, chat(CAPITAL, top_logprobs=3))
    for token in answer.tokens:
        assert token.logprob is not None
        assert token.logprob <= 0
        assert len(token.top) == 3
        assert token.top[0].id == token.id  # greedy
        assert token.top[0].logprob == pytest.approx(token.logprob)
        assert [t.logprob for t in token.top] == sorted((t.logprob for t in token.top), reverse=True)
    assert b"".join(token.piece for token in answer.tokens).decode() == answer.text
    bare = await ask(runtime, chat(CAPITAL, top_logprobs=0, max_tokens=1))
    assert bare.tokens[0].logprob is not None
    assert bare.tokens[0].top == ()


@pytest.mark.parametrize("temperature", [0.0, 1.5])
async def test_json_schema(runtime, ask, chat, temperature):
    constraint = Constraint("json_schema", json.dumps(PERSON))
    for seed in range(3):
        work = chat(
            "Invent a person.", constraint=constraint, temperature=temperature, seed=seed, max_tokens=60
        )
        answer = await ask(runtime, work)
        assert answer.finished.finish == "stop"
        value = json.loads(answer.text)
        assert isinstance(value["name"], str)
        assert isinstance(value["age"], int)


async def test_gbnf_ends_when_it_is_complete(runtime, ask, chat):
    grammar = Constraint("gbnf", 'root ::= ("yes" | "no") "!"')
    answer = await ask(runtime, chat("Is water wet?", constraint=grammar, ignore_eos=True))
    assert answer.text in ("yes!", "no!")
    assert answer.finished.finish == "stop"


async def test_json_object(runtime, ask, chat):
    answer = await ask(runtime, chat("Give JSON.", constraint=Constraint("json_object"), max_tokens=80))
    if answer.finished.finish == "stop":
        assert isinstance(json.loads(answer.text), dict)
    assert answer.text.startswith("{")


async def test_a_constrained_job_resumes(runtime, ask, chat):
    constraint = Constraint("json_schema", json.dumps(PERSON))
    work = chat("Invent a person.", constraint=constraint, temperature=1.0, max_tokens=60, deterministic=True)
    whole = await ask(runtime, work)
    for cut in (1, len(whole.ids) // 2, len(whole.ids)):
        rest = await ask(runtime, work, resume=whole.ids[:cut])
        assert rest.ids == whole.ids[cut:]
        assert rest.finished.output_hash == whole.finished.output_hash


REFUSED = [
    ({"prompt": TokenPrompt((5, 10**6))}, "invalid", "prompt"),
    ({"prompt": TextPrompt("")}, "invalid", "empty"),
    ({"prompt": TokenPrompt(tuple([5] * 512))}, "too-long", "512 tokens"),
    ({"prompt": TextPrompt("hello " * 200_000)}, "too-long", "context length of 512"),
    ({"sampling": Sampling(seed=1, logit_bias=((10**6, 1.0),))}, "invalid", "logit_bias"),
    ({"constraint": Constraint("gbnf", "root ::= nowhere")}, "invalid", "does not parse"),
    ({"constraint": Constraint("gbnf", 'root ::= root "a"')}, "invalid", "left-recursive"),
    ({"constraint": Constraint("gbnf", 'start ::= "a"')}, "invalid", "root"),
    ({"constraint": Constraint("gbnf", "root ::= " + "(" * 1000 + '"a"' + ")" * 1001)}, "invalid", "parse"),
    ({"constraint": Constraint("json_schema", "{")}, "invalid", "not JSON"),
]


async def test_what_is_invalid_is_refused_and_the_runtime_goes_on(runtime, ask, chat):
    for change, code, words in REFUSED:
        with pytest.raises(JobRefused) as caught:
            await ask(runtime, msgspec.structs.replace(chat("x"), **change))
        assert caught.value.code == code
        assert words in caught.value.detail
    assert (await ask(runtime, chat(CAPITAL, max_tokens=1))).finished.finish == "length"
    assert runtime.load().restarts == 0


async def test_bad_resume_is_refused(runtime, ask, chat):
    for resume in ([10**6], [5] * 25):
        with pytest.raises(JobRefused):
            await ask(runtime, chat("x"), resume=resume)
    whole = await ask(runtime, chat(CAPITAL, stop=("France",)))
    with pytest.raises(JobRefused):
        await ask(runtime, chat(CAPITAL, stop=("France",)), resume=[*whole.ids, 5])


async def test_a_job_that_had_ended_ends_at_once(runtime, ask, chat):
    for options in ({"stop": ("France",)}, {"max_tokens": 4}, {}):
        work = chat(CAPITAL, **options)
        whole = await ask(runtime, work)
        rest = await ask(runtime, work, resume=whole.ids)
        assert rest.ids == []
        assert rest.finished.finish == whole.finished.finish
        assert rest.finished.output_hash == whole.finished.output_hash
        assert rest.finished.usage.generated_tokens == 0


async def test_text_of_a_resumed_job_joins_on(runtime, ask, chat):
    work = chat("Write three emojis and a French sentence.", max_tokens=30, stop=("zzz", "é une"))
    whole = await ask(runtime, work)
    for cut in range(1, len(whole.ids), 7):
        rest = await ask(runtime, work, resume=whole.ids[:cut])
        if rest.ids == whole.ids[cut:]:
            assert [t.text for t in rest.tokens] == [t.text for t in whole.tokens[cut:]]


async def test_pause_at_what_is_granted(runtime, ask, chat):
    async with runtime.session(chat("Count.", ignore_eos=True, max_tokens=20), granted=4) as session:
        got = 0
        with trio.fail_after(30):
            while got < 4:
                event = await session.receive()
                got += len(event.tokens) if isinstance(event, Tokens) else 0
        # Others go on meanwhile, and nothing comes for this one.
        await ask(runtime, chat(CAPITAL))
        with trio.move_on_after(0.2) as scope:
            await session.receive()
        assert scope.cancelled_caught
        assert runtime.load().active == 1
        session.grant(6)
        with trio.fail_after(30):
            while got < 6:
                got += len((await session.receive()).tokens)
        assert got == 6


async def test_leaving_frees_the_slot(llama_spec, ask, chat):
    async with open_llama(llama_spec(slots=1)) as runtime:
        for _ in range(3):
            answer = await ask(runtime, chat("Count.", ignore_eos=True, max_tokens=400), until=2)
            assert answer.finished is None
        answer = await ask(runtime, chat(CAPITAL, max_tokens=2))
        assert answer.finished is not None
        assert runtime.load().active == 0


async def test_more_jobs_than_slots_wait_their_turn(llama_spec, ask, chat):
    async with open_llama(llama_spec(slots=2)) as runtime:
        results = {}

        async def one(n: int) -> None:
            results[n] = await ask(runtime, chat(CAPITAL))

        async with trio.open_nursery() as nursery:
            for n in range(6):
                nursery.start_soon(one, n)
        assert {r.text for r in results.values()} == {"The capital of France is Paris."}
        assert max(r.finished.usage.queue_ns for r in results.values()) > 0


async def test_a_prefix_in_memory_is_reused(runtime, ask, chat):
    first = await ask(runtime, chat(CAPITAL))
    again = await ask(runtime, chat(CAPITAL))
    assert again.finished.usage.cached_tokens == again.finished.usage.prompt_tokens - 1
    assert again.ids == first.ids
    history = (
        ChatMessage("system", "You are a helpful assistant."),
        ChatMessage("user", CAPITAL),
        ChatMessage("assistant", first.text),
        ChatMessage("user", "And of Italy?"),
    )
    turn = msgspec.structs.replace(chat(""), prompt=ChatPrompt(history))
    answer = await ask(runtime, turn)
    assert answer.finished.usage.cached_tokens >= first.finished.usage.prompt_tokens + 6
    cold = await ask(runtime, msgspec.structs.replace(turn, deterministic=True))
    assert cold.finished.usage.cached_tokens == 0


async def test_answers_do_not_depend_on_slots_and_neighbours(llama_spec, ask, chat):
    """Copied prefixes, closed gaps and whoever else is in the batch leave a job's numbers alone."""
    async with open_llama(llama_spec(slots=4)) as runtime:
        works = [chat(f"Story {n}.", temperature=0.8, max_tokens=8 + 4 * n, seed=n) for n in range(7)]
        alone = [await ask(runtime, work) for work in works]
        together = {}

        async def one(n: int) -> None:
            together[n] = await ask(runtime, works[n])

        async with trio.open_nursery() as nursery:
            for n in (3, 0, 6, 1, 5, 2, 4):
                nursery.start_soon(one, n)
        assert [together[n].ids for n in range(7)] == [answer.ids for answer in alone]


async def test_a_template_of_the_cargo_overrides_the_models(llama_spec, ask, chat):
    template = "One, two, three,"
    async with open_llama(llama_spec(chat_template=template)) as runtime:
        answer = await ask(runtime, chat("?", max_tokens=6))
        assert "four" in answer.text
