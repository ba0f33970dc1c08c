"""One gateway, assembled: a libp2p peer with the coordinator role and the HTTP API, in one trio task tree."""

from __future__ import annotations

import errno
import secrets
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import msgspec
import structlog
import trio

from gateway.app import create_app
from gateway.config import GatewaySettings
from gateway.http import HttpSettings
from gateway.http_server import open_listener, serve_http
from gateway.keys import KeyRing
from gateway.mesh import open_mesh
from node.control import ControlMethods, serve_control
from node.coordination.coordinator import CoordinatorConfig, CoordinatorService, open_coordinator
from node.coordination.gossip import ROLE_COORDINATOR
from node.coordination.karma_control import KarmaControl
from node.coordination.port import CoordinationPort
from node.identity import load_or_create_identity
from node.island import AGENT, VERSION, monotonic_now, unix_now
from node.overlay.control import OverlayControl
from node.overlay.overlay import NODE_POLICY, OverlayConfig, open_overlay
from node.p2p import open_host
from node.p2p.errors import ListenFailed
from node.p2p.identify import serve_identify
from node.p2p.ping import serve_ping
from node.peers import open_peers
from node.traversal import open_traversal
from protocol.adverts import Hello
from protocol.dice import Dice
from protocol.instants import SECOND_NS

_log = structlog.get_logger("gateway")


@dataclass(frozen=True, slots=True)
class GatewayReady:
    """`url`: of the HTTP server. `addresses`: full multiaddrs for Islands' `network.coordinators`.
    `coordinator`: this gateway's own.
    """

    url: str
    addresses: tuple[str, ...]
    coordinator: CoordinatorService


def key_ring(settings: GatewaySettings) -> KeyRing:
    """The keys of the settings. Raises gateway.keys.KeyConfigError."""

    def entries() -> Iterator[Mapping[str, object]]:
        if settings.api_key:
            yield {"name": "api-key", "key": settings.api_key, "requests_per_minute": 0}
        for key in settings.keys:
            fields: dict[str, object] = msgspec.structs.asdict(key)
            yield {name: value for name, value in fields.items() if value is not None}

    return KeyRing.from_config(entries(), open_to_all=settings.open)


def overlay_config(settings: GatewaySettings, ways_in: tuple[str, ...]) -> OverlayConfig:
    """How a gateway takes part in the overlay."""
    overlay = settings.overlay
    policy = replace(
        NODE_POLICY,
        k=overlay.k,
        provider_ttl_ns=overlay.provider_ttl_s * SECOND_NS,
        provide_interval_ns=overlay.provider_ttl_s * SECOND_NS // 3,
    )
    return OverlayConfig(settings.data_path, ways_in, policy=policy, heal_s=overlay.heal_s)


async def run_gateway(
    settings: GatewaySettings, *, ready: Callable[[GatewayReady], Awaitable[None]] | None = None
) -> None:
    """Run until cancelled. Raises KeyConfigError, IdentityError, AddressInvalid, ListenFailed."""
    keys = key_ring(settings)
    identity = load_or_create_identity(settings.data_path / "identity.key")
    hello = Hello(settings.name, VERSION, (ROLE_COORDINATOR,))
    dice = Dice(int.from_bytes(secrets.token_bytes(8), "little"))
    mesh_settings = settings.mesh
    requirements = mesh_settings.requirements
    config = CoordinatorConfig(
        settings.name,
        settings.data_path,
        region=mesh_settings.region,
        country=mesh_settings.country,
        trusted=mesh_settings.trusted_peers,
        vantages=mesh_settings.vantage_points,
    )
    ways_in = (*mesh_settings.bootstrap, *mesh_settings.islands)
    async with (
        open_host(identity, mesh_settings.listen) as host,
        open_peers(host, hello=hello, dice=dice) as peers,
        open_overlay(host, peers, overlay_config(settings, ways_in), identity) as overlay,
        open_traversal(host, overlay, settings.nat),
        nullcontext(CoordinationPort(peers)) as port,
        open_coordinator(host, peers, overlay, port=port, signer=identity.signer, config=config) as coordinator,
        open_mesh(
            host,
            peers,
            overlay,
            coordinator=coordinator,
            port=port,
            signer=identity.signer,
            policy=settings.jobs.policy,
            now=monotonic_now,
            unix_now=unix_now,
            requirements=requirements,
            dtype=settings.mesh.activations,
            balance=settings.mesh.balance,
        ) as mesh,
        trio.open_nursery() as nursery,
    ):
        serve_identify(host, agent=AGENT)
        serve_ping(host)
        methods = ControlMethods()
        OverlayControl(overlay, peers, identity.signer).register(methods)
        KarmaControl(overlay, lambda: (host.peer, *mesh_settings.trusted_peers)).register(methods)
        await nursery.start(serve_control, settings.data_path, methods)
        for address in mesh_settings.islands:
            peers.keep(address)
        http = HttpSettings(
            requests_per_minute=settings.http.requests_per_minute,
            cors_origins=settings.http.cors_origins,
            metrics_need_key=not settings.public_metrics,
        )
        app = create_app(mesh, keys=keys, settings=http, island_count=lambda: len(mesh.book))
        listener = _listener(settings.http.host, settings.http.port)
        url = _url_of(listener)
        await nursery.start(partial(serve_http, app, listener))
        _log.info("listening", http=url, mesh=list(host.addresses), peer=host.peer)
        if ready is not None:
            await ready(GatewayReady(url, host.addresses, coordinator))


def _listener(host: str, port: int) -> socket.socket:
    try:
        return open_listener(host, port)
    except OSError as error:
        busy = error.errno == errno.EADDRINUSE
        why = "another program listens there" if busy else error.strerror or str(error)
        raise ListenFailed(f"http://{host}:{port}: {why}; choose another --host or --port (0: any)") from error


def _url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
