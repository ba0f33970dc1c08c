"""The HTTP floor under the endpoints: bounded bodies, whole responses, and the outermost boundary.

Plain ASGI (Starlette's types) rather than its Request and Response: a token passes through here, and each layer
would cost it time.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Final, cast
from urllib.parse import quote

import structlog
import trio
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.metrics import GatewayMetrics
from gateway.openai.errors import ApiError, internal_error
from protocol.limits import MAX_OFFER_BYTES

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

Header = tuple[bytes, bytes]

JSON_TYPE: Final = b"application/json"

#: After a refusal before the body was read, this much of it is read and dropped so that the client, still
#: sending, sees the answer and not a reset connection (a lingering close, as in nginx).
LINGER_BYTES: Final = 16 * 1024 * 1024
LINGER_S: Final = 2.0

#: Characters of an Island's name that may stand in a header as they are.
_HEADER_SAFE: Final = " !#$&'()*+,-./:;=?@[]^_`{|}~"


def _version() -> str:
    try:
        return metadata.version("archipelag")
    except metadata.PackageNotFoundError:  # run from a checkout
        return "unknown"


@dataclass(frozen=True, slots=True)
class HttpSettings:
    """What an operator may set.

    `requests_per_minute`: per key, for keys without their own figure; 0 switches the limit off.
    `keep_alive_s`: silence in a begun stream after which a comment is sent, under the 15 to 60 s after which
    proxies drop idle connections. `cors_origins`: browsers' origins that may call; none by default.
    """

    requests_per_minute: int = 100
    max_body_bytes: int = MAX_OFFER_BYTES
    body_timeout_s: float = 30.0
    keep_alive_s: float = 10.0
    cors_origins: tuple[str, ...] = ()
    metrics_need_key: bool = False
    version: str = field(default_factory=_version)


@dataclass(slots=True)
class Exchange:
    """One request and the way to answer it. `body_read`: nothing of its body is left to receive."""

    scope: Scope
    receive: Receive
    send: Send
    body_read: bool = False

    def header(self, name: bytes) -> str | None:
        """The first header of this (lower-case) name."""
        for key, value in cast("Iterable[Header]", self.scope["headers"]):
            if key == name:
                return value.decode("latin-1")
        return None


async def read_body_untrusted(exchange: Exchange, *, limit: int, timeout_s: float) -> bytes | None:
    """The request's body; None if the client left. Raises ApiError: 413 over `limit`, 408 over `timeout_s`.

    Never holds more than `limit` bytes and one chunk.
    """
    too_large = ApiError(413, f"The body exceeds {limit} bytes.", code="request_too_large")
    announced = exchange.header(b"content-length")
    if announced is not None and announced.isdigit() and int(announced[:20]) > limit:
        raise too_large
    chunks: list[bytes] = []
    size = 0
    with trio.move_on_after(timeout_s):
        while True:
            message = await exchange.receive()
            if message["type"] != "http.request":
                return None
            exchange.body_read = not message.get("more_body", False)
            chunk = cast("bytes", message.get("body", b""))
            size += len(chunk)
            if size > limit:
                raise too_large
            chunks.append(chunk)
            if exchange.body_read:
                return b"".join(chunks)
    raise ApiError(408, f"The body did not arrive within {timeout_s:g} s.", code="request_timeout")


def header_safe(text: str) -> str:
    """A remote's words for a header or an SSE comment: printable ASCII, the rest percent-encoded."""
    return quote(text, safe=_HEADER_SAFE)


def encode_headers(headers: Iterable[tuple[str, str]]) -> list[Header]:
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]


async def send_whole(
    send: Send, status: int, body: bytes, *, content_type: bytes = JSON_TYPE, headers: Iterable[Header] = ()
) -> None:
    await send(_start(status, body, content_type, headers))
    await send({"type": "http.response.body", "body": body})


async def send_error(exchange: Exchange, error: ApiError, *, headers: Iterable[Header] = ()) -> None:
    """The error as a response; then what is left of the request's body is drained, within bounds."""
    body = error.body()
    await exchange.send(_start(error.status, body, JSON_TYPE, [*headers, *encode_headers(error.headers)]))
    if not exchange.body_read:
        await exchange.send({"type": "http.response.body", "body": body, "more_body": True})
        await _drain(exchange)
        body = b""
    await exchange.send({"type": "http.response.body", "body": body})


async def _drain(exchange: Exchange) -> None:
    left = LINGER_BYTES
    with trio.move_on_after(LINGER_S):
        while left > 0:
            message = await exchange.receive()
            if message["type"] != "http.request" or not message.get("more_body", False):
                return
            left -= len(cast("bytes", message.get("body", b"")))


def _start(status: int, body: bytes, content_type: bytes, headers: Iterable[Header]) -> Message:
    length = str(len(body)).encode()
    return {
        "type": "http.response.start",
        "status": status,
        "headers": [(b"content-type", content_type), (b"content-length", length), *headers],
    }


class Boundary:
    """The outermost layer: a request id, metrics, and no exception past it.

    `routes` maps paths to the route names that metrics know; anything else counts as 'other'.
    """

    def __init__(self, app: ASGIApp, *, metrics: GatewayMetrics, routes: Mapping[str, str]) -> None:
        self._app = app
        self._metrics = metrics
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"req_{secrets.token_hex(16)}"
        scope["request_id"] = request_id
        own = [(b"x-request-id", request_id.encode()), (b"x-content-type-options", b"nosniff")]
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = cast("int", message["status"])
                message["headers"] = [*cast("list[Header]", message["headers"]), *own]
            await send(message)

        path = cast("str", scope["path"])
        route = self._routes.get(path) or ("/v1/models/{id}" if "/models/" in path else "other")
        with self._metrics.request(route) as ended:
            try:
                await self._app(scope, receive, send_with_id)
            except Exception:  # the outermost task boundary: a bug here must end one request, not the server
                log.exception("request failed", request_id=request_id, route=route)
                if status == 0:
                    body = internal_error().body()
                    await send_whole(send_with_id, 500, body)
                else:
                    raise  # the response has begun: let the server break the connection
            finally:
                ended(status)


def not_found(request: Request, error: Exception) -> Response:
    """The router's 404 and 405 in OpenAI's shape."""
    assert isinstance(error, HTTPException)  # registered for it alone  # noqa: S101
    if error.status_code == 404:
        message = f"Invalid URL ({request.method} {header_safe(request.url.path)[:200]})."
        shown = ApiError(404, message, code="unknown_url")
    else:
        allowed = (error.headers or {}).get("Allow", "another method")
        shown = ApiError(
            error.status_code,
            f"{request.method} is not allowed here, only {allowed}.",
            code="method_not_allowed",
        )
    return Response(
        shown.body(), status_code=error.status_code, media_type="application/json", headers=error.headers
    )


class Endpoint:
    """An ASGI application of one function, whose ApiErrors become responses."""

    def __init__(self, handle: Callable[[Exchange], Awaitable[None]]) -> None:
        self._handle = handle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send)
        try:
            await self._handle(exchange)
        except ApiError as error:
            await send_error(exchange, error)
