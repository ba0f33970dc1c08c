"""`archi-gateway` and `archi` as people and scripts meet them."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tomllib
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from gateway import archi, chat, cli
from gateway.archi import build_parser
from gateway.config import GatewaySettings
from gateway.connection import (
    Connection,
    connection_path,
    read_connection,
    remove_connection,
    write_connection,
)
from gateway.demo.screen import (
    ChainShown,
    IslandRow,
    NoChainShown,
    Screen,
    Tally,
    chain_untrusted,
    islands_table,
    readable_untrusted,
    told_untrusted,
)
from gateway.demo.words import island_command, too_little
from gateway.keys import hash_of_key
from gateway.server import overlay_config
from node.config import OverlaySettings
from protocol.instants import SECOND_NS


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("ARCHI") and name != "ARCHI_CACHE"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))


@pytest.mark.parametrize("module", ["gateway.cli", "gateway.archi"])
def test_help_loads_neither_network_nor_web(module: str) -> None:
    heavy = ("libp2p", "httpx", "fastapi", "trio", "rich")
    call = "build_parser(None)" if module == "gateway.archi" else "build_parser()"
    code = f"import {module} as m, sys; m.{call}; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_asking_needs_no_network_code() -> None:
    """`archi demo` and `archi chat` start at once: neither is a peer itself."""
    code = "import gateway.demo.demo, gateway.chat, sys; print('libp2p' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


@pytest.mark.parametrize("words", [["--help"], ["demo", "--help"], ["chat", "--help"], ["--version"]])
def test_help_and_version_end_well(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        archi.main(words)
    assert ended.value.code == 0
    assert "archi" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["consumer", 'o\'brien "x"', "back\\slash", "Zoë\ttab"])
def test_key_prints_configuration_that_is_toml(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["key", "--name", name]) == 0
    key, _, configuration = capsys.readouterr().out.partition("\n")
    assert tomllib.loads(configuration)["keys"] == [{"name": name, "sha256": hash_of_key(key)}]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "`archi-gateway key`"),
        (["--open", "--listen", "nowhere"], "'nowhere' is not of the form /ip4/"),
        (["--open", "--port", "{taken}"], "another program listens there; choose another --host or --port"),
        (["--open", "--port", "70000"], "http.port: expected a whole number <= 65535"),
    ],
)
def test_what_can_be_mended_is_no_traceback(flags: list[str], said: str, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        words = ["--listen", "/ip4/127.0.0.1/tcp/0", *(flag.format(taken=port) for flag in flags)]
        if "nowhere" in flags:
            words = flags
        done = subprocess.run(
            [sys.executable, "-m", "gateway.cli", "run", "--data-dir", str(tmp_path), *words],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode in {1, 2}
    assert said in done.stderr
    assert "Traceback" not in done.stderr


# --- archi chat finds the demo ----------------------------------------------------------------------


def settings(*flags: str) -> chat.ChatSettings:
    return chat._settings(build_parser("chat").parse_args(["chat", *flags]), os.environ)


def test_chat_without_flags_finds_a_running_demo() -> None:
    path = connection_path(os.environ)
    assert settings().url == chat.DEFAULT_URL
    write_connection(path, Connection("http://127.0.0.1:5/v1", "ak_demo", os.getpid()))
    assert path.stat().st_mode & 0o777 == 0o600
    assert settings() == chat.ChatSettings("http://127.0.0.1:5/v1", "ak_demo", None)
    # Whoever says where to go, or with which key, does not mean the demo.
    assert settings("--url", "http://x/v1") == chat.ChatSettings("http://x/v1", None, None)
    assert settings("--key", "mine").url == chat.DEFAULT_URL
    remove_connection(path)
    assert not path.exists()


def test_a_demo_that_is_gone_is_not_found() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    path = connection_path(os.environ)
    write_connection(path, Connection("http://x/v1", "k", gone.pid))
    assert read_connection(path) is None


def test_a_file_that_others_could_write_or_read_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "demo.json"
    write_connection(path, Connection("http://x/v1", "k", os.getpid()))
    path.chmod(0o666)
    assert read_connection(path) is None
    path.chmod(0o600)
    assert read_connection(path) is not None
    (tmp_path / "link").symlink_to(path)
    assert read_connection(tmp_path / "link") is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"url": 1}', '{"url": "u", "key": "k", "pid": 1e300}'])
def test_a_broken_file_is_ignored(text: str, tmp_path: Path) -> None:
    path = tmp_path / "demo.json"
    path.write_text(text)
    path.chmod(0o600)
    assert read_connection(path) is None


def test_another_demos_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "demo.json"
    write_connection(path, Connection("http://x/v1", "k", os.getppid()))
    remove_connection(path)
    assert path.exists()


# --- the demo's screen ------------------------------------------------------------------------------


def painted(text: str) -> list[str]:
    """What a very wide terminal shows after this output, less empty rows at its end."""
    rows, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[?0-9;]*[a-zA-Z]|[\r\n]|[^\x1b\r\n]+", text):
        if part == "\n":
            row, column = row + 1, 0
            rows += [""] * (row + 1 - len(rows))
        elif part == "\r":
            column = 0
        elif part == "\x1b[1A":
            row -= 1
        elif part == "\x1b[2K":
            rows[row] = ""
        elif not part.startswith("\x1b"):
            rows[row] = rows[row][:column].ljust(column) + part + rows[row][column + len(part) :]
            column += len(part)
    while rows and not rows[-1].strip():
        rows.pop()
    return [line.rstrip() for line in rows]


def test_without_a_terminal_events_stand_between_whole_lines() -> None:
    out = StringIO()
    screen = Screen(Console(file=out, width=20))
    screen.answer_begins()
    screen.answer_piece("The sea\nis ")
    screen.line("  job 1a2b goes on at coral from token 3", style="bold cyan")
    screen.answer_piece("salty.")
    screen.answer_ends()
    screen.line("[coral]")
    assert out.getvalue() == "The sea\n  job 1a2b goes on at coral from token 3\nis salty.\n[coral]\n"


def test_lines_for_scripts_are_not_wrapped_nor_coloured_on_a_narrow_terminal() -> None:
    out = StringIO()
    screen = Screen(Console(file=out, width=20, force_terminal=True, highlight=False))
    line = "ready http://127.0.0.1:8080/v1 key ak_0123456789"
    screen.line(line)
    assert out.getvalue() == f"{line}\n"


def test_on_a_terminal_the_whole_answer_and_what_is_to_be_copied_stay() -> None:
    out = StringIO()
    screen = Screen(Console(file=out, width=40, height=12, force_terminal=True, highlight=False))
    command = "curl " + "x" * 80
    with screen.live():
        screen.below("the table")
        for word in ("The sea ", "is ", "salty."):
            screen.answer_piece(word)
            screen.draw()
            screen.line("an event")
        screen.answer_ends()
        screen.verbatim(command)
        screen.draw()
        assert painted(out.getvalue())[-1] == "the table"
    # The live part leaves nothing behind and takes nothing with it.
    assert painted(out.getvalue()) == ["an event"] * 3 + ["The sea is salty.", command]


def test_log_lines_become_events_and_numbers() -> None:
    tally = Tally()

    def told(**record: object) -> str | None:
        found = told_untrusted("coral", json.dumps(record), tally)
        return None if found is None else found[0].strip()

    placed = {"event": "job placed", "job": "1a2b3c", "island": "atoll", "rtt_ms": 1.5, "tokens": 7}
    assert told(**placed, hand_over=0) == "job 1a2b runs at atoll (RTT 1.5 ms)"
    assert told(**placed, hand_over=1) == "job 1a2b goes on at atoll from token 7"
    done = told(event="job completed", job="1a2b3c", tokens=30, hand_overs=1)
    assert done == "job 1a2b done: 30 tokens, 1 hand-over"
    assert told(event="job failed", job="1a2b3c", detail="no Island") == "job 1a2b failed: no Island"
    assert (tally.answers, tally.hand_overs, tally.failures) == (1, 1, 1)


@pytest.mark.parametrize("line", ["", "Traceback", "[]", "{}", '{"event": "job placed"}', '{"event": []}'])
def test_other_lines_are_no_events(line: str) -> None:
    assert told_untrusted("coral", line, Tally()) is None
    assert isinstance(readable_untrusted(line), str)


READY = {
    "event": "chain ready",
    "cargo": "m",
    "layers": 30,
    "stages": [["coral", 0, 9], ["atoll", 9, 24], ["reef", 24, 30]],
    "spares": [["cay", 9, 24]],
}
SHORT = {
    "event": "no chain",
    "cargo": "m",
    "reason": "160 MiB needed",
    "islands": 2,
    "room_mib": 80,
    "enough_islands": 3,
    "enough_room_mib": 120,
}


def test_who_holds_which_layers_is_a_line_each_for_scripts_and_a_column_for_people() -> None:
    chain = chain_untrusted(json.dumps(READY))
    assert isinstance(chain, ChainShown)
    assert chain.lines() == [
        "island coral layers 0-8 of 30",
        "island atoll layers 9-23 of 30",
        "island reef layers 24-29 of 30",
        "island cay layers 9-23 of 30 spare",
    ]
    out = StringIO()
    rows = [IslandRow(name, 1, "ready", "", layers=chain.of(name)) for name in ("coral", "cay", "holm")]
    Console(file=out, width=120).print(islands_table(rows, Tally()))
    shown = out.getvalue().splitlines()
    assert [line.split()[-1] for line in shown[:3]] == ["layers", "0-8", "spare"]
    plain = StringIO()
    Console(file=plain, width=120).print(islands_table([IslandRow("coral", 1, "ready", "")], Tally()))
    assert "layers" not in plain.getvalue()


def test_too_little_memory_is_said_with_the_ways_out() -> None:
    short = chain_untrusted(json.dumps(SHORT))
    assert isinstance(short, NoChainShown)
    # What an Island offers may be less than it was given; the difference stays.
    words = too_little(short, 90)
    assert "--islands 3" in words
    assert "--memory-mb 130" in words
    assert too_little(replace(short, enough_islands=None, enough_room_mib=None), 90).endswith(")")


@pytest.mark.parametrize(
    "line",
    [
        '{"event": "chain ready"}',
        json.dumps({**READY, "stages": [["coral", 0]]}),
        json.dumps({**READY, "layers": "many"}),
        json.dumps({**SHORT, "islands": "two"}),
        '"chain ready"',
        '{"event": "other", "x": "chain ready"}',
    ],
)
def test_other_accounts_of_chains_are_none(line: str) -> None:
    assert chain_untrusted(line) is None


def test_an_island_is_added_with_the_memory_of_the_others() -> None:
    assert island_command("/ip4/1.2.3.4", " --set shards.memory_mib=150").endswith(
        "--coordinator /ip4/1.2.3.4 --set shards.memory_mib=150"
    )


def test_a_gateway_takes_part_in_a_network_with_its_own_k() -> None:
    settings = GatewaySettings(overlay=OverlaySettings(k=5, provider_ttl_s=30, heal_s=7))
    config = overlay_config(settings, ("/ip4/127.0.0.1/tcp/1",))
    assert (config.policy.k, config.heal_s, config.bootstrap) == (5, 7, ("/ip4/127.0.0.1/tcp/1",))
    assert config.policy.provider_ttl_ns == 30 * SECOND_NS
