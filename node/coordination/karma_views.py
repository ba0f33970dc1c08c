"""Request and answer of `archi-node karma` on the control socket. Imports no network: the command answers
at once.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta


class KarmaParams(msgspec.Struct, frozen=True):
    """`peer`: empty for the node itself."""

    peer: Annotated[str, Meta(max_length=64)] = ""


class StatementView(msgspec.Struct, frozen=True):
    """What one coordinator states. `hours`: net hours of the reference machine's work, all epochs decayed to
    now. The counts are of the running epoch.
    """

    issuer: str
    believed: bool
    hours: float
    work_hours: float
    failures: int
    timeouts: int
    lies: int
    audits_passed: int
    audits_failed: int


class KarmaView(msgspec.Struct, frozen=True):
    """`points`: as this node judges, which believes its own coordinators and those of its settings.
    `threshold`: points from which on work is paid.
    """

    peer: str
    points: float
    threshold: float
    statements: tuple[StatementView, ...]
