"""Constraints as GBNF text, checked before the native parser sees them.

The source is hostile: repetition counts expand, brackets recurse. Bounds here keep a request from costing
more than a moment; what then still does not parse is refused with the reason.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final, cast

from llama_cpp import llama_grammar as _converter

from cargos.runtimes.base import JobRefused
from cargos.runtimes.llama.leftovers import close_leftovers
from protocol.codec import excerpt
from protocol.work import Constraint

close_leftovers()

#: A grammar after conversion from a schema. Parsing is linear; every rule costs time at each token.
_MAX_GRAMMAR_CHARS: Final = 256 * 1024

#: Brackets inside brackets. The native parser recurses about a kilobyte of stack each.
_MAX_NESTING: Final = 1024

#: Levels and values of a schema: OpenAI allows 10 levels and 5,000 properties.
_MAX_SCHEMA_DEPTH: Final = 64
_MAX_SCHEMA_VALUES: Final = 20_000

#: Repetition counts in a schema (minItems, maxLength, ...): they are written out in the grammar.
_MAX_REPEAT: Final = 1000
_REPEATS: Final = ("minItems", "maxItems", "minLength", "maxLength")
_PATTERN_REPEAT: Final = re.compile(r"\{(\d+)(?:,(\d*))?\}")

_JSON_CHAR: Final = (
    r"""[^"\\\x7F\x00-\x1F] | "\\" (["\\/bfnrt] | "u" [0-9a-fA-F] [0-9a-fA-F] [0-9a-fA-F] [0-9a-fA-F])"""
)

_JSON_OBJECT: Final = r"""
root   ::= object
value  ::= object | array | string | number | "true" | "false" | "null"
object ::= "{" ws ( pair ( "," ws pair )* )? "}"
pair   ::= string ws ":" ws value ws
array  ::= "[" ws ( value ws ( "," ws value ws )* )? "]"
string ::= "\"" char* "\""
char   ::= [^"\\\x7F\x00-\x1F] | "\\" ( ["\\/bfnrt] | "u" hex hex hex hex )
hex    ::= [0-9a-fA-F]
number ::= "-"? ( "0" | [1-9] [0-9]{0,15} ) ( "." [0-9]{1,15} )? ( [eE] [-+]? [0-9]{1,3} )?
ws     ::= ( " " | "\n" [ \t]{0,20} )?
"""


def gbnf_source(constraint: Constraint) -> str:
    """The constraint as GBNF. Raises JobRefused('invalid', why)."""
    if constraint.kind == "json_object":
        return _JSON_OBJECT
    source = constraint.source if constraint.kind == "gbnf" else _from_schema(constraint.source)
    if not source.strip():
        raise JobRefused("invalid", "the grammar is empty")
    if "\0" in source:
        raise JobRefused("invalid", "the grammar holds a zero byte")
    if len(source) > _MAX_GRAMMAR_CHARS:
        raise JobRefused(
            "invalid", f"the constraint expands to a grammar of {len(source)} characters, too complex"
        )
    if _nesting(source) > _MAX_NESTING:
        raise JobRefused("invalid", f"the grammar nests brackets more than {_MAX_NESTING} deep")
    return source


def _from_schema(source: str) -> str:
    try:
        schema: object = json.loads(source)
    except (ValueError, RecursionError) as error:
        raise JobRefused("invalid", f"the JSON schema is not JSON: {excerpt(str(error))}") from error
    if schema is True or schema == {}:
        return _JSON_OBJECT
    if not isinstance(schema, dict):
        raise JobRefused("invalid", "the JSON schema is not an object")
    _check(cast("dict[str, object]", schema))
    converter = _Converter(prop_order={}, allow_fetch=False, dotall=False, raw_pattern=False)
    try:
        resolved = converter.resolve_refs(schema, "schema")
        converter.visit(resolved, "")
        converter.correct()
        return cast("str", converter.format_grammar())
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        # The converter says "unsupported" and "wrong" in all of these ways.
        reason = excerpt(str(error)) or type(error).__name__
        raise JobRefused("invalid", f"the JSON schema is not supported: {reason}") from error


class _Converter(cast("Any", _converter).SchemaConverter):  # type: ignore[misc]  # untyped library class
    def _format_literal(self, literal: str) -> str:
        # The library's own leaves backslashes alone, which GBNF then reads as escapes.
        escaped = literal.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\r", "\\r")
        return f'"{escaped}"'

    def correct(self) -> None:
        # The library's own rule lets control characters into strings, which JSON forbids.
        if "char" in self._rules:
            self._rules["char"] = _JSON_CHAR


def _check(schema: dict[str, object]) -> None:
    """Refuse what would expand without bound."""
    todo: list[tuple[object, int]] = [(schema, 0)]
    seen = 0
    while todo:
        value, depth = todo.pop()
        seen += 1
        if depth > _MAX_SCHEMA_DEPTH or seen > _MAX_SCHEMA_VALUES:
            raise JobRefused("invalid", "the JSON schema is too deep or too large")
        if isinstance(value, list):
            todo.extend((item, depth + 1) for item in cast("list[object]", value))
        elif isinstance(value, dict):
            members = cast("dict[str, object]", value)
            todo.extend((item, depth + 1) for item in members.values())
            for key in _REPEATS:
                count = members.get(key)
                if isinstance(count, int | float) and not 0 <= count <= _MAX_REPEAT:
                    raise JobRefused(
                        "invalid", f"{key} in the JSON schema must lie between 0 and {_MAX_REPEAT}"
                    )
            pattern = members.get("pattern")
            if isinstance(pattern, str):
                _check_pattern(pattern)


def _check_pattern(pattern: str) -> None:
    product = 1
    for low, high in _PATTERN_REPEAT.findall(pattern):
        product *= max(
            int(low or 0) if len(low) < 10 else 10**9, int(high or 0) if len(high) < 10 else 10**9, 1
        )
        if product > _MAX_REPEAT:
            raise JobRefused("invalid", f"a pattern in the JSON schema repeats more than {_MAX_REPEAT} times")


def _nesting(source: str) -> int:
    """Deepest nesting of round brackets outside literals, character classes and comments."""
    deepest = depth = 0
    closing = ""
    escaped = False
    for char in source:
        if closing:
            if escaped:
                escaped = False
            elif char == "\\" and closing != "\n":
                escaped = True
            elif char == closing:
                closing = ""
        elif char == "(":
            depth += 1
            deepest = max(deepest, depth)
        elif char == ")":
            depth -= 1
        elif char in '"[#':
            closing = {'"': '"', "[": "]", "#": "\n"}[char]
    return deepest
