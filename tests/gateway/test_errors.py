"""Every refusal has OpenAI's shape, the right status, and names the field."""

from __future__ import annotations

import json

import httpx
import pytest
import trio

from gateway.http import HttpSettings
from gateway.keys import ApiKey, KeyRing, hash_of_key
from gateway.service import Failed, Released

KEY = "ak_test-key-of-the-gateway-tests"
USER = {"role": "user", "content": "hi"}


def error_of(response: httpx.Response, status: int) -> dict:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


CHAT_FIELDS = [
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [USER, {"role": "boss", "content": "x"}]}, "messages[1].role"),
    ({"messages": [USER, USER, {"role": "user", "content": 5}]}, "messages[2].content"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "messages[0].content[0].type"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}]},
        "messages[0].content[1]",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "file"}]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
    ({"messages": [{"role": "function", "name": "f", "content": "x"}]}, "messages[0].role"),
    (
        {
            "messages": [
                {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{"}}]}
            ]
        },
        "messages[0].tool_calls[0].function.arguments",
    ),
    ({"messages": [{**USER, "tool_calls": [{"function": {"name": "f"}}]}]}, "messages[0].tool_calls"),
    ({"model": ""}, "model"),
    ({"model": 3}, "model"),
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_completion_tokens": -1}, "max_completion_tokens"),
    ({"seed": 1 << 63}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"stop": ""}, "stop"),
    ({"stop": ["ok", ""]}, "stop[1]"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": 1}, "logprobs"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"schema": {"$ref": "https://x.example/s"}},
            }
        },
        "response_format.json_schema.schema",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": ["x" * 70_000]}}}},
        "response_format.json_schema.schema",
    ),
    ({"grammar": ""}, "grammar"),
    ({"grammar": "x", "response_format": {"type": "json_object"}}, "grammar"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "retrieval", "function": {"name": "a"}}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "function": {"name": "a"}}] * 2}, "tools[1].function.name"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": "maybe"}, "tool_choice"),
    (
        {
            "tools": [{"function": {"name": "a"}}],
            "tool_choice": {"type": "function", "function": {"name": "b"}},
        },
        "tool_choice.function.name",
    ),
    (
        {"tools": [{"function": {"name": "a"}}], "response_format": {"type": "json_object"}},
        "response_format",
    ),
    ({"functions": []}, "functions"),
    ({"function_call": "auto"}, "function_call"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"audio": {"voice": "x"}}, "audio"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"timeout_s": 0}, "timeout_s"),
    ({"timeout_s": 100_000}, "timeout_s"),
    ({"top_k": 1001}, "top_k"),
    ({"deterministic": 1}, "deterministic"),
]


@pytest.mark.parametrize(
    ("fields", "param"), CHAT_FIELDS, ids=[p + str(i) for i, (_, p) in enumerate(CHAT_FIELDS)]
)
async def test_chat_field(gateway, service, fields, param):
    error = error_of(await gateway.chat(**fields), 400)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert service.works == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[1], []]}, "prompt[1]"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": ["a", [1]]}, "prompt"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": ["a"] * 5, "n": 4}, "prompt"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"echo": True, "prompt": [1, 2]}, "echo"),
    ],
)
async def test_completion_field(gateway, service, fields, param):
    assert error_of(await gateway.complete(**fields), 400)["param"] == param
    assert service.works == []


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"\xff", b'{"model":"\\ud800"}', b"[" * 100_000, b'{"model":"tiny"}', b"{}"],
)
async def test_body_that_is_no_request(gateway, body):
    for path in ("/v1/chat/completions", "/v1/completions"):
        response = await gateway.client.post(path, content=body)
        error_of(response, 400)


async def test_missing_field_is_named(gateway):
    response = await gateway.client.post("/v1/chat/completions", json={"model": "tiny"})
    error = error_of(response, 400)
    assert (error["param"], error["code"]) == ("messages", "missing_required_parameter")


async def test_unknown_model_lists_what_there_is(gateway):
    for response in (await gateway.chat(model="gpt-x"), await gateway.client.get("/v1/models/gpt-x")):
        error = error_of(response, 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert "tiny" in error["message"]


@pytest.mark.parametrize(
    "authorization", [None, "Bearer ak_wrong", "Bearer", "Basic abc", "Bearer " + "x" * 9000]
)
async def test_keys(gateway, authorization):
    headers = {} if authorization is None else {"authorization": authorization}
    async with httpx.AsyncClient(base_url=gateway.url) as stranger:
        for method, path in (
            ("POST", "/v1/chat/completions"),
            ("POST", "/v1/completions"),
            ("GET", "/v1/models"),
        ):
            response = await stranger.request(method, path, headers=headers, content=b"{}")
            assert error_of(response, 401)["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
        assert (await stranger.get("/health")).status_code == 200
        assert (await stranger.get("/metrics")).status_code == 200


async def test_metrics_behind_a_key(start_gateway):
    async with start_gateway(HttpSettings(metrics_need_key=True)) as gateway:
        assert (await gateway.client.get("/metrics")).status_code == 200
        async with httpx.AsyncClient(base_url=gateway.url) as stranger:
            error_of(await stranger.get("/v1/metrics"), 401)


async def test_open_gateway(start_gateway):
    async with start_gateway(keys=KeyRing([], open_to_all=True)) as gateway:
        response = await gateway.client.get("/v1/models", headers={"authorization": "Bearer anything"})
        assert response.status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("POST", "/v1/models", 405, "method_not_allowed"),
        ("POST", "/v1/chat/completion", 404, "unknown_url"),
        ("GET", "/", 404, "unknown_url"),
        ("GET", "/docs", 404, "unknown_url"),
        ("GET", "/openapi.json", 404, "unknown_url"),
        ("GET", "/v1/health/", 404, "unknown_url"),
    ],
)
async def test_routes(gateway, method, path, status, code):
    response = await gateway.client.request(method, path)
    assert error_of(response, status)["code"] == code
    if status == 405:
        assert response.headers["allow"]


@pytest.mark.parametrize("chunked", [False, True])
async def test_too_large_a_body(start_gateway, service, chunked):
    body = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "x" * 300_000}]}).encode()

    async def pieces():
        for start in range(0, len(body), 10_000):
            yield body[start : start + 10_000]

    async with start_gateway(HttpSettings(max_body_bytes=100_000)) as gateway:
        content = pieces() if chunked else body
        response = await gateway.client.post("/v1/chat/completions", content=content)
        assert error_of(response, 413)["code"] == "request_too_large"
        # The connection is as good as new afterwards.
        assert (await gateway.chat()).status_code == 200


async def test_body_that_never_arrives(start_gateway, monkeypatch):
    monkeypatch.setattr("gateway.http.LINGER_S", 0.05)
    async with start_gateway(HttpSettings(body_timeout_s=0.05)) as gateway:
        stream = await trio.open_tcp_stream("127.0.0.1", gateway.port)
        head = (
            "POST /v1/completions HTTP/1.1",
            "host: x",
            f"authorization: Bearer {KEY}",
            "content-length: 9",
            "",
        )
        await stream.send_all("\r\n".join(head).encode() + b"\r\n{")
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 408 ")
        await stream.aclose()


async def test_rate_limit(start_gateway, service):
    keys = KeyRing([ApiKey("a", hash_of_key(KEY)), ApiKey("b", hash_of_key("ak_another-key-of-tests"), 1)])
    async with start_gateway(HttpSettings(requests_per_minute=3), keys=keys) as gateway:
        for left in ("2", "1", "0"):
            response = await gateway.chat()
            assert response.status_code == 200
            assert response.headers["x-ratelimit-limit-requests"] == "3"
            assert response.headers["x-ratelimit-remaining-requests"] == left
        response = await gateway.chat(stream=True)
        error = error_of(response, 429)
        assert error["code"] == "rate_limit_exceeded"
        assert 15 <= int(response.headers["retry-after"]) <= 20
        assert 15_000 <= int(response.headers["retry-after-ms"]) <= 20_000
        assert response.headers["x-ratelimit-remaining-requests"] == "0"
        assert len(service.works) == 3
        other = {"authorization": "Bearer ak_another-key-of-tests"}
        body = {"model": "tiny", "prompt": "x"}
        assert (await gateway.client.post("/v1/completions", json=body, headers=other)).status_code == 200
        error_of(await gateway.client.post("/v1/completions", json=body, headers=other), 429)
        assert (await gateway.client.get("/v1/models")).status_code == 200  # reading is free


FAILURES = [
    ("no-islands", 503, "no_islands", None),
    ("busy", 503, "overloaded", None),
    ("too-long", 400, "context_length_exceeded", "messages"),
    ("invalid", 400, "invalid_value", None),
    ("deadline", 504, "deadline_exceeded", None),
    ("exhausted", 502, "islands_failed", None),
]


@pytest.mark.parametrize(("code", "status", "shown", "param"), FAILURES)
@pytest.mark.parametrize("stream", [False, True])
async def test_failure_before_the_first_token(gateway, service, scripts, code, status, shown, param, stream):
    service.script = lambda work, index: [scripts.placed(), Failed(code, "the reason", 2_300)]
    response = await gateway.chat(stream=stream)
    error = error_of(response, status)
    assert (error["code"], error["param"], error["message"]) == (shown, param, "the reason")
    if status == 503:
        assert response.headers["retry-after"] == "3"
        assert response.headers["retry-after-ms"] == "2300"
    if status == 504:
        assert response.headers["x-should-retry"] == "false"
    assert gateway.metric("archipelag_job_failures_total", code=code) == 1


async def test_failure_names_the_prompt_of_the_legacy_endpoint(gateway, service):
    service.script = lambda work, index: [Failed("too-long", "the reason")]
    assert error_of(await gateway.complete(), 400)["param"] == "prompt"


async def test_failure_in_mid_stream(gateway, service, scripts):
    def script(work, index):
        yield Released(0, (scripts.token(0, "a"),))
        yield Failed("exhausted", "all Islands are gone")

    service.script = script
    response = await gateway.chat(stream=True)
    assert response.status_code == 200
    events = [event for event in response.text.split("\n\n") if event]
    error = json.loads(events[-1].removeprefix("data: "))["error"]
    assert (error["code"], error["message"]) == ("islands_failed", "all Islands are gone")
    assert "[DONE]" not in response.text
    whole = await gateway.chat()
    error_of(whole, 502)


async def test_one_of_three_choices_fails(gateway, service, scripts):
    """The others are cancelled, also those that have begun."""

    def script(work, index):
        if index % 3 == 1:
            return [Failed("exhausted", "gone")]
        return [scripts.placed(), trio.Event()]

    service.script = script
    error_of(await gateway.chat(n=3), 502)
    error_of(await gateway.chat(n=3, stream=True), 502)
    assert sorted(service.left) == ["cancelled"] * 4 + ["ended"] * 2


async def test_a_bug_is_a_500_that_tells_nothing(gateway, service, capsys):
    def script(work, index):
        raise ZeroDivisionError("secret")

    service.script = script
    error = error_of(await gateway.chat(), 500)
    assert error["code"] == "internal_error"
    assert "secret" not in error["message"]
    assert "ZeroDivisionError" in "".join(capsys.readouterr())
    service.script = lambda work, index: []
    error_of(await gateway.chat(), 500)  # a job that ends without an end is a bug too


async def test_a_bug_in_mid_stream_breaks_the_connection(gateway, service, scripts):
    def script(work, index):
        yield Released(0, (scripts.token(0, "a"),))
        raise ZeroDivisionError

    service.script = script
    with pytest.raises(httpx.RemoteProtocolError):
        await gateway.chat(stream=True)
    assert (await gateway.client.get("/health")).status_code == 200
