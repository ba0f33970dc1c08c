"""A laboratory of network namespaces with delays between them (docs/decisions/0007-delay-laboratory.md)."""

from bench.lab.figures import LabFigures
from bench.lab.lab import Lab
from bench.lab.need import LabUnavailable, why_unavailable

__all__ = ["Lab", "LabFigures", "LabUnavailable", "why_unavailable"]
