"""JSON schemas of consumers as constraints, and the one that makes a model call tools.

A forced call is generated as an array of `{"name": ..., "arguments": ...}`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final, cast

import msgspec

#: Calls in one forced answer. An array without an end would let a weak model go on for ever.
MAX_FORCED_CALLS: Final = 8

_DEFINITIONS: Final = ("$defs", "definitions")


def foreign_reference(schema: object) -> str | None:
    """The first `$ref` that leaves the schema, if any.

    llama.cpp's Python converter fetches `https://` ones: from an Island, for whoever asks.
    """
    return next((ref for ref in _references(schema) if not ref.startswith("#")), None)


def calls_schema(tools: Sequence[tuple[str, str]], *, parallel: bool) -> dict[str, Any]:
    """Schema of the calls that may be made. `tools`: (name, parameters as JSON schema text).

    "name" stands before "arguments", in the order in which they are generated and read. A tool's own
    definitions move to `#/$defs/tool_I_NAME`: llama.cpp's converter names grammar rules by the last
    segment of a reference only, so that segment must be unique over all tools.
    """
    definitions: dict[str, object] = {}
    calls: list[dict[str, Any]] = []
    for i, (name, parameters) in enumerate(tools):
        place = f"tool_{i}"
        schema = cast("dict[str, object]", msgspec.json.decode(parameters)) or {"type": "object"}
        for group in _DEFINITIONS:
            local = schema.pop(group, None)
            if isinstance(local, dict):
                for key, value in cast("dict[str, object]", local).items():
                    definitions[f"{place}_{key}"] = _moved(value, place)
        definitions[place] = _moved(schema, place)
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": name}, "arguments": {"$ref": f"#/$defs/{place}"}},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    return {
        "type": "array",
        "items": calls[0] if len(calls) == 1 else {"anyOf": calls},
        "minItems": 1,
        "maxItems": MAX_FORCED_CALLS if parallel else 1,
        "$defs": definitions,
    }


def _references(schema: object) -> Iterator[str]:
    if isinstance(schema, list):
        for item in cast("list[object]", schema):
            yield from _references(item)
    elif isinstance(schema, dict):
        for key, value in cast("dict[str, object]", schema).items():
            if key == "$ref" and isinstance(value, str):
                yield value
            else:
                yield from _references(value)


def _moved(schema: object, place: str) -> object:
    """The schema with its local references pointing to where its definitions now are."""
    if isinstance(schema, list):
        return [_moved(item, place) for item in cast("list[object]", schema)]
    if not isinstance(schema, dict):
        return schema
    moved: dict[str, object] = {}
    for key, value in cast("dict[str, object]", schema).items():
        if key == "$ref" and isinstance(value, str):
            moved[key] = _moved_reference(value, place)
        else:
            moved[key] = _moved(value, place)
    return moved


def _moved_reference(reference: str, place: str) -> str:
    for group in _DEFINITIONS:
        prefix = f"#/{group}/"
        if reference.startswith(prefix):
            return f"#/$defs/{place}_{reference[len(prefix) :]}"
    return f"#/$defs/{place}{reference[1:]}"
