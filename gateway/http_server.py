"""The HTTP server: hypercorn's trio worker, with what its defaults leave open closed."""

from __future__ import annotations

import socket
import sys
from collections.abc import Awaitable, Callable
from typing import Any, Final, cast

import trio
from hypercorn.config import Config
from hypercorn.trio import serve  # pyright: ignore[reportUnknownVariableType]  # its WSGI half is untyped
from hypercorn.typing import ASGIFramework
from starlette.types import ASGIApp

#: A consumer that takes nothing for this long while data waits for it is gone. Hypercorn shields its writes
#: from cancellation, so only the kernel can end one: without this a stalled reader would hold its job's
#: task, and the shutdown, for ever.
STALLED_WRITE_MS: Final = 60_000

#: Idle connections are kept this long: longer than openai-python's pool keeps them (5 s), so that the
#: client closes first.
IDLE_CONNECTION_S: Final = 30.0

#: How long running requests may go on after the order to shut down.
GRACE_S: Final = 3.0

BACKLOG: Final = 1024


def open_listener(host: str, port: int, *, stalled_write_ms: int = STALLED_WRITE_MS) -> socket.socket:
    """A listening TCP socket; port 0 takes any free one. Raises OSError (address in use, no permission)."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if sys.platform == "linux":  # accepted sockets inherit it
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, stalled_write_ms)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


async def serve_http(
    app: ASGIApp,
    listener: socket.socket,
    *,
    shutdown_trigger: Callable[[], Awaitable[None]] | None = None,
    task_status: trio.TaskStatus[Any] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until cancelled or `shutdown_trigger` returns. Takes the listener over."""
    config = Config()
    config.bind = [f"fd://{listener.detach()}"]
    config.backlog = BACKLOG
    config.include_server_header = False
    config.accesslog = None
    config.errorlog = None
    config.keep_alive_timeout = IDLE_CONNECTION_S
    config.keep_alive_max_requests = 1_000_000
    config.graceful_timeout = GRACE_S
    await serve(
        cast("ASGIFramework", app),
        config,
        shutdown_trigger=shutdown_trigger or trio.sleep_forever,
        task_status=task_status,
        mode="asgi",
    )
