"""The doctor on machines where something is wrong."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from node import doctor
from node.config import EngineSettings, NetworkSettings, NodeSettings
from node.doctor import Finding, show_findings
from node.identity import load_or_create_identity, new_identity
from node.p2p import open_host

ANYWHERE = "/ip4/127.0.0.1/tcp/0"


def only(findings: list[Finding], topic: str) -> Finding:
    [found] = [finding for finding in findings if finding.topic == topic]
    return found


def test_a_cache_that_can_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    # /proc: permission bits say yes to root, the file system says no to everybody.
    for folder in ("/proc/nothing", str(tmp_path / "file"), str(tmp_path / "file" / "below")):
        finding = doctor._cache(NodeSettings(cache_dir=folder))
        assert finding.state == "missing"
        assert folder in finding.text
        assert "cache_dir" in finding.remedy
    assert doctor._cache(NodeSettings(cache_dir=str(tmp_path / "new" / "deep"))).state in {"ok", "note"}
    assert not (tmp_path / "new").exists()


def test_an_identity_that_others_can_read(tmp_path: Path) -> None:
    settings = NodeSettings(data_dir=str(tmp_path))
    assert doctor._identity(settings).state == "ok"
    load_or_create_identity(tmp_path / "identity.key")
    assert doctor._identity(settings).state == "ok"
    (tmp_path / "identity.key").chmod(0o644)
    finding = doctor._identity(settings)
    assert (finding.state, finding.remedy) == ("missing", f"chmod 600 {tmp_path / 'identity.key'}")


def test_more_threads_than_cores() -> None:
    finding = only(doctor._machine(NodeSettings(engine=EngineSettings(threads=256))), "threads")
    assert finding.state == "note"
    assert finding.remedy.startswith("--threads ")


async def test_addresses_to_listen_on(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        listen = (ANYWHERE, "nowhere", f"/ip4/127.0.0.1/tcp/{taken.getsockname()[1]}")
        settings = NodeSettings(data_dir=str(tmp_path), network=NetworkSettings(listen=listen))
        findings = await doctor._listening(settings)
    assert [finding.state for finding in findings] == ["ok", "missing", "missing"]
    assert "another program listens there" in findings[2].text


async def test_coordinators_are_met_not_only_reached() -> None:
    async with open_host(new_identity(), [ANYWHERE]) as gateway:
        right = gateway.addresses[0]
        somebody_else = right.replace(gateway.peer, new_identity().peer)
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            port = closed.getsockname()[1]
        nobody = f"/ip4/127.0.0.1/tcp/{port}/p2p/{gateway.peer}"
        findings = await doctor._coordinators([right, somebody_else, nobody, "foo", "/ip4/127.0.0.1/tcp/1"])
    assert [finding.state for finding in findings] == ["ok", *["missing"] * 4]
    assert "handshake" in findings[1].text
    assert "refused" in findings[2].text


async def test_no_coordinator_is_a_note() -> None:
    [finding] = await doctor._coordinators([])
    assert finding.state == "note"


async def test_the_engine_is_loaded_not_assumed() -> None:
    assert (await doctor._engine()).state == "ok"


def test_a_remedy_is_not_broken_into_lines(capsys: pytest.CaptureFixture[str]) -> None:
    remedy = f"chmod 600 /a/very/{'long/' * 40}path"
    show_findings([Finding("identity", "missing", "readable by others", remedy)])
    out = capsys.readouterr().out
    assert f"-> {remedy}\n" in out
    assert "1 missing" in out
