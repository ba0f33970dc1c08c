"""The status socket: who may ask, and what happens when either side breaks off."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import trio

from node import control
from node.control import (
    MAX_REQUEST_BYTES,
    MAX_SOCKET_PATH,
    ControlError,
    ControlMethods,
    ControlRefused,
    NoParams,
    NotRunning,
    ask,
    ask_status,
    serve_control,
    socket_path,
)
from node.identity import new_identity
from node.jobs import JobCounters
from node.snapshot import Snapshot, snapshot


class Words(msgspec.Struct):
    words: tuple[str, ...]


@pytest.fixture
def methods() -> ControlMethods:
    jobs = SimpleNamespace(draining=False, jobs={}, counters=JobCounters(accepted=3, tokens=7))
    state: Any = SimpleNamespace(
        settings=SimpleNamespace(name="isle"),
        identity=new_identity(),
        host=SimpleNamespace(addresses=("/ip4/127.0.0.1/tcp/1",)),
        peers=SimpleNamespace(table=lambda: ()),
        jobs=jobs,
        cargos={},
        started=0.0,
        overlay=None,
        affiliation=None,
        shards=None,
        pieces=None,
    )
    methods = ControlMethods()

    async def status(_: NoParams) -> Snapshot:
        return snapshot(state)

    async def turn(params: Words) -> Words:
        if not params.words:
            raise ControlRefused("failed", "nothing to turn")
        return Words(params.words[::-1])

    async def broken(_: NoParams) -> None:
        raise RuntimeError("a bug")

    methods.serve("status", NoParams, status)
    methods.serve("turn", Words, turn)
    methods.serve("broken", NoParams, broken)
    return methods


async def test_it_answers_and_leaves_nothing(tmp_path: Path, methods: ControlMethods) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_control, tmp_path, methods)
        path = socket_path(tmp_path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        for _ in range(3):
            snapshot = await ask_status(tmp_path)
        assert (snapshot.name, snapshot.counters.accepted, snapshot.counters.tokens) == ("isle", 3, 7)
        nursery.cancel_scope.cancel()
    assert not path.exists()
    with pytest.raises(NotRunning):
        await ask_status(tmp_path)


async def test_requests_and_what_they_are_refused_with(
    tmp_path: Path, methods: ControlMethods, capsys: pytest.CaptureFixture[str]
) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_control, tmp_path, methods)
        assert await ask(tmp_path, "turn", Words(("a", "b")), result=Words) == Words(("b", "a"))
        for method, params, code in (
            ("turn", Words(()), "failed"),
            ("turn", {"words": 7}, "bad-request"),
            ("nothing", {}, "unknown-method"),
            ("turn", Words(("x" * MAX_REQUEST_BYTES,)), "bad-request"),
            ("broken", {}, "failed"),
        ):
            with pytest.raises(ControlRefused) as refused:
                await ask(tmp_path, method, params, result=Words)
            assert refused.value.code == code
        assert "a control request failed" in capsys.readouterr().out  # the bug is told, the node lives
        stream = await trio.open_unix_socket(str(socket_path(tmp_path)))
        async with stream:
            await stream.send_all(b'{"method": "turn", "params": {"words": ["1"]}}\n[]\n')
            answers = b""
            while answers.count(b"\n") < 2:
                answers += await stream.receive_some()
        first, second, _ = answers.split(b"\n")
        assert first == b'{"ok":{"words":["1"]}}'
        assert b"bad-request" in second
        nursery.cancel_scope.cancel()


async def test_a_socket_that_a_killed_island_left(tmp_path: Path, methods: ControlMethods) -> None:
    async with trio.open_nursery() as nursery:
        listener = trio.socket.socket(trio.socket.AF_UNIX)
        await listener.bind(str(socket_path(tmp_path)))
        listener.close()
        with pytest.raises(NotRunning):
            await ask_status(tmp_path)
        await nursery.start(serve_control, tmp_path, methods)
        assert (await ask_status(tmp_path)).name == "isle"
        nursery.cancel_scope.cancel()


async def test_those_who_ask_and_go_do_no_harm(tmp_path: Path, methods: ControlMethods) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_control, tmp_path, methods)
        for said in (b"", b"status\n", b"x" * 100_000):
            stream = await trio.open_unix_socket(str(socket_path(tmp_path)))
            with suppress(trio.BrokenResourceError):  # it answered the beginning
                await stream.send_all(said)
            await stream.aclose()
        assert (await ask_status(tmp_path)).name == "isle"
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("answer", [b"", b'{"name": "half', b"[]\n"])
async def test_an_island_that_dies_while_it_answers(tmp_path: Path, answer: bytes) -> None:
    async def serve(stream: trio.SocketStream) -> None:
        if answer:
            await stream.receive_some(1)  # the rest of the request stays unread: closing resets
            await stream.send_all(answer)

    async with trio.open_nursery() as nursery:
        listener = trio.socket.socket(trio.socket.AF_UNIX)
        await listener.bind(str(socket_path(tmp_path)))
        listener.listen()
        nursery.start_soon(trio.serve_listeners, serve, [trio.SocketListener(listener)])
        for _ in range(5):
            with pytest.raises(NotRunning):
                await ask_status(tmp_path)
        nursery.cancel_scope.cancel()


async def test_a_long_path_goes_to_a_directory_that_only_we_can_write(
    tmp_path: Path, methods: ControlMethods, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    monkeypatch.setattr(control.tempfile, "gettempdir", lambda: str(shared))
    deep = tmp_path / ("d" * MAX_SOCKET_PATH)
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_control, deep, methods)
        folder = socket_path(deep).parent
        assert folder.parent == shared
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert (await ask_status(deep)).name == "isle"
        nursery.cancel_scope.cancel()
    folder.chmod(0o777)  # as another user could have made it before us
    with pytest.raises(ControlError, match="archipelag-"):
        await serve_control(deep, methods)
    with pytest.raises(NotRunning, match="archipelag-"):
        await ask_status(deep)
    assert os.getuid() == folder.stat().st_uid
