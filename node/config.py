"""The settings of an Island (`archi-node`). docs/configuration.md has them in prose."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Annotated, Final, Literal

from msgspec import Meta

from node.settings import Settings, SettingsError
from protocol.adverts import MAX_ADVERT_MEMORY_MIB, MAX_ASK_UCR
from protocol.errors import ProtocolError
from protocol.ids import PeerId, peer_id_untrusted
from protocol.limits import MAX_CONTEXT_TOKENS, MAX_NAME_CHARS

#: A year: longer is never.
MAX_IDLE_MINUTES: Final = 365 * 24 * 60


#: ISO 3166-1 alpha-2 in capitals; empty: not said.
Country = Annotated[
    str, Meta(pattern=r"^(?:[A-Z]{2})?\Z", description="a country as two capitals, such as DE or BR")
]


def default_data_dir() -> Path:
    """`$XDG_DATA_HOME/archipelag`, where identity and state live."""
    base = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(base) / "archipelag"


class NetworkSettings(Settings, frozen=True):
    """`listen`: multiaddrs to listen on (port 0: any). `coordinators`: full multiaddrs, with /p2p/ID, of
    the gateways to work for. `bootstrap`: full multiaddrs of any peers, to enter the overlay by; coordinators
    serve for that, too.
    """

    listen: tuple[str, ...] = ("/ip4/127.0.0.1/tcp/0",)
    coordinators: tuple[str, ...] = ()
    bootstrap: tuple[str, ...] = ()


class NatSettings(Settings, frozen=True):
    """`reachability`: whether others can dial this node; auto: it asks peers to try. `relays`: full multiaddrs
    of relays to be met at if they can not; more are found by the overlay. `serve_relay`: carry others, for
    nodes with a public address and bandwidth to give: `relay_mbit` Mbit/s for all together, `relay_circuit_mib`
    each way between two of them until they have to ask anew. `hole_punching`: turn relayed connections into
    direct ones where NATs let it. `private_addresses`: also towards private addresses (networks without any
    other).
    """

    reachability: Literal["auto", "public", "private"] = "auto"
    relays: tuple[str, ...] = ()
    serve_relay: bool = False
    relay_mbit: Annotated[int, Meta(ge=1, le=1_000_000)] = 64
    relay_circuit_mib: Annotated[int, Meta(ge=1, le=1 << 30)] = 4096
    hole_punching: bool = True
    private_addresses: bool = False


class CoordinatorSettings(Settings, frozen=True):
    """`enabled`: this node also coordinates: Islands may advertise to it, gateways ask it, it gossips with
    others. `trusted`: peer ids of coordinators whose word on karma it believes in full.
    """

    enabled: bool = False
    country: Country = ""
    trusted: tuple[str, ...] = ()

    @property
    def trusted_peers(self) -> tuple[PeerId, ...]:
        """Raises SettingsError."""
        return tuple(peer_setting("coordinator.trusted", text) for text in self.trusted)


def peer_setting(setting: str, text: str) -> PeerId:
    """A peer id from the settings. Raises SettingsError."""
    try:
        return peer_id_untrusted(text)
    except ProtocolError as error:
        raise SettingsError(f"{setting}: {text!r} is no peer id ({error.detail})") from error


class OverlaySettings(Settings, frozen=True):
    """Who runs a network of one's own may change these; nodes of one network must agree about `k`.

    `k`: replicas and bucket size. `provider_ttl_s`: an Island that vanished is listed at most this long, if all
    nodes say the same. `heal_s`: bootstrap peers are asked this often even when all seems well, so that a
    network that was cut in two grows together.
    """

    k: Annotated[int, Meta(ge=1, le=64)] = 20
    provider_ttl_s: Annotated[int, Meta(ge=3, le=48 * 3600)] = 3600
    heal_s: Annotated[int, Meta(ge=1, le=24 * 3600)] = 600


class EngineSettings(Settings, frozen=True):
    """`threads`: per loaded Cargo; one is right wherever Islands share cores. `slots`: sequences decoded
    together. `queue`: jobs that may wait beyond that before the Island answers "busy".
    """

    threads: Annotated[int, Meta(ge=1, le=256)] = 1
    slots: Annotated[int, Meta(ge=1, le=64)] = 8
    queue: Annotated[int, Meta(ge=0, le=10_000)] = 32
    context_length: Annotated[int, Meta(ge=0, le=262_144)] = 0
    """Tokens per sequence; 0: as the Cargo says."""


class ShardSettings(Settings, frozen=True):
    """Cargos too large for this machine: it holds layers of them and works in chains with others.

    `memory_mib`: what weights and sequences of all Cargos may take here; for one that needs more, room for
    layers is offered instead of running it whole. 0: no limit, all are run whole. `slots`, `context_length`
    (0: as the Cargo says): sequences at a time and tokens of each, for which memory is set aside. `drafts`: as
    a head, guess tokens and have the chain check several in one traversal. `idle_minutes`: layers that nobody
    has used for so long give way to another Cargo that is asked for; 0: never. `disk_mib`: slices of models
    that are kept on disk, the least recently used go first; those in use stay; 0: no bound.
    """

    enabled: bool = True
    memory_mib: Annotated[int, Meta(ge=0, le=MAX_ADVERT_MEMORY_MIB)] = 0
    slots: Annotated[int, Meta(ge=1, le=64)] = 4
    context_length: Annotated[int, Meta(ge=0, le=MAX_CONTEXT_TOKENS)] = 0
    drafts: bool = True
    idle_minutes: Annotated[int, Meta(ge=0, le=MAX_IDLE_MINUTES)] = 10
    disk_mib: Annotated[int, Meta(ge=0, le=MAX_ADVERT_MEMORY_MIB)] = 16_384

    @property
    def offered(self) -> bool:
        """Whether this Island takes part in chains at all."""
        return self.enabled and self.memory_mib > 0


class PieceSettings(Settings, frozen=True):
    """Files of Cargos between peers. `serve`: give to others what is here. `fetch`: ask others before the
    sources that the manifest names. `upload_mbit`: Mbit/s to all of them together; 0: no bound.
    """

    serve: bool = True
    fetch: bool = True
    upload_mbit: Annotated[int, Meta(ge=0, le=1_000_000)] = 0


class AskSettings(Settings, frozen=True):
    """Asking prices in micro-credits: per 1000 prompt and output tokens, and per unit of other work."""

    prompt_ucr: Annotated[int, Meta(ge=0, le=MAX_ASK_UCR)] = 0
    output_ucr: Annotated[int, Meta(ge=0, le=MAX_ASK_UCR)] = 0
    unit_ucr: Annotated[int, Meta(ge=0, le=MAX_ASK_UCR)] = 0


class LogSettings(Settings, frozen=True):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["console", "json"] = "console"


class NodeSettings(Settings, frozen=True):
    name: Annotated[str, Meta(min_length=1, max_length=MAX_NAME_CHARS)] = platform.node() or "island"
    data_dir: str = ""
    cache_dir: str = ""
    region: Annotated[str, Meta(max_length=MAX_NAME_CHARS)] = ""
    country: Country = ""

    schedule: tuple[str, ...] = ()
    """When it takes jobs (node/schedule.py); empty: always."""

    cargos: tuple[str, ...] = ("smollm2-135m",)
    network: NetworkSettings = NetworkSettings()
    nat: NatSettings = NatSettings()
    coordinator: CoordinatorSettings = CoordinatorSettings()
    overlay: OverlaySettings = OverlaySettings()
    engine: EngineSettings = EngineSettings()
    shards: ShardSettings = ShardSettings()
    pieces: PieceSettings = PieceSettings()
    asks: AskSettings = AskSettings()
    log: LogSettings = LogSettings()

    @property
    def data_path(self) -> Path:
        return Path(self.data_dir).expanduser() if self.data_dir else default_data_dir()
