from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from node.identity import IdentityError, load_or_create_identity, new_identity
from node.p2p.noise import Credentials


def test_first_start_creates_it_and_later_ones_load_it(tmp_path: Path) -> None:
    path = tmp_path / "data" / "deep" / "identity"
    made = load_or_create_identity(path)
    assert load_or_create_identity(path) == made
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.parent.parent.stat().st_mode) == 0o700
    assert [p.name for p in path.parent.iterdir()] == ["identity"]  # no draft stays behind


def test_mode_does_not_depend_on_the_umask(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        load_or_create_identity(tmp_path / "d" / "identity")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "d" / "identity").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "d").stat().st_mode) == 0o700


def test_the_network_knows_it_by_the_same_name() -> None:
    identity = new_identity()
    assert Credentials(identity.seed).peer == identity.peer == identity.signer.peer


def test_repr_shows_no_secret() -> None:
    identity = new_identity()
    text = repr(identity) + str(identity)
    assert identity.peer in text
    assert identity.seed.hex() not in text
    assert repr(identity.seed) not in text


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_key_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "identity"
    load_or_create_identity(path)
    path.chmod(mode)
    with pytest.raises(IdentityError, match=f"chmod 600 {path}"):
        load_or_create_identity(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"archipelag-identity-1\nabc\n", b"\xff" * 5000])
def test_another_file_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "identity"
    path.touch(0o600)
    path.write_bytes(content)
    with pytest.raises(IdentityError, match="move it away"):
        load_or_create_identity(path)
    assert path.read_bytes() == content


def test_a_directory_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "identity").mkdir()
    with pytest.raises(IdentityError, match="regular file"):
        load_or_create_identity(tmp_path / "identity")


def test_a_directory_that_others_can_write_is_refused(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(IdentityError, match="chmod 700"):
        load_or_create_identity(shared / "identity")


def test_the_slower_of_two_starts_takes_the_others_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "identity"
    link = Path.hardlink_to
    winner = []

    def late(self: Path, target: Path) -> None:
        monkeypatch.setattr(Path, "hardlink_to", link)
        winner.append(load_or_create_identity(path))
        link(self, target)

    monkeypatch.setattr(Path, "hardlink_to", late)
    assert load_or_create_identity(path) == winner[0]
    assert [p.name for p in tmp_path.iterdir()] == ["identity"]
