"""Time: consumers that leave, that are slow, and Islands that are silent."""

from __future__ import annotations

import json

import httpx
import pytest
import trio

from gateway.http import HttpSettings
from gateway.service import Released

BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


def request_bytes(port: int, **fields) -> bytes:
    body = json.dumps({**BODY, **fields}).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\n"
        "authorization: Bearer ak_test-key-of-the-gateway-tests\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def wait_for(condition) -> None:
    """Until the condition holds; the test's own time limit ends it otherwise."""
    with trio.fail_after(20):
        while not condition():  # noqa: ASYNC110  # counters have no event to wait for
            await trio.sleep(0.005)


@pytest.mark.parametrize("n", [1, 3])
async def test_leaving_cancels_a_stream(gateway, service, scripts, n):
    never = trio.Event()
    service.script = lambda work, index: [scripts.placed(), Released(0, (scripts.token(0, "a"),)), never]
    consumer = await trio.open_tcp_stream("127.0.0.1", gateway.port)
    await consumer.send_all(request_bytes(gateway.port, stream=True, n=n))
    received = b""
    while received.count(b'"a"') < n:
        received += await consumer.receive_some()
    assert received.startswith(b"HTTP/1.1 200")
    await consumer.aclose()
    with trio.fail_after(20):
        for index in range(n):
            await service.gone_event(index).wait()
    assert service.left == ["cancelled"] * n
    await wait_for(lambda: gateway.metric("archipelag_consumer_disconnects_total") == 1)
    assert gateway.metric("archipelag_jobs_in_flight") == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_leaving_before_the_first_token_cancels(gateway, service, scripts, stream):
    service.script = lambda work, index: [scripts.placed(), trio.Event()]
    consumer = await trio.open_tcp_stream("127.0.0.1", gateway.port)
    await consumer.send_all(request_bytes(gateway.port, stream=stream))
    await wait_for(lambda: service.given == [1])
    await consumer.aclose()
    with trio.fail_after(20):
        await service.gone_event(0).wait()
    assert service.left == ["cancelled"]
    metric = "archipelag_http_requests_total"
    await wait_for(lambda: gateway.metric(metric, route="/v1/chat/completions", status="499") == 1)


async def test_leaving_in_the_middle_of_the_body(gateway, service):
    consumer = await trio.open_tcp_stream("127.0.0.1", gateway.port)
    await consumer.send_all(request_bytes(gateway.port)[:-10])
    await consumer.aclose()
    assert (await gateway.chat()).status_code == 200
    assert len(service.works) == 1


@pytest.mark.parametrize("n", [1, 2])
async def test_slow_consumer_stops_the_job(gateway, service, scripts, n):
    """What nobody takes is not taken from the Island: kernel buffers are all that fills."""
    many = 100_000
    text = "x" * 500

    def script(work, index):
        yield scripts.placed()
        for i in range(many):
            yield Released(i, (scripts.token(i, text),))
        yield scripts.completed(many)

    service.script = script
    consumer = await trio.open_tcp_stream("127.0.0.1", gateway.port)
    await consumer.send_all(request_bytes(gateway.port, stream=True, n=n))
    await wait_for(lambda: len(service.given) == n and service.given[0] > 10)

    still = 0
    before = -1
    with trio.fail_after(30):
        while still < 5:  # until nothing has moved for a while
            await trio.sleep(0.05)
            still = still + 1 if sum(service.given) == before else 0
            before = sum(service.given)
    assert before < many // 2
    taken = 0
    while taken < 2_000_000:  # reading sets it going again
        taken += len(await consumer.receive_some(65536))
    await wait_for(lambda: sum(service.given) > before)
    await consumer.aclose()
    with trio.fail_after(20):
        for index in range(n):
            await service.gone_event(index).wait()


async def test_stalled_consumer_is_dropped(start_gateway, service, scripts):
    """The kernel gives up on a reader that takes nothing, and the job ends."""

    def script(work, index):
        for i in range(100_000):
            yield Released(i, (scripts.token(i, "x" * 2000),))

    service.script = script
    async with start_gateway(stalled_ms=300) as gateway:
        consumer = await trio.open_tcp_stream("127.0.0.1", gateway.port)
        await consumer.send_all(request_bytes(gateway.port, stream=True))
        await wait_for(lambda: bool(service.given))
        with trio.fail_after(60):
            await service.gone_event(0).wait()
        assert service.left == ["cancelled"]
        await consumer.aclose()


async def test_keep_alive_comments_only_in_a_begun_stream(start_gateway, service, scripts):
    begin, go_on = trio.Event(), trio.Event()
    service.script = lambda work, index: [
        scripts.placed(),
        begin,
        Released(0, (scripts.token(0, "a"),)),
        go_on,
        scripts.completed(1),
    ]
    async with start_gateway(HttpSettings(keep_alive_s=0.05)) as gateway, trio.open_nursery() as nursery:

        async def first_token_later():
            await trio.sleep(0.2)  # several keep-alive intervals
            begin.set()

        nursery.start_soon(first_token_later)
        comments = 0
        async with gateway.client.stream(
            "POST", "/v1/chat/completions", json={**BODY, "stream": True}
        ) as response:
            lines = response.aiter_lines()
            first = await anext(lines)
            assert first.startswith("data: ")
            async for line in lines:
                comments += line == ": keep-alive"
                if comments == 2:
                    go_on.set()
        assert comments >= 2


async def test_connection_is_kept_after_a_stream(gateway):
    """The server's own report of the end must not cut off its work on the connection."""
    for _ in range(3):
        for stream in (True, False):
            assert (await gateway.chat(stream=stream)).status_code == 200
    pool = gateway.client._transport._pool
    assert len(pool.connections) == 1
    assert "Request Count: 6" in repr(pool.connections[0])
    assert gateway.metric("archipelag_consumer_disconnects_total") == 0


async def test_a_hundred_at_once(gateway, service, scripts):
    service.script = scripts.says(*[f" t{i}" for i in range(20)])
    answers: list[str] = []

    async def one() -> None:
        response = await gateway.chat(stream=True)
        answers.append(response.text)

    limits = httpx.Limits(max_connections=100)
    async with httpx.AsyncClient(
        base_url=gateway.url, headers=gateway.client.headers, limits=limits, timeout=60
    ) as client:
        gateway.client = client
        async with trio.open_nursery() as nursery:
            for _ in range(100):
                nursery.start_soon(one)
    assert len(answers) == 100
    assert all(answer.count('"content":" t') == 20 and answer.endswith("[DONE]\n\n") for answer in answers)


async def test_shutdown_with_a_stream_open(start_gateway, service, scripts):
    service.script = lambda work, index: [Released(0, (scripts.token(0, "a"),)), trio.Event()]
    with trio.fail_after(20):
        async with start_gateway() as gateway:
            consumer = await trio.open_tcp_stream("127.0.0.1", gateway.port)
            await consumer.send_all(request_bytes(gateway.port, stream=True))
            assert b"200" in await consumer.receive_some()
    assert service.left == ["cancelled"]
    await consumer.aclose()
