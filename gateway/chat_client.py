"""A small streaming client of the OpenAI API, for `archi chat`.

Works with any server that speaks it; from an archipelag gateway it also hears of hand-overs and speeds. What
comes from the network is decoded here and never trusted to be what it should.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Final, TypeAlias

import httpx
import msgspec
from msgspec import Meta

#: Silence after which the server is given up. A model that must be loaded first takes a while.
READ_TIMEOUT_S: Final = 300.0
CONNECT_TIMEOUT_S: Final = 10.0

#: A list of models is at hand at once; who is silent for so long is something else than an API.
MODELS_TIMEOUT_S: Final = 15.0

#: Longest line of the event stream that is held; a chunk is a few hundred bytes.
MAX_LINE_BYTES: Final = 1024 * 1024

#: Body of an error that is read, and of the list of models.
MAX_BODY_BYTES: Final = 1024 * 1024

NO_OPTIONS: Final[Mapping[str, object]] = MappingProxyType({})


class ChatFailed(Exception):
    """No answer, or not the whole one. The text is for the person at the terminal."""


@dataclass(frozen=True, slots=True)
class Answering:
    """The first bytes are there. `island` is empty if the server is no archipelag gateway."""

    island: str


@dataclass(frozen=True, slots=True)
class Text:
    text: str


@dataclass(frozen=True, slots=True)
class HandedOver:
    """Another Island goes on from here."""

    island: str


@dataclass(frozen=True, slots=True)
class Closed:
    """The end. Figures are None where the server did not give them. `stages`: NAME FIRST-LAST of each Island of
    a chain; `stages_lost`: those that were replaced on the way.
    """

    finish: str
    completion_tokens: int | None
    tokens_per_second: float | None
    hand_overs: int | None
    island: str
    ttft_ms: float | None
    stages: tuple[str, ...] = ()
    stages_lost: int = 0


ChatEvent: TypeAlias = Answering | Text | HandedOver | Closed


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta = msgspec.field(default_factory=_Delta)
    finish_reason: str | None = None


class _OwnStage(msgspec.Struct):
    island: str
    first_layer: int
    last_layer: int


class _Own(msgspec.Struct):
    island: str | None = None
    hand_overs: int | None = None
    tokens_per_second: float | None = None
    ttft_ms: float | None = None
    stages: Annotated[list[_OwnStage], Meta(max_length=64)] = []
    stages_lost: int = 0


class _Usage(msgspec.Struct):
    completion_tokens: int | None = None
    archipelag: _Own = msgspec.field(default_factory=_Own)


class _Error(msgspec.Struct):
    message: str = "no message"


class _Chunk(msgspec.Struct):
    choices: Annotated[list[_Choice], Meta(max_length=64)] = []
    usage: _Usage | None = None
    error: _Error | None = None


class _ErrorBody(msgspec.Struct):
    error: _Error


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


_CHUNK: Final = msgspec.json.Decoder(_Chunk)
_ERROR: Final = msgspec.json.Decoder(_ErrorBody)
_MODELS: Final = msgspec.json.Decoder(_Models)


class ChatClient:
    """One conversation partner. `url` ends in /v1 (or /api/v1)."""

    def __init__(self, url: str, key: str | None) -> None:
        self.url: Final = url.rstrip("/")
        self._headers = {"authorization": f"Bearer {key}"} if key else {}

    def _open(self, read_timeout_s: float = READ_TIMEOUT_S) -> httpx.AsyncClient:
        timeout = httpx.Timeout(read_timeout_s, connect=CONNECT_TIMEOUT_S)
        return httpx.AsyncClient(headers=self._headers, timeout=timeout)

    async def models(self) -> list[str]:
        """Names of the models that can be asked for. Raises ChatFailed."""
        try:
            async with (
                self._open(MODELS_TIMEOUT_S) as client,
                client.stream("GET", f"{self.url}/models") as response,
            ):
                body = await _bounded_body(response)
                if response.status_code != 200:
                    raise ChatFailed(self._refusal_untrusted(response.status_code, body))
                return [model.id for model in _MODELS.decode(body).data]
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ChatFailed(self._unreachable(error)) from error
        except msgspec.DecodeError as error:
            raise ChatFailed(f"{self.url} does not answer like an OpenAI server: {error}") from error

    async def ask(
        self, model: str, messages: Sequence[dict[str, str]], options: Mapping[str, object] = NO_OPTIONS
    ) -> AsyncGenerator[ChatEvent]:
        """The answer as it comes; ends with `Closed`. `options`: more fields of the request. Raises ChatFailed.

        An async generator: close it (or leave its `aclosing`) to stop the answer on the server.
        """
        body = {
            **options,
            "model": model,
            "messages": list(messages),
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        answering = False
        try:
            async with (
                self._open() as client,
                client.stream("POST", f"{self.url}/chat/completions", json=body) as response,
            ):
                if response.status_code != 200:
                    refusal = await _bounded_body(response)
                    raise ChatFailed(self._refusal_untrusted(response.status_code, refusal))
                answering = True
                yield Answering(response.headers.get("x-archipelag-island", ""))
                reader = EventReader()
                async for data in response.aiter_bytes():
                    for event in reader.feed_untrusted(data):
                        yield event
                if not reader.done:
                    raise ChatFailed("the connection ended in the middle of the answer")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            if answering:
                raise ChatFailed(f"the connection broke in the middle of the answer: {error}") from error
            raise ChatFailed(self._unreachable(error)) from error

    def _unreachable(self, error: Exception) -> str:
        reason = str(error) or type(error).__name__
        return f"no connection to {self.url} ({reason}). Is the gateway running? `archi demo` starts one."

    def _refusal_untrusted(self, status: int, body: bytes) -> str:
        try:
            message = _ERROR.decode(body).error.message
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            message = "the server gave no reason"
        if status == 401:
            message += " Set ARCHIPELAG_API_KEY or give --key."
        return f"{status}: {message}"


async def _bounded_body(response: httpx.Response) -> bytes:
    body = b""
    async for chunk in response.aiter_bytes():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise ChatFailed(f"the answer exceeds {MAX_BODY_BYTES} bytes")
    return body


class EventReader:
    """Server-sent events (WHATWG HTML, 9.2), as far as OpenAI's API uses them."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._finish = ""
        self._usage = _Usage()
        self.done = False

    def feed_untrusted(self, data: bytes) -> Iterator[ChatEvent]:
        """Events that are complete now. Raises ChatFailed."""
        self._buffer += data
        *lines, self._buffer = self._buffer.split(b"\n")
        for line in lines:
            yield from self._line_untrusted(bytes(line).removesuffix(b"\r"))
        if len(self._buffer) > MAX_LINE_BYTES:
            raise ChatFailed(f"a line of the answer exceeds {MAX_LINE_BYTES} bytes")

    def _line_untrusted(self, line: bytes) -> Iterator[ChatEvent]:
        if line.startswith(b": hand-over "):
            yield HandedOver(line.partition(b"island=")[2].decode("ascii", "replace"))
        if self.done or not line.startswith(b"data:"):
            return
        data = line[5:].strip()
        if data == b"[DONE]":
            self.done = True
            yield self._closed()
            return
        try:
            chunk = _CHUNK.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ChatFailed(f"the server sent something else than a chunk: {error}") from error
        if chunk.error is not None:
            raise ChatFailed(chunk.error.message)
        self._usage = chunk.usage or self._usage
        for choice in chunk.choices:
            self._finish = choice.finish_reason or self._finish
            if choice.delta.content:
                yield Text(choice.delta.content)

    def _closed(self) -> Closed:
        own = self._usage.archipelag
        return Closed(
            self._finish,
            self._usage.completion_tokens,
            own.tokens_per_second,
            own.hand_overs,
            own.island or "",
            own.ttft_ms,
            tuple(f"{stage.island} {stage.first_layer}-{stage.last_layer}" for stage in own.stages),
            own.stages_lost,
        )
