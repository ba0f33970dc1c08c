"""Settings from a file, the environment and flags, each overriding the one before.

A settings type is a tree of frozen msgspec structs with defaults. `[network] listen = […]` in TOML,
`ARCHI_NETWORK_LISTEN=a,b` in the environment and `network.listen` in the overrides mean the same field. An
unknown key, a wrong type or a value out of range is one error that names the source, the field and what was
expected.
"""

from __future__ import annotations

import difflib
import re
import tomllib
import types
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import msgspec

from protocol.expectations import in_plain_words

S = TypeVar("S", bound="Settings")

ENV_PREFIX: Final = "ARCHI_"

#: Environment variables with our prefix that are no settings of these types: caches, test hooks, the
#: client's key.
ENV_OTHERS: Final = frozenset({"ARCHI_CACHE", "ARCHI_CONFIG", "ARCHI_TEST_MODEL"})

#: A configuration file is written by hand.
MAX_CONFIG_BYTES: Final = 1024 * 1024


#: How alike a variable must be to a setting to be taken for a typing slip. The gateway's ARCHI_MESH_LISTEN and
#: the Island's ARCHI_NETWORK_LISTEN score 0.76: each may stand in the environment of the other.
SLIP_LIKENESS: Final = 0.85

#: An element's number in the path of an error: the settings file has the list as a whole.
_INDEX: Final = re.compile(r"\[[^]]*\]")


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of every settings type."""


class SettingsError(Exception):
    """A setting is wrong. The message says where it came from and what would be right."""


def load_settings(
    kind: type[S],
    *,
    file: Path | None,
    environ: Mapping[str, str],
    overrides: Mapping[str, object],
    prefix: str = ENV_PREFIX,
) -> S:
    """Merge file < environment < overrides (dotted names) and check the result against `kind`.

    Raises SettingsError.
    """
    tree: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if file is not None:
        tree = _read_file(file)
        origins = {name: str(file) for name in _leaves(tree)}
    fields = dict(_fields_of(kind))
    for name, raw in environ.items():
        if not name.startswith(prefix) or name in ENV_OTHERS:
            continue
        path = _env_path(name[len(prefix) :], fields)
        if path is None:
            continue  # our other programs share the prefix; `likely_slips` tells of typing slips
        _put(tree, path, _split(raw, fields[path]))
        origins[path] = f"environment variable {name}"
    for path, value in overrides.items():
        if path not in fields:
            inside = [name for name in fields if name.startswith(f"{path}.")]
            if inside:
                raise SettingsError(f"{path!r} is a section, not a setting; in it: {', '.join(inside)}")
            raise SettingsError(f"there is no setting {path!r}{_did_you_mean(path, fields)}")
        _put(tree, path, _split(value, fields[path]) if isinstance(value, str) else value)
        origins[path] = "command line"
    try:
        return msgspec.convert(tree, kind, strict=False)
    except msgspec.ValidationError as error:
        raise SettingsError(_explain(str(error), kind, origins)) from error


def setting_names(kind: type[Settings]) -> frozenset[str]:
    """Dotted names of all settings."""
    return frozenset(path for path, _ in _fields_of(kind))


def list_settings(kind: type[Settings]) -> frozenset[str]:
    """Dotted names of the settings that hold lists."""
    return frozenset(path for path, hint in _fields_of(kind) if _is_list(hint))


def likely_slips(
    kind: type[Settings], environ: Mapping[str, str], prefix: str = ENV_PREFIX
) -> list[tuple[str, str]]:
    """Variables that are no setting but nearly one, each with the name that was probably meant."""
    known = {prefix + path.replace(".", "_").upper() for path, _ in _fields_of(kind)}
    slips: list[tuple[str, str]] = []
    for name in environ:
        if not name.startswith(prefix) or name in known | ENV_OTHERS:
            continue
        if close := difflib.get_close_matches(name, known, n=1, cutoff=SLIP_LIKENESS):
            slips.append((name, close[0]))
    return slips


def parse_assignment(text: str) -> tuple[str, str]:
    """`a.b=value` of a `--set` flag. Raises SettingsError."""
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise SettingsError(f"--set wants NAME=VALUE, not {text!r}; for example --set engine.threads=2")
    return path.strip(), value


def _read_file(file: Path) -> dict[str, Any]:
    try:
        size = file.stat().st_size
        if size > MAX_CONFIG_BYTES:
            raise SettingsError(f"{file}: {size} bytes is too large for a configuration file")
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{file}: {error.strerror}; give another file with --config") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file}: not valid TOML: {error}") from error


def _fields_of(kind: type[Settings], prefix: str = "") -> Iterator[tuple[str, Any]]:
    hints = get_type_hints(kind)
    for field in msgspec.structs.fields(kind):
        hint: Any = hints[field.name]
        path = f"{prefix}{field.encode_name}"
        if isinstance(hint, type) and issubclass(hint, Settings):
            yield from _fields_of(hint, f"{path}.")
        else:
            yield path, hint


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(cast("dict[str, Any]", value), f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _env_path(name: str, fields: Mapping[str, Any]) -> str | None:
    wanted = name.lower()
    return next((path for path in fields if path.replace(".", "_") == wanted), None)


def _is_list(hint: object) -> bool:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_is_list(option) for option in get_args(hint))
    return origin in (tuple, list)


def _split(value: object, hint: object) -> object:
    if isinstance(value, str) and _is_list(hint):
        return [item.strip() for item in value.split(",") if item.strip()]
    return value


def _put(tree: dict[str, Any], path: str, value: object) -> None:
    *sections, leaf = path.split(".")
    for section in sections:
        inner = tree.setdefault(section, {})
        if not isinstance(inner, dict):
            raise SettingsError(f"{section!r} is a section, not a value")
        tree = cast("dict[str, Any]", inner)
    tree[leaf] = value


def _did_you_mean(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"


def _explain(text: str, kind: type[Settings], origins: Mapping[str, str]) -> str:
    message, _, where = text.partition(" - at `$.")
    path = where.rstrip("`")
    if "unknown field" in message:
        name = message.split("`")[1]
        path = f"{path}.{name}" if path else name
        known = dict.fromkeys([*(name for name, _ in _fields_of(kind)), *_element_names(kind)])
        problem = f"there is no setting {path!r}{_did_you_mean(_INDEX.sub('', path), known)}"
    else:
        problem = f"{path or 'settings'}: {in_plain_words(message, kind, path)}"
    return f"{_origin(_INDEX.sub('', path), origins)}: {problem}"


def _origin(path: str, origins: Mapping[str, str]) -> str:
    """Where a setting came from, or what it stands in, or what stands in it."""
    near = (o for o in origins if o == path or o.startswith(f"{path}.") or path.startswith(f"{o}."))
    return next((origins[o] for o in near), "configuration")


def _element_names(kind: type[Settings]) -> Iterator[str]:
    """Dotted names of what stands in lists of tables, such as `keys.name`."""
    for path, hint in _fields_of(kind):
        for element in get_args(hint):
            if isinstance(element, type) and issubclass(element, Settings):
                yield from (name for name, _ in _fields_of(element, f"{path}."))
