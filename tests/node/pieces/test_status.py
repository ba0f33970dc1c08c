"""What `archi-node status` says of pieces."""

from __future__ import annotations

from rich.console import Console

from node.snapshot import CounterSnapshot, PiecesSnapshot, Snapshot
from node.status import render_status


def shown(pieces: PiecesSnapshot) -> str:
    now = Snapshot("isle", "p", (), 1.0, False, (), (), (), CounterSnapshot(0, 0, 0, 0, 0, 0), pieces=pieces)
    console = Console(width=200)
    with console.capture() as capture:
        console.print(render_status(now, None, 0.0))
    return capture.get()


def test_what_was_given_and_got_is_shown_and_wrong_pieces_only_if_there_were_any() -> None:
    text = shown(PiecesSnapshot(3, 2, 10, 12_000_000, 90, 91_000_000, 0))
    assert "files of Cargos: 3 offered to peers, 12 MB given (2 fetch now), 91 MB got" in text
    assert "wrong" not in text
    assert "4 wrong pieces refused" in shown(PiecesSnapshot(0, 0, 0, 0, 0, 0, 4))
