"""Tool calls out of a model's text, as it comes.

Each model family writes calls in its own way; a reader turns text into `Content`, `CallStart` and
`CallArguments`. What comes out, taken together, depends only on the whole text, never on where it was cut.
Nothing in here raises: what is not a call of a tool that the request named stays content.

    Hermes, Qwen     text <tool_call>{"name": ..., "arguments": {...}}</tool_call> ...
    Llama 3.x        {"name": ..., "parameters": {...}}        also after <|python_tag|>, several with ';'
    Mistral          [TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]      also NAME[ARGS]{...}

Control tokens ([TOOL_CALLS], <|python_tag|>) may be missing in the text, so bare JSON at its beginning is
looked at as well.
"""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias, cast

import msgspec

from protocol.limits import MAX_TOOL_CALLS


@dataclass(frozen=True, slots=True)
class Content:
    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the JSON text of call `index`'s arguments."""

    index: int
    text: str


Piece: TypeAlias = Content | CallStart | CallArguments

_ID_ALPHABET: Final = string.ascii_letters + string.digits


def new_call_id() -> str:
    """Nine letters and digits: the only form that Mistral's templates take back, and fine for all others."""
    return "".join(secrets.choice(_ID_ALPHABET) for _ in range(9))


class ToolReader(Protocol):
    """Feed text, then close; both return what is certain by then."""

    calls: int

    def feed(self, text: str) -> list[Piece]: ...

    def close(self) -> list[Piece]: ...


class ValueScanner:
    """Finds the end of the JSON object or array that starts at `start`, over as many feeds as it takes."""

    __slots__ = ("_at", "_depth", "_escaped", "_string")

    _SPECIAL: Final = re.compile(r'["\\{}\[\]]')

    def __init__(self, start: int) -> None:
        self._at = start
        self._depth = 0
        self._string = False
        self._escaped = False

    def end(self, text: str) -> int | None:
        """The index after the value, or None if it is not complete in `text` (which only ever grows)."""
        while self._at < len(text):
            if self._escaped:
                self._escaped = False
                self._at += 1
                continue
            found = self._SPECIAL.search(text, self._at)
            if found is None:
                self._at = len(text)
                return None
            self._at = found.end()
            char = found.group()
            if char == "\\":
                self._escaped = self._string
            elif char == '"':
                self._string = not self._string
            elif not self._string:
                self._depth += 1 if char in "{[" else -1
                if self._depth == 0:
                    return self._at
        return None


class _Call(msgspec.Struct):
    """A call as models write it: Llama says 'parameters', everybody else 'arguments'."""

    name: str
    arguments: dict[str, object] | str | None = None
    parameters: dict[str, object] | str | None = None


_CALLS: Final = msgspec.json.Decoder(_Call | list[_Call])


def _arguments_of(call: _Call) -> str | None:
    """JSON text of an object, or None if that is not what the model wrote."""
    value = call.arguments if call.arguments is not None else call.parameters
    if value is None:
        return "{}"
    if isinstance(value, str):  # some models quote the object
        try:
            value = cast("object", msgspec.json.decode(value))
        except (msgspec.DecodeError, RecursionError):
            return None
        if not isinstance(value, dict):
            return None
    try:
        return msgspec.json.encode(value).decode()
    except (RecursionError, OverflowError):
        return None


_MARKERS: Final = ("<tool_call>", "<|python_tag|>", "[TOOL_CALLS]")
_MARKER: Final = re.compile("|".join(re.escape(marker) for marker in _MARKERS))
_LONGEST_MARKER: Final = max(map(len, _MARKERS))
#: Mistral's newer form: the name stands before the arguments. The name is bounded as tools' names are.
_NAMED: Final = re.compile(r"\s*([a-zA-Z0-9_-]{1,64})\s*(?:\[ARGS\])?\s*(?=\{)")
_NAMED_SO_FAR: Final = re.compile(r"\s*[a-zA-Z0-9_-]{0,64}\s*(?:\[A?R?G?S?\]?)?\s*\Z")
_SPACE: Final = re.compile(r"\s*")
_CLOSING: Final = "</tool_call>"
_SEPARATORS: Final = re.compile(r"[\s;,]*")


def _held_suffix(text: str) -> int:
    """Where the longest suffix that may become a marker starts, with the white space before it."""
    start = len(text)
    for size in range(min(_LONGEST_MARKER - 1, len(text)), 0, -1):
        if any(marker.startswith(text[-size:]) for marker in _MARKERS):
            start -= size
            break
    return len(text[:start].rstrip())


class AutoReader:
    """The model decides: content, calls in any of the known forms, or both.

    A call is given out whole, when it is complete and its JSON has been checked. White space between content
    and a call is dropped. `parallel` False: what follows the first call is dropped.
    """

    def __init__(self, names: frozenset[str], *, parallel: bool = True) -> None:
        self.calls = 0
        self._names = names
        self._most = MAX_TOOL_CALLS if parallel else 1
        self._buffer = ""
        self._step: Callable[[], bool] = self._at_start
        self._scanner: ValueScanner | None = None
        self._value_at = 0
        self._called = ""  # name that stood before the value
        self._marker = ""
        self._out: list[Piece] = []

    def feed(self, text: str) -> list[Piece]:
        self._buffer += text
        while self._step():
            pass
        return self._taken()

    def close(self) -> list[Piece]:
        """What was held back is content, unless it is white space around calls."""
        rest = self._buffer
        self._buffer = ""
        if not (self.calls and (not rest.strip() or self._step == self._after_call)):
            self._content(rest)
        return self._taken()

    def _taken(self) -> list[Piece]:
        out, self._out = self._out, []
        return out

    def _content(self, text: str) -> None:
        if text and self.calls < self._most:
            self._out.append(Content(text))

    # Steps: each looks at the buffer and returns whether it got further.

    def _at_start(self) -> bool:
        stripped = self._buffer.lstrip()
        if not stripped:
            return False
        if stripped[0] == "{" or (stripped[0] == "[" and not _may_be(stripped, "[TOOL_CALLS]")):
            self._begin_value("", len(self._buffer) - len(stripped))
        elif stripped[0] == "[" and len(stripped) < len("[TOOL_CALLS]"):
            return False  # a marker, or an array: not known yet
        else:
            self._step = self._in_text
        return True

    def _in_text(self) -> bool:
        found = _MARKER.search(self._buffer)
        if found is None:
            held = _held_suffix(self._buffer)
            self._content(self._buffer[:held])
            self._buffer = self._buffer[held:]
            return False
        before = self._buffer[: found.start()].rstrip()
        self._content(before)
        self._buffer = self._buffer[len(before) :]
        self._marker = found.group()
        self._value_at = found.end() - len(before)
        self._step = self._after_marker
        return True

    def _after_marker(self) -> bool:
        start = _end(_SPACE, self._buffer, self._value_at)
        if start == len(self._buffer):
            return False
        if self._buffer[start] in "{[":
            self._begin_value(self._marker, start)
            return True
        if self._marker == "[TOOL_CALLS]":
            named = _NAMED.match(self._buffer, self._value_at)
            if named is not None:
                self._called = named.group(1)
                self._begin_value(self._marker, named.end())
                return True
            if _NAMED_SO_FAR.match(self._buffer, self._value_at):
                return False
        self._give_up(self._value_at)
        return True

    def _begin_value(self, marker: str, start: int) -> None:
        self._marker = marker
        self._value_at = start
        self._scanner = ValueScanner(start)
        self._step = self._in_value

    def _in_value(self) -> bool:
        assert self._scanner is not None  # noqa: S101  # set with the step
        end = self._scanner.end(self._buffer)
        if end is None:
            return False
        calls = self._calls_in(self._buffer[self._value_at : end])
        self._called = ""
        if calls is None:
            self._give_up(end)
            return True
        for name, arguments in calls:
            if self.calls < self._most:
                self._out.append(CallStart(self.calls, new_call_id(), name))
                self._out.append(CallArguments(self.calls, arguments))
                self.calls += 1
        self._buffer = self._buffer[end:]
        self._step = self._after_call
        return True

    def _after_call(self) -> bool:
        """Separators and the closing tag are dropped; another value may follow at once."""
        rest = _end(_SEPARATORS, self._buffer, 0)
        if rest == len(self._buffer):
            return False
        tail = self._buffer[rest:]
        if self._marker == "<tool_call>" and _may_be(tail, _CLOSING):
            if len(tail) < len(_CLOSING):
                return False
            self._buffer = tail[len(_CLOSING) :]
            self._marker = "closed"
            return True
        if tail[0] == "{" and self._marker != "closed":
            self._begin_value(self._marker, rest)
        else:
            self._buffer = tail
            self._step = self._in_text
        return True

    def _give_up(self, end: int) -> None:
        """It was no call: all of it up to `end` is content."""
        self._content(self._buffer[:end])
        self._buffer = self._buffer[end:]
        self._step = self._in_text

    def _calls_in(self, value: str) -> list[tuple[str, str]] | None:
        """(name, arguments) of each call, or None unless all of it is calls of known tools."""
        try:
            if self._called:
                arguments: object = msgspec.json.decode(value)
                found = [_Call(self._called, cast("dict[str, object]", arguments))]
                if not isinstance(arguments, dict):
                    return None
            else:
                decoded = _CALLS.decode(value)
                found = cast("list[_Call]", decoded) if isinstance(decoded, list) else [decoded]
        except (msgspec.DecodeError, RecursionError, UnicodeEncodeError):
            return None
        calls: list[tuple[str, str]] = []
        for call in found:
            text = _arguments_of(call)
            if call.name not in self._names or text is None:
                return None
            calls.append((call.name, text))
        return calls or None


def _may_be(text: str, whole: str) -> bool:
    """Whether `text` starts with `whole`, or is the beginning of it."""
    return text.startswith(whole) or whole.startswith(text)


def _end(pattern: re.Pattern[str], text: str, start: int) -> int:
    found = pattern.match(text, start)
    return start if found is None else found.end()


class NamedReader:
    """`tool_choice` names a tool: a constraint makes the whole text its arguments, passed on as they come."""

    def __init__(self, name: str) -> None:
        self.calls = 0
        self._name = name

    def feed(self, text: str) -> list[Piece]:
        out: list[Piece] = []
        if self.calls == 0:
            text = text.lstrip()
            if not text:
                return out
            self.calls = 1
            out.append(CallStart(0, new_call_id(), self._name))
        if text:
            out.append(CallArguments(0, text))
        return out

    def close(self) -> list[Piece]:
        return []


class RequiredReader:
    """`tool_choice` 'required': a constraint makes the text an array of calls, name before arguments.

    Arguments are passed on as they come. If an Island did not honour the constraint, the text is content.
    """

    #: What stands before a call's arguments, with the brace and comma that end the call before it.
    _HEAD: Final = re.compile(r'\s*\}?\s*[\[,]?\s*\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"arguments"\s*:\s*(?=\{)')
    #: Longer than any head that a grammar makes (a name has 64 characters at most).
    _LONGEST_HEAD: Final = 512

    def __init__(self, names: frozenset[str]) -> None:
        self.calls = 0
        self._names = names
        self._buffer: str = ""
        self._scanner: ValueScanner | None = None
        self._given = 0
        self._over = False  # no further call can come

    def feed(self, text: str) -> list[Piece]:
        if self._over:
            return [Content(text)] if text and self.calls == 0 else []
        self._buffer += text
        return list(self._pieces())

    def close(self) -> list[Piece]:
        """What never became a call is content; the brackets after the last call are nothing."""
        if self.calls or not self._buffer:
            return []
        return [Content(self._buffer)]

    def _pieces(self) -> Iterator[Piece]:
        while True:
            if self._scanner is not None:
                end = self._scanner.end(self._buffer)
                upto = len(self._buffer) if end is None else end
                if upto > self._given:
                    yield CallArguments(self.calls - 1, self._buffer[self._given : upto])
                    self._given = upto
                if end is None:
                    return
                self._buffer = self._buffer[end:]
                self._scanner = None
            head = self._HEAD.match(self._buffer)
            if head is None and len(self._buffer) <= self._LONGEST_HEAD:
                return
            if (
                head is None
                or head.end() > self._LONGEST_HEAD
                or head.group(1) not in self._names
                or self.calls >= MAX_TOOL_CALLS
            ):
                self._over = True
                if self.calls == 0:
                    yield Content(self._buffer)
                self._buffer = ""
                return
            yield CallStart(self.calls, new_call_id(), head.group(1))
            self.calls += 1
            self._scanner = ValueScanner(head.end())
            self._given = head.end()
