"""Pieces of a file over HTTP: Range requests (RFC 9110, section 14) for neighbouring pieces at once."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable, Iterable, Iterator
from http import HTTPStatus
from typing import Final

import httpx
import trio

from cargos.errors import CargoError, SourceFailed
from cargos.locator import HttpLocator, HubLocator
from cargos.manifest import CargoFile
from cargos.sources.http import (
    CONTENT_RANGE,
    USER_AGENT,
    Interrupted,
    Speedometer,
    Target,
    check_status,
    explain,
    follow,
    token_for,
)
from cargos.sources.settings import FetchSettings
from protocol.pieces import HASH_BYTES

#: Pieces asked for in one request: a connection that breaks costs little, and one per piece would wait for
#: the server each time.
MAX_RUN_PIECES: Final = 64
#: What is beside the file with its piece list.
LIST_SUFFIX: Final = ".pieces"


async def fetch_list(locator: HttpLocator | HubLocator, file: CargoFile, settings: FetchSettings) -> bytes:
    """What the server has as piece list of the file; not checked. Raises SourceFailed."""
    size = file.pieces * HASH_BYTES
    received = bytearray()

    async def take(data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        received.extend(data)
        if len(received) > size:
            raise SourceFailed(f"the piece list has more than {size} bytes")

    target = target_of(locator, settings, LIST_SUFFIX)
    async with _client(target, settings) as client:
        await _get(client, target, None, take, settings)
    if len(received) != size:
        raise SourceFailed(f"the piece list has {len(received)} bytes, not {size}")
    return bytes(received)


async def fetch_pieces(
    locator: HttpLocator | HubLocator,
    file: CargoFile,
    wanted: Iterable[int],
    put: Callable[[int, bytes], Awaitable[None]],
    settings: FetchSettings,
) -> None:
    """Pass each of these pieces to `put`, which checks them and may raise SourceFailed, StoreUnusable.

    Raises SourceFailed if the server does not know Range, has another file, or fails too often.
    """
    target = target_of(locator, settings)
    left = sorted(wanted)
    failures = 0
    async with _client(target, settings) as client:
        while left:
            run = next(_runs(left))
            taken = _Pieces(file, run, put)
            try:
                await _get(
                    client,
                    target,
                    (run[0] * file.piece_bytes, taken.end, file.size_bytes),
                    taken.take,
                    settings,
                )
                taken.finish()
            except Interrupted as error:
                failures = 1 if taken.done else failures + 1
                if failures >= settings.attempts:
                    raise SourceFailed(f"{error} ({failures} attempts)", "What came so far is kept.") from error
                await trio.sleep(max(error.wait_s, settings.backoff_s * 2 ** (failures - 1)))
            left = left[taken.done :]


class _Pieces:
    """Cuts a stream of bytes into the pieces of a run."""

    def __init__(self, file: CargoFile, run: list[int], put: Callable[[int, bytes], Awaitable[None]]) -> None:
        self._file = file
        self._run = run
        self._put = put
        self._buffer = bytearray()
        self.done = 0

    @property
    def end(self) -> int:
        return min((self._run[-1] + 1) * self._file.piece_bytes, self._file.size_bytes)

    @property
    def complete(self) -> bool:
        return self.done == len(self._run)

    @property
    def next(self) -> int:
        return self._run[self.done]

    def finish(self) -> None:
        """The server says that this was all. Raises Interrupted if it was not."""
        if not self.complete:
            raise Interrupted(f"cut off in piece {self.next}")

    async def take(self, data: bytes) -> None:
        self._buffer += data
        while not self.complete:
            size = min(self._file.piece_bytes, self._file.size_bytes - self.next * self._file.piece_bytes)
            if len(self._buffer) < size:
                return
            piece = bytes(self._buffer[:size])
            del self._buffer[:size]
            await self._put(self.next, piece)
            self.done += 1
        if self._buffer:
            raise SourceFailed("the server sends more than was asked for")


def _runs(pieces: list[int]) -> Iterator[list[int]]:
    """Neighbours together."""
    for _, group in itertools.groupby(enumerate(pieces), lambda pair: pair[1] - pair[0]):
        run = [piece for _, piece in group]
        for start in range(0, len(run), MAX_RUN_PIECES):
            yield run[start : start + MAX_RUN_PIECES]


def target_of(locator: HttpLocator | HubLocator, settings: FetchSettings, suffix: str = "") -> Target:
    """Where to ask. `suffix` is added to the file's path."""
    if isinstance(locator, HttpLocator):
        url = httpx.URL(locator.url)
        return Target(str(url.copy_with(path=url.path + suffix)), None, locator.loopback)
    url = str(httpx.URL(locator.url(settings.hub_endpoint) + suffix))
    return Target(url, token_for(url, settings.hub_token), settings.hub_is_loopback)


def _client(target: Target, settings: FetchSettings) -> httpx.AsyncClient:
    timeout = httpx.Timeout(settings.stall_timeout_s, connect=settings.connect_timeout_s)
    return httpx.AsyncClient(timeout=timeout, verify=httpx.create_ssl_context(), trust_env=not target.loopback)


async def _get(
    client: httpx.AsyncClient,
    target: Target,
    span: tuple[int, int, int] | None,
    take: Callable[[bytes], Awaitable[None]],
    settings: FetchSettings,
) -> None:
    """One request. `span`: first byte, end, size of the whole file; None: all of it.

    Raises Interrupted (the next may do better), SourceFailed, and what `take` does.
    """
    headers = {"Accept-Encoding": "identity", "User-Agent": USER_AGENT}
    if span is not None:
        headers["Range"] = f"bytes={span[0]}-{span[1] - 1}"
    if target.token is not None:
        headers["Authorization"] = f"Bearer {target.token}"
    try:
        response = await follow(client, client.build_request("GET", target.url, headers=headers), target)
        try:
            _admit(response, span)
            await _receive(response, take, Speedometer(settings))
        finally:
            with trio.CancelScope(shield=True):  # closing a socket does not wait for the peer
                await response.aclose()
    except httpx.TransportError as error:
        raise explain(error) from error
    except httpx.InvalidURL as error:
        raise SourceFailed("not a URL") from error


def _admit(response: httpx.Response, span: tuple[int, int, int] | None) -> None:
    if span is None:
        if response.status_code != HTTPStatus.OK:
            check_status(response)
        return
    if response.status_code == HTTPStatus.OK:
        raise SourceFailed("the server does not know Range", "Only the whole file is to be had there.")
    if response.status_code != HTTPStatus.PARTIAL_CONTENT:
        check_status(response)
    found = CONTENT_RANGE.match(response.headers.get("content-range", ""))
    first, end, size = span
    if found is None or (int(found[1]), int(found[2])) != (first, end - 1):
        raise SourceFailed("the server sent another range than was asked for")
    if found[3] != "*" and int(found[3]) != size:
        raise SourceFailed(f"the server's file has {found[3]} bytes, not {size}")
    if response.headers.get("content-encoding", "identity").lower() != "identity":
        raise SourceFailed("the server encodes the content although it was asked not to")


async def _receive(
    response: httpx.Response, take: Callable[[bytes], Awaitable[None]], speed: Speedometer
) -> None:
    """As in `sources.http`: to stop early, the read itself is cancelled."""
    failure: Exception | None = None
    with trio.CancelScope() as reading:
        async for chunk in response.aiter_raw():
            if failure is not None:
                continue
            try:
                await take(chunk)
                speed.count(len(chunk))
            except (CargoError, Interrupted) as error:
                failure = error
                reading.cancel()
    if failure is not None:
        raise failure
