"""Whatever the body: a 2xx or an OpenAI-shaped 4xx, and what reaches the mesh is within the protocol."""

from __future__ import annotations

import json

import httpx
import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.app import create_app
from gateway.http import HttpSettings
from gateway.keys import KeyRing

ANY_TEXT = st.text(max_size=12)
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY_TEXT, inner, max_size=4),
    max_leaves=12,
)
SCHEMAS = ANY_JSON | st.fixed_dictionaries(
    {"type": st.just("object"), "$ref": st.sampled_from(["#", "#/$defs/x", "https://x"])}
)
PARTS = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image_url", "refusal", "x"])}, optional={"text": ANY_TEXT | ANY_JSON}
)
CALLS = st.fixed_dictionaries(
    {"function": st.fixed_dictionaries({"name": ANY_TEXT, "arguments": ANY_TEXT | st.just("{}")})},
    optional={"id": ANY_TEXT},
)
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "developer", "user", "assistant", "tool", "x"])},
    optional={
        "content": ANY_TEXT | st.lists(PARTS, max_size=3) | ANY_JSON,
        "name": ANY_TEXT,
        "tool_calls": st.lists(CALLS, max_size=2),
        "tool_call_id": ANY_TEXT,
    },
)
TOOLS = st.fixed_dictionaries(
    {"type": st.just("function")},
    optional={
        "function": st.fixed_dictionaries(
            {"name": st.sampled_from(["add", "get", "a b"])},
            optional={"parameters": SCHEMAS, "description": ANY_TEXT},
        )
    },
)


def near(*good) -> st.SearchStrategy:
    """Mostly what belongs there, sometimes anything."""
    return st.one_of(*good, ANY_JSON)


FIELDS = {
    "n": near(st.integers(-1, 20)),
    "stop": near(ANY_TEXT, st.lists(ANY_TEXT, max_size=3)),
    "seed": near(st.integers()),
    "max_tokens": near(st.integers(-1, 300_000)),
    "max_completion_tokens": near(st.integers(-1, 300_000)),
    "temperature": near(st.floats(-1, 3)),
    "top_p": near(st.floats(-1, 2)),
    "presence_penalty": near(st.floats(-3, 3)),
    "logit_bias": near(st.dictionaries(st.integers(-1, 1 << 33).map(str), st.floats(-101, 101), max_size=4)),
    "stream": near(st.booleans()),
    "stream_options": near(st.fixed_dictionaries({"include_usage": st.booleans()})),
    "logprobs": near(st.booleans(), st.integers(-1, 6)),
    "top_logprobs": near(st.integers(-1, 21)),
    "response_format": near(
        st.fixed_dictionaries(
            {"type": st.sampled_from(["text", "json_object", "json_schema", "x"])},
            optional={"json_schema": st.fixed_dictionaries({"schema": SCHEMAS})},
        )
    ),
    "tools": near(st.lists(TOOLS, max_size=3)),
    "tool_choice": near(
        st.sampled_from(["none", "auto", "required"]),
        st.just({"type": "function", "function": {"name": "add"}}),
    ),
    "parallel_tool_calls": near(st.booleans()),
    "grammar": near(ANY_TEXT),
    "deterministic": near(st.booleans()),
    "top_k": near(st.integers(-1, 1001)),
    "min_p": near(st.floats(-1, 2)),
    "repeat_penalty": near(st.floats(-1, 3)),
    "timeout_s": near(st.floats(-1, 4000)),
    "functions": st.none() | ANY_JSON,
    "modalities": near(st.lists(st.sampled_from(["text", "audio"]))),
    "echo": near(st.booleans()),
    "best_of": near(st.integers(0, 4)),
    "suffix": near(ANY_TEXT),
}
CHAT = st.fixed_dictionaries(
    {"model": st.just("tiny") | ANY_JSON, "messages": near(st.lists(MESSAGES, min_size=1, max_size=3))},
    optional=FIELDS,
)
GOOD_CHAT = st.fixed_dictionaries(
    {"model": st.just("tiny"), "messages": st.just([{"role": "user", "content": "hi"}])}, optional=FIELDS
)
PROMPTS = near(
    ANY_TEXT,
    st.lists(ANY_TEXT, max_size=3),
    st.lists(st.integers(-1, 1 << 32), max_size=3),
    st.lists(st.lists(st.integers(0, 9), max_size=2), max_size=3),
)
COMPLETION = st.fixed_dictionaries({"model": st.just("tiny"), "prompt": PROMPTS}, optional=FIELDS)


def check(app, path: str, body: bytes) -> None:
    """One request through the app, in-process; the scripted mesh checks each Work on its own."""

    async def request() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=True)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(path, content=body, headers={"content-type": "application/json"})

    response = trio.run(request)
    if response.status_code != 200:
        assert 400 <= response.status_code < 500, response.text
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        assert error["type"] == "invalid_request_error"
    elif response.headers["content-type"].startswith("text/event-stream"):
        assert response.text.endswith("data: [DONE]\n\n")
    else:
        assert response.json()["choices"]


CUT_SHORT = GOOD_CHAT.map(lambda body: json.dumps(body).encode()).flatmap(
    lambda data: st.integers(0, len(data)).map(lambda end: data[:end])
)

FUZZ = settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture
def app(service, scripts):
    service.script = scripts.says("Hi", " [TOOL_CALLS]", ' [{"name": "add", "arguments": {}}]', "{")
    settings = HttpSettings(requests_per_minute=0)
    return create_app(service, keys=KeyRing([], open_to_all=True), settings=settings)


@FUZZ
@given(body=CHAT | GOOD_CHAT)
def test_chat(app, body):
    check(app, "/v1/chat/completions", json.dumps(body).encode())


@FUZZ
@given(body=COMPLETION)
def test_completions(app, body):
    check(app, "/v1/completions", json.dumps(body).encode())


@FUZZ
@given(body=ANY_JSON)
def test_any_json(app, body):
    for path in ("/v1/chat/completions", "/v1/completions"):
        check(app, path, json.dumps(body).encode())


@FUZZ
@given(body=st.binary(max_size=60) | CUT_SHORT)
def test_any_bytes(app, body):
    check(app, "/v1/chat/completions", body)
