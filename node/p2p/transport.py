"""Bytes over a TCP socket, without detours.

A tiny frame must not cost a task switch: `send_nowait` hands it to the kernel from the writer's own task,
and only what the kernel does not take is left to wait for. Cancelling a wait loses no byte on either path,
because what was taken is known before any wait starts.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Final, Protocol

import trio

from node.p2p.errors import ChannelBroken
from protocol.ids import PeerId

#: One recv at first; grows while the socket is full, so that bulk needs few calls and idle little memory.
_SMALL_READ_BYTES: Final = 16 * 1024
_LARGE_READ_BYTES: Final = 256 * 1024

#: Of a connection for bulk: two records. The kernel would take megabytes otherwise.
_UNSENT_BYTES: Final = 128 * 1024
_NOTSENT_LOWAT: Final[int | None] = getattr(socket, "TCP_NOTSENT_LOWAT", None)
_INET: Final = frozenset({socket.AF_INET, socket.AF_INET6})


@dataclass(frozen=True, slots=True)
class Path:
    """How a connection reaches its peer."""

    relay: PeerId | None = None
    """Who carries the bytes; None: a socket of ours."""

    from_listener: bool = False
    """We dialled from the port that we listen on, so the peer sees us where others may find us."""

    inbound: bool = False
    """The peer came to us."""

    bulk: bool = False
    """For tensors and pieces of files only (node/p2p/bulk.py)."""

    punched: bool = False
    """Through a hole in the peer's NAT, which lets in no second one."""


class Transport(Protocol):
    """A reliable byte pipe with one reader and one writer."""

    @property
    def remote(self) -> str:
        """Whom it leads to, for logs."""
        ...

    def send_nowait(self, data: bytes | memoryview) -> int:
        """How many leading bytes were taken, without waiting. Raises ChannelBroken."""
        ...

    async def wait_writable(self) -> None:
        """Return when `send_nowait` may take more. Raises ChannelBroken."""
        ...

    async def receive_some(self) -> bytes:
        """At least one byte, or b"" at the end. Raises ChannelBroken."""
        ...

    def close(self) -> None:
        """At once and for good; wakes whoever waits."""
        ...


class SocketTransport:
    """A connected stream socket."""

    def __init__(self, stream: trio.SocketStream) -> None:
        # trio's own wrapper adds a scheduler pass to each call that would not have had to wait.
        sock = socket.socket(fileno=stream.socket.detach())
        sock.setblocking(False)
        if sock.family in _INET:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket: Final = sock
        self._open = True
        self._more_likely = False
        self._read_bytes = _SMALL_READ_BYTES
        try:
            host, port, *_ = sock.getpeername()
            self.remote = f"{host}:{port}"
        except OSError:
            self.remote = "(gone)"

    def send_nowait(self, data: bytes | memoryview) -> int:
        try:
            return self._socket.send(data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            raise ChannelBroken(_words(error)) from error

    async def wait_writable(self) -> None:
        self._check_open()
        try:
            await trio.lowlevel.wait_writable(self._socket)
        except (trio.ClosedResourceError, OSError) as error:
            raise ChannelBroken("the connection was closed here") from error

    def limit_unsent(self) -> None:
        """Keep no more than a little in the kernel that has not left yet, so that what is small and urgent
        waits behind little, however slow the way out is.
        """
        if self._open and _NOTSENT_LOWAT is not None and self._socket.family in _INET:
            self._socket.setsockopt(socket.IPPROTO_TCP, _NOTSENT_LOWAT, _UNSENT_BYTES)

    async def receive_some(self) -> bytes:
        while True:
            await self._wait_readable()
            wanted = self._read_bytes
            try:
                data = self._socket.recv(wanted)
            except (BlockingIOError, InterruptedError):
                self._more_likely = False
                continue
            except OSError as error:
                raise ChannelBroken(_words(error)) from error
            self._more_likely = len(data) == wanted
            self._read_bytes = _LARGE_READ_BYTES if self._more_likely else _SMALL_READ_BYTES
            return data

    async def _wait_readable(self) -> None:
        if self._more_likely:
            await trio.lowlevel.checkpoint()
        self._check_open()  # trio never forgets a task that waits for a closed socket's number, -1
        if self._more_likely:
            return
        try:
            await trio.lowlevel.wait_readable(self._socket)
        except (trio.ClosedResourceError, OSError) as error:
            raise ChannelBroken("the connection was closed here") from error

    def _check_open(self) -> None:
        if not self._open:
            raise ChannelBroken("the connection was closed here")

    def close(self) -> None:
        if self._open:
            self._open = False
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()


def _words(error: OSError) -> str:
    return (error.strerror or type(error).__name__).lower()


async def send_all(transport: Transport, data: bytes) -> None:
    """All of it. Raises ChannelBroken. Not for use beside another sender."""
    view = memoryview(data)
    while True:
        view = view[transport.send_nowait(view) :]
        if not view:
            return
        await transport.wait_writable()


class ExactReader:
    """Reads exact amounts, however small the pieces in which they come (own buffer, no retry count)."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self.buffer = bytearray()

    async def read_exactly(self, size: int) -> bytes:
        """Raises ChannelBroken if the pipe ends before."""
        while len(self.buffer) < size:
            await self.fill()
        data = bytes(self.buffer[:size])
        del self.buffer[:size]
        return data

    async def fill(self) -> None:
        """At least one more byte into `buffer`. Raises ChannelBroken at the end."""
        chunk = await self._transport.receive_some()
        if not chunk:
            raise ChannelBroken("the other side closed the connection")
        self.buffer += chunk
