"""`pypi:`: a file inside a pinned wheel. pip fetches it: the user's mirrors, proxies and certificates hold.

Nothing of the package runs: wheels only, no dependencies, no installation.
"""

from __future__ import annotations

import os
import re
import zipfile
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from subprocess import CompletedProcess
from typing import IO, Final

import trio

from cargos.errors import SourceFailed, WrongContent
from cargos.locator import WheelLocator
from cargos.part import Part, store_errors
from cargos.progress import Report
from cargos.sources.settings import FetchSettings
from protocol.codec import excerpt
from protocol.limits import MIB

#: How often pip's folder is looked at: pip itself tells nothing of its progress.
WATCH_S: Final = 0.2
#: A wheel may hold this much beside the wanted file, twice over (pip moves and caches copies while it works).
#: A manifest that names a larger one is cut off.
WHEEL_MARGIN_BYTES: Final = 512 * MIB
WHEEL_FACTOR: Final = 3
EXTRACT_BYTES: Final = 4 * MIB
#: Lines of pip's complaint that are shown.
PIP_LINES: Final = 4

_PIP_MISSING: Final = re.compile(r"No module named '?pip\b")
_ERROR_LINE: Final = re.compile(r"^(ERROR|WARNING): ")


async def fetch_wheel_member(
    locator: WheelLocator, part: Part, report: Report, settings: FetchSettings, scratch: Path
) -> None:
    """Download the wheel into `scratch` and extract the member from where the part ends.

    Raises SourceFailed (WrongContent if the member has another size), StoreUnusable.
    """
    wheel = await download_wheel(locator, part.file.size_bytes, report, settings, scratch)
    report("extracting", part.offset, part.file.size_bytes)
    with wheel_faults(wheel):
        await _extract(wheel, locator, part, report)


@contextmanager
def wheel_faults(wheel: Path) -> Generator[None]:
    """Turn what a damaged wheel makes the standard library say into SourceFailed."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError) as error:
        raise SourceFailed(
            f"{wheel.name} is damaged: {excerpt(str(error))}", "Is the mirror all right?"
        ) from error


async def download_wheel(
    locator: WheelLocator, member_bytes: int, report: Report, settings: FetchSettings, scratch: Path
) -> Path:
    """The wheel, somewhere below `scratch`. `member_bytes`: the most that the wanted member may have.

    Raises SourceFailed, StoreUnusable.
    """
    into = scratch / "wheel"
    with store_errors(scratch):
        into.mkdir(parents=True)
    command = [settings.python, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    # Only data is wanted of it: which Python its code would need does not matter.
    command += [
        "--ignore-requires-python",
        "--no-input",
        "--disable-pip-version-check",
        "--progress-bar",
        "off",
    ]
    command += ["--dest", str(into), f"{locator.package}=={locator.version}"]
    result: CompletedProcess[bytes] | None = None
    refusal: OSError | None = None
    limit = WHEEL_FACTOR * member_bytes + WHEEL_MARGIN_BYTES
    oversize = False
    async with trio.open_nursery() as nursery:

        async def watch() -> None:
            nonlocal oversize
            while True:
                largest, total = await trio.to_thread.run_sync(sizes_below, scratch)
                report("downloading", largest, None)
                if total > limit:
                    oversize = True
                    nursery.cancel_scope.cancel()
                await trio.sleep(WATCH_S)

        nursery.start_soon(watch)
        try:
            result = await trio.run_process(
                command,
                capture_stdout=True,
                capture_stderr=True,
                check=False,
                cwd=scratch,
                env={**os.environ, "TMPDIR": str(scratch)},  # where the watcher looks, and we clean up
            )
        except OSError as error:
            refusal = error
        nursery.cancel_scope.cancel()
    if refusal is not None:
        problem = f"can not start {settings.python}: {refusal.strerror}"
        raise SourceFailed(problem, "Is it a Python?") from refusal
    name = f"{locator.package}=={locator.version}"
    if oversize:
        raise SourceFailed(f"the wheel of {name} is larger than {limit} bytes", "Check the manifest.")
    if result is None or result.returncode != 0:
        raise _complaint(result.stderr.decode(errors="replace") if result else "", name, settings.python)
    wheels = list(into.glob("*.whl"))
    if len(wheels) != 1:
        raise SourceFailed(f"pip brought {len(wheels)} wheels for {name}", "Check pip's configuration.")
    return wheels[0]


def _complaint(stderr: str, name: str, python: str) -> SourceFailed:
    if _PIP_MISSING.search(stderr):
        return SourceFailed(
            f"pip is missing in {python}",
            f"Run '{python} -m ensurepip', or install your system's python3-pip, or add another source.",
        )
    lines = [line for line in stderr.splitlines() if _ERROR_LINE.match(line)] or stderr.splitlines()
    said = "; ".join(excerpt(line) for line in lines[-PIP_LINES:])
    return SourceFailed(
        f"pip could not download {name}: {said or 'it said nothing'}",
        f"Try '{python} -m pip download --no-deps {name}': mirrors and proxies are pip's own settings.",
    )


async def _extract(wheel: Path, locator: WheelLocator, part: Part, report: Report) -> None:
    stream = await trio.to_thread.run_sync(_open_sized, wheel, locator, part)
    try:
        while not part.complete:
            data = await trio.to_thread.run_sync(stream.read, EXTRACT_BYTES)
            if not data:
                return
            await part.write(data)
            report("extracting", part.offset, part.file.size_bytes)
    finally:
        stream.close()


def _open_sized(wheel: Path, locator: WheelLocator, part: Part) -> IO[bytes]:
    stream, size = open_member(wheel, locator)
    if size != part.file.size_bytes:
        stream.close()
        raise WrongContent(part.file.name, f"{part.file.size_bytes} bytes", f"{size} bytes in {wheel.name}")
    stream.seek(part.offset)
    return stream


def open_member(wheel: Path, locator: WheelLocator) -> tuple[IO[bytes], int]:
    """The member, to be read, and its size. Raises SourceFailed, and what `wheel_faults` expects."""
    with zipfile.ZipFile(wheel) as archive:
        try:
            info = archive.getinfo(locator.member)
        except KeyError as error:
            raise SourceFailed(
                f"{wheel.name} holds no {locator.member}", "'unzip -l' lists what it holds."
            ) from error
        if info.flag_bits & 0x1:
            raise SourceFailed(f"{locator.member} in {wheel.name} is encrypted")
        return archive.open(info), info.file_size  # keeps the file open by itself


def sizes_below(folder: Path) -> tuple[int, int]:
    """Bytes of the largest file and of all files below a folder that others write to."""
    largest = total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                size = os.lstat(os.path.join(parent, name)).st_size  # noqa: PTH118 - os.walk's own idiom
            except OSError:
                continue  # gone since
            largest, total = max(largest, size), total + size
    return largest, total
