"""How files are fetched on this machine."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlsplit

from cargos.errors import CargoError
from cargos.locator import is_loopback_host

DEFAULT_HUB: Final = "https://huggingface.co"


@dataclass(frozen=True, slots=True)
class FetchSettings:
    """`hub_endpoint`: where hf: sources are served. The user chooses it, so plain http to a mirror in the own
    network is allowed here; the token is then not sent. `python`: whose pip fetches wheels.

    Times in seconds. `stall_timeout_s`: without a byte this long, or slower than `min_rate_bytes_s` over
    `rate_window_s`, the connection is given up. `attempts`: connections in a row that brought next to nothing
    before the source is; the waits between them start at `backoff_s` and double.
    """

    hub_endpoint: str = DEFAULT_HUB
    hub_token: str | None = field(default=None, repr=False)
    python: str = sys.executable
    connect_timeout_s: float = 15.0
    stall_timeout_s: float = 30.0
    rate_window_s: float = 60.0
    min_rate_bytes_s: int = 1024
    attempts: int = 4
    backoff_s: float = 0.5

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> FetchSettings:
        """HF_ENDPOINT and HF_TOKEN, as the hub's own client reads them. Raises CargoError."""
        endpoint = environment.get("HF_ENDPOINT", "").strip() or DEFAULT_HUB
        try:
            parts = urlsplit(endpoint)
            host = parts.hostname
        except ValueError:
            host = None
        else:
            if parts.scheme not in ("http", "https"):
                host = None
        if not host:
            raise CargoError("HF_ENDPOINT is not an http(s) URL", f"Unset it, or write {DEFAULT_HUB}.")
        return cls(hub_endpoint=endpoint, hub_token=environment.get("HF_TOKEN", "").strip() or None)

    @property
    def hub_is_loopback(self) -> bool:
        return is_loopback_host(urlsplit(self.hub_endpoint).hostname or "")
