"""Two hundred streams at once, for a minute: all whole, memory flat, and a slow reader holds up nobody."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import psutil
import pytest
import trio

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

STREAMS = 200
SECONDS = 60
TOKENS_PER_S = 8
TOKENS = SECONDS * TOKENS_PER_S
#: What allocators and caches may still grow by after warming up; a leak of one token's worth of objects per
#: token would be ten times that.
GROWTH_MIB = 24


async def stream(host: str, port: int, key: str, tokens: int, delay_s: float = 0.0) -> list[str]:
    """One streamed completion over a raw socket: the client must cost less than what it measures."""
    body = json.dumps(
        {
            "model": "scripted",
            "messages": [{"role": "user", "content": "go"}],
            "stream": True,
            "max_tokens": tokens,
            "timeout_s": 200,
        }
    )
    request = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    )
    connection = await trio.open_tcp_stream(host, port)
    words: list[str] = []
    rest = b""
    async with connection:
        await connection.send_all(request.encode())
        while True:
            chunk = await connection.receive_some(4096 if delay_s else 65536)
            if not chunk:
                return words
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                if line.startswith(b"data: [DONE]"):
                    return words
                if line.startswith(b"data: "):
                    for choice in json.loads(line[6:])["choices"]:
                        words.extend((choice["delta"].get("content") or "").split())
            if delay_s:
                await trio.sleep(delay_s)


async def wait_offered(host: str, port: int, key: str) -> None:
    with trio.fail_after(30):
        while not await stream(host, port, key, 1):  # noqa: ASYNC110 - another process sends us no event
            await trio.sleep(0.2)


def rss_mib(pid: int) -> float:
    return psutil.Process(pid).memory_info().rss / 2**20


async def test_two_hundred_streams_for_a_minute(
    start_mesh: Callable[..., Any],
    program_class: Any,
    api_key: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mesh = start_mesh("http.requests_per_minute=0")
    for name in ("script-1", "script-2"):
        mesh.islands[name] = program_class(
            *("bench.scripted_island", "--coordinator", mesh.address, "--name", name),
            *("--tokens-per-s", str(TOKENS_PER_S)),
        )
        mesh.islands[name].wait_line(lambda line: line.startswith("listening "))
    host, port = mesh.base.removeprefix("http://").split(":")
    await wait_offered(host, int(port), api_key)

    pids = {"gateway": mesh.gateway.pid, **{name: island.pid for name, island in mesh.islands.items()}}
    results: list[list[str]] = []
    early: dict[str, float] = {}

    async def one() -> None:
        results.append(await stream(host, int(port), api_key, TOKENS))

    async def watch() -> None:
        await trio.sleep(SECONDS * 0.3)
        early.update({name: rss_mib(pid) for name, pid in pids.items()})

    with trio.fail_after(SECONDS * 3):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            for _ in range(STREAMS):
                nursery.start_soon(one)
        late = {name: rss_mib(pid) for name, pid in pids.items()}
    whole = [f"w{index}" for index in range(TOKENS)]
    assert len(results) == STREAMS
    assert all(words == whole for words in results)
    growth = {name: late[name] - early[name] for name in pids}
    with capsys.disabled():
        print("\n  " + ", ".join(f"{n}: {late[n]:.0f} MiB ({g:+.1f})" for n, g in growth.items()), end="")
    assert max(growth.values()) < GROWTH_MIB


async def test_a_slow_reader_is_waited_for_and_holds_up_nobody(
    start_mesh: Callable[..., Any], program_class: Any, api_key: str
) -> None:
    """As fast as grants allow: the slow one gets everything, in order; memory stays bounded meanwhile."""
    mesh = start_mesh("http.requests_per_minute=0")
    mesh.islands["script"] = program_class("bench.scripted_island", "--coordinator", mesh.address)
    mesh.islands["script"].wait_line(lambda line: line.startswith("listening "))
    host, port = mesh.base.removeprefix("http://").split(":")
    await wait_offered(host, int(port), api_key)
    before = rss_mib(mesh.gateway.pid)
    tokens, slow_words = 20_000, list[str]()
    done_first = trio.Event()

    async def slow() -> None:
        slow_words.extend(await stream(host, int(port), api_key, tokens, delay_s=0.01))

    async def quick() -> None:
        for _ in range(5):
            assert len(await stream(host, int(port), api_key, 300)) == 300
        done_first.set()

    with trio.fail_after(120):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(slow)
            nursery.start_soon(quick)
            await done_first.wait()
            assert len(slow_words) == 0, "the slow reader should not be done before the quick ones"
    assert slow_words == [f"w{index}" for index in range(tokens)]
    assert rss_mib(mesh.gateway.pid) - before < GROWTH_MIB
