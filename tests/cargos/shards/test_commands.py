"""`archi-node cargo split, inspect, pieces, remove` as a person and as a script use them."""

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from cargos import cli
from cargos.manifest_text import parse_manifest_untrusted

MANIFEST = """
schema = 1
name = "mine"
version = "1"
title = "Mine"
runtime = "llmcpp"
publisher = "me"
context_length = 256
[licence]
spdx = "MIT"
[needs]
memory_mib = 10
[[files]]
name = "m.gguf"
role = "model"
sources = ["file:m.gguf"]
"""


@pytest.fixture
def archi(tmp_path, capsys):
    """Run a command line in this process: (exit code, stdout, stderr)."""
    parser = argparse.ArgumentParser()
    cli.register(parser.add_subparsers())

    def run(*words):
        arguments = parser.parse_args(["cargo", *map(str, words)])
        arguments.cache = tmp_path / "store"
        code = arguments.handler(arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def model(synthetic, tmp_path):
    return synthetic.write_model(tmp_path / "m.gguf", synthetic.Shape(architecture="qwen3", layers=6))


def test_what_pieces_prints_makes_a_manifest_whose_cargo_can_be_split(archi, model, tmp_path, native):
    """The whole way of somebody who publishes a model."""
    code, out, err = archi("pieces", model)
    assert code == 0
    assert "m.gguf.pieces" in err
    (tmp_path / "mine.toml").write_text(MANIFEST + out)
    manifest = parse_manifest_untrusted(MANIFEST + out, "toml")
    (file,) = manifest.files
    assert file.sha256 == hashlib.sha256(model.read_bytes()).hexdigest()
    assert hashlib.sha256((tmp_path / "m.gguf.pieces").read_bytes()).hexdigest() == file.pieces_sha256
    assert manifest.sharding.layers == 6

    code, out, _ = archi("show", tmp_path / "mine.toml")
    assert "yes: 6 layers" in out
    code, out, _ = archi("split", tmp_path / "mine.toml", "--stages", 3, "--out", tmp_path, "--json")
    assert code == 0
    rows = json.loads(out)
    assert [(row["first"], row["last"]) for row in rows] == [(0, 1), (2, 3), (4, 5)]
    tokens = np.array([1, 270, 5], np.int32)
    chain = native.run_chain([Path(row["path"]) for row in rows], tokens, 2)
    assert np.array_equal(chain, native.run_chain([model], tokens, 2))

    code, out, _ = archi("remove", "mine")
    assert code == 0
    assert not list((tmp_path / "store").rglob("*.gguf"))


def test_layers_count_the_last_one_in(archi, model, tmp_path):
    code, out, _ = archi("split", model, "--layers", "2-3", "--out", tmp_path)
    assert code == 0
    assert "layers 2-3 of 6" in out
    code, out, _ = archi("inspect", tmp_path / "m.2-3of6.gguf")
    assert code == 0
    assert "layers 2-3 of 6" in out
    assert "itself a slice" in out
    code, _, err = archi("split", model, "--layers", "4-6", "--out", tmp_path)
    assert code == 1
    assert "no layer 6: the model has layers 0 to 5" in err
    for words in ("x", "3-2", "-1", "1-2-3"):
        with pytest.raises(SystemExit):
            archi("split", model, f"--layers={words}")
    code, _, err = archi("split", model, "--stages", 7)
    assert code == 1
    assert "6 layers can not be spread over 7" in err


def test_inspect_says_what_each_island_needs(archi, model):
    code, out, _ = archi("inspect", model)
    assert code == 0
    for words in ("qwen3", "6, each of", "rows of 64 values", "the same matrix", "2 Islands", "4 Islands"):
        assert words in out
    code, out, _ = archi("inspect", model, "--json")
    facts = json.loads(out)
    assert facts["can_be_spread"] is True
    assert sum(stage["last"] - stage["first"] + 1 for stage in facts["chains"]["3"]) == 6


def test_inspect_of_a_cargo_that_is_not_here(archi):
    code, out, _ = archi("inspect", "smollm2-135m-f16")
    assert code == 0
    assert "3 Islands" in out


def test_inspect_says_why_not(archi, synthetic, tmp_path):
    shape = synthetic.Shape(architecture="smollm3")
    code, out, _ = archi("inspect", synthetic.write_model(tmp_path / "x.gguf", shape))
    assert code == 0
    assert "derives from a layer's number" in out
    code, out, _ = archi("pieces", tmp_path / "x.gguf")
    assert code == 0
    assert "# no [sharding]: models of the architecture 'smollm3' can not be cut" in out
    parse_manifest_untrusted(MANIFEST + out, "toml")


def test_what_is_no_model(archi, tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"no model")
    for command in (("inspect",), ("split", "--stages", "2")):
        code, _, err = archi(command[0], tmp_path / "x.gguf", *command[1:])
        assert code == 1
        assert "not a GGUF file" in err
    code, _, err = archi("inspect", tmp_path / "missing.gguf")
    assert code == 1
    assert "can not read" in err
    (tmp_path / "empty").write_bytes(b"")
    for words in (("empty",), ("missing",), ("x.gguf", "--piece-kib", "3"), ("x.gguf", "--piece-kib", "65536")):
        code, _, err = archi("pieces", tmp_path / words[0], *words[1:])
        assert code == 1
        assert err.startswith("error: ")
