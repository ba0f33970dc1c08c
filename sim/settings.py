"""Scenario files to settings: TOML, overrides by dotted names, variants; and errors that say what would be
right.
"""

from __future__ import annotations

import copy
import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias, cast, get_args, get_type_hints

import msgspec

from protocol.expectations import in_plain_words
from sim.config import ScenarioSettings, Section

Tree: TypeAlias = dict[str, Any]

#: A scenario is written by hand.
MAX_SCENARIO_BYTES: Final = 1 << 20

#: What a scenario shipped with the program is looked for in, after the path as given.
SHIPPED: Final = Path(__file__).resolve().parent.parent / "scenarios"


class ScenarioError(Exception):
    """A scenario is wrong. The message says where, and what would be right."""


def find_scenario(name: str) -> Path:
    """The file of this path, the run.json in the folder of this path, or the shipped scenario of this name.

    Raises ScenarioError.
    """
    given = Path(name)
    if given.is_file():
        return given
    if (given / "run.json").is_file():
        return given / "run.json"
    shipped = SHIPPED / (name if name.endswith(".toml") else f"{name}.toml")
    if given.name == name.removesuffix(".toml") + given.suffix and shipped.is_file():
        return shipped
    known = [path.stem for path in shipped_scenarios()]
    close = difflib.get_close_matches(given.stem, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else "`archi-sim list` shows what is shipped"
    raise ScenarioError(f"there is no scenario {name!r}; {hint}")


def shipped_scenarios() -> list[Path]:
    return sorted(SHIPPED.glob("*.toml"))


def read_tree(file: Path) -> Tree:
    """A scenario as plain values, from .toml, or from the run.json of an earlier run. Raises ScenarioError."""
    try:
        if file.stat().st_size > MAX_SCENARIO_BYTES:
            raise ScenarioError(f"{file}: too large for a scenario")
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".json":
            return cast("Tree", json.loads(text)["scenario"])
        return tomllib.loads(text)
    except OSError as error:
        raise ScenarioError(f"{file}: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise ScenarioError(f"{file}: not valid TOML: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ScenarioError(f"{file}: neither a scenario in TOML nor the run.json of a run") from error


def parse_assignment(text: str) -> tuple[str, object]:
    """`a.b=value` of `--set`; the value as TOML would read it, else as text. Raises ScenarioError."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise ScenarioError(f"--set wants NAME=VALUE, not {text!r}; for example --set links.loss=0.01")
    return name.strip(), parse_value(value)


def parse_value(text: str) -> object:
    """A TOML value; what is none is text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def with_changes(tree: Tree, changes: Mapping[str, object]) -> Tree:
    """A copy with dotted names set. Raises ScenarioError if a name leads through a value."""
    changed = copy.deepcopy(tree)
    for name, value in changes.items():
        *sections, leaf = name.split(".")
        at: Any = changed
        for section in sections:
            if isinstance(at, list):
                at = _element(cast("list[Any]", at), section, name)
            elif section.isdigit():
                raise ScenarioError(f"{name!r}: there is no list of which {section} could be an element")
            else:
                at = cast("Tree", at).setdefault(section, {})
            if not isinstance(at, dict | list):
                raise ScenarioError(f"{name!r}: {section!r} is a value, not a section")
        if isinstance(at, list):
            raise ScenarioError(f"{name!r} sets a whole element; name one of its fields")
        at[leaf] = value
    return changed


def _element(items: list[Any], number: str, name: str) -> object:
    if not number.isdigit() or int(number) >= len(items):
        raise ScenarioError(f"{name!r}: {number!r} is no element; there are {len(items)}, counted from 0")
    return items[int(number)]


def settings_of(tree: Tree, source: str) -> ScenarioSettings:
    """The tree as settings. Raises ScenarioError."""
    try:
        return msgspec.convert(tree, ScenarioSettings)
    except msgspec.ValidationError as error:
        raise ScenarioError(f"{source}: {_explain(str(error))}") from error


def variants_of(
    tree: Tree, source: str, fixed: frozenset[str] = frozenset()
) -> list[tuple[str, ScenarioSettings]]:
    """Each variant's name and settings; one named "base" if the scenario has none. Names in `fixed` were asked
    for from outside: no variant changes them. Raises ScenarioError.
    """
    base = settings_of(tree, source)
    plain = {key: value for key, value in tree.items() if key != "variant"}
    if not base.variant:
        return [("base", base)]
    names = [variant.name for variant in base.variant]
    if len(set(names)) != len(names):
        raise ScenarioError(f"{source}: two variants have the same name")
    variants: list[tuple[str, ScenarioSettings]] = []
    for variant in base.variant:
        changes = {name: value for name, value in variant.set.items() if name not in fixed}
        settings = settings_of(with_changes(plain, changes), f"{source}, variant {variant.name!r}")
        variants.append((variant.name, settings))
    return variants


def _explain(text: str) -> str:
    message, _, where = text.partition(" - at `$")
    path = where.rstrip("`").removeprefix(".")
    if "unknown field" not in message:
        return f"{path or 'the file'}: {in_plain_words(message, ScenarioSettings, path)}"
    name = message.split("`")[1]
    full = f"{path}.{name}" if path else name
    known = list(setting_names(ScenarioSettings))
    close = difflib.get_close_matches(_without_numbers(full), known, n=1, cutoff=0.5)
    siblings = [n.rpartition(".")[2] for n in known if n.rpartition(".")[0] == _without_numbers(path)]
    hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(siblings)}"
    return f"there is no setting {full!r}; {hint}"


def _without_numbers(path: str) -> str:
    return "".join(part.split("]")[-1] for part in path.split("["))


def setting_names(kind: type[Section], prefix: str = "") -> Iterator[str]:
    """Dotted names of all settings, sections and elements of lists included."""
    for name, hint in get_type_hints(kind).items():
        yield f"{prefix}{name}"
        for inner in (hint, *get_args(hint)):
            if isinstance(inner, type) and issubclass(inner, Section):
                yield from setting_names(inner, f"{prefix}{name}.")
