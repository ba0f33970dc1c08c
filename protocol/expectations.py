"""What msgspec says of a wrong value, in words for the person who wrote it.

msgspec names its own kinds ("Expected `object`, got `int`") and of a word that is not in a list only that it
is not. Settings and scenarios are written by hand, so their errors name what would be right.
"""

from __future__ import annotations

import re
import types
from typing import Annotated, Any, Final, Literal, Union, cast, get_args, get_origin, get_type_hints

import msgspec

_KINDS: Final = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "array": "a list",
    "object": "a section",
    "null": "nothing",
}
_EXPECTED: Final = re.compile(r"Expected `(?P<kinds>[^`]+)`(?P<bound>[^,]*)(?:, got `(?P<got>\w+)`)?\Z")
_MISSING: Final = re.compile(r"Object missing required field `(?P<name>[^`]+)`\Z")


def in_plain_words(message: str, kind: type, path: str) -> str:
    """The problem of a `ValidationError` (without its ` - at ...`) at `path`, which is in `kind`.

    `path` is written as msgspec does, without the leading `$.`: `keys[0].name`. What is not known here stays
    as msgspec says it.
    """
    hint = _hint_at(kind, path)
    if hint is not None and (described := _description(hint)):
        return f"expected {described}"
    if message.startswith("Invalid enum value") and (options := _options(hint)):
        value = message.removeprefix("Invalid enum value").strip()
        return f"expected one of {', '.join(options)}, not {value}"
    if missing := _MISSING.match(message):
        return f"{missing['name']!r} is missing"
    found = _EXPECTED.match(message)
    if found is None:
        return message
    words = " or ".join(_KINDS.get(each, each) for each in found["kinds"].split(" | ") if each != "null")
    got = f", not {_KINDS.get(found['got'], found['got'])}" if found["got"] else ""
    return f"expected {words}{found['bound']}{got}"


def _hint_at(kind: type, path: str) -> object:
    """The annotation of the field at `path`, or None where there is none to be found."""
    at: object = kind
    for part in filter(None, path.split(".")):
        name, *elements = part.split("[")
        struct = next((t for t in _members(at) if isinstance(t, type) and issubclass(t, msgspec.Struct)), None)
        at = None if struct is None else get_type_hints(struct, include_extras=True).get(name)
        for _ in elements:
            at = _element(at)
    return at


def _members(hint: object) -> list[Any]:
    """The alternatives of a union, each without its `Annotated`."""
    origin = get_origin(hint)
    if origin is Annotated:
        return _members(get_args(hint)[0])
    if origin in (Union, types.UnionType):
        return [member for option in get_args(hint) for member in _members(option)]
    return [hint]


def _element(hint: object) -> object:
    """What a list's or a dict's elements are."""
    for member in _members(hint):
        inner = [each for each in get_args(member) if each is not Ellipsis]
        if get_origin(member) in (tuple, list, dict) and inner:
            return inner[-1]
    return None


def _description(hint: object) -> str | None:
    if get_origin(hint) is not Annotated:
        return None
    metas = [extra for extra in get_args(hint)[1:] if isinstance(extra, msgspec.Meta)]
    return next((meta.description for meta in metas if meta.description), None)


def _options(hint: object) -> list[str]:
    return [
        str(cast("object", option))
        for member in _members(hint)
        if get_origin(member) is Literal
        for option in get_args(member)
    ]
