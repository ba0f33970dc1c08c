"""POST chat/completions: what goes into the mesh, what comes out, streamed and whole."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from msgspec import structs

from gateway.service import Placed, Preparing, Released, StageInfo
from protocol.dice import draw_u64
from protocol.ids import PeerId
from protocol.work import ChatMessage, ChatPrompt, Constraint


def chunks_of(response) -> list[dict]:
    assert response.status_code == 200, response.text
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1] if not line.startswith(":")]


@pytest.mark.parametrize("prefix", ["/v1", "/api/v1"])
async def test_whole(gateway, service, prefix):
    body = {"model": "tiny@1.2", "messages": [{"role": "user", "content": "hi"}]}
    response = await gateway.client.post(f"{prefix}/chat/completions", json=body)
    assert response.status_code == 200
    answer = response.json()
    assert answer["id"].startswith("chatcmpl-")
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "tiny"
    assert answer["system_fingerprint"] == "fp_abababababab"
    message = {"role": "assistant", "content": "Hello there!", "refusal": None}
    assert answer["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (7, 3, 10)
    assert usage["prompt_tokens_details"]["cached_tokens"] == 3
    own = usage["archipelag"]
    assert own["island"] == "reef"
    assert own["hand_overs"] == 0
    assert (own["rtt_ms"], own["queue_ms"]) == (1.5, 2.25)
    assert own["tokens_per_second"] > 0
    assert own["ttft_ms"] > 0
    assert response.headers["x-archipelag-island"] == "reef"
    assert response.headers["x-archipelag-rtt-ms"] == "1.50"
    assert response.headers["x-archipelag-queue-ms"] == "2.25"
    assert response.headers["x-request-id"].startswith("req_")
    assert "server" not in response.headers
    assert service.left == ["ended"]


async def test_streamed(gateway):
    response = await gateway.chat(stream=True)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["x-archipelag-island"] == "reef"
    chunks = chunks_of(response)
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert all("usage" not in chunk for chunk in chunks)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas == [
        {"role": "assistant", "content": "", "refusal": None},
        {"content": "Hello"},
        {"content": " there"},
        {"content": "!"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 4 + ["stop"]


async def test_streamed_usage(gateway):
    chunks = chunks_of(await gateway.chat(stream=True, stream_options={"include_usage": True}))
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * 5
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == 10
    assert chunks[-1]["usage"]["archipelag"]["island"] == "reef"


async def test_tail_and_length(gateway, service, scripts):
    service.script = scripts.says("a", "", finish="length", tail=" b")
    whole = (await gateway.chat()).json()["choices"][0]
    assert whole["message"]["content"] == "a b"
    assert whole["finish_reason"] == "length"
    chunks = chunks_of(await gateway.chat(stream=True))
    texts = [chunk["choices"][0]["delta"].get("content") for chunk in chunks]
    assert texts == ["", "a", " b", None]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


async def test_nothing_said(gateway, service, scripts):
    service.script = scripts.says()
    chunks = chunks_of(await gateway.chat(stream=True))
    assert [chunk["choices"][0]["delta"].get("role") for chunk in chunks] == ["assistant", None]
    assert (await gateway.chat()).json()["choices"][0]["message"]["content"] == ""


async def test_tokens_of_one_event_share_a_chunk(gateway, service, scripts):
    def script(work, index):
        yield Preparing("loading", 1, 2)
        yield scripts.placed()
        yield Released(0, (scripts.token(0, "é\u2028"), scripts.token(1, '"\\'), scripts.token(2, "\x00")))
        yield scripts.completed(3)

    service.script = script
    chunks = chunks_of(await gateway.chat(stream=True))
    assert [chunk["choices"][0]["delta"].get("content") for chunk in chunks] == ["", 'é\u2028"\\\x00', None]


async def test_all_fields_reach_the_work(gateway, service):
    response = await gateway.chat(
        messages=[
            {
                "role": "developer",
                "content": [{"type": "text", "text": "be"}, {"type": "text", "text": "brief"}],
            },
            {"role": "user", "content": "hi", "name": "ann"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": ""}}],
            },
            {"role": "tool", "content": "42", "tool_call_id": "c1"},
        ],
        temperature=0,
        top_p=0.5,
        max_tokens=5,
        max_completion_tokens=6,
        seed=-1,
        stop=["x", "y"],
        presence_penalty=-1,
        frequency_penalty=1,
        logit_bias={"7": -100, "3": 5},
        top_k=9,
        min_p=0.1,
        repeat_penalty=1.1,
        deterministic=True,
        ignore_eos=True,
        timeout_s=2.5,
        user="u",
        metadata={"a": "b"},
        store=True,
        service_tier="auto",
        some_future_field={"x": 1},
    )
    assert response.status_code == 200, response.text
    (work,) = service.works
    assert isinstance(work.prompt, ChatPrompt)
    assert work.prompt.messages[0] == ChatMessage("developer", "be\nbrief")
    assert work.prompt.messages[1] == ChatMessage("user", "hi", name="ann")
    assert work.prompt.messages[2].tool_calls[0].arguments == "{}"
    assert work.prompt.messages[3] == ChatMessage("tool", "42", tool_call_id="c1")
    assert work.prompt.date == datetime.now(UTC).date().isoformat()
    sampling = work.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0, 0.5, 9, 0.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repeat_penalty) == (-1, 1, 1.1)
    assert sampling.logit_bias == ((3, 5), (7, -100))
    assert sampling.seed == (1 << 53) - 1
    assert work.max_tokens == 6
    assert work.stop == ("x", "y")
    assert work.deterministic
    assert work.ignore_eos
    assert service.deadlines_ns == [2_500_000_000]


async def test_defaults(gateway, service):
    await gateway.chat(stop="one")
    await gateway.chat(temperature=None, stop=None)
    first, second = service.works
    assert (first.sampling.temperature, first.sampling.top_p, first.sampling.top_k) == (1.0, 1.0, 0)
    assert first.max_tokens is None
    assert first.stop == ("one",)
    assert second.stop == ()
    assert first.top_logprobs is None
    assert first.sampling.seed != second.sampling.seed  # drawn
    assert service.deadlines_ns == [None, None]


@pytest.mark.parametrize(
    ("fields", "constraint"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Constraint("json_object")),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "array"}},
                }
            },
            Constraint("json_schema", '{"type":"array"}'),
        ),
        ({"grammar": 'root ::= "a"'}, Constraint("gbnf", 'root ::= "a"')),
    ],
)
async def test_constraints(gateway, service, fields, constraint):
    assert (await gateway.chat(**fields)).status_code == 200
    assert service.works[0].constraint == constraint


async def test_three_choices(gateway, service, scripts):
    def script(work, index):
        return scripts.says(f"answer {index}")(work, index)

    service.script = script
    response = await gateway.chat(n=3, seed=11)
    answer = response.json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    order = [work.sampling.seed for work in service.works]
    mask = (1 << 53) - 1
    seeds = [11, draw_u64(11, 0, 1) & mask, draw_u64(11, 0, 2) & mask]
    assert [texts.index(f"answer {order.index(seed)}") for seed in seeds] == [0, 1, 2]
    assert answer["usage"]["prompt_tokens"] == 7  # the prompt once
    assert answer["usage"]["completion_tokens"] == 3
    chunks = chunks_of(await gateway.chat(n=3, stream=True, stream_options={"include_usage": True}))
    by_index: dict[int, list] = {0: [], 1: [], 2: []}
    for chunk in chunks[:-1]:
        (choice,) = chunk["choices"]
        by_index[choice["index"]].append(choice)
    for choices in by_index.values():
        assert choices[0]["delta"]["role"] == "assistant"
        assert choices[-1]["finish_reason"] == "stop"
        assert "".join(c["delta"].get("content") or "" for c in choices).startswith("answer ")
    assert chunks[-1]["usage"]["completion_tokens"] == 3


async def test_logprobs(gateway, service):
    whole = (await gateway.chat(logprobs=True, top_logprobs=2)).json()["choices"][0]
    entries = whole["logprobs"]["content"]
    assert [entry["token"] for entry in entries] == ["Hello", " there", "!"]
    assert entries[1]["logprob"] == -0.5
    assert bytes(entries[1]["bytes"]) == b" there"
    assert [top["token"] for top in entries[0]["top_logprobs"]] == ["Hello", "Hello*"]
    assert service.works[0].top_logprobs == 2
    chunks = chunks_of(await gateway.chat(logprobs=True, stream=True))
    streamed = [c["choices"][0]["logprobs"] for c in chunks]
    assert streamed[0] is None
    assert [each["content"][0]["token"] for each in streamed[1:4]] == ["Hello", " there", "!"]
    assert streamed[1]["content"][0]["top_logprobs"] == []
    assert service.works[1].top_logprobs == 0


async def test_broken_logprobs_and_bytes(gateway, service, scripts):
    token = scripts.token(0, "x", logprob=float("-inf"))

    def script(work, index):
        yield Released(0, (token,))
        yield Released(
            1, (type(token)(1, "", b"\xf0\x9f", float("nan")), type(token)(2, "😀", b"\x98\x80", None))
        )
        yield scripts.completed(3)

    service.script = script
    entries = (await gateway.chat(logprobs=True)).json()["choices"][0]["logprobs"]["content"]
    assert [entry["logprob"] for entry in entries] == [-9999.0] * 3
    assert entries[1]["bytes"] == [0xF0, 0x9F]
    assert entries[1]["token"] == "\N{REPLACEMENT CHARACTER}"


async def test_hand_over_is_seen(gateway, service, scripts):
    def script(work, index):
        yield scripts.placed("reef")
        yield Released(0, (scripts.token(0, "a"),))
        yield scripts.placed("atoll\n\nInjected: é", 1)
        yield Released(1, (scripts.token(1, "b"),))
        yield scripts.completed(2, hand_overs=1)

    service.script = script
    response = await gateway.chat(stream=True, stream_options={"include_usage": True})
    assert ": hand-over 1 island=atoll%0A%0AInjected: %C3%A9\n\n" in response.text
    assert response.headers["x-archipelag-island"] == "reef"
    assert chunks_of(response)[-1]["usage"]["archipelag"]["hand_overs"] == 1
    assert gateway.metric("archipelag_hand_overs_total") == 1


async def test_hostile_island_name_in_headers(gateway, service, scripts):
    def script(work, index):
        yield Placed("a\r\nset-cookie: x=1\x7f☃", scripts.placed().peer, 0, 0, 0)
        yield scripts.completed(0)

    service.script = script
    response = await gateway.chat()
    assert response.headers["x-archipelag-island"] == "a%0D%0Aset-cookie: x=1%7F%E2%98%83"
    assert "set-cookie" not in response.headers


async def test_a_chains_stages_are_told(gateway, service, scripts):
    stages = (StageInfo("coral", PeerId("a"), 0, 9), StageInfo("reef", PeerId("b"), 9, 30))

    def script(_work, _index):
        yield replace(scripts.placed(), stages=stages)
        yield Released(0, (scripts.token(0, "x"),))
        done = scripts.completed(1)
        usage = structs.replace(done.usage, traversals=5, drafts=4, drafts_right=3)
        yield replace(done, usage=usage, stages_lost=1)

    service.script = script
    response = await gateway.chat()
    assert response.headers["x-archipelag-stages"] == "coral 0-8, reef 9-29"
    own = response.json()["usage"]["archipelag"]
    assert own["stages"] == [
        {"island": "coral", "first_layer": 0, "last_layer": 8},
        {"island": "reef", "first_layer": 9, "last_layer": 29},
    ]
    assert own["stages_lost"] == 1
    assert (own["traversals"], own["drafts"], own["drafts_right"]) == (5, 4, 3)
    assert gateway.metric("archipelag_drafts_total") == 4
    assert gateway.metric("archipelag_drafts_right_total") == 3
