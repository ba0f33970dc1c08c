"""JSON of answers: whole ones, and chunks of streams.

The constant parts of a stream's chunks are rendered once per choice; a token costs the encoding of its
text and one join.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import msgspec

from gateway.openai.plan import Plan, ToolMode
from gateway.openai.tool_calls import (
    AutoReader,
    CallArguments,
    CallStart,
    Content,
    NamedReader,
    Piece,
    RequiredReader,
    ToolReader,
)
from protocol.ids import CargoDigest
from protocol.jobs import Token

_encode: Final = msgspec.json.Encoder().encode

#: OpenAI's stand-in for minus infinity; JSON has none.
LEAST_LOGPROB: Final = -9999.0

DONE: Final = b"data: [DONE]\n\n"


def fingerprint(digest: CargoDigest) -> str:
    """`system_fingerprint`: the same weights, template and runtime have the same one."""
    return "fp_" + digest.removeprefix("sha256:")[:12]


def logprob_value(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else LEAST_LOGPROB


def token_logprob(token: Token) -> dict[str, Any]:
    """An entry of chat's `logprobs.content`."""
    return {
        "token": token.piece.decode("utf-8", "replace"),
        "logprob": logprob_value(token.logprob),
        "bytes": list(token.piece),
        "top_logprobs": [
            {
                "token": top.piece.decode("utf-8", "replace"),
                "logprob": logprob_value(top.logprob),
                "bytes": list(top.piece),
            }
            for top in token.top
        ],
    }


def make_reader(mode: ToolMode) -> ToolReader:
    if mode.kind == "named":
        return NamedReader(mode.name)
    if mode.kind == "required":
        return RequiredReader(mode.names)
    return AutoReader(mode.names, parallel=mode.parallel)


class StreamChoice(Protocol):
    """One choice of a stream: events to bytes (possibly none)."""

    def tokens(self, tokens: Sequence[Token]) -> bytes: ...

    def finish(self, finish: str, tail: str) -> bytes: ...


class WholeChoice(Protocol):
    """One choice of a whole answer."""

    def tokens(self, tokens: Sequence[Token]) -> None: ...

    def finish(self, finish: str, tail: str) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Format:
    """What tells the two endpoints' answers apart."""

    id_prefix: str
    whole: str
    chunk: str
    stream_choice: Callable[[Answer, int], StreamChoice]
    whole_choice: Callable[[Answer, int], WholeChoice]


class Answer:
    """What all choices of one response have in common."""

    def __init__(self, plan: Plan, form: Format, *, created_unix_s: int) -> None:
        self.plan: Final = plan
        self._form = form
        self._common: dict[str, Any] = {
            "id": form.id_prefix + secrets.token_hex(16),
            "created": created_unix_s,
            "model": plan.model.id,
            "system_fingerprint": fingerprint(plan.model.digest),
        }

    def stream_choices(self) -> list[StreamChoice]:
        return [self._form.stream_choice(self, i) for i in range(len(self.plan.works))]

    def whole_choices(self) -> list[WholeChoice]:
        return [self._form.whole_choice(self, i) for i in range(len(self.plan.works))]

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> bytes:
        return _encode({"object": self._form.whole, **self._common, "choices": choices, "usage": usage})

    def chunk_head(self, index: int) -> bytes:
        """`data: {...,"choices":[{"index":N,` of this choice's chunks."""
        common = _encode({"object": self._form.chunk, **self._common})[:-1]
        return b'data: %b,"choices":[{"index":%d,' % (common, index)

    def chunk_tail(self) -> bytes:
        """What ends each chunk: with `include_usage` a null usage, as OpenAI sends it."""
        return b'}],"usage":null}\n\n' if self.plan.include_usage else b"}]}\n\n"

    def usage_chunk(self, usage: dict[str, Any]) -> bytes:
        chunk: dict[str, Any] = {"object": self._form.chunk, **self._common, "choices": [], "usage": usage}
        return b"data: " + _encode(chunk) + b"\n\n"


def _text_of(tokens: Sequence[Token]) -> str:
    return tokens[0].text if len(tokens) == 1 else "".join(token.text for token in tokens)


class ChatStreamChoice:
    """`chat.completion.chunk` objects. Tokens that arrive together share a chunk."""

    def __init__(self, answer: Answer, index: int) -> None:
        head = answer.chunk_head(index)
        tail = answer.chunk_tail()
        self._logprobs = answer.plan.logprobs
        self._role = b'%b"delta":{"role":"assistant","content":"","refusal":null},"logprobs":null,' % head
        self._role += b'"finish_reason":null' + tail
        self._before = head + b'"delta":{"content":'
        self._after = b'},"logprobs":null,"finish_reason":null' + tail
        self._head = head + b'"delta":'
        self._tail = tail
        self._reader = None if answer.plan.tools is None else make_reader(answer.plan.tools)

    def tokens(self, tokens: Sequence[Token]) -> bytes:
        text = _text_of(tokens)
        if self._reader is None and not self._logprobs:
            if not text:
                return self._take_role()
            return b"".join((self._take_role(), self._before, _encode(text), self._after))
        return self._take_role() + self._general(text, tokens)

    def finish(self, finish: str, tail: str) -> bytes:
        parts = [self._take_role()]
        if self._reader is None:
            if tail:
                parts += (self._before, _encode(tail), self._after)
        else:
            pieces = [*self._reader.feed(tail), *self._reader.close()]
            parts += [self._chunk(delta, None) for delta in map(_delta_of, pieces)]
            if self._reader.calls and finish == "stop":
                finish = "tool_calls"
        parts.append(b'%b{},"logprobs":null,"finish_reason":%b%b' % (self._head, _encode(finish), self._tail))
        return b"".join(parts)

    def _take_role(self) -> bytes:
        role, self._role = self._role, b""
        return role

    def _general(self, text: str, tokens: Sequence[Token]) -> bytes:
        logprobs = {"content": [token_logprob(t) for t in tokens], "refusal": None} if self._logprobs else None
        if self._reader is None:
            return self._chunk({"content": text}, logprobs)
        deltas: list[dict[str, Any]] = [_delta_of(piece) for piece in self._reader.feed(text)]
        if not deltas and logprobs is not None:
            deltas = [{}]
        chunks = [self._chunk(delta, logprobs if i == 0 else None) for i, delta in enumerate(deltas)]
        return b"".join(chunks)

    def _chunk(self, delta: dict[str, Any], logprobs: dict[str, Any] | None) -> bytes:
        return b'%b%b,"logprobs":%b,"finish_reason":null%b' % (
            self._head,
            _encode(delta),
            _encode(logprobs),
            self._tail,
        )


def _delta_of(piece: Piece) -> dict[str, Any]:
    match piece:
        case Content(text):
            return {"content": text}
        case CallStart(index, call_id, name):
            function = {"name": name, "arguments": ""}
            return {"tool_calls": [{"index": index, "id": call_id, "type": "function", "function": function}]}
        case CallArguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}


class ChatWholeChoice:
    """An element of `choices` in a `chat.completion`."""

    def __init__(self, answer: Answer, index: int) -> None:
        self._index = index
        self._texts: list[str] = []
        self._logprobs: list[dict[str, Any]] | None = [] if answer.plan.logprobs else None
        self._reader = None if answer.plan.tools is None else make_reader(answer.plan.tools)

    def tokens(self, tokens: Sequence[Token]) -> None:
        self._texts.append(_text_of(tokens))
        if self._logprobs is not None:
            self._logprobs += map(token_logprob, tokens)

    def finish(self, finish: str, tail: str) -> dict[str, Any]:
        content: str | None = "".join(self._texts) + tail
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self._reader is not None:
            content, calls = _gathered([*self._reader.feed(content), *self._reader.close()])
            message["content"] = content or (None if calls else "")
            if calls:
                message["tool_calls"] = calls
                finish = "tool_calls" if finish == "stop" else finish
        logprobs = None if self._logprobs is None else {"content": self._logprobs, "refusal": None}
        return {"index": self._index, "message": message, "logprobs": logprobs, "finish_reason": finish}


def _gathered(pieces: Iterable[Piece]) -> tuple[str, list[dict[str, Any]]]:
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    for piece in pieces:
        match piece:
            case Content(text):
                texts.append(text)
            case CallStart(_, call_id, name):
                calls.append({"id": call_id, "type": "function", "function": {"name": name, "arguments": ""}})
            case CallArguments(index, text):
                calls[index]["function"]["arguments"] += text
    return "".join(texts), calls


class LegacyLogprobs:
    """The four parallel lists of the completions endpoint. Offsets count characters of the text."""

    def __init__(self, offset: int) -> None:
        self._offset = offset

    def take(self, tokens: Sequence[Token]) -> dict[str, list[Any]]:
        """The lists for these tokens, which follow those taken before."""
        offsets: list[int] = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token.text)
        return {
            "tokens": [token.piece.decode("utf-8", "replace") for token in tokens],
            "token_logprobs": [logprob_value(token.logprob) for token in tokens],
            "top_logprobs": [
                {top.piece.decode("utf-8", "replace"): logprob_value(top.logprob) for top in token.top}
                for token in tokens
            ],
            "text_offset": offsets,
        }


class TextStreamChoice:
    """Streamed `text_completion` objects. The prompt, if echoed, is the first chunk's text."""

    def __init__(self, answer: Answer, index: int) -> None:
        self._tail = answer.chunk_tail()
        self._before = answer.chunk_head(index) + b'"text":'
        self._after = b',"logprobs":null,"finish_reason":null' + self._tail
        self._prefix = answer.plan.prefixes[index]
        self._logprobs = LegacyLogprobs(len(self._prefix)) if answer.plan.logprobs else None

    def tokens(self, tokens: Sequence[Token]) -> bytes:
        text = self._take_prefix() + _text_of(tokens)
        if self._logprobs is None:
            return b"".join((self._before, _encode(text), self._after)) if text else b""
        lists = _encode(self._logprobs.take(tokens))
        return b'%b%b,"logprobs":%b,"finish_reason":null%b' % (self._before, _encode(text), lists, self._tail)

    def finish(self, finish: str, tail: str) -> bytes:
        text = _encode(self._take_prefix() + tail)
        return b'%b%b,"logprobs":null,"finish_reason":%b%b' % (self._before, text, _encode(finish), self._tail)

    def _take_prefix(self) -> str:
        prefix, self._prefix = self._prefix, ""
        return prefix


class TextWholeChoice:
    """An element of `choices` in a `text_completion`."""

    def __init__(self, answer: Answer, index: int) -> None:
        self._index = index
        self._prefix = answer.plan.prefixes[index]
        self._wants_logprobs = answer.plan.logprobs
        self._tokens: list[Token] = []

    def tokens(self, tokens: Sequence[Token]) -> None:
        self._tokens += tokens

    def finish(self, finish: str, tail: str) -> dict[str, Any]:
        text = self._prefix + "".join(token.text for token in self._tokens) + tail
        logprobs = LegacyLogprobs(len(self._prefix)).take(self._tokens) if self._wants_logprobs else None
        return {"index": self._index, "text": text, "logprobs": logprobs, "finish_reason": finish}


CHAT_FORMAT: Final = Format(
    "chatcmpl-", "chat.completion", "chat.completion.chunk", ChatStreamChoice, ChatWholeChoice
)
TEXT_FORMAT: Final = Format("cmpl-", "text_completion", "text_completion", TextStreamChoice, TextWholeChoice)
