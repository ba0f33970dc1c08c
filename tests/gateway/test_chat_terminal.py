"""`archi chat` as a process at a terminal, and its client against broken servers."""

from __future__ import annotations

import argparse
import os
import pty
import select
import signal
import subprocess
import sys
import time
from contextlib import aclosing

import pytest
import trio

from gateway.chat import register, terminal_safe
from gateway.chat_client import ChatClient, ChatFailed, Closed, HandedOver, Text
from gateway.service import Failed, Released

KEY = "ak_test-key-of-the-gateway-tests"


class Terminal:
    """`archi chat` on a pseudo-terminal. Blocking: use from a thread."""

    def __init__(self, *arguments: str, key: str = KEY) -> None:
        self.fd, child = pty.openpty()
        environ = {**os.environ, "ARCHIPELAG_API_KEY": key, "NO_COLOR": "1", "TERM": "dumb"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gateway.chat", "chat", *arguments],
            stdin=child,
            stdout=child,
            stderr=child,
            env=environ,
            start_new_session=True,
        )
        os.close(child)
        self.seen = ""

    def read_until(self, text: str, timeout_s: float = 25) -> str:
        """What came up to and with `text`."""
        end = time.monotonic() + timeout_s
        while text not in self.seen:
            ready, _, _ = select.select([self.fd], [], [], max(0, end - time.monotonic()))
            assert ready, f"{text!r} did not come; there is {self.seen!r}"
            try:
                data = os.read(self.fd, 65536)
            except OSError:  # the other side is closed
                data = b""
            assert data, f"ended before {text!r}; there is {self.seen!r}"
            self.seen += data.decode()
        before, _, self.seen = self.seen.partition(text)
        return before + text

    def type(self, line: str) -> None:
        os.write(self.fd, line.encode() + b"\n")

    def ctrl_c(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def leave(self) -> int:
        """Ctrl-C at the prompt; again if it came before readline had begun to wait (which misses it)."""
        for _ in range(25):
            self.ctrl_c()
            try:
                self.process.wait(1)
                break
            except subprocess.TimeoutExpired:
                continue
        return self.wait()

    def wait(self) -> int:
        code = self.process.wait(25)
        os.close(self.fd)
        return code


async def test_a_conversation(gateway, service, scripts):
    started, go_on = trio.Event(), trio.Event()

    def script(work, index):
        if index == 0:
            yield from scripts.says("Hello", " \x1b[31mred\x07", "!")(work, index)
        elif index == 1:
            started.set()
            yield Released(0, (scripts.token(0, "one"),))
            yield scripts.placed("atoll", 1)
            yield Released(1, (scripts.token(1, " two"),))
            yield scripts.completed(2, hand_overs=1)
        elif index == 2:
            yield Released(0, (scripts.token(0, "endless"),))
            yield go_on
        else:
            yield Failed("exhausted", "all Islands are gone")

    service.script = script

    def talk() -> int:
        terminal = Terminal("--url", f"{gateway.url}/v1", "--system", "be brief")
        terminal.read_until("> ")
        terminal.type("hi")
        first = terminal.read_until("> ")
        assert "Hello [31mred!" in first
        assert "\x1b" not in first
        assert "reef | " in first
        assert "3 tokens" in first
        terminal.type("go on")
        second = terminal.read_until("> ")
        assert "one [goes on at atoll]  two" in second
        assert "1 hand-over" in second
        terminal.type("for ever")
        terminal.read_until("endless")
        terminal.ctrl_c()
        terminal.read_until("stopped")
        terminal.read_until("> ")
        terminal.type("/model")
        terminal.read_until("* tiny")
        terminal.type("/nonsense")
        terminal.read_until("/nonsense is no command")
        terminal.read_until("Ctrl-C stops")
        terminal.type("fail")
        terminal.read_until("error: 502: all Islands are gone")
        terminal.read_until("> ")
        terminal.type("again")
        terminal.read_until("all Islands are gone")
        terminal.type("/model other")
        terminal.read_until("now other")
        terminal.type("/reset")
        terminal.read_until("forgotten")
        terminal.type("x")
        terminal.read_until("There is: tiny")
        terminal.read_until("> ")
        return terminal.leave()

    assert await trio.to_thread.run_sync(talk) == 0
    first, second, third, fourth, fifth = ([m.content for m in work.prompt.messages] for work in service.works)
    assert first == ["be brief", "hi"]
    assert second == [*first, "Hello \x1b[31mred\x07!", "go on"]
    assert third == [*second, "one two", "for ever"]
    assert fourth == [*third, "endless", "fail"]  # what was stopped is remembered as far as it came
    assert fifth == [*third, "endless", "again"]  # what failed is not
    assert service.left[2] == "cancelled"


async def test_one_question(gateway):
    def talk() -> tuple[int, str]:
        terminal = Terminal("--url", f"{gateway.url}/api/v1/", "-p", "hi")
        said = terminal.read_until("\n")
        return terminal.wait(), said

    code, said = await trio.to_thread.run_sync(talk)
    assert (code, said.strip()) == (0, "Hello there!")


async def test_wrong_key(gateway, monkeypatch, capsys):
    monkeypatch.setenv("ARCHIPELAG_API_KEY", "ak_not-a-key-of-this-gateway")
    monkeypatch.setenv("ARCHIPELAG_URL", f"{gateway.url}/v1")
    parser = argparse.ArgumentParser()
    register(parser.add_subparsers())
    arguments = parser.parse_args(["chat", "-p", "hi"])
    assert await trio.to_thread.run_sync(arguments.handler, arguments) == 1
    said = capsys.readouterr().err
    assert "error: 401" in said
    assert "ARCHIPELAG_API_KEY" in said


async def test_nobody_there():
    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    port = listener.socket.getsockname()[1]
    await listener.aclose()
    with pytest.raises(ChatFailed, match="archi demo"):
        await ChatClient(f"http://127.0.0.1:{port}/v1", None).models()


async def test_client_events(gateway, service, scripts):
    def script(work, index):
        yield scripts.placed()
        yield Released(0, (scripts.token(0, "a"),))
        yield scripts.placed("atoll", 1)
        yield scripts.completed(1, finish="length", hand_overs=1)

    service.script = script
    client = ChatClient(f"{gateway.url}/v1", KEY)
    assert await client.models() == ["tiny"]
    async with aclosing(client.ask("tiny", [{"role": "user", "content": "hi"}])) as events:
        answering, *rest, closed = [event async for event in events]
    assert answering.island == "reef"
    assert rest == [Text("a"), HandedOver("atoll")]
    assert isinstance(closed, Closed)
    assert (closed.finish, closed.completion_tokens, closed.hand_overs) == ("length", 1, 1)


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"


async def consume(answer) -> None:
    async with aclosing(answer) as events:
        async for _ in events:
            pass


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (HEAD + b"data: {nonsense}\n\n", "something else"),
        (HEAD + b'data: {"choices": 5}\n\n', "something else"),
        (HEAD + b"data: \xff\n\n", "something else"),
        (HEAD + b"data: " + b"[" * 100_000 + b"\n\n", "something else"),
        (HEAD + b'data: {"choices":[]}\n\n', "in the middle"),
        (HEAD + b'data: {"error": {"message": "all gone"}}\n\n', "all gone"),
        (HEAD + b"x" * (1024 * 1024 + 1), "exceeds"),
        (b"HTTP/1.1 500 X\r\nconnection: close\r\n\r\n<html>", "no reason"),
        (b"HTTP/1.1 429 X\r\nconnection: close\r\n\r\n" + b"y" * (1024 * 1024 + 1), "exceeds"),
        (b"garbage\r\n\r\n", "no connection"),
        (b"", "no connection"),
    ],
)
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # httpx leaves its generators behind
async def test_broken_servers(answer, told):
    async def serve(stream):
        async with stream:
            request = b""
            while not request.endswith(b"}"):  # all of it: closing before would reset the connection
                request += await stream.receive_some()
            await stream.send_all(answer)

    async with trio.open_nursery() as nursery:
        listener = (await nursery.start(trio.serve_tcp, serve, 0))[0]
        port = listener.socket.getsockname()[1]
        with pytest.raises(ChatFailed, match=told):
            await consume(ChatClient(f"http://127.0.0.1:{port}/v1", KEY).ask("m", []))
        nursery.cancel_scope.cancel()


def test_terminal_safe():
    assert terminal_safe("a\x1b]0;x\x07\r\n\tb\x9b1m\u202e☃") == "a]0;x\n\tb1m☃"
