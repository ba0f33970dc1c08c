"""A file server that misbehaves on request, and manifests of files made up on the spot."""

from __future__ import annotations

import datetime as dt
import hashlib
import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import IPv4Address
from pathlib import Path

import psutil
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from cargos.manifest import CargoFile, Licence, Manifest, Needs, RuntimeType
from cargos.progress import FetchProgress
from cargos.sources import FetchSettings
from cargos.store import CargoStore


@dataclass
class Served:
    """What the server does at one path. `cuts`: connection i ends after that many bytes of its body."""

    data: bytes
    ranges: bool = True
    cuts: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    content_length: int | str | None = "true"  # None: not sent
    content_range: str | None = None
    redirect: str | None = None
    token: str | None = None
    encoding: str | None = None
    hold_after: int | None = None  # then wait for `release`
    release: threading.Event = field(default_factory=threading.Event)
    requests: list[dict[str, str]] = field(default_factory=list)
    sent_bytes: int = 0


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FileServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.close_connection = True
        served = self.server.files.get(self.path)
        if served is None:
            self.send_error(404)
            return
        with self.server.lock:
            number = len(served.requests)
            served.requests.append({key.lower(): value for key, value in self.headers.items()})
        if served.redirect is not None:
            self.send_response(302)
            self.send_header("Location", served.redirect)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if served.token is not None and self.headers.get("Authorization") != f"Bearer {served.token}":
            self.send_error(401)
            return
        if number < len(served.statuses) and served.statuses[number] != 200:
            self.send_error(served.statuses[number])
            return
        self._send_file(served, number)

    def _send_file(self, served: Served, number: int) -> None:
        start, end = 0, len(served.data)
        asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and served.ranges:
            start = int(asked[1])
            if start >= len(served.data):
                self.send_error(416)
                return
            self.send_response(206)
            total = len(served.data)
            end = min(int(asked[2]) + 1, total) if asked[2] else total
            self.send_header("Content-Range", served.content_range or f"bytes {start}-{end - 1}/{total}")
        else:
            self.send_response(200)
        body = served.data[start:end]
        if served.content_length is not None:
            length = len(body) if served.content_length == "true" else served.content_length
            self.send_header("Content-Length", str(length))
        if served.encoding:
            self.send_header("Content-Encoding", served.encoding)
        self.send_header("Connection", "close")
        self.end_headers()
        cut = served.cuts[number] if number < len(served.cuts) else len(body)
        try:
            for at in range(0, min(cut, len(body)), 64 * 1024):
                if served.hold_after is not None and start + at >= served.hold_after:
                    self.wfile.flush()
                    served.release.wait(60)
                chunk = body[at : min(at + 64 * 1024, cut)]
                self.wfile.write(chunk)
                served.sent_bytes += len(chunk)
        except OSError:
            pass  # the client has gone: that is what some tests do


class FileServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> None:
        super().__init__((host, 0), Handler)
        self.scheme = "http" if tls is None else "https"
        if tls is not None:
            self.socket = tls.wrap_socket(self.socket, server_side=True)
        self.lock = threading.Lock()
        self.files: dict[str, Served] = {}

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.server_address[0]}:{self.server_address[1]}"

    def serve(self, path: str, data: bytes, **behaviour: object) -> Served:
        self.files[path] = served = Served(data, **behaviour)  # type: ignore[arg-type]
        return served


@contextmanager
def running(server: FileServer) -> Iterator[FileServer]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    for served in server.files.values():
        served.release.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def server() -> Iterator[FileServer]:
    with running(FileServer()) as server:
        yield server


@pytest.fixture
def tls_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """One that speaks https, with a certificate that SSL_CERT_FILE makes known."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    (tmp_path / "ca.pem").write_bytes(pem)
    form = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (tmp_path / "key.pem").write_bytes(pem + key.private_bytes(serialization.Encoding.PEM, *form))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "key.pem")
    with running(FileServer(tls=tls)) as server:
        yield server


@pytest.fixture
def lan_server() -> Iterator[FileServer]:
    """One that is reached by an address of this machine's network card: to the client, another machine."""
    addresses = [
        a.address for card in psutil.net_if_addrs().values() for a in card if a.family == socket.AF_INET
    ]
    lan = [address for address in addresses if not address.startswith("127.")]
    if not lan:
        pytest.skip("this machine has no network card")
    with running(FileServer(lan[0])) as server:
        yield server


@pytest.fixture
def blob() -> Callable[..., bytes]:
    """Bytes that no compression shrinks, the same for the same seed."""

    def make(size: int, seed: int = 1) -> bytes:
        return hashlib.shake_256(seed.to_bytes(8, "big")).digest(size)

    return make


@pytest.fixture
def cargo() -> Callable[..., Manifest]:
    """A manifest of (name, content, sources) triples."""

    def make(*files: tuple[str, bytes, list[str]], name: str = "test", version: str = "1") -> Manifest:
        return Manifest(
            schema=1,
            name=name,
            version=version,
            title="Test",
            runtime=RuntimeType.LLMCPP,
            publisher="tests",
            licence=Licence(spdx="Apache-2.0"),
            needs=Needs(memory_mib=1),
            files=tuple(
                CargoFile(
                    name=file,
                    role="model",
                    size_bytes=len(data),
                    sha256=hashlib.sha256(data).hexdigest(),
                    sources=tuple(sources),
                )
                for file, data, sources in files
            ),
        )

    return make


@pytest.fixture
def settings() -> FetchSettings:
    """Short waits: the servers are here."""
    return FetchSettings(stall_timeout_s=5.0, connect_timeout_s=5.0, backoff_s=0.01)


@pytest.fixture
def store(tmp_path: Path, settings: FetchSettings) -> CargoStore:
    return CargoStore(tmp_path / "store", settings)


@pytest.fixture
def steps() -> list[FetchProgress]:
    """Pass `steps.append` as progress."""
    return []


@pytest.fixture
def leftovers(store: CargoStore) -> Callable[[], list[str]]:
    """What a failed fetch left: anything but empty lock files and folders."""

    def look() -> list[str]:
        return sorted(
            str(path.relative_to(store.root))
            for path in store.root.rglob("*")
            if path.is_file() and path.parent.name != "locks"
        )

    return look
