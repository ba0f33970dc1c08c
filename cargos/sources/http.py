"""`https:` and `hf:`: one file over HTTP, in several connections if need be (Range: RFC 9110, section 14)."""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final, NoReturn

import httpx
import trio

from cargos.errors import CargoError, SourceFailed, WrongContent
from cargos.locator import is_loopback_host
from cargos.part import Part
from cargos.progress import Report
from cargos.sources.settings import FetchSettings
from protocol.codec import excerpt
from protocol.limits import KIB

#: The hub redirects once to its storage, mirrors once or twice more.
MAX_REDIRECTS: Final = 5
#: A connection that brought less than this counts as failed: a server must not keep us with a byte each.
MIN_GAIN_BYTES: Final = 256 * KIB
#: The longest wait that a server may ask of us by Retry-After, in seconds.
MAX_RETRY_AFTER_S: Final = 30
USER_AGENT: Final = "archipelag"

CONTENT_RANGE: Final = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)\Z")


class Interrupted(Exception):
    """This connection failed; the next may not."""

    def __init__(self, problem: str, wait_s: float = 0.0) -> None:
        super().__init__(problem)
        self.wait_s = wait_s


@dataclass(frozen=True, slots=True)
class Target:
    """Where a request goes. `loopback`: the server is on this machine. `token`: for its Authorization."""

    url: str
    token: str | None
    loopback: bool


async def fetch_url(
    url: str,
    part: Part,
    report: Report,
    settings: FetchSettings,
    *,
    token: str | None = None,
    loopback: bool = False,
) -> None:
    """Download the rest. `loopback`: the server is on this machine, so redirects may lead to plain http here.

    A server without Range starts over. Raises SourceFailed, WrongContent (the server offers another size or
    sends more), StoreUnusable.
    """
    target = Target(url, token_for(url, token), loopback)
    timeout = httpx.Timeout(settings.stall_timeout_s, connect=settings.connect_timeout_s)
    # SSL_CERT_FILE holds everywhere, but a proxy has no business between this machine and itself.
    trust = httpx.create_ssl_context()
    async with httpx.AsyncClient(timeout=timeout, verify=trust, trust_env=not loopback) as client:
        failures = 0
        while True:
            before = part.offset
            try:
                await _download(client, target, part, report, settings)
            except Interrupted as error:
                failures = 1 if part.offset - before >= MIN_GAIN_BYTES else failures + 1
                if failures >= settings.attempts:
                    raise SourceFailed(
                        f"{error} ({failures} attempts)", "Check the network; what came so far is kept."
                    ) from error
                report("retrying", part.offset, part.file.size_bytes)
                await trio.sleep(max(error.wait_s, settings.backoff_s * 2 ** (failures - 1)))
            else:
                return


async def _download(
    client: httpx.AsyncClient, target: Target, part: Part, report: Report, settings: FetchSettings
) -> None:
    headers = {"Accept-Encoding": "identity", "User-Agent": USER_AGENT}
    if part.offset:
        headers["Range"] = f"bytes={part.offset}-"
    if target.token is not None:
        headers["Authorization"] = f"Bearer {target.token}"
    try:
        response = await follow(client, client.build_request("GET", target.url, headers=headers), target)
        try:
            await _admit(response, part)
            await _receive(response, part, report, settings)
        finally:
            with trio.CancelScope(shield=True):  # closing a socket does not wait for the peer
                await response.aclose()
    except httpx.TransportError as error:
        raise explain(error) from error
    except httpx.InvalidURL as error:
        raise SourceFailed(f"not a URL: {excerpt(str(error))}") from error


async def follow(client: httpx.AsyncClient, request: httpx.Request, target: Target) -> httpx.Response:
    """The first response that is no redirect. httpx drops the Authorization header when the host changes."""
    for _ in range(MAX_REDIRECTS + 1):
        response = await client.send(request, stream=True)
        following = response.next_request
        if following is None:
            return response
        await response.aclose()
        url = following.url
        # Plain http stays possible only where the user began with it: a server here, an HF_ENDPOINT of his own.
        if url.scheme != "https" and (url.scheme != "http" or request.url.scheme == "https"):
            raise SourceFailed(f"redirected to {excerpt(url.scheme)}:", "Name the file's final https address.")
        if is_loopback_host(url.host) and not target.loopback:
            raise SourceFailed("redirected to this machine", "Name the file's final address.")
        request = following
    raise SourceFailed(f"more than {MAX_REDIRECTS} redirects", "Name the file's final address.")


async def _admit(response: httpx.Response, part: Part) -> None:
    """Check status and headers before any byte counts."""
    expected = part.file.size_bytes
    status = response.status_code
    if status == HTTPStatus.PARTIAL_CONTENT:
        found = CONTENT_RANGE.match(response.headers.get("content-range", ""))
        if found is None or int(found[1]) != part.offset:
            await part.restart()
            raise Interrupted("the server sent another range than was asked for")
        if found[3] != "*" and int(found[3]) != expected:
            raise WrongContent(part.file.name, f"{expected} bytes", f"{found[3]} bytes on the server")
    elif status == HTTPStatus.OK:
        length = response.headers.get("content-length", "")
        if length.isascii() and length.isdigit() and int(length[:20]) != expected:
            raise WrongContent(
                part.file.name, f"{expected} bytes", f"{excerpt(length[:20])} bytes on the server"
            )
        if part.offset:
            await part.restart()  # it does not know Range
    elif status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and part.offset:
        await part.restart()
        raise Interrupted("the server could not resume")
    else:
        check_status(response)
    if response.headers.get("content-encoding", "identity").lower() != "identity":
        raise SourceFailed("the server encodes the content although it was asked not to")


def check_status(response: httpx.Response) -> NoReturn:
    """Raise what an unwelcome status means: Interrupted if another try may do better, else SourceFailed."""
    status = response.status_code
    if status in (408, 425, 429) or status >= 500:
        raise Interrupted(f"HTTP {status}", _retry_after_s(response))
    raise SourceFailed(f"HTTP {status} {excerpt(response.reason_phrase)}".rstrip(), _hint(status))


async def _receive(response: httpx.Response, part: Part, report: Report, settings: FetchSettings) -> None:
    """Take the body. To stop early, the read itself is cancelled: httpx chains four async generators, and
    leaving the loop would abandon the inner ones to the garbage collector.
    """
    speed = Speedometer(settings)
    failure: Exception | None = None
    with trio.CancelScope() as reading:
        async for chunk in response.aiter_raw():
            if failure is not None:
                continue  # what was already received; the next read ends it
            try:
                await part.write(chunk)
                report("downloading", part.offset, part.file.size_bytes)
                speed.count(len(chunk))
            except (CargoError, Interrupted) as error:
                failure = error
                reading.cancel()
    if failure is not None:
        raise failure
    if not part.complete:
        raise Interrupted(f"cut off at {part.offset} of {part.file.size_bytes} bytes")


class Speedometer:
    """Notices a connection that lives but leads nowhere."""

    def __init__(self, settings: FetchSettings) -> None:
        self._settings = settings
        self._start = trio.current_time()
        self._bytes = 0

    def count(self, size: int) -> None:
        self._bytes += size
        elapsed = trio.current_time() - self._start
        if elapsed < self._settings.rate_window_s:
            return
        if self._bytes < self._settings.min_rate_bytes_s * elapsed:
            raise Interrupted(f"slower than {self._settings.min_rate_bytes_s} bytes/s")
        self._start, self._bytes = trio.current_time(), 0


def explain(error: httpx.TransportError) -> Exception:
    """What broke, in the words of whoever has some: httpx often wraps an error without its text."""
    words = ""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, ssl.SSLCertVerificationError):
            return SourceFailed(
                f"the server's certificate is not trusted: {excerpt(link.verify_message)}",
                "If your network has certificates of its own, name their file in SSL_CERT_FILE.",
            )
        words = words or str(link)
        link = link.__cause__ or link.__context__
    return Interrupted(f"{type(error).__name__}: {excerpt(words) or 'the connection broke'}")


def token_for(url: str, token: str | None) -> str | None:
    """A token never travels in the clear, except within this machine."""
    parsed = httpx.URL(url)
    return token if parsed.scheme == "https" or is_loopback_host(parsed.host) else None


def _retry_after_s(response: httpx.Response) -> float:
    value = response.headers.get("retry-after", "")
    return float(min(int(value[:6]), MAX_RETRY_AFTER_S)) if value.isascii() and value.isdigit() else 0.0


def _hint(status: int) -> str:
    match status:
        case 401 | 403:
            return "It needs a login: for hf: set HF_TOKEN and accept the model's terms on its page."
        case 404 | 410:
            return "The file is not there (any more): check the manifest, or add another source."
        case _:
            return ""
