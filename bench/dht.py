"""45 real peers on loopback: our DHT against py-libp2p's kad_dht, the same questions in the same run.

Each side runs in a process of its own, all its peers in that one, with real sockets, noise and yamux; the sides
take turns. A lookup that has no answer after 30 s counts as timed out; kad_dht takes that long for most of the
concurrent ones.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import structlog
import trio
from libp2p import new_host
from libp2p.abc import IHost
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_static_pair
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
from libp2p.peer.peerinfo import PeerInfo
from libp2p.records.validator import BlankValidator, NamespacedValidator
from libp2p.security.noise.transport import PROTOCOL_ID, Transport
from libp2p.tools.anyio_service import background_trio_service
from multiaddr import Multiaddr

from bench.figures import header, percentile
from dht.keys import key_of_record
from dht.records import RECORD, seal_record
from node.identity import Identity, new_identity
from node.overlay.overlay import Overlay, OverlayConfig, open_overlay
from node.p2p import open_host
from node.peers import open_peers
from protocol.adverts import Hello
from protocol.dice import Dice
from protocol.instants import SECOND_NS, UnixNs

#: As kad_dht's own callers have it; nobody waits longer for one lookup.
TIMEOUT_S = 30.0
#: One side's process: joining, puts, gets and two rounds of concurrent lookups.
SIDE_LIMIT_S = 400.0
PUTS = 10
GETS = 40


class Peer(Protocol):
    """What the benchmark asks of one peer, on either side."""

    async def put(self, name: str, value: bytes) -> None: ...

    async def get(self, name: str) -> bytes | None: ...

    async def ready(self) -> None: ...


# --- ours -------------------------------------------------------------------------------------------


class OurPeer:
    def __init__(self, overlay: Overlay, identity: Identity) -> None:
        self.overlay = overlay
        self.identity = identity

    async def put(self, name: str, value: bytes) -> None:

        now = self.overlay.unix_now()
        expires = UnixNs(now + 3600 * SECOND_NS)
        signer = self.identity.signer
        envelope = seal_record(signer, "bench", name, value, sequence=now, expires_unix_ns=expires)
        await self.overlay.put_record(envelope)

    async def get(self, name: str) -> bytes | None:

        found = await self.overlay.get_records(key_of_record("bench", name))
        return RECORD.decode_untrusted(found.records[0].body).value if found.records else None

    async def ready(self) -> None:
        while not self.overlay.membership.joined:  # noqa: ASYNC110 - once, before the clock runs
            await trio.sleep(0.01)


@contextlib.asynccontextmanager
async def _our_peers(count: int) -> AsyncGenerator[list[Peer]]:

    peers: list[Peer] = []
    addresses: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        async with contextlib.AsyncExitStack() as stack:
            for i in range(count):
                identity = new_identity()
                host = await stack.enter_async_context(open_host(identity))
                links = await stack.enter_async_context(
                    open_peers(host, hello=Hello(f"n{i}", "0"), dice=Dice(i))
                )
                config = OverlayConfig(Path(folder) / str(i), tuple(addresses[:1]))
                overlay = await stack.enter_async_context(open_overlay(host, links, config, identity))
                addresses.append(host.addresses[0])
                peers.append(OurPeer(overlay, identity))
            yield peers


# --- theirs -----------------------------------------------------------------------------------------


class TheirPeer:
    def __init__(self, host: IHost, dht: KadDHT, others: Sequence[TheirPeer]) -> None:
        self.host = host
        self.dht = dht
        self.others = others

    async def put(self, name: str, value: bytes) -> None:
        await self.dht.put_value(f"/bench/{name}", value)

    async def get(self, name: str) -> bytes | None:
        return await self.dht.get_value(f"/bench/{name}")

    async def ready(self) -> None:
        """Enter by two peers that came before, as our peers enter by one."""

        for other in self.others:
            identity = other.host.get_id()
            await self.host.connect(PeerInfo(identity, other.host.get_addrs()))
            await self.dht.add_peer(identity)
        await self.dht.peer_routing.find_closest_peers_network(self.host.get_id().to_bytes())


@contextlib.asynccontextmanager
async def _their_peers(count: int) -> AsyncGenerator[list[Peer]]:

    logging.getLogger("libp2p").setLevel(logging.CRITICAL)
    dice = random.Random(1)
    peers: list[TheirPeer] = []
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(count):
            pair = create_new_key_pair()
            noise = Transport(pair, noise_privkey=create_static_pair().private_key)
            host = new_host(key_pair=pair, sec_opt={PROTOCOL_ID: noise})
            await stack.enter_async_context(host.run([Multiaddr("/ip4/127.0.0.1/tcp/0")]))
            validator = NamespacedValidator({"bench": BlankValidator()})
            dht = KadDHT(host, DHTMode.SERVER, validator=validator, validator_changed=True)
            await stack.enter_async_context(background_trio_service(dht))
            others = dice.sample(peers, min(2, len(peers)))
            peers.append(TheirPeer(host, dht, others))
        yield list(peers)


# --- one side ---------------------------------------------------------------------------------------


async def _timed(work: Callable[[], Awaitable[object]]) -> tuple[float, object, bool]:
    """Milliseconds, the result, and whether it came in time and whole."""
    began = time.perf_counter()
    result: object = None
    good = False
    with trio.move_on_after(TIMEOUT_S):
        try:
            result = await work()
            good = True
        except Exception as error:  # noqa: BLE001 - what kad_dht raises is its own affair; it is counted
            print(f"a lookup failed: {error!r}"[:200], file=sys.stderr)
    return (time.perf_counter() - began) * 1e3, result, good


async def _measure(peers: list[Peer], say: Callable[[dict[str, Any]], None]) -> None:
    began, cpu = time.perf_counter(), time.process_time()
    with trio.move_on_after(120):
        for peer in peers:
            await peer.ready()
    say({"join_s": time.perf_counter() - began, "join_cpu_s": time.process_time() - cpu})
    await trio.sleep(3)  # what a join leaves to do
    puts: list[float] = []
    for i in range(PUTS):
        peer = peers[(7 * i) % len(peers)]
        puts.append((await _timed(lambda peer=peer, i=i: peer.put(f"k{i}", f"v{i}".encode())))[0])
    say({"put_ms": puts})
    gets: list[float] = []
    right = 0
    for i in range(GETS):
        peer = peers[(11 * i + 3) % len(peers)]
        took, value, _ = await _timed(lambda peer=peer, i=i: peer.get(f"k{i % PUTS}"))
        gets.append(took)
        right += value == f"v{i % PUTS}".encode()
    say({"get_ms": gets, "right": right})
    found: list[tuple[float, bool]] = []

    async def absent(peer: Peer, name: str) -> None:
        took, _, good = await _timed(lambda: peer.get(name))
        found.append((took, good))

    began, cpu = time.perf_counter(), time.process_time()
    async with trio.open_nursery() as nursery:
        for i, peer in enumerate(peers):
            nursery.start_soon(absent, peer, f"a{i}")
            nursery.start_soon(absent, peer, f"b{i}")
    say(
        {
            "concurrent_ms": [took for took, _ in found],
            "timeouts": sum(not good for _, good in found),
            "wall_s": time.perf_counter() - began,
            "cpu_s": time.process_time() - cpu,
        }
    )


async def _side(name: str, count: int) -> None:
    def say(figures: dict[str, Any]) -> None:
        print(json.dumps(figures), flush=True)

    opened = _our_peers(count) if name == "ours" else _their_peers(count)
    async with opened as peers:
        await _measure(peers, say)
        sys.stdout.flush()
        # Its hosts may take minutes to close; what was to be measured is said.
        os._exit(0)


# --- the run ----------------------------------------------------------------------------------------


def _run_side(name: str, count: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.dht", "--side", name, "--peers", str(count)]
    try:
        output = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=SIDE_LIMIT_S, check=False
        ).stdout
    except subprocess.TimeoutExpired as late:
        output = late.stdout or b""
    figures: dict[str, Any] = {}
    for line in output.splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            figures |= json.loads(line)
    return figures


def _row(label: str, values: Sequence[str]) -> None:
    print(f"{label:<38}" + "".join(f"{value:>14}" for value in values))


def _p50(figures: dict[str, Any], name: str) -> str:
    return f"{percentile(figures[name], 0.5):.1f}" if figures.get(name) else "-"


def _number(figures: dict[str, Any], name: str, digits: int = 1) -> str:
    return f"{figures[name]:.{digits}f}" if name in figures else "-"


def _report(sides: dict[str, dict[str, Any]], count: int) -> None:
    all_ = list(sides.values())
    _row(f"{count} peers", list(sides))
    _row("all have joined, s", [_number(side, "join_s") for side in all_])
    _row("CPU for that, s", [_number(side, "join_cpu_s") for side in all_])
    _row("put, p50 ms", [_p50(side, "put_ms") for side in all_])
    _row("get, p50 ms", [_p50(side, "get_ms") for side in all_])
    _row(f"gets right of {GETS}", [_number(side, "right", 0) for side in all_])
    _row(f"{2 * count} lookups at once, p50 ms", [_p50(side, "concurrent_ms") for side in all_])
    _row(f"timed out ({TIMEOUT_S:.0f} s) or failed", [_number(side, "timeouts", 0) for side in all_])
    _row("all of them, s", [_number(side, "wall_s", 2) for side in all_])
    _row("CPU for that, s", [_number(side, "cpu_s", 2) for side in all_])
    ours, theirs = sides["ours"], sides["kad_dht"]
    if ours.get("get_ms") and theirs.get("get_ms"):
        ratio = percentile(theirs["get_ms"], 0.5) / percentile(ours["get_ms"], 0.5)
        print(f"\na get takes kad_dht {ratio:.0f} times as long")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench dht", description=__doc__)
    parser.add_argument("--peers", type=int, default=45)
    parser.add_argument("--side", choices=("ours", "kad_dht"), help="one side; used by the benchmark itself")
    arguments = parser.parse_args(argv)
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    if arguments.side:
        trio.run(_side, arguments.side, arguments.peers)
        return 0
    header("the DHT with real peers")
    sides = {name: _run_side(name, arguments.peers) for name in ("ours", "kad_dht")}
    _report(sides, arguments.peers)
    return 0 if sides["ours"].get("timeouts") == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
