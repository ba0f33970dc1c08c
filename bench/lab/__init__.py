"""A laboratory of network namespaces with delays between them (docs/decisions/0007-delay-laboratory.md)."""

from __future__ import annotations

from bench.lab.figures import LabFigures
from bench.lab.lab import Lab
from bench.lab.need import LabUnavailable, why_unavailable

__all__ = ["Lab", "LabFigures", "LabUnavailable", "main", "why_unavailable"]


def main(argv: list[str]) -> int:
    """`python -m bench lab`."""
    from bench.lab.accuracy import main as measure  # noqa: PLC0415 - who only wants a Lab must not wait for it

    return measure(argv)
