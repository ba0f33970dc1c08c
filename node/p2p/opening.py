"""How a host comes up and goes down: listeners, connections as descriptors allow, an end without leftovers."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Final

import structlog
import trio

from node.identity import Identity
from node.p2p.addresses import addresses_of
from node.p2p.host import Host, plain_errors
from node.p2p.limits import HostLimits
from node.p2p.sockets import allow_descriptors, endpoint_of, open_listeners

_log = structlog.get_logger("p2p")

#: Files and sockets of a process besides its connections: models, databases, HTTP, pipes.
_OTHER_DESCRIPTORS: Final = 512


@asynccontextmanager
async def open_host(
    identity: Identity,
    listen: Sequence[str] = ("/ip4/127.0.0.1/tcp/0",),
    *,
    limits: HostLimits = HostLimits(),  # noqa: B008 - frozen: one shared default is safe
) -> AsyncGenerator[Host]:
    """A host that listens. On leaving, listeners and connections are closed and all its tasks have ended.

    Raises ListenFailed (address in use, ...) or AddressInvalid.
    """
    limits = _within_descriptors(limits)
    listeners = await open_listeners(listen)
    endpoints = tuple(map(endpoint_of, listeners))
    addresses = tuple(text for endpoint in endpoints for text in addresses_of(endpoint, identity.peer))
    with plain_errors():
        async with trio.open_nursery() as connections:
            host = Host(identity, endpoints, addresses, limits, connections)
            try:
                async with trio.open_nursery() as handlers:
                    host.handlers.open(handlers)
                    if listeners:  # a host may only dial
                        handlers.start_soon(trio.serve_listeners, host.accept, listeners)
                    try:
                        yield host
                    finally:
                        host.closing = True
                        host.handlers.close()
                        handlers.cancel_scope.cancel()
            finally:
                with trio.CancelScope(shield=True):
                    for listener in listeners:
                        await listener.aclose()
                    await host.shut_down()
                connections.cancel_scope.cancel()


def _within_descriptors(limits: HostLimits) -> HostLimits:
    """As many connections as there may be descriptors for, beside those that others in this process need."""
    spare = 2 * limits.max_handshakes + _OTHER_DESCRIPTORS
    allowed = allow_descriptors(limits.max_connections + spare)
    most = max(allowed - spare, allowed // 4)
    if most >= limits.max_connections:
        return limits
    _log.warning(
        "few open files are allowed",
        allowed=allowed,
        connections=most,
        remedy="raise the hard limit (ulimit -Hn, LimitNOFILE) if this node shall serve many peers",
    )
    return replace(limits, max_connections=most)
