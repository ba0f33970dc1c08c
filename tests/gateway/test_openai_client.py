"""The unmodified openai-python client."""

from __future__ import annotations

import json

import openai
import pytest
import trio

from gateway.service import Failed, Released

KEY = "ak_test-key-of-the-gateway-tests"
HI = [{"role": "user", "content": "hi"}]
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@pytest.fixture
def in_client(gateway):
    """Runs a function of the sync client in a thread, as the server runs on this one."""

    async def run(work, *, key: str = KEY):
        def call():
            with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0, timeout=20) as client:
                return work(client)

        return await trio.to_thread.run_sync(call)

    return run


async def test_whole(in_client):
    answer = await in_client(lambda c: c.chat.completions.create(model="tiny", messages=HI))
    assert answer.choices[0].message.content == "Hello there!"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == 10
    assert answer.usage.archipelag["island"] == "reef"
    assert answer._request_id.startswith("req_")


async def test_streamed(in_client):
    def work(client):
        options = {"include_usage": True}
        with client.chat.completions.create(
            model="tiny", messages=HI, stream=True, stream_options=options
        ) as stream:
            return list(stream)

    chunks = await in_client(work)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Hello there!"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage.completion_tokens == 3
    assert chunks[-1].usage.archipelag["tokens_per_second"] > 0


async def test_streaming_helper(in_client):
    """`chat.completions.stream` checks more of the shapes than plain iteration does."""

    def work(client):
        with client.chat.completions.stream(model="tiny", messages=HI, logprobs=True, n=1) as stream:
            kinds = [event.type for event in stream]
            return kinds, stream.get_final_completion()

    kinds, final = await in_client(work)
    assert kinds.count("content.delta") == 4  # the first, with the role, is empty: as at OpenAI
    assert "content.done" in kinds
    assert final.choices[0].message.content == "Hello there!"
    assert [entry.token for entry in final.choices[0].logprobs.content] == ["Hello", " there", "!"]


async def test_raw_headers(in_client):
    raw = await in_client(lambda c: c.chat.completions.with_raw_response.create(model="tiny", messages=HI))
    assert raw.headers["x-archipelag-island"] == "reef"
    assert raw.parse().choices[0].message.content == "Hello there!"


async def test_tools(in_client, service, scripts):
    service.script = scripts.says('<tool_call>{"name": "add", ', '"arguments": {"a": 1}}</tool_call>')
    answer = await in_client(lambda c: c.chat.completions.create(model="tiny", messages=HI, tools=[ADD]))
    (call,) = answer.choices[0].message.tool_calls
    assert (call.type, call.function.name) == ("function", "add")
    assert json.loads(call.function.arguments) == {"a": 1}
    assert answer.choices[0].finish_reason == "tool_calls"

    def stream(client):
        with client.chat.completions.stream(model="tiny", messages=HI, tools=[ADD]) as events:
            return [event.type for event in events], events.get_final_completion()

    kinds, final = await in_client(stream)
    assert "tool_calls.function.arguments.done" in kinds
    assert final.choices[0].message.tool_calls[0].function.name == "add"

    # The conversation goes on with the call and its result.
    service.script = scripts.says("It is 2.")
    turns = [*HI, answer.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "2"}]
    await in_client(lambda c: c.chat.completions.create(model="tiny", messages=turns, tools=[ADD]))
    assert service.works[-1].prompt.messages[1].tool_calls[0].arguments == '{"a":1}'


async def test_logprobs(in_client):
    answer = await in_client(
        lambda c: c.chat.completions.create(model="tiny", messages=HI, logprobs=True, top_logprobs=2)
    )
    entry = answer.choices[0].logprobs.content[1]
    assert (entry.token, entry.logprob, bytes(entry.bytes)) == (" there", -0.5, b" there")
    assert [top.token for top in entry.top_logprobs] == [" there", " there*"]


async def test_legacy_completions(in_client):
    answer = await in_client(lambda c: c.completions.create(model="tiny", prompt=["a", "b"], n=2, logprobs=1))
    assert [choice.text for choice in answer.choices] == ["Hello there!"] * 4
    assert answer.choices[0].logprobs.text_offset == [0, 5, 11]

    def stream(client):
        return "".join(
            c.choices[0].text for c in client.completions.create(model="tiny", prompt="a", stream=True)
        )

    assert await in_client(stream) == "Hello there!"


async def test_models(in_client):
    assert [model.id for model in await in_client(lambda c: list(c.models.list()))] == ["tiny"]
    assert (await in_client(lambda c: c.models.retrieve("tiny"))).owned_by == "tests"


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        ("too-long", openai.BadRequestError),
        ("busy", openai.InternalServerError),
        ("no-islands", openai.InternalServerError),
        ("deadline", openai.InternalServerError),
    ],
)
async def test_failures_have_their_class(in_client, service, failure, kind):
    service.script = lambda work, index: [Failed(failure, "the reason")]
    with pytest.raises(kind) as caught:
        await in_client(lambda c: c.chat.completions.create(model="tiny", messages=HI))
    assert caught.value.body["message"] == "the reason"
    assert caught.value.code


async def test_refusals_have_their_class(in_client, start_gateway):
    with pytest.raises(openai.AuthenticationError):
        await in_client(
            lambda c: c.chat.completions.create(model="tiny", messages=HI), key="ak_not-a-key-at-all"
        )
    with pytest.raises(openai.NotFoundError) as missing:
        await in_client(lambda c: c.chat.completions.create(model="gpt", messages=HI))
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        await in_client(lambda c: c.chat.completions.create(model="tiny", messages=HI, temperature=3))
    assert bad.value.param == "temperature"


async def test_the_client_retries_what_is_busy(gateway, service, scripts):
    def script(work, index):
        return [Failed("busy", "full", 10)] if index == 0 else scripts.says("now")(work, index)

    service.script = script

    def call():
        with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=KEY, max_retries=1) as client:
            return client.chat.completions.create(model="tiny", messages=HI)

    answer = await trio.to_thread.run_sync(call)
    assert answer.choices[0].message.content == "now"


async def test_failure_in_mid_stream_raises_api_error(in_client, service, scripts):
    service.script = lambda work, index: [
        Released(0, (scripts.token(0, "a"),)),
        Failed("exhausted", "all gone"),
    ]
    seen: list[str] = []

    def work(client):
        stream = client.chat.completions.create(model="tiny", messages=HI, stream=True)
        seen.extend(chunk.choices[0].delta.content for chunk in stream)

    with pytest.raises(openai.APIError) as caught:
        await in_client(work)
    assert caught.value.message == "all gone"
    assert caught.value.code == "islands_failed"
    assert seen == ["", "a"]


async def test_leaving_the_stream_cancels(in_client, service, scripts):
    service.script = lambda work, index: [Released(0, (scripts.token(0, "a"),)), trio.Event()]

    def work(client):
        stream = client.chat.completions.create(model="tiny", messages=HI, stream=True)
        next(stream)
        stream.close()

    await in_client(work)
    with trio.fail_after(20):
        await service.gone_event(0).wait()
    assert service.left == ["cancelled"]
