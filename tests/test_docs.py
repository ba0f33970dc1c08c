"""What the documentation names is there: files, functions, links, commands with their flags, settings."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

import bench.__main__ as bench_commands
from gateway import archi
from gateway import cli as gateway_cli
from gateway.config import GatewaySettings
from node import cli as node_cli
from node.config import NodeSettings
from node.settings import ENV_OTHERS, Settings, setting_names
from sim import cli as sim_cli
from sim.config import ScenarioSettings
from sim.settings import setting_names as scenario_names

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "sdk/js/README.md", "scenarios/README.md")),
        *ROOT.glob("docs/**/*.md"),
    ]
)
FOLDERS = "protocol|dht|routing|cargos|node|gateway|sim|scenarios|sdk|tests|bench|docs|native|locks"

#: `folder/file.py`, `folder/`, and with what is in it: `folder/file.py: one, two.three`.
NAMED_PATH = re.compile(rf"\A(?P<path>(?:{FOLDERS})/[\w./*-]*)(?:: (?P<names>[\w.]+(?:, [\w.]+)*))?\Z")
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]\n]*\]\((?!https?:)(?P<file>[^)#\s]*)(?:#(?P<anchor>[^)\s]*))?\)")
#: At the beginning, or behind a prompt, a folder, variables, `$(`.
COMMAND = re.compile(
    r"\A(?:\$ |.*\$\(|(?:\w+=\S+ )+)?(?:\S*/)?(?P<command>archi(?:-node|-gateway|-sim)?) (?P<rest>.*)"
)
#: `file.py: name` of a file that the text has named before; `Class.method`.
NAMED_FILE = re.compile(r"\A(?P<file>\w+\.py): (?P<names>[\w.]+(?:, [\w.]+)*)\Z")
METHOD = re.compile(r"\A(?P<owner>_?[A-Z]\w*)\.(?P<name>_?[a-z]\w+)\Z")


@pytest.fixture(params=PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def page(request: pytest.FixtureRequest) -> Path:
    return request.param


def code_of(text: str) -> Iterator[str]:
    """Inline code and the lines of code blocks, continued lines joined, comments off."""
    parts = re.split(r"^```.*$", text, flags=re.MULTILINE)
    for number, part in enumerate(parts):
        if number % 2:
            yield from re.sub(r"\s*\\\n\s*", " ", part).splitlines()
        else:
            yield from CODE.findall(part)
            yield from re.findall(r"^    (\S.*)$", part, flags=re.MULTILINE)


def anchor_of(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower().replace("`", "")).replace(" ", "-")


def defines(path: Path, name: str) -> bool:
    """Whether a file (or a package's __init__) has a class, function or name of this kind."""
    file = path / "__init__.py" if path.is_dir() else path
    text = file.read_text()
    last = re.escape(name.rpartition(".")[2])
    return (
        re.search(rf"(?:def|class) {last}\b|^{last}\b.*=|import .*\b{last}\b|^    {last}\b", text, re.MULTILINE)
        is not None
    )


def test_paths_and_what_they_hold(page: Path) -> None:
    missing: list[str] = []
    for code in CODE.findall(page.read_text()):
        found = NAMED_PATH.match(code)
        if found is None:
            continue
        paths = list(ROOT.glob(found["path"].rstrip("/")))
        if not paths:
            missing.append(code)
        elif found["names"]:
            missing += [f"{code}: {n}" for n in found["names"].split(", ") if not defines(paths[0], n)]
    assert not missing


def test_names_of_functions(page: Path) -> None:
    every = [file for folder in FOLDERS.split("|") for file in (ROOT / folder).rglob("*.py")]
    sources = [file for file in every if "node_modules" not in file.parts]
    texts = {file: file.read_text() for file in sources}
    missing: list[str] = []
    for code in CODE.findall(page.read_text()):
        if found := NAMED_FILE.match(code):
            files = [file for file in sources if file.name == found["file"]]
            names = found["names"].split(", ")
            missing += [code for name in names if not any(defines(file, name) for file in files)]
        elif found := METHOD.match(code):
            owners = [file for file, text in texts.items() if f"class {found['owner']}" in text]
            if owners and not any(re.search(rf"\b{found['name']}\b", texts[file]) for file in owners):
                missing.append(code)
    assert not missing


def test_links(page: Path) -> None:
    broken: list[str] = []
    for link in LINK.finditer(page.read_text()):
        target = page.parent / link["file"] if link["file"] else page
        if not target.exists():
            broken.append(link[0])
        elif link["anchor"]:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            if link["anchor"] not in map(anchor_of, headings):
                broken.append(link[0])
    assert not broken


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Each command's parser by its words: "archi-node dht put"."""
    found: dict[str, argparse.ArgumentParser] = {}

    def walk(words: str, parser: argparse.ArgumentParser) -> None:
        found[words] = parser
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for name, inner in action.choices.items():
                    walk(f"{words} {name}", inner)

    for program, parser in (
        ("archi-node", node_cli.build_parser()),
        ("archi-gateway", gateway_cli.build_parser()),
        ("archi-sim", sim_cli.build_parser()),
        *(("archi", archi.build_parser(command)) for command in ("chat", "demo")),
    ):
        known = dict(found)
        walk(program, parser)
        # `archi` builds the wanted command only: of the others there is but the name.
        found.update(
            {words: each for words, each in known.items() if len(each._actions) > len(found[words]._actions)}
        )
    return found


PARSERS = parsers()


def commands_of(text: str) -> Iterator[tuple[str, str, list[str]]]:
    """(the code, the command's words as far as they are one, what follows)."""
    for code in code_of(text):
        found = COMMAND.search(code)
        if found is None:
            continue
        try:
            rest = shlex.split(found["rest"], comments=True)
        except ValueError:
            rest = found["rest"].split()
        rest = [word.rstrip(",;)") for word in rest]
        words = found["command"]
        while rest and f"{words} {rest[0]}" in PARSERS:
            words += f" {rest.pop(0)}"
        yield code, words, rest


def test_commands_and_flags(page: Path) -> None:
    wrong: list[str] = []
    for code, words, rest in commands_of(page.read_text()):
        parser = PARSERS[words]
        inner = any(isinstance(action, argparse._SubParsersAction) for action in parser._actions)
        if inner and rest and not rest[0].startswith(("-", "...", "[")):
            wrong.append(f"{code}: {words} has no {rest[0]!r}")
        flags = {flag for word in rest for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", word)}
        wrong += [f"{code}: no {flag}" for flag in flags if flag not in parser._option_string_actions]
    assert not wrong


def test_settings_of_commands(page: Path) -> None:
    """`--set NAME=VALUE` names a setting of the program that it is given to."""
    known = {
        "archi-node": setting_names(NodeSettings),
        "archi-gateway": setting_names(GatewaySettings),
        "archi-sim": frozenset(scenario_names(ScenarioSettings)),
    }
    wrong: list[str] = []
    for code, words, rest in commands_of(page.read_text()):
        settings = known.get(words.split()[0])
        if settings is None:
            continue
        for flag, value in pairwise(rest):
            name = re.sub(r"\.\d+\.", ".", value.partition("=")[0])
            dynamic = name.startswith("dht.policy.")
            if flag in {"--set", "--grid"} and "=" in value and name != "NAME" and not dynamic:
                wrong += [f"{code}: {name}"] if name not in settings else []
    assert not wrong


def test_make_targets_and_benches(page: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    benches = set(bench_commands.BENCHMARKS)
    wrong: list[str] = []
    for code in code_of(page.read_text()):
        wrong += [code for target in re.findall(r"\bmake ([a-z]+)\b", code) if target not in targets]
        wrong += [code for name in re.findall(r"-m bench ([a-z_]+)", code) if name not in {*benches, "all"}]
    assert not wrong


@pytest.mark.parametrize(("heading", "kind"), [("### Island", NodeSettings), ("### Gateway", GatewaySettings)])
def test_every_setting_is_documented_and_no_other(heading: str, kind: type[Settings]) -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    section = re.split(r"^##", text.partition(f"{heading}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
    named: set[str] = set()
    for row in re.findall(r"^\| (.*?) \|", section, re.MULTILINE):
        names = re.findall(r"`(?:\[\[)?([a-z0-9_.*]+)(?:\]\])?`", row)
        named.update(names)
    settings = setting_names(kind)
    wildcards = [name.removesuffix("*") for name in named if name.endswith("*")]
    documented = {name for name in settings if name in named or any(name.startswith(w) for w in wildcards)}
    assert settings - documented == frozenset()
    assert {name for name in named if not name.endswith("*")} - settings == set()


def test_environment_variables(page: Path) -> None:
    known = {
        f"ARCHI_{name.replace('.', '_').upper()}"
        for kind in (NodeSettings, GatewaySettings)
        for name in setting_names(kind)
    }
    named = set(re.findall(r"\bARCHI_[A-Z_]*[A-Z]\b", page.read_text()))
    assert named - known - ENV_OTHERS == set()
