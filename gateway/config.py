"""The settings of a gateway (`archi-gateway`). docs/configuration.md has them in prose."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from node.config import Country, LogSettings, NatSettings, OverlaySettings, default_data_dir, peer_setting
from node.coordination.vantage import Vantage
from node.settings import Settings, SettingsError
from protocol.ids import PeerId
from protocol.instants import MILLISECOND_NS, SECOND_NS, seconds_to_ns
from protocol.limits import DEFAULT_TOKEN_WINDOW, MAX_NAME_CHARS, MAX_TOKEN_WINDOW
from protocol.ring import Dtype
from routing.chains.rebalance import BalancePolicy
from routing.geography import JURISDICTIONS, Place
from routing.job_events import SupervisionPolicy
from routing.jurisdiction import MAX_LIARS, Residency
from routing.requirements import Requirements

_Millis = Annotated[int, Meta(ge=0, le=86_400_000)]


class HttpBindSettings(Settings, frozen=True):
    """`port` 0: any free one, printed at start. `requests_per_minute`: of keys without their own figure;
    0 switches it off. `cors_origins`: web pages that may call from a browser.
    """

    host: str = "127.0.0.1"
    cors_origins: tuple[str, ...] = ()
    requests_per_minute: Annotated[int, Meta(ge=0, le=1_000_000)] = 100
    port: Annotated[int, Meta(ge=0, le=65535)] = 8080


class VantageSettings(Settings, frozen=True):
    """A coordinator whose place is known (its peer id; this gateway's own, too): where round trips are measured
    that prove where an Island stands. `operator`: who runs it; one operator is one voice.
    """

    peer: str
    operator: Annotated[str, Meta(min_length=1, max_length=MAX_NAME_CHARS)]
    latitude: Annotated[float, Meta(ge=-90, le=90)]
    longitude: Annotated[float, Meta(ge=-180, le=180)]


class MeshSettings(Settings, frozen=True):
    """`listen`: multiaddrs where others reach this gateway. `islands`, `bootstrap`: full multiaddrs of Islands
    or any peers, to enter the overlay by. `trusted`: peer ids of coordinators whose word on karma counts in
    full. `karma_floor`: points that an Island must have to get jobs; empty: any. `jurisdictions`: an Island
    must be proven to stand in one of these (ISO country codes, EU), from `vantages`; empty: anywhere.
    `activations`: how the stages of a chain pass on what they computed (docs/sharding.md); f32 changes nothing.
    `balance_s`: how long a load must last, about, before Islands are sent to layers of a chain that are busy.
    """

    listen: tuple[str, ...] = ("/ip4/127.0.0.1/tcp/4001",)
    islands: tuple[str, ...] = ()
    bootstrap: tuple[str, ...] = ()
    region: Annotated[str, Meta(max_length=MAX_NAME_CHARS)] = ""
    country: Country = ""
    trusted: tuple[str, ...] = ()
    karma_floor: Annotated[float, Meta(ge=-1000, le=1_000_000)] | None = None
    jurisdictions: tuple[str, ...] = ()
    activations: Dtype = "f16s"
    balance_s: Annotated[float, Meta(ge=1, le=86400)] = BalancePolicy().smoothing_ns / SECOND_NS
    liars: Annotated[int, Meta(ge=0, le=MAX_LIARS)] = 1
    """Operators of vantage points that may lie without making a proof."""

    vantages: tuple[VantageSettings, ...] = ()

    @property
    def balance(self) -> BalancePolicy:
        return BalancePolicy(smoothing_ns=seconds_to_ns(self.balance_s))

    @property
    def requirements(self) -> Requirements:
        """What every job asks of an Island. Raises SettingsError."""
        for name in self.jurisdictions:
            if name not in JURISDICTIONS:
                known = ", ".join(sorted(JURISDICTIONS))
                raise SettingsError(f"mesh.jurisdictions: {name!r} is not known; there are: {known}")
        residency = Residency(self.jurisdictions, self.liars) if self.jurisdictions else None
        floor = None if self.karma_floor is None else round(self.karma_floor * 1000)
        return Requirements(residency=residency, karma_floor_milli=floor, region=self.region)

    @property
    def trusted_peers(self) -> tuple[PeerId, ...]:
        """Raises SettingsError."""
        return tuple(peer_setting("mesh.trusted", text) for text in self.trusted)

    @property
    def vantage_points(self) -> tuple[Vantage, ...]:
        """Raises SettingsError."""
        return tuple(
            Vantage(peer_setting("mesh.vantages", v.peer), v.operator, Place(v.latitude, v.longitude))
            for v in self.vantages
        )


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
    nat: NatSettings = NatSettings()
    overlay: OverlaySettings = OverlaySettings()
    jobs: JobSettings = JobSettings()
    log: LogSettings = LogSettings()

    @property
    def data_path(self) -> Path:
        return Path(self.data_dir).expanduser() if self.data_dir else default_data_dir() / "gateway"
