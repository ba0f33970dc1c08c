"""Calls, notices and pings between two peers over one kept stream (frames: protocol/rpc.py).

Both sides call over the same stream. Frames are sent from the caller's own task when nothing waits, which
makes a call two task switches; otherwise they queue, and the queue is bounded in each of its kinds: callers
and answering handlers wait for room, notices are dropped, and a peer that provokes answers without reading
them is disconnected. The reader never waits for a write, so two busy sides can not freeze each other.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import structlog
import trio

from node.p2p.errors import StreamBroken
from node.streams import ByteStream, MessageStream
from protocol.codec import Codec, Message, encode, excerpt
from protocol.errors import Fault, ProtocolError
from protocol.ids import PeerId
from protocol.instants import MILLISECOND_NS, SECOND_NS
from protocol.limits import KIB, MAX_METHOD_CHARS, MAX_RPC_BYTES, MAX_RPC_DEADLINE_MS, MAX_RPC_INFLIGHT_PER_PEER
from protocol.rpc import (
    RPC_CODEC,
    Abandon,
    Notice,
    Ping,
    Pong,
    Refusal,
    Reply,
    Request,
    RpcFrame,
)

Q = TypeVar("Q", bound=Message)
R = TypeVar("R", bound=Message)

_log = structlog.get_logger("rpc")

#: Bytes that wait for the peer's window before callers and answers wait, too: two of the largest frames.
MAX_QUEUED_BYTES: Final = 512 * KIB

#: Answers that the peer provokes without our consent (pongs, refusals). It gets four rounds of its calls.
MAX_QUEUED_ANSWERS: Final = 4 * MAX_RPC_INFLIGHT_PER_PEER

#: Pings without an answer that are remembered; more are not sent while the peer is silent.
MAX_OPEN_PINGS: Final = 8

#: Weight of a new round-trip time in the smoothed one (RFC 6298).
RTT_GAIN: Final = 1 / 8


class CallFailed(Exception):
    """The peer answered that it will not or can not, or did not answer in time.

    `code`: unknown-method, busy, malformed, deadline, failed. `detail` is the peer's text, safe to show.
    """

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{code}: {detail}" if detail else code)
        self.code = code
        self.detail = detail


class PeerUnreachable(Exception):
    """There is no link to the peer, or it was lost before the answer came."""


class Refused(Exception):
    """Raise it in a handler to refuse a call: the caller gets `CallFailed(code, detail)`."""

    def __init__(self, code: str, detail: str = "") -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Method:
    """How to answer calls of one method."""

    request: Codec[Any]
    handler: Callable[[PeerId, Any], Awaitable[Message]]


@dataclass(frozen=True, slots=True)
class NoticeMethod:
    """What to do with notices of one method. The handler must not raise or block.

    `admit` is asked before a notice is decoded; what it refuses is dropped and counted.
    """

    notice: Codec[Any]
    handler: Callable[[PeerId, Any], None]
    admit: Callable[[PeerId], bool] | None = None


@dataclass(slots=True)
class RpcCounters:
    """For metrics; shared by all links of a node."""

    calls: int = 0
    calls_failed: int = 0
    requests: int = 0
    requests_refused: int = 0
    handler_failures: int = 0
    notices_sent: int = 0
    notices_dropped: int = 0
    notices_refused: int = 0
    malformed: int = 0


class Methods:
    """What this node answers, on every link."""

    def __init__(self) -> None:
        self.requests: dict[str, Method] = {}
        self.notices: dict[str, NoticeMethod] = {}

    def serve(self, method: str, request: Codec[Q], handler: Callable[[PeerId, Q], Awaitable[Message]]) -> None:
        """Answer calls of `method`. Raises ValueError if the name is taken or too long."""
        self._check(method, self.requests)
        self.requests[method] = Method(request, handler)

    def serve_notice(
        self,
        method: str,
        notice: Codec[Q],
        handler: Callable[[PeerId, Q], None],
        *,
        admit: Callable[[PeerId], bool] | None = None,
    ) -> None:
        """Take notices of `method`. Raises ValueError if the name is taken or too long."""
        self._check(method, self.notices)
        self.notices[method] = NoticeMethod(notice, handler, admit)

    @staticmethod
    def _check(method: str, taken: Mapping[str, object]) -> None:
        if not 1 <= len(method) <= MAX_METHOD_CHARS:
            raise ValueError(f"a method name has 1 to {MAX_METHOD_CHARS} characters")
        if method in taken:
            raise ValueError(f"{method!r} is served already")


@dataclass(slots=True)
class _Call:
    done: trio.Event
    answer: Reply | Refusal | None = None


class RpcLink:
    """One kept stream. `run` serves it until it ends; `ended` is set then and `reason` says why."""

    def __init__(
        self,
        stream: ByteStream,
        methods: Methods,
        counters: RpcCounters,
        *,
        greeting: tuple[str, Method] | None = None,
        measured: Callable[[PeerId, int], None] | None = None,
    ) -> None:
        """`greeting`: a method of this link only. Until `opened` is set, nothing else is answered.

        `measured` hears each round trip of a ping (nanoseconds); it must not raise.
        """
        self.peer: Final[PeerId] = stream.peer
        self.ended: Final = trio.Event()
        self.reason = ""
        self.violated = False  # the peer broke the protocol
        self.opened = greeting is None
        self.rtt_ns: int | None = None  # smoothed
        self.min_rtt_ns: int | None = None
        self.used_at = (
            trio.current_time()
        )  # when either side last called or told something (pings do not count)
        self._measured = measured
        self._stream = stream
        self._messages: MessageStream[RpcFrame, RpcFrame] = MessageStream(stream, RPC_CODEC, RPC_CODEC)
        self._methods = methods
        self._counters = counters
        self._greeting = greeting
        self._scope = trio.CancelScope()
        self._calls: dict[int, _Call] = {}
        self._next_call = 0
        self._slots = trio.Semaphore(MAX_RPC_INFLIGHT_PER_PEER)
        self._serving: dict[int, trio.CancelScope] = {}
        self._running = 0
        self._pings: dict[int, float] = {}
        self._queue: deque[bytes] = deque()
        self._queued_bytes = 0
        self._queued_answers = 0
        self._writer = trio.lowlevel.ParkingLot()
        self._room = trio.lowlevel.ParkingLot()

    # --- for users ------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Is a call open, in either direction?"""
        return bool(self._calls or self._running)

    async def call(self, method: str, message: Message, reply: Codec[R], *, deadline_ns: int) -> R:
        """Call and wait for the answer, `deadline_ns` at most (a duration; both sides keep to it).

        Cancelled or out of time, the peer is told and its handler is cancelled. At most
        MAX_RPC_INFLIGHT_PER_PEER calls are open; more wait their turn. Raises CallFailed, PeerUnreachable.
        """
        body = _body(message)
        self._counters.calls += 1
        self.used_at = trio.current_time()
        with trio.move_on_after(deadline_ns / SECOND_NS) as scope:
            async with self._slots:
                answer = await self._exchange(method, body, scope)
            match answer:
                case Reply(body=found):
                    try:
                        return reply.decode_untrusted(found)
                    except ProtocolError as error:
                        self._counters.malformed += 1
                        self._counters.calls_failed += 1
                        raise CallFailed("malformed", f"the answer: {error.detail}") from error
                case Refusal(code=code, detail=detail):
                    self._counters.calls_failed += 1
                    raise CallFailed(excerpt(code), excerpt(detail))
                case None:
                    self._counters.calls_failed += 1
                    raise PeerUnreachable(self.reason)
        self._counters.calls_failed += 1
        raise CallFailed("deadline", f"no answer to {method!r} within {deadline_ns / SECOND_NS:g} s")

    async def _exchange(self, method: str, body: bytes, scope: trio.CancelScope) -> Reply | Refusal | None:
        await self._wait_room()
        if self.ended.is_set():
            return None
        left_ms = int((scope.deadline - trio.current_time()) * 1000) + 1
        number, self._next_call = self._next_call, self._next_call + 1
        call = self._calls[number] = _Call(trio.Event())
        try:
            self._post(Request(number, method, max(1, min(left_ms, MAX_RPC_DEADLINE_MS)), body))
            await call.done.wait()
        finally:
            del self._calls[number]
            if call.answer is None:
                self._post(Abandon(number))
        return call.answer

    def notify(self, method: str, message: Message) -> bool:
        """Tell the peer, without an answer. False: dropped, because too much waits already."""
        if self.ended.is_set() or self._queued_bytes >= MAX_QUEUED_BYTES:
            self._counters.notices_dropped += 1
            return False
        self._counters.notices_sent += 1
        self.used_at = trio.current_time()
        self._post(Notice(method, _body(message)))
        return True

    def ping(self) -> None:
        """Measure the round-trip time once; `rtt_ns` follows when the answer comes.

        The number can not be guessed: who answers before the question came would seem nearer than light
        allows, and jurisdictions are judged by that (routing/jurisdiction.py).
        """
        if len(self._pings) < MAX_OPEN_PINGS:
            number = secrets.randbelow(1 << 53)
            self._pings[number] = trio.current_time()
            self._post(Ping(number))

    def close(self, reason: str) -> None:
        """End the link at once. Open calls fail, handlers are cancelled. Idempotent."""
        if self.ended.is_set():
            return
        self.reason = reason
        self.ended.set()
        for call in self._calls.values():
            call.done.set()
        self._queue.clear()
        self._room.unpark_all()
        self._scope.cancel()
        self._stream.reset()

    async def run(self) -> None:
        """Serve until the stream ends, breaks or `close` is called."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write)
                    await self._read(nursery)
        finally:
            self.close("the link was closed here")

    # --- sending --------------------------------------------------------------------------------

    def _post(self, frame: RpcFrame) -> None:
        if self.ended.is_set():
            return
        data = RPC_CODEC.encode_frame(frame)
        try:
            if not self._queue and self._stream.send_nowait(data):
                return
        except StreamBroken as error:
            self.close(error.reason)
            return
        self._queue.append(data)
        self._queued_bytes += len(data)
        self._writer.unpark()

    def _answer(self, frame: Pong | Refusal) -> None:
        """Answer from the reader, which may not wait."""
        if self._queue:
            self._queued_answers += 1
            if self._queued_answers > MAX_QUEUED_ANSWERS:
                self.violated = True
                self.close("the peer floods us and does not read the answers")
                return
        self._post(frame)

    async def _wait_room(self) -> None:
        while self._queued_bytes >= MAX_QUEUED_BYTES and not self.ended.is_set():
            await self._room.park()

    async def _write(self) -> None:
        try:
            while True:
                while self._queue:
                    data = self._queue[0]
                    await self._stream.send_all(data)
                    self._queue.popleft()
                    self._queued_bytes -= len(data)
                    if self._queued_bytes < MAX_QUEUED_BYTES:
                        self._room.unpark_all()
                self._queued_answers = 0
                await self._writer.park()
        except StreamBroken as error:
            self.close(error.reason)

    # --- receiving ------------------------------------------------------------------------------

    async def _read(self, nursery: trio.Nursery) -> None:
        try:
            while (frame := await self._messages.receive()) is not None:
                if self.ended.is_set():
                    return
                self._take(frame, nursery)
            reason = "the peer closed the link"
        except StreamBroken as error:
            reason = error.reason
        except ProtocolError as error:
            self._counters.malformed += 1
            self.violated = True
            reason = f"the peer broke the protocol: {error.detail}"
        self.close(reason)

    def _take(self, frame: RpcFrame, nursery: trio.Nursery) -> None:
        match frame:
            case Reply() | Refusal():
                call = self._calls.get(frame.call)  # none: abandoned meanwhile
                if call is not None and call.answer is None:
                    call.answer = frame
                    call.done.set()
            case Request():
                self._take_request(frame, nursery)
            case Abandon():
                scope = self._serving.get(frame.call)
                if scope is not None:
                    scope.cancel()
            case Notice():
                self._take_notice(frame)
            case Ping():
                self._answer(Pong(frame.number))
            case Pong():
                self._take_pong(frame)

    def _take_request(self, request: Request, nursery: trio.Nursery) -> None:
        self._counters.requests += 1
        if request.call in self._serving:
            raise ProtocolError(Fault.UNEXPECTED, "a call with the number of an open one")
        method = self._methods.requests.get(request.method)
        if self._greeting is not None and request.method == self._greeting[0]:
            method = self._greeting[1]
        elif not self.opened:
            self._refuse(request, "failed", "say hello first")
            return
        if method is None:
            self._refuse(request, "unknown-method", request.method)
            return
        if self._running >= MAX_RPC_INFLIGHT_PER_PEER:
            self._refuse(request, "busy", f"{self._running} calls are open")
            return
        try:
            body = method.request.decode_untrusted(request.body)
        except ProtocolError as error:
            self._counters.malformed += 1
            self._refuse(request, "malformed", error.detail)
            return
        self._running += 1
        self.used_at = trio.current_time()
        scope = self._serving[request.call] = trio.CancelScope()
        nursery.start_soon(self._serve, request, method, body, scope)

    def _refuse(self, request: Request, code: str, detail: str) -> None:
        self._counters.requests_refused += 1
        self._answer(Refusal(request.call, code, excerpt(detail)))

    async def _serve(self, request: Request, method: Method, body: Message, scope: trio.CancelScope) -> None:
        frame: Reply | Refusal | None = None
        try:
            with scope, trio.move_on_after(request.deadline_ms * MILLISECOND_NS / SECOND_NS) as deadline:
                frame = await self._run_handler(request, method, body)
                await self._wait_room()
            if deadline.cancelled_caught:
                frame = Refusal(request.call, "deadline", "the handler took too long")
        finally:
            self._running -= 1
            del self._serving[request.call]
        if frame is not None and not scope.cancelled_caught:
            if isinstance(frame, Refusal):
                self._counters.requests_refused += 1
            self._post(frame)

    async def _run_handler(self, request: Request, method: Method, body: Message) -> Reply | Refusal:
        """The wall round handlers."""
        try:
            return Reply(request.call, _body(await method.handler(self.peer, body)))
        except Refused as refused:
            return Refusal(request.call, refused.code, excerpt(refused.detail))
        except ProtocolError as error:
            self._counters.malformed += 1
            return Refusal(request.call, "malformed", excerpt(error.detail))
        except Exception:  # noqa: BLE001 - the outermost boundary of a handler's task
            self._counters.handler_failures += 1
            _log.exception("a call handler failed", peer=self.peer, method=request.method)
            return Refusal(request.call, "failed", "an error in the peer, see its log")

    def _take_notice(self, notice: Notice) -> None:
        method = self._methods.notices.get(notice.method)
        if method is None or not self.opened:
            return  # nothing waits for an answer; a newer peer may know more
        if method.admit is not None and not method.admit(self.peer):
            self._counters.notices_refused += 1
            return
        self.used_at = trio.current_time()
        try:
            body = method.notice.decode_untrusted(notice.body)
        except ProtocolError:
            self._counters.malformed += 1
            return
        try:
            method.handler(self.peer, body)
        except ProtocolError:
            self._counters.malformed += 1
        except Exception:  # noqa: BLE001 - the outermost boundary: a bug in a handler costs no link
            self._counters.handler_failures += 1
            _log.exception("a notice handler failed", peer=self.peer, method=notice.method)

    def _take_pong(self, pong: Pong) -> None:
        sent = self._pings.pop(pong.number, None)
        if sent is None:
            return
        sample = max(1, round((trio.current_time() - sent) * SECOND_NS))
        if self.rtt_ns is None or self.min_rtt_ns is None:
            self.rtt_ns = self.min_rtt_ns = sample
        else:
            self.rtt_ns = round(self.rtt_ns + RTT_GAIN * (sample - self.rtt_ns))
            self.min_rtt_ns = min(self.min_rtt_ns, sample)
        if self._measured is not None:
            self._measured(self.peer, sample)


def _body(message: Message) -> bytes:
    body = encode(message)
    if len(body) > MAX_RPC_BYTES:
        raise ValueError(f"{type(message).__name__} of {len(body)} bytes exceeds an RPC body ({MAX_RPC_BYTES})")
    return body
