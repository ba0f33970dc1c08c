"""The local control socket: how commands look into a running node and ask it for things.

A UNIX socket, mode 0600, in the node's data directory: who may read the directory may ask. Each line is a
request, JSON such as {"method": "dht.find", "params": {"name": "..."}}, and each gets one line of JSON: {"ok":
...} or {"error": {"code": ..., "message": ...}}. Nothing asked here changes the node itself; with `dht.put` and
`dht.provide` it speaks for its owner in the overlay.
"""

from __future__ import annotations

import hashlib
import os
import socket
import stat
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
import structlog
import trio

from node.snapshot import Snapshot

P = TypeVar("P")
T = TypeVar("T")

#: The kernel's limit for the path of a UNIX socket is 108 bytes with its end.
MAX_SOCKET_PATH: Final = 100

#: A status of 64 Cargos and thousands of peers is 1 MiB.
MAX_ANSWER_BYTES: Final = 4 * 1024 * 1024

#: The largest request stores a record of 4 KiB.
MAX_REQUEST_BYTES: Final = 64 * 1024

#: Who runs the node asks from a terminal or a script.
MAX_CONNECTIONS: Final = 32

#: A request must come, and its answer be taken, within this time.
TALK_S: Final = 5.0

#: The longest that a request may take to answer: a lookup in a network with many dead peers.
ANSWER_S: Final = 60.0

_log = structlog.get_logger("control")


class ControlError(OSError):
    """The control socket can not be made safely. The message says why and what to do."""


class NotRunning(Exception):
    """No node answers at this data directory."""


class ControlRefused(Exception):
    """The node will not or can not do what it was asked. `code`: bad-request, unknown-method, failed,
    timeout.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class _Method:
    params: type[Any]
    handler: Callable[[Any], Awaitable[object]]


class ControlMethods:
    """What a node answers on its control socket."""

    def __init__(self) -> None:
        self._methods: dict[str, _Method] = {}

    def serve(self, name: str, params: type[P], handler: Callable[[P], Awaitable[object]]) -> None:
        """Answer `name`. `params` is a msgspec Struct; the handler returns what msgspec can write as JSON, or
        raises ControlRefused.
        """
        self._methods[name] = _Method(params, handler)

    async def answer_untrusted(self, line: bytes) -> object:
        """The answer to one request. Raises ControlRefused."""
        try:
            request = _request.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ControlRefused("bad-request", f"no request: {error}") from error
        method = self._methods.get(request.method)
        if method is None:
            known = ", ".join(sorted(self._methods))
            raise ControlRefused("unknown-method", f"there is no {request.method!r} here; there are: {known}")
        try:
            params = msgspec.json.decode(request.params, type=method.params)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ControlRefused("bad-request", f"{request.method}: {error}") from error
        with trio.move_on_after(ANSWER_S):
            return await method.handler(params)
        raise ControlRefused("timeout", f"{request.method} took longer than {ANSWER_S:g} s")


class _Request(msgspec.Struct, frozen=True):
    method: str
    params: msgspec.Raw = msgspec.Raw(b"{}")


class _Fault(msgspec.Struct, frozen=True):
    code: str
    message: str


class _Answer(msgspec.Struct, frozen=True):
    ok: msgspec.Raw = msgspec.Raw()
    error: _Fault | None = None


_request: Final = msgspec.json.Decoder(_Request)
_answer: Final = msgspec.json.Decoder(_Answer)


class NoParams(msgspec.Struct, frozen=True):
    """For methods that need to know nothing."""


def socket_path(data_dir: Path) -> Path:
    """Where the socket of the node with this data directory lies."""
    path = data_dir.absolute() / "control.sock"
    if len(os.fsencode(path)) <= MAX_SOCKET_PATH:
        return path
    name = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"archipelag-{os.getuid()}" / f"{name}.sock"


async def serve_control(
    data_dir: Path,
    methods: ControlMethods,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer requests until cancelled. Raises ControlError."""
    path = socket_path(data_dir)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_folder(path, data_dir)
    path.unlink(missing_ok=True)
    listener = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    room = trio.CapacityLimiter(MAX_CONNECTIONS)
    try:
        await listener.bind(str(path))
        path.chmod(0o600)
        listener.listen()

        async def serve(stream: trio.SocketStream) -> None:
            try:
                async with room:
                    await _serve_connection(stream, methods)
            except trio.BrokenResourceError:
                pass  # whoever asked has gone

        task_status.started()
        await trio.serve_listeners(serve, [trio.SocketListener(listener)])
    finally:
        path.unlink(missing_ok=True)


async def ask(data_dir: Path, method: str, params: object = None, *, result: type[T]) -> T:
    """Ask the node with this data directory. Raises NotRunning, ControlRefused."""
    path = socket_path(data_dir)
    line = msgspec.json.encode({"method": method, "params": {} if params is None else params}) + b"\n"
    if len(line) > MAX_REQUEST_BYTES:
        raise ControlRefused("bad-request", f"a request of {len(line)} bytes is too long")
    try:
        _check_folder(path, data_dir)
        with trio.fail_after(ANSWER_S + TALK_S):
            async with await trio.open_unix_socket(str(path)) as stream:
                await stream.send_all(line)
                answer = bytearray()
                while not answer.endswith(b"\n") and len(answer) <= MAX_ANSWER_BYTES:
                    chunk = await stream.receive_some()
                    if not chunk:
                        break
                    answer += chunk
        found = _answer.decode(bytes(answer))
        if bytes(found.ok):
            return msgspec.json.decode(found.ok, type=result)
    except ControlError as error:
        raise NotRunning(str(error)) from error
    except (OSError, trio.BrokenResourceError, trio.TooSlowError, msgspec.DecodeError) as error:
        raise NotRunning(f"no node answers at {data_dir}; start one with: archi-node run") from error
    if found.error is None:
        raise NotRunning(f"no node answers at {data_dir}; start one with: archi-node run")
    raise ControlRefused(found.error.code, found.error.message)


async def ask_status(data_dir: Path) -> Snapshot:
    """The snapshot of the Island with this data directory. Raises NotRunning."""
    try:
        return await ask(data_dir, "status", result=Snapshot)
    except ControlRefused as error:
        raise NotRunning(f"what runs at {data_dir} has no status: {error}") from error


async def _serve_connection(stream: trio.SocketStream, methods: ControlMethods) -> None:
    """Requests, one after the other."""
    waiting = bytearray()
    while True:
        with trio.move_on_after(TALK_S) as scope:
            while b"\n" not in waiting:
                if len(waiting) > MAX_REQUEST_BYTES:
                    await _say(
                        stream, _fault("bad-request", f"a request has at most {MAX_REQUEST_BYTES} bytes")
                    )
                    return
                chunk = await stream.receive_some()
                if not chunk:
                    return
                waiting += chunk
        if scope.cancelled_caught:
            return
        end = waiting.index(b"\n")
        line = bytes(waiting[:end])
        del waiting[: end + 1]
        try:
            answer: object = {"ok": await methods.answer_untrusted(line)}
        except ControlRefused as error:
            answer = _fault(error.code, str(error))
        except Exception:  # noqa: BLE001 - the outermost boundary: one request must not end the node
            _log.exception("a control request failed")
            answer = _fault("failed", "an error in the node, see its log")
        await _say(stream, answer)


def _fault(code: str, message: str) -> object:
    return {"error": _Fault(code, message)}


async def _say(stream: trio.SocketStream, answer: object) -> None:
    with trio.move_on_after(TALK_S):
        await stream.send_all(msgspec.json.encode(answer) + b"\n")


def _check_folder(path: Path, data_dir: Path) -> None:
    """In a directory for everybody, another user may have made ours first, and would own what lies in it."""
    if path.parent == data_dir.absolute():
        return
    found = path.parent.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise ControlError(f"{path.parent}: other users can write there; choose a shorter --data-dir")
