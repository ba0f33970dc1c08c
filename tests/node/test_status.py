"""What the status screen does with words that are not ours."""

from __future__ import annotations

import io
from types import SimpleNamespace

from rich.console import Console

from node.status import _coordinators, _peers


def test_the_names_of_peers_are_shown_as_text_and_steer_nothing() -> None:
    """Whoever connects chooses its name: it is no markup (`[/b]` would end the screen) and moves no cursor."""
    names = ("[/b]", "[link=file:///etc]x[/link]", "\x1b[2J\x1b]0;mine\x07", "a\nb")
    peers = tuple(
        SimpleNamespace(
            peer=f"12D3KooW{i}", name=name, roles=(name,), state="connected", rtt_ms=1.0, address="/ip4/1.2.3.4"
        )
        for i, name in enumerate(names)
    )
    now = SimpleNamespace(peers=peers, coordinators=tuple(peer.peer for peer in peers))
    console = Console(file=io.StringIO(), width=200, force_terminal=True)
    console.print(_peers(now))  # type: ignore[arg-type]
    console.print(_coordinators(now))  # type: ignore[arg-type]
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "[/b]" in shown
    assert "[link=file:///etc]x[/link]" in shown
    assert "\x1b[2J" not in shown
    assert "\x1b]0" not in shown
    assert "a\nb" not in shown
