"""The unmodified `openai` package for Python against a gateway, real Islands and the real model."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import trio

from node.control import Snapshot, ask_status

pytestmark = [pytest.mark.model, pytest.mark.timeout(300)]

CAPITAL = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]


@pytest.fixture
def client(mesh: Any, api_key: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=mesh.url, api_key=api_key, max_retries=0, timeout=120) as made:
        yield made


def status_of(mesh: Any, name: str) -> Snapshot:
    return trio.run(ask_status, mesh.root / name)


def wait_idle(mesh: Any, timeout_s: float = 10) -> float:
    """Seconds until no Island has a job; fails the test if one goes on."""
    began = time.monotonic()
    while time.monotonic() - began < timeout_s:
        if not any(status_of(mesh, name).jobs for name in mesh.islands):
            return time.monotonic() - began
        time.sleep(0.02)
    pytest.fail("a job goes on for nobody")


def test_chat_whole_and_streamed_are_the_same(client: openai.OpenAI, model_name: str) -> None:
    whole = client.chat.completions.create(model=model_name, messages=CAPITAL, temperature=0, max_tokens=20)
    text = whole.choices[0].message.content
    assert text is not None
    assert "Paris" in text
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    stream = client.chat.completions.create(
        model=model_name,
        messages=CAPITAL,
        temperature=0,
        max_tokens=20,
        stream=True,
        stream_options={"include_usage": True},
    )
    pieces: list[str] = []
    usage = None
    for chunk in stream:
        usage = chunk.usage or usage
        pieces += [choice.delta.content or "" for choice in chunk.choices]
    assert "".join(pieces) == text
    assert usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_headers_say_who_answered(client: openai.OpenAI, mesh: Any, model_name: str) -> None:
    raw = client.chat.completions.with_raw_response.create(model=model_name, messages=CAPITAL, max_tokens=5)
    assert raw.headers["x-archipelag-island"] in mesh.islands
    assert float(raw.headers["x-archipelag-rtt-ms"]) > 0
    assert float(raw.headers["x-archipelag-queue-ms"]) >= 0


def test_a_seed_repeats_and_another_differs(client: openai.OpenAI, model_name: str) -> None:
    def say(seed: int) -> str | None:
        answer = client.chat.completions.create(
            model=model_name,
            messages=[{"role": "user", "content": "Invent a name for a boat."}],
            temperature=1.2,
            seed=seed,
            max_tokens=24,
            extra_body={"deterministic": True},
        )
        return answer.choices[0].message.content

    assert say(1) == say(1)
    assert say(1) != say(2)


def test_several_choices_stop_and_logprobs(client: openai.OpenAI, model_name: str) -> None:
    answer = client.chat.completions.create(
        model=model_name,
        messages=[{"role": "user", "content": "Count from one to ten, separated by commas."}],
        n=3,
        temperature=0.9,
        seed=3,
        max_tokens=40,
        stop=["five", "5"],
        logprobs=True,
        top_logprobs=4,
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    for choice in answer.choices:
        text = choice.message.content or ""
        assert "five" not in text
        assert "5" not in text
        assert choice.logprobs is not None
        content = choice.logprobs.content
        assert content
        for entry in content:
            assert entry.logprob <= 0
            assert len(entry.top_logprobs) == 4
            assert bytes(entry.bytes or []).decode("utf-8", "replace") == entry.token


def test_json_schema_holds_whatever_the_model_would_say(client: openai.OpenAI, model_name: str) -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "green", "blue"]}, "count": {"type": "integer"}},
        "required": ["colour", "count"],
        "additionalProperties": False,
    }
    for seed in range(3):
        answer = client.chat.completions.create(
            model=model_name,
            messages=[{"role": "user", "content": "Tell me a joke."}],
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": schema, "strict": True},
            },
            temperature=1.0,
            seed=seed,
            max_tokens=100,
        )
        value = json.loads(answer.choices[0].message.content or "")
        assert value["colour"] in {"red", "green", "blue"}
        assert isinstance(value["count"], int)
        assert set(value) == {"colour", "count"}


def test_a_required_tool_is_called_with_arguments_that_fit(client: openai.OpenAI, model_name: str) -> None:
    tools: Any = [
        {
            "type": "function",
            "function": {
                "name": "get_weather",
                "description": "Weather in a city",
                "parameters": {
                    "type": "object",
                    "properties": {"city": {"type": "string", "maxLength": 30}, "unit": {"enum": ["c", "f"]}},
                    "required": ["city", "unit"],
                    "additionalProperties": False,
                },
            },
        }
    ]
    answer = client.chat.completions.create(
        model=model_name,
        messages=[{"role": "user", "content": "What is the weather in Lisbon?"}],
        tools=tools,
        tool_choice="required",
        temperature=0,
        max_tokens=120,
    )
    assert answer.choices[0].finish_reason == "tool_calls"
    [call] = answer.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "get_weather"
    arguments = json.loads(call.function.arguments)
    assert set(arguments) == {"city", "unit"}
    assert arguments["unit"] in {"c", "f"}


def test_completions_with_text_and_tokens(client: openai.OpenAI, model_name: str) -> None:
    answer = client.completions.create(
        model=model_name,
        prompt=["The capital of France is", "The capital of Italy is"],
        temperature=0,
        max_tokens=6,
    )
    assert len(answer.choices) == 2
    assert "Paris" in answer.choices[0].text
    assert "Rome" in answer.choices[1].text
    tokens = client.completions.create(model=model_name, prompt=[504, 3575, 282], temperature=0, max_tokens=3)
    assert tokens.usage is not None
    assert tokens.usage.prompt_tokens == 3


def test_errors_are_the_clients_own(client: openai.OpenAI, mesh: Any, model_name: str) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="no-such-model", messages=CAPITAL)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model=model_name, messages=CAPITAL, temperature=7)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(
            model=model_name, messages=[{"role": "user", "content": "sea and salt " * 3000}]
        )
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(
            model=model_name, messages=CAPITAL, extra_body={"grammar": "root ::= oops ::= ("}
        )
    with (
        openai.OpenAI(base_url=mesh.url, api_key="ak_wrong_0123456789", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()


def test_a_consumer_who_leaves_frees_the_island(client: openai.OpenAI, mesh: Any, model_name: str) -> None:
    for stream in (True, False):
        wait_idle(mesh)
        before = sum(status_of(mesh, name).counters.cancelled for name in mesh.islands)
        request: dict[str, Any] = {
            "model": model_name,
            "messages": [{"role": "user", "content": "Write a very long story."}],
            "max_tokens": 1500,
            "extra_body": {"ignore_eos": True},
        }
        if stream:
            answer = client.chat.completions.create(**request, stream=True)
            for count, _ in enumerate(answer):
                if count == 5:
                    break
            answer.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                client.with_options(timeout=1.0).chat.completions.create(**request)
        wait_idle(mesh)
        after = sum(status_of(mesh, name).counters.cancelled for name in mesh.islands)
        assert after == before + 1


def test_an_answer_as_long_as_the_context_ends_with_length(client: openai.OpenAI, model_name: str) -> None:
    answer = client.chat.completions.create(
        model=model_name,
        messages=[{"role": "user", "content": "Say it again. " * 480}],
        max_tokens=4000,
        extra_body={"ignore_eos": True},
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.total_tokens == 2048
