"""Settings: file < environment < flags, and errors that say what to write instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.config import GatewaySettings
from node.config import NodeSettings
from node.settings import SettingsError, load_settings, parse_assignment


def load(
    tmp_path: Path, toml: str = "", environ: dict[str, str] | None = None, **overrides: object
) -> NodeSettings:
    file = tmp_path / "island.toml"
    file.write_text(toml)
    named = {name.replace("__", "."): value for name, value in overrides.items()}
    return load_settings(NodeSettings, file=file, environ=environ or {}, overrides=named)


def test_each_source_overrides_the_one_before(tmp_path: Path) -> None:
    toml = 'name = "file"\nregion = "file"\n[engine]\nthreads = 2\nslots = 3\n'
    environ = {"ARCHI_REGION": "env", "ARCHI_ENGINE_THREADS": "4", "PATH": "/bin"}
    settings = load(tmp_path, toml, environ, engine__threads="5")
    assert (settings.name, settings.region) == ("file", "env")
    assert (settings.engine.threads, settings.engine.slots, settings.engine.queue) == (5, 3, 32)


def test_lists_from_text(tmp_path: Path) -> None:
    settings = load(
        tmp_path, "", {"ARCHI_NETWORK_LISTEN": "/ip4/1.2.3.4/tcp/1, /ip4/1.2.3.4/tcp/2"}, cargos="a,b"
    )
    assert settings.network.listen == ("/ip4/1.2.3.4/tcp/1", "/ip4/1.2.3.4/tcp/2")
    assert settings.cargos == ("a", "b")


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        ("[engine]\nthread = 2\n", "did you mean 'engine.threads'"),
        ("nmae = 'x'\n", "did you mean 'name'"),
        ("[engine]\nthreads = 0\n", "engine.threads: expected a whole number >= 1"),
        ("[engine]\nthreads = 'many'\n", "engine.threads: expected a whole number, not text"),
        ("[log]\nlevel = 'loud'\n", "log.level: expected one of debug, info, warning, error, not 'loud'"),
        ("[network]\nlisten = 3\n", "network.listen: expected a list, not a whole number"),
        ("[network]\nlisten = ['a', {}]\n", "network.listen[1]: expected text, not a section"),
        ("country = 'Germany'\n", "country: expected a country as two capitals, such as DE"),
        ("engine = 3\n", "engine: expected a section, not a whole number"),
        ("name = \n", "not valid TOML"),
    ],
)
def test_a_wrong_file_is_one_clear_error(tmp_path: Path, toml: str, said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load(tmp_path, toml)
    assert said in str(caught.value)
    assert "island.toml" in str(caught.value)


def test_the_environment_is_named_when_it_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"environment variable ARCHI_ENGINE_SLOTS: engine.slots"):
        load(tmp_path, "", {"ARCHI_ENGINE_SLOTS": "x"})


def test_flags_are_named_when_they_are_wrong(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"did you mean 'engine.threads'"):
        load(tmp_path, engine__thread="1")
    with pytest.raises(SettingsError, match=r"command line: engine.threads"):
        load(tmp_path, engine__threads="-1")
    with pytest.raises(SettingsError, match=r"'engine' is a section, not a setting; in it: engine.threads"):
        load(tmp_path, engine="2")
    with pytest.raises(SettingsError, match="NAME=VALUE"):
        parse_assignment("engine.threads")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nowhere\.toml.*--config"):
        load_settings(NodeSettings, file=tmp_path / "nowhere.toml", environ={}, overrides={})


def test_the_gateways_keys_are_tables(tmp_path: Path) -> None:
    file = tmp_path / "gateway.toml"
    file.write_text('[[keys]]\nname = "me"\nkey = "ak_0123456789abcdef"\nrequests_per_minute = 5\n')
    settings = load_settings(
        GatewaySettings, file=file, environ={"ARCHI_API_KEY": "ak_x"}, overrides={"open": "true"}
    )
    assert settings.keys[0].requests_per_minute == 5
    assert settings.api_key == "ak_x"
    assert settings.open


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        ("[[keys]]\nname = 'me'\nkay = 'x'\n", "there is no setting 'keys[0].kay'; did you mean 'keys.key'?"),
        ("[[keys]]\nkey = 'x'\n", "keys[0]: 'name' is missing"),
        ("[[keys]]\nname = 'me'\nrequests_per_minute = 'x'\n", "keys[0].requests_per_minute: expected a whole"),
        ("[mesh]\nkarma_floor = 'x'\n", "mesh.karma_floor: expected a number, not text"),
        ("[mesh]\nactivations = 'f17'\n", "mesh.activations: expected one of f32, f16s, q8x, not 'f17'"),
    ],
)
def test_a_wrong_table_in_a_list_is_named(tmp_path: Path, toml: str, said: str) -> None:
    file = tmp_path / "gateway.toml"
    file.write_text(toml)
    with pytest.raises(SettingsError) as caught:
        load_settings(GatewaySettings, file=file, environ={}, overrides={})
    assert str(caught.value).startswith(f"{file}: {said}")
