"""POST completions (legacy), models, health, metrics."""

from __future__ import annotations

import json

import pytest

from gateway.http import HttpSettings
from gateway.service import Released
from protocol.jobs import Token
from protocol.work import Constraint, TextPrompt, TokenPrompt


def chunks_of(response) -> list[dict]:
    assert response.status_code == 200, response.text
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("", [TextPrompt("")]),
        ("a", [TextPrompt("a")]),
        (["a", "b"], [TextPrompt("a"), TextPrompt("b")]),
        ([1, 2], [TokenPrompt((1, 2))]),
        ([[1], [2, 3]], [TokenPrompt((1,)), TokenPrompt((2, 3))]),
    ],
)
async def test_prompts(gateway, service, prompt, prompts):
    response = await gateway.complete(prompt=prompt, seed=5)
    answer = response.json()
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert [c["index"] for c in answer["choices"]] == list(range(len(prompts)))
    assert {c["text"] for c in answer["choices"]} == {"Hello there!"}
    assert sorted(map(repr, (work.prompt for work in service.works))) == sorted(map(repr, prompts))
    assert all(work.max_tokens == 16 for work in service.works)
    assert answer["usage"]["prompt_tokens"] == 7 * len(prompts)


async def test_prompts_times_n(gateway, service):
    answer = (await gateway.complete(prompt=["a", "b"], n=2, best_of=2, seed=5)).json()
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2, 3]
    assert len({work.sampling.seed for work in service.works}) == 4
    assert answer["usage"]["prompt_tokens"] == 14  # each prompt once
    assert answer["usage"]["completion_tokens"] == 12


async def test_echo(gateway):
    whole = (await gateway.complete(prompt=["a ", "b "], echo=True)).json()
    assert [c["text"] for c in whole["choices"]] == ["a Hello there!", "b Hello there!"]
    chunks = chunks_of(await gateway.complete(prompt="a ", echo=True, stream=True))
    assert [c["choices"][0]["text"] for c in chunks] == ["a Hello", " there", "!", ""]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


async def test_stream_with_usage(gateway):
    chunks = chunks_of(await gateway.complete(stream=True, stream_options={"include_usage": True}))
    assert {c["object"] for c in chunks} == {"text_completion"}
    assert chunks[-1]["usage"]["completion_tokens"] == 3
    assert chunks[0]["usage"] is None


async def test_logprobs(gateway, service):
    logprobs = (await gateway.complete(logprobs=2)).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["Hello", " there", "!"]
    assert logprobs["token_logprobs"] == [-0.25, -0.5, -0.75]
    assert logprobs["text_offset"] == [0, 5, 11]
    assert logprobs["top_logprobs"][0] == {"Hello": -0.25, "Hello*": -1.25}
    assert service.works[0].top_logprobs == 2
    chunks = chunks_of(await gateway.complete(logprobs=0, stream=True))
    parts = [c["choices"][0]["logprobs"] for c in chunks]
    assert [p and p["text_offset"] for p in parts] == [[0], [5], [11], None]


async def test_logprobs_of_tokens_without_text(gateway, service, scripts):
    service.script = lambda work, index: [
        Released(0, (Token(0, "", b"\xf0", -1.0),)),
        scripts.completed(1, tail="x"),
    ]
    chunks = chunks_of(await gateway.complete(logprobs=0, stream=True))
    assert [(c["choices"][0]["text"], bool(c["choices"][0]["logprobs"])) for c in chunks] == [
        ("", True),
        ("x", False),
    ]


async def test_grammar(gateway, service):
    await gateway.complete(grammar='root ::= "x"', max_tokens=3)
    assert service.works[0].constraint == Constraint("gbnf", 'root ::= "x"')
    assert service.works[0].max_tokens == 3


@pytest.mark.parametrize("prefix", ["/v1", "/api/v1"])
async def test_models(gateway, prefix):
    listed = (await gateway.client.get(f"{prefix}/models")).json()
    assert listed["object"] == "list"
    (model,) = listed["data"]
    assert model == {
        "id": "tiny",
        "object": "model",
        "created": 1_700_000_000,
        "owned_by": "tests",
        "archipelag": {
            "digest": "sha256:" + "ab" * 32,
            "version": "1.2",
            "runtime": "llama",
            "context_length": 2048,
            "islands": 2,
            "ready": 1,
            "decode_tps": 123.46,
        },
    }
    for name in ("tiny", "tiny@1.2", "sha256:" + "ab" * 32):
        assert (await gateway.client.get(f"{prefix}/models/{name}")).json() == model


@pytest.mark.parametrize("path", ["/health", "/v1/health", "/api/v1/health"])
async def test_health(gateway, service, path):
    health = (await gateway.client.get(path)).json()
    assert health == {
        "status": "ok",
        "version": "9.9",
        "islands": 2,
        "models": [{"id": "tiny", "islands": 2, "ready": 1}],
    }
    service.known = ()
    assert (await gateway.client.get(path)).json()["status"] == "no-islands"


async def test_metrics(gateway):
    await gateway.chat()
    await gateway.chat(stream=True)
    await gateway.chat(model="none")
    await gateway.client.get("/v1/models/x/y")
    await gateway.client.get("/somewhere")
    response = await gateway.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    lines = response.text.splitlines()
    for line in (
        'archipelag_http_requests_total{route="/v1/chat/completions",status="200"} 2.0',
        'archipelag_http_requests_total{route="/v1/chat/completions",status="404"} 1.0',
        'archipelag_http_requests_total{route="/v1/models/{id}",status="404"} 1.0',
        'archipelag_http_requests_total{route="other",status="404"} 1.0',
        "archipelag_http_requests_in_flight 1.0",
        "archipelag_jobs_in_flight 0.0",
        "archipelag_time_to_first_token_seconds_count 2.0",
        "archipelag_inter_token_seconds_count 4.0",
        "archipelag_prompt_tokens_total 14.0",
        "archipelag_completion_tokens_total 6.0",
        "archipelag_models 1.0",
        "archipelag_models_ready 1.0",
    ):
        assert line in lines


async def test_cors_is_off_by_default_and_can_be_allowed(gateway, start_gateway):
    asked = {"origin": "https://app.example", "access-control-request-method": "POST"}
    refused = await gateway.client.options("/v1/chat/completions", headers=asked)
    assert refused.status_code == 405
    assert "access-control-allow-origin" not in (await gateway.client.get("/health", headers=asked)).headers
    async with start_gateway(HttpSettings(cors_origins=("https://app.example",))) as open_to_app:
        allowed = await open_to_app.client.options("/v1/chat/completions", headers=asked)
        assert allowed.headers["access-control-allow-origin"] == "https://app.example"
        other = {**asked, "origin": "https://other.example"}
        refused = await open_to_app.client.options("/v1/chat/completions", headers=other)
        assert "access-control-allow-origin" not in refused.headers
