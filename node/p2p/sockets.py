"""Opening TCP sockets: listeners, and dials that leave from the port that a listener has.

A NAT maps our (address, port) to a public one. Only a dial from the listening port makes the mapping that
others can dial back or punch through, so the two must share a port. On Linux that takes SO_REUSEPORT on both
sockets; a listener gets it only after it has bound without it, so that a second program on the same port is
still an error and not a silent competitor for our connections.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import resource
import socket
from collections.abc import Generator, Sequence
from typing import Final, TypeAlias, cast

import trio

from node.p2p.addresses import Address, parse_address
from node.p2p.errors import AddressInvalid, ListenFailed

Endpoint: TypeAlias = tuple[str, int]
"""IP address and TCP port."""

#: What the kernel keeps of connections that we have not accepted yet; Linux caps it at its own somaxconn.
_LISTEN_BACKLOG: Final = 512


async def open_listeners(listen: Sequence[str]) -> list[trio.SocketListener]:
    """One or more sockets for each address. Raises ListenFailed or AddressInvalid."""
    listeners: list[trio.SocketListener] = []
    try:
        for text in listen:
            address = _listenable(text)
            try:
                opened = await trio.open_tcp_listeners(address.port, host=address.host, backlog=_LISTEN_BACKLOG)
                listeners += opened
                for listener in opened:
                    listener.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            except OSError as error:
                raise ListenFailed(_advice(text, error)) from error
    except BaseException:
        for listener in listeners:
            await listener.aclose()
        raise
    return listeners


def allow_descriptors(wanted: int) -> int:
    """Have the system let this process open so many files and sockets, as far as it does. What it allows now.

    The usual limit of a login is 1024: without more, connections would take what models and databases need.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    except (OSError, ValueError):  # some systems have lower limits than they say
        return soft
    return allowed


def endpoint_of(listener: trio.SocketListener) -> Endpoint:
    """Where it is bound."""
    return cast("Endpoint", listener.socket.getsockname()[:2])


def remote_host(stream: trio.SocketStream) -> str:
    """The IP address at the other end; empty if it has gone."""
    try:
        return str(stream.socket.getpeername()[0])
    except OSError:
        return ""


class PortBusy(Exception):
    """A connection between the listening port and that address exists or has just ended."""


async def dial(target: Address, source: Endpoint | None = None) -> trio.SocketStream:
    """A connection to this address, leaving from `source` (see `source_for`) if given.

    Raises OSError, and PortBusy if it can not leave from `source`.
    """
    if source is None:
        return await trio.open_tcp_stream(target.host, target.port)
    sock = trio.socket.socket(
        socket.AF_INET6 if ":" in target.host else socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP
    )
    try:
        # Without SO_REUSEADDR the port could not be listened on again while this connection fades away.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        await sock.bind(source)
        await sock.connect((target.host, target.port))
    except OSError as error:
        sock.close()
        if error.errno in {errno.EADDRINUSE, errno.EADDRNOTAVAIL}:
            raise PortBusy from error
        raise
    except BaseException:
        sock.close()
        raise
    return trio.SocketStream(sock)


def source_for(target: Address, listening: Sequence[Endpoint]) -> Endpoint | None:
    """The listener whose port a dial to `target` may leave from; None if there is none, and for names."""
    if target.kind not in {"ip4", "ip6"}:
        return None
    goal = ipaddress.ip_address(target.host)
    for host, port in listening:
        bound = ipaddress.ip_address(host.partition("%")[0])
        if bound.version != goal.version:
            continue
        if bound.is_unspecified or bound.is_loopback == goal.is_loopback:
            return (host, port)
    return None


def explain(error: OSError) -> str:
    """The system's words; trio reports several attempts as a group that caused a plain OSError."""
    causes = [leaf for leaf in leaves(error.__cause__ or error) if isinstance(leaf, OSError)]
    first = causes[0] if causes else error
    if first.errno is not None and first.errno > 0:
        return os.strerror(first.errno).lower()  # trio repeats the address in `strerror`
    return (first.strerror or str(first) or type(first).__name__).lower()


def leaves(error: BaseException) -> Generator[BaseException]:
    """The errors inside the groups that nurseries make."""
    if isinstance(error, BaseExceptionGroup):
        for inner in cast("BaseExceptionGroup[BaseException]", error).exceptions:
            yield from leaves(inner)
    else:
        yield error


def _listenable(text: str) -> Address:
    address = parse_address(text)
    if address.relay is not None:
        raise AddressInvalid(f"{text}: at a relay one reserves a place, one does not listen")
    return address


def _advice(text: str, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"{text}: another program listens there; choose another port, or port 0 for any"
    if error.errno == errno.EACCES:
        return f"{text}: this user may not listen there; choose a port above 1023"
    return f"{text}: {(error.strerror or str(error)).lower()}"
