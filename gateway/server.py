"""One gateway, assembled: a libp2p peer with the coordinator role and the HTTP API, in one trio task tree."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass

import msgspec
import structlog
import trio
from hypercorn.config import Config
from hypercorn.trio import serve
from hypercorn.typing import ASGIFramework

from gateway.app import create_app
from gateway.config import GatewaySettings
from gateway.http import HttpSettings
from gateway.keys import KeyRing
from gateway.mesh import Mesh
from node.identity import load_or_create_identity
from node.island import ROLE_COORDINATOR, VERSION, monotonic_now, unix_now
from node.p2p import open_host
from node.peers import open_peers
from protocol.adverts import Hello
from protocol.dice import Dice

#: What open connections get at shutdown before they are cut.
GRACE_S = 1.0

_log = structlog.get_logger("gateway")


@dataclass(frozen=True, slots=True)
class GatewayReady:
    """`urls`: of the HTTP server. `addresses`: full multiaddrs for Islands' `network.coordinators`."""

    urls: tuple[str, ...]
    addresses: tuple[str, ...]


def key_ring(settings: GatewaySettings) -> KeyRing:
    """The keys of the settings. Raises gateway.keys.KeyConfigError."""

    def entries() -> Iterator[Mapping[str, object]]:
        if settings.api_key:
            yield {"name": "api-key", "key": settings.api_key, "requests_per_minute": 0}
        for key in settings.keys:
            fields: dict[str, object] = msgspec.structs.asdict(key)
            yield {name: value for name, value in fields.items() if value is not None}

    return KeyRing.from_config(entries(), open_to_all=settings.open)


async def run_gateway(
    settings: GatewaySettings, *, ready: Callable[[GatewayReady], Awaitable[None]] | None = None
) -> None:
    """Run until cancelled. Raises KeyConfigError, IdentityError, OSError (address in use)."""
    keys = key_ring(settings)
    identity = load_or_create_identity(settings.data_path / "identity.key")
    hello = Hello(settings.name, VERSION, (ROLE_COORDINATOR,))
    dice = Dice(int.from_bytes(secrets.token_bytes(8), "little"))
    async with (
        open_host(identity, settings.mesh.listen) as host,
        open_peers(host, hello=hello, dice=dice) as peers,
        trio.open_nursery() as nursery,
    ):
        mesh = Mesh(host, peers, policy=settings.jobs.policy, now=monotonic_now, unix_now=unix_now)
        await nursery.start(mesh.keep)
        for address in settings.mesh.islands:
            peers.keep(address)
        http = HttpSettings(
            requests_per_minute=settings.http.requests_per_minute,
            cors_origins=settings.http.cors_origins,
            metrics_need_key=not settings.public_metrics,
        )
        app = create_app(mesh, keys=keys, settings=http, island_count=lambda: len(mesh.book))
        config = _hypercorn_config(settings)

        async def run_http(task_status: trio.TaskStatus[list[str]]) -> None:
            never = trio.Event()
            await serve(
                _as_asgi(app), config, shutdown_trigger=never.wait, task_status=task_status, mode="asgi"
            )

        urls = await nursery.start(run_http)
        _log.info("listening", http=urls, mesh=list(host.addresses), peer=host.peer)
        if ready is not None:
            await ready(GatewayReady(tuple(urls), host.addresses))


def _hypercorn_config(settings: GatewaySettings) -> Config:
    config = Config()
    host = f"[{settings.http.host}]" if ":" in settings.http.host else settings.http.host
    config.bind = [f"{host}:{settings.http.port}"]
    config.accesslog = None
    config.errorlog = None
    config.include_server_header = False
    config.graceful_timeout = GRACE_S
    return config


def _as_asgi(app: object) -> ASGIFramework:
    return app  # type: ignore[return-value]
