"""The settings of a gateway (`archi-gateway`). docs/configuration.md has them in prose."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from node.config import LogSettings, default_data_dir
from node.settings import Settings
from protocol.instants import MILLISECOND_NS
from protocol.limits import DEFAULT_TOKEN_WINDOW, MAX_NAME_CHARS, MAX_TOKEN_WINDOW
from routing.job_events import (
    SupervisionPolicy,
)

_Millis = Annotated[int, Meta(ge=0, le=86_400_000)]


class HttpBindSettings(Settings, frozen=True):
    """`port` 0: any free one, printed at start. `requests_per_minute`: of keys without their own figure;
    0 switches it off. `cors_origins`: web pages that may call from a browser.
    """

    host: str = "127.0.0.1"
    cors_origins: tuple[str, ...] = ()
    requests_per_minute: Annotated[int, Meta(ge=0, le=1_000_000)] = 100
    port: Annotated[int, Meta(ge=0, le=65535)] = 8080


class MeshSettings(Settings, frozen=True):
    """`listen`: multiaddrs where Islands reach this gateway. `islands`: full multiaddrs of Islands that the
    gateway dials itself and keeps. `bootstrap`: full multiaddrs of any peers, to enter the overlay by.
    """

    listen: tuple[str, ...] = ("/ip4/127.0.0.1/tcp/4001",)
    islands: tuple[str, ...] = ()
    bootstrap: tuple[str, ...] = ()


class JobSettings(Settings, frozen=True):
    """How patient to be with Islands, in milliseconds. `wait_ms` 0: a job that finds no Island fails at
    once; else it waits that long. `stall_ms`: longest silence between tokens before the rest moves to another
    Island (adapts down to 50 times the usual gap, not below `stall_floor_ms`).
    """

    accept_ms: _Millis = 3_000
    first_token_ms: _Millis = 60_000
    stall_ms: _Millis = 5_000
    stall_floor_ms: _Millis = 1_000
    wait_ms: _Millis = 10_000
    deadline_ms: _Millis = 600_000
    attempts: Annotated[int, Meta(ge=1, le=100)] = 8
    window: Annotated[int, Meta(ge=1, le=MAX_TOKEN_WINDOW)] = DEFAULT_TOKEN_WINDOW

    @property
    def policy(self) -> SupervisionPolicy:
        return SupervisionPolicy(
            accept_ns=self.accept_ms * MILLISECOND_NS,
            first_token_ns=self.first_token_ms * MILLISECOND_NS,
            stall_ns=self.stall_ms * MILLISECOND_NS,
            stall_floor_ns=self.stall_floor_ms * MILLISECOND_NS,
            wait_ns=self.wait_ms * MILLISECOND_NS,
            deadline_ns=self.deadline_ms * MILLISECOND_NS,
            attempts=self.attempts,
            window=self.window,
        )


class KeySettings(Settings, frozen=True):
    """An API key: `key` in clear, or `sha256` of it in hex. `requests_per_minute` 0: no limit."""

    name: Annotated[str, Meta(min_length=1, max_length=MAX_NAME_CHARS)]
    key: str | None = None
    sha256: str | None = None
    requests_per_minute: Annotated[int, Meta(ge=0, le=1_000_000)] | None = None


class GatewaySettings(Settings, frozen=True):
    """`open`: answer without a key; without it and without keys the gateway refuses to start. `api_key`: one
    key without a limit, for a gateway of one's own (best given as ARCHI_API_KEY). `public_metrics`:
    /metrics needs no key.
    """

    name: Annotated[str, Meta(min_length=1, max_length=MAX_NAME_CHARS)] = platform.node() or "gateway"
    data_dir: str = ""
    open: bool = False
    api_key: str = ""
    public_metrics: bool = True
    keys: tuple[KeySettings, ...] = ()
    http: HttpBindSettings = HttpBindSettings()
    mesh: MeshSettings = MeshSettings()
    jobs: JobSettings = JobSettings()
    log: LogSettings = LogSettings()

    @property
    def data_path(self) -> Path:
        return Path(self.data_dir).expanduser() if self.data_dir else default_data_dir() / "gateway"
