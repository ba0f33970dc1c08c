"""Frames of the one kept RPC stream between two peers.

Both sides call over the same stream. Request ids are chosen by the caller and unique among its open
requests. Bodies are encoded messages of the method's own types. `Ping`/`Pong` carry the sender's own
number, so round-trip time is measured on the very stream that the calls use.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, TypeAlias

from msgspec import Meta

from protocol.codec import Codec, Message
from protocol.limits import MAX_METHOD_CHARS, MAX_REMOTE_TEXT_CHARS, MAX_RPC_BYTES, MAX_RPC_DEADLINE_MS

RPC_PROTOCOL: Final = "/archipelag/rpc/1.0.0"

CallId = Annotated[int, Meta(ge=0, lt=1 << 53)]
MethodName = Annotated[str, Meta(min_length=1, max_length=MAX_METHOD_CHARS)]
RpcBody = Annotated[bytes, Meta(max_length=MAX_RPC_BYTES)]
_FRAME_BYTES: Final = MAX_RPC_BYTES + 256


class Request(Message, frozen=True, gc=False, tag="q"):
    """Call `method`; the caller stops waiting `deadline_ms` after it sent this."""

    max_bytes: ClassVar[int] = _FRAME_BYTES
    call: CallId
    method: MethodName
    deadline_ms: Annotated[int, Meta(ge=1, le=MAX_RPC_DEADLINE_MS)]
    body: RpcBody


class Reply(Message, frozen=True, gc=False, tag="r"):
    max_bytes: ClassVar[int] = _FRAME_BYTES
    call: CallId
    body: RpcBody


class Refusal(Message, frozen=True, gc=False, tag="x"):
    """The call failed. `code` is one of: unknown-method, busy, malformed, deadline, failed."""

    call: CallId
    code: Annotated[str, Meta(max_length=32)]
    detail: Annotated[str, Meta(max_length=MAX_REMOTE_TEXT_CHARS)]


class Abandon(Message, frozen=True, gc=False, tag="c"):
    """The caller no longer wants the answer."""

    call: CallId


class Notice(Message, frozen=True, gc=False, tag="n"):
    """A call without an answer."""

    max_bytes: ClassVar[int] = _FRAME_BYTES
    method: MethodName
    body: RpcBody


class Ping(Message, frozen=True, gc=False, tag="p"):
    number: CallId


class Pong(Message, frozen=True, gc=False, tag="o"):
    number: CallId


RpcFrame: TypeAlias = Request | Reply | Refusal | Abandon | Notice | Ping | Pong
RPC_CODEC: Final[Codec[RpcFrame]] = Codec(RpcFrame)
