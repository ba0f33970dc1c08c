"""The local status socket: how `archi-node status` looks into a running Island.

A UNIX socket, mode 0600, in the Island's data directory: who may read the directory may look. One line
asks, one line of JSON answers; nothing can be changed through it.
"""

from __future__ import annotations

import hashlib
import os
import socket
import stat
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
import trio

from cargos.runtimes.base import RuntimeLoad

if TYPE_CHECKING:
    from node.state import IslandState

#: The kernel's limit for the path of a UNIX socket is 108 bytes with its end.
MAX_SOCKET_PATH: Final = 100
MAX_ANSWER_BYTES: Final = 4 * 1024 * 1024
REQUEST: Final = b"status\n"


class ControlError(OSError):
    """The status socket can not be made safely. The message says why and what to do."""


class NotRunning(Exception):
    """No Island answers at this data directory."""


def socket_path(data_dir: Path) -> Path:
    """Where the socket of the Island with this data directory lies."""
    path = data_dir.absolute() / "control.sock"
    if len(os.fsencode(path)) <= MAX_SOCKET_PATH:
        return path
    name = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"archipelag-{os.getuid()}" / f"{name}.sock"


class CargoSnapshot(msgspec.Struct, frozen=True):
    name: str
    version: str
    digest: str
    state: str
    detail: str
    done_bytes: int
    total_bytes: int
    load: RuntimeLoad | None


class PeerSnapshot(msgspec.Struct, frozen=True):
    peer: str
    name: str
    roles: tuple[str, ...]
    address: str
    state: str
    rtt_ms: float | None


class JobSnapshot(msgspec.Struct, frozen=True):
    job: str
    consumer: str
    state: str
    tokens: int
    age_s: float


class CounterSnapshot(msgspec.Struct, frozen=True):
    """Jobs and tokens since the start (not `node.jobs.JobCounters` itself, which loads the network)."""

    accepted: int
    rejected: int
    done: int
    failed: int
    cancelled: int
    tokens: int


class Snapshot(msgspec.Struct, frozen=True):
    """Everything that `archi-node status` shows. Times in seconds, rates in tokens/s."""

    name: str
    peer: str
    addresses: tuple[str, ...]
    uptime_s: float
    draining: bool
    cargos: tuple[CargoSnapshot, ...]
    peers: tuple[PeerSnapshot, ...]
    jobs: tuple[JobSnapshot, ...]
    counters: CounterSnapshot


async def serve_control(
    data_dir: Path, state: IslandState, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Answer status requests until cancelled. Raises ControlError."""
    path = socket_path(data_dir)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_folder(path, data_dir)
    path.unlink(missing_ok=True)
    listener = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        await listener.bind(str(path))
        path.chmod(0o600)
        listener.listen()

        async def answer(stream: trio.SocketStream) -> None:
            with trio.move_on_after(5):
                try:
                    await stream.receive_some(len(REQUEST))
                    await stream.send_all(msgspec.json.encode(snapshot(state)) + b"\n")
                except trio.BrokenResourceError:
                    pass  # whoever asked has gone

        task_status.started()
        await trio.serve_listeners(answer, [trio.SocketListener(listener)])
    finally:
        path.unlink(missing_ok=True)


async def ask_status(data_dir: Path) -> Snapshot:
    """The snapshot of the Island with this data directory. Raises NotRunning."""
    path = socket_path(data_dir)
    try:
        _check_folder(path, data_dir)
        with trio.fail_after(5):
            async with await trio.open_unix_socket(str(path)) as stream:
                await stream.send_all(REQUEST)
                answer = bytearray()
                async for chunk in stream:
                    answer += chunk
                    if len(answer) > MAX_ANSWER_BYTES:
                        break
        return msgspec.json.decode(bytes(answer), type=Snapshot)
    except ControlError as error:
        raise NotRunning(str(error)) from error
    except (OSError, trio.BrokenResourceError, trio.TooSlowError, msgspec.DecodeError) as error:
        raise NotRunning(f"no Island answers at {data_dir}; start one with: archi-node run") from error


def _check_folder(path: Path, data_dir: Path) -> None:
    """In a directory for everybody, another user may have made ours first, and would own what lies in it."""
    if path.parent == data_dir.absolute():
        return
    found = path.parent.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise ControlError(f"{path.parent}: other users can write there; choose a shorter --data-dir")


def snapshot(state: IslandState) -> Snapshot:
    jobs = state.jobs
    now = trio.current_time()
    return Snapshot(
        name=state.settings.name,
        peer=state.identity.peer,
        addresses=state.host.addresses,
        uptime_s=round(time.monotonic() - state.started, 1),
        draining=jobs.draining,
        cargos=tuple(
            CargoSnapshot(
                name=hosted.entry.manifest.name,
                version=hosted.entry.manifest.version,
                digest=digest,
                state=hosted.state,
                detail=hosted.detail,
                done_bytes=hosted.done_bytes,
                total_bytes=hosted.total_bytes,
                load=hosted.runtime.load() if hosted.runtime is not None else None,
            )
            for digest, hosted in state.cargos.items()
        ),
        peers=tuple(
            PeerSnapshot(
                peer=view.peer or "",
                name=view.name,
                roles=view.roles,
                address=view.address or "",
                state=view.state,
                rtt_ms=None if view.rtt_ns is None else round(view.rtt_ns / 1e6, 3),
            )
            for view in state.peers.table()
        ),
        jobs=tuple(
            JobSnapshot(
                job=job.job,
                consumer=job.consumer,
                state=job.state,
                tokens=job.tokens,
                age_s=round(now - job.started, 2),
            )
            for job in jobs.jobs.values()
        ),
        counters=msgspec.convert(jobs.counters, CounterSnapshot, from_attributes=True),
    )
