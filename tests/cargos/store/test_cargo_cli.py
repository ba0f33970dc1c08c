"""`archi-node cargo ...` as a person and as a script use it."""

import argparse
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cargos import cli
from cargos.cli_progress import show_progress
from cargos.manifest import CANONICAL_DOMAIN, canonical_json
from cargos.progress import FetchProgress
from cargos.resolve import builtin_catalogue

MAIN = "import argparse, sys; from cargos import cli; p = argparse.ArgumentParser(); "
MAIN += "cli.register(p.add_subparsers()); a = p.parse_args(); sys.exit(a.handler(a))"


@pytest.fixture
def archi(tmp_path, capsys):
    """Run a command line in this process: (exit code, stdout, stderr)."""
    parser = argparse.ArgumentParser()
    cli.register(parser.add_subparsers())

    def run(*words):
        arguments = parser.parse_args(["cargo", *words])
        arguments.cache = tmp_path / "cache"
        code = arguments.handler(arguments)
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def shelf(tmp_path, cargo, blob):
    """A manifest on disk, with its file beside it."""
    (tmp_path / "m.bin").write_bytes(blob(1000))
    manifest = cargo(("m.bin", blob(1000), ["file:m.bin"]), name="mine", version="2")
    path = tmp_path / "mine.json"
    path.write_text(canonical_json(manifest))
    return str(path), manifest


def test_fetch_list_show_verify_remove(archi, shelf, blob, tmp_path):
    path, manifest = shelf
    code, out, err = archi("fetch", path)
    assert code == 0
    assert Path(out.strip()).read_bytes() == blob(1000)
    assert "verified" in err
    code, out, _ = archi("list", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert rows["mine"]["fetched"] is True
    assert rows["mine"]["digest"] == manifest.digest
    assert rows["smollm2-135m"]["fetched"] is False
    _, out, _ = archi("list")
    shipped = [entry.manifest.name for entry in builtin_catalogue()]
    assert [line.split()[0] for line in out.splitlines()] == ["NAME", *shipped, "mine"]
    _, out, _ = archi("show", "mine")
    assert manifest.digest in out
    assert "Apache-2.0" in out
    _, out, _ = archi("show", "mine@2", "--json")
    assert json.loads(out)["digest"] == manifest.digest
    code, out, _ = archi("verify", "--json")
    assert code == 0
    stored = Path(json.loads(out)[0]["files"]["m.bin"])
    stored.chmod(0o600)
    stored.write_bytes(b"damage" + blob(1000)[6:])
    code, _, err = archi("verify", "mine")  # by name: nothing tells where file:m.bin would be
    assert code == 1
    assert "from elsewhere" in err
    assert archi("fetch", path)[0] == 0
    assert stored.read_bytes() == blob(1000)
    code, out, _ = archi("remove", manifest.digest)
    assert (code, out) == (0, "removed mine@2, 0 MiB freed\n")
    assert not stored.exists()
    code, _, err = archi("verify", path)
    assert code == 1
    assert "was not fetched" in err


def test_digest(archi, shelf):
    path, manifest = shelf
    assert archi("digest", path) == (0, f"{manifest.digest}\n", "")
    assert json.loads(archi("digest", path, "--json")[1])["digest"] == manifest.digest
    _, canonical, _ = archi("digest", path, "--canonical")
    assert canonical.encode().startswith(CANONICAL_DOMAIN)
    assert manifest.digest == "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()


def test_errors_have_a_way_out_and_exit_code_1(archi, tmp_path):
    (tmp_path / "bad.toml").write_text('schema = 1\nnmae = "x"\n')
    for words, said in (
        (("show", "smolm2-135m"), "Did you mean 'smollm2-135m'?"),
        (("digest", str(tmp_path / "bad.toml")), "Did you mean 'name'?"),
        (("fetch", str(tmp_path / "none.toml")), "Check the path."),
        (("remove", "smollm2-135m"), "archi-node cargo list"),
    ):
        code, out, err = archi(*words)
        assert (code, out) == (1, "")
        assert err.startswith("error: ")
        assert said in err


def test_ctrl_c(server, cargo, blob, tmp_path):
    data = blob(3 * 1024 * 1024)
    server.serve("/m", data, hold_after=1024 * 1024)
    (tmp_path / "m.json").write_text(canonical_json(cargo(("m", data, [f"{server.url}/m"]))))
    command = [
        sys.executable,
        "-c",
        MAIN,
        "cargo",
        "fetch",
        str(tmp_path / "m.json"),
        "--cache",
        str(tmp_path / "c"),
    ]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as child:
        first = child.stderr.readline()
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=30)
    assert "downloading" in first
    assert child.returncode == cli.INTERRUPTED
    assert "kept" in err
    assert "Traceback" not in err
    assert out == ""
    (part,) = (tmp_path / "c" / "parts").iterdir()
    assert data.startswith(part.read_bytes())


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_in_a_terminal_and_elsewhere(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    steps = [
        FetchProgress("m.gguf", "", 0, None, "downloading"),
        FetchProgress("m.gguf", "", 10 << 20, None, "downloading"),
        FetchProgress("m.gguf", "", 0, 20 << 20, "extracting"),
        FetchProgress("m.gguf", "", 11 << 20, 20 << 20, "extracting"),
        FetchProgress("m.gguf", "", 20 << 20, 20 << 20, "done"),
    ]
    terminal, pipe = Terminal(), io.StringIO()
    for stream in (terminal, pipe):
        with show_progress(stream) as note:
            for step in steps:
                note(step)
    assert "verified" in terminal.getvalue()
    assert "20.0/20.0" in terminal.getvalue()
    assert pipe.getvalue().splitlines() == [
        "m.gguf: downloading (0 MiB)",
        "m.gguf: extracting (0/20 MiB)",
        "m.gguf: extracting (11/20 MiB)",
        "m.gguf: verified (20/20 MiB)",
    ]
