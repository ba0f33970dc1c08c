"""`archi-node` as people and scripts meet it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from node import cli
from node.cli import build_parser
from node.config import NodeSettings
from node.data_dir import DataDirError, hold_data_dir
from node.runner import guarded, settings_from


def archi_node(*arguments: str, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "node.cli", *arguments],
        stdout=options.get("stdout", subprocess.PIPE),
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("ARCHI_") and name != "ARCHI_CACHE"]:
        monkeypatch.delenv(name)


def test_help_loads_neither_network_nor_web() -> None:
    """They take seconds, and every command passes through this module."""
    heavy = ("libp2p", "httpx", "fastapi", "trio", "rich")
    code = f"import node.cli, sys; node.cli.build_parser(); print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["cargo", "--help"], ["--version"]])
def test_help_and_version_end_well(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 0
    assert "archi-node" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["id", "--config", "/nonexistent.toml"], "/nonexistent.toml: No such file"),
        (["id", "--set", "engine.threads"], "--set wants NAME=VALUE"),
        (["id", "--set", "engine.thread=2"], "did you mean 'engine.threads'"),
        (["doctor", "--threads", "many"], "command line: engine.threads: expected a whole number"),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error


def test_a_list_flag_given_twice_adds_up_and_of_others_the_last_counts() -> None:
    flags = ["--coordinator", "/ip4/1.2.3.4/tcp/1", "--coordinator", "/ip4/1.2.3.4/tcp/2,/ip4/1.2.3.4/tcp/3"]
    arguments = build_parser().parse_args(["run", *flags, "--name", "a", "--name", "b"])
    settings = settings_from(arguments, NodeSettings)
    assert settings.network.coordinators == tuple(f"/ip4/1.2.3.4/tcp/{port}" for port in (1, 2, 3))
    assert settings.name == "b"


def test_a_typing_slip_in_a_variable_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("ARCHI_ENGINE_THREAD", "2")
    monkeypatch.setenv("ARCHI_MESH_LISTEN", "/ip4/127.0.0.1/tcp/0")  # the gateway's: none of our business
    assert cli.main(["id", "--data-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().err == (
        "warning: ARCHI_ENGINE_THREAD is no setting; did you mean ARCHI_ENGINE_THREADS?\n"
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--listen", "nowhere"], "'nowhere' is not of the form /ip4/"),
        (["--coordinator", "nobody"], "'nobody' is not of the form /ip4/"),
        (["--cargo", "smolm2-135m"], "Did you mean 'smollm2-135m'"),
    ],
)
def test_what_can_be_mended_is_no_traceback(flags: list[str], said: str, tmp_path: Path) -> None:
    with archi_node("run", "--data-dir", str(tmp_path), *flags) as program:
        error = program.communicate(timeout=60)[1]
    assert program.returncode == 1
    assert said in error
    assert "Traceback" not in error


def test_one_island_per_data_directory_and_a_signal_ends_it_well(tmp_path: Path) -> None:
    flags = ("run", "--data-dir", str(tmp_path), "--set", "cargos=", "--log-format", "json")
    with archi_node(*flags) as first:
        assert first.stdout is not None
        try:
            assert first.stdout.readline().startswith("listening /ip4/127.0.0.1/")
            with archi_node(*flags) as second:
                error = second.communicate(timeout=60)[1]
            assert second.returncode == 1
            assert f"process {first.pid} already runs with the data directory {tmp_path}" in error
            # The first one still answers where `archi-node status` asks.
            with archi_node("status", "--data-dir", str(tmp_path), "--json") as status:
                assert '"uptime_s"' in status.communicate(timeout=60)[0]
        finally:
            first.send_signal(signal.SIGTERM)
            first.communicate(timeout=60)
    assert first.returncode == 0
    with hold_data_dir(tmp_path):
        pass


def test_the_lock_goes_with_its_holder(tmp_path: Path) -> None:
    code = "import sys, time, pathlib, node.data_dir as d\nwith d.hold_data_dir(pathlib.Path(sys.argv[1])):\n"
    code += "    print('held', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(DataDirError, match=f"process {holder.pid}"), hold_data_dir(tmp_path):
            pass
        holder.kill()
        holder.wait()
    with hold_data_dir(tmp_path):
        assert (tmp_path / "lock").stat().st_mode & 0o777 == 0o600


def test_a_data_directory_that_can_not_be_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataDirError, match="choose another"), hold_data_dir(tmp_path / "file"):
        pass


def test_a_reader_that_has_gone_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    with archi_node("cargo", "show", "smollm2-135m", stdout=write) as program:
        os.close(write)
        error = program.communicate(timeout=60)[1]
    assert program.returncode in {0, 1}  # 1: Rich's own way to say so
    assert error == ""


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (KeyboardInterrupt(), 130),
        (BaseExceptionGroup("", [BaseExceptionGroup("", [KeyboardInterrupt()])]), 130),
    ],
)
def test_ctrl_c_is_130_also_out_of_a_nursery(raised: BaseException, code: int) -> None:
    def command(_: object) -> int:
        raise raised

    assert guarded(command, build_parser().parse_args(["id"])) == code


def test_a_bug_beside_ctrl_c_is_not_swallowed() -> None:
    def command(_: object) -> int:
        raise BaseExceptionGroup("", [KeyboardInterrupt(), ZeroDivisionError()])

    with pytest.raises(BaseExceptionGroup):
        guarded(command, build_parser().parse_args(["id"]))
