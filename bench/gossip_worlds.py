"""One swarm of gossiping nodes in one process on loopback, ours or py-libp2p's gossipsub; started by
bench.gossip.

Both carry the same bytes (sealed karma statements) over noise and yamux on TCP, along the same random graph,
and lose the same nodes at the same moments. Ours verifies each statement; gossipsub verifies its own message
signatures.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import resource
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import structlog
import trio

from bench.figures import percentile
from node.identity import new_identity
from node.p2p import Host, open_host
from node.peers import PeerEvent, Peers, PeerUp, open_peers
from protocol.adverts import Hello
from protocol.codec import encode
from protocol.dice import Dice
from protocol.envelope import Envelope, Signer
from protocol.ids import PeerId, peer_id_of
from protocol.instants import SECOND_NS, Instant, UnixNs
from protocol.machine import Emit, Ordered, PeerLost, Received, Send, Woken
from routing.gossip import GossipEffect, GossipMachine
from routing.gossip_messages import (
    GOSSIP_CODEC,
    METHOD_GOSSIP,
    AddPeer,
    GossipMessage,
    Learnt,
    Publish,
    Push,
)
from routing.gossip_peers import GossipPolicy
from routing.karma import Counters, KarmaPolicy, Statement
from routing.karma_wire import KARMA_KIND, karma_item, karma_kind, karma_opener, seal_statement

DEGREE = 4  # each node dials so many; it ends with twice as many neighbours
SETTLE_S = 6.0
IDLE_S = 10.0
TAIL_S = 12.0
POLICY = KarmaPolicy()


@dataclass
class Tally:
    """What arrived where and when. Messages are numbered; times are seconds of the monotonic clock."""

    sent: dict[int, tuple[int, float]] = field(default_factory=dict[int, tuple[int, float]])
    got: dict[int, dict[int, float]] = field(default_factory=dict[int, dict[int, float]])
    arrivals: int = 0  # payloads received, repeated ones included

    def arrived(self, node: int, number: int) -> None:
        self.got.setdefault(number, {}).setdefault(node, time.perf_counter())


class Swarm(Protocol):
    async def start(self, count: int, edges: Iterable[tuple[int, int]], nursery: trio.Nursery) -> None: ...
    async def publish(self, node: int, number: int) -> None: ...
    def kill(self, node: int) -> None: ...


def sealed(signer: Signer, number: int) -> Envelope:
    """A statement about a subject of its own, which the number names."""
    now = UnixNs(time.time_ns())
    subject = peer_id_of(number.to_bytes(32, "big"))
    statement = Statement(signer.peer, subject, POLICY.sequence_at(now), Counters(number))
    return seal_statement(signer, statement, POLICY)


# --- ours -----------------------------------------------------------------------------------------


class OurNode:
    """The gossip machine over kept RPC links."""

    def __init__(self, number: int, tally: Tally) -> None:
        self._number = number
        self._tally = tally
        self._identity = new_identity()
        self._stirred = trio.Event()
        offset_ns = time.time_ns() - self._now()
        self._machine: GossipMachine[PeerId] = GossipMachine(
            Dice(number),
            GossipPolicy(),
            {KARMA_KIND: karma_opener(POLICY)},
            {KARMA_KIND: karma_kind(POLICY)},
            unix_offset_ns=offset_ns,
        )
        self.signer = Signer(number.to_bytes(32, "big"))
        self.scope = trio.CancelScope()
        self._peers: Peers | None = None
        self.host: Host | None = None

    def _now(self) -> Instant:
        return Instant(round(trio.current_time() * SECOND_NS))

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with self.scope:
            async with (
                open_host(self._identity) as host,
                open_peers(host, hello=Hello("node", "0"), dice=Dice(self._number)) as peers,
            ):
                self.host, self._peers = host, peers
                peers.serve_notice(METHOD_GOSSIP, GOSSIP_CODEC, self._heard)
                peers.subscribe(self._peer_event)
                task_status.started()
                await self._wake()

    async def dial(self, address: str) -> None:
        assert self._peers is not None
        self._peers.keep(address)
        await trio.lowlevel.checkpoint()

    def publish(self, number: int) -> None:
        self._do(self._machine.receive(self._now(), Ordered(Publish(karma_item(sealed(self.signer, number))))))

    def _heard(self, peer: PeerId, message: GossipMessage) -> None:
        if isinstance(message, Push):
            self._tally.arrivals += len(message.items)
        self._do(self._machine.receive(self._now(), Received(peer, message)))

    def _peer_event(self, event: PeerEvent) -> None:
        up = isinstance(event, PeerUp)
        what = Ordered(AddPeer(event.peer)) if up else PeerLost(event.peer)
        self._do(self._machine.receive(self._now(), what))

    def _do(self, effects: Iterable[GossipEffect[PeerId]]) -> None:
        assert self._peers is not None
        for effect in effects:
            match effect:
                case Send(peer=peer, message=message):
                    self._peers.notify(peer, METHOD_GOSSIP, message)
                case Emit(event=Learnt(body=Statement() as statement)):
                    self._tally.arrived(self._number, statement.counters.work_units)
                case _:
                    pass
        self._stirred.set()

    async def _wake(self) -> None:
        while True:
            self._stirred = trio.Event()
            wake = self._machine.next_wake()
            with trio.move_on_at(float("inf") if wake is None else wake / SECOND_NS) as scope:
                await self._stirred.wait()
            if scope.cancelled_caught:
                self._do(self._machine.receive(self._now(), Woken()))


class OurSwarm:
    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._nodes: list[OurNode] = []

    async def start(self, count: int, edges: Iterable[tuple[int, int]], nursery: trio.Nursery) -> None:
        self._nodes = [OurNode(i, self._tally) for i in range(count)]
        for node in self._nodes:
            await nursery.start(node.run)
        for a, b in edges:
            host = self._nodes[b].host
            assert host is not None
            await self._nodes[a].dial(host.addresses[0])

    async def publish(self, node: int, number: int) -> None:
        self._nodes[node].publish(number)
        await trio.lowlevel.checkpoint()

    def kill(self, node: int) -> None:
        self._nodes[node].scope.cancel()


# --- gossipsub ------------------------------------------------------------------------------------


class SubSwarm:
    """py-libp2p's gossipsub, set up as well as it can be: heartbeat 1 s, its usual degrees, no rate limit."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._hosts: list[Any] = []
        self._pubsubs: list[Any] = []
        self._scopes: list[trio.CancelScope] = []
        self._signers: list[Signer] = []

    async def start(self, count: int, edges: Iterable[tuple[int, int]], nursery: trio.Nursery) -> None:
        import multiaddr  # noqa: PLC0415 - seconds, and only this swarm needs it
        from libp2p.peer.peerinfo import info_from_p2p_addr  # noqa: PLC0415 - likewise

        for i in range(count):
            await nursery.start(self._run, i)
        infos = [info_from_p2p_addr(host.get_addrs()[0]) for host in self._hosts]
        for a, b in edges:
            address = infos[b].addrs[0].encapsulate(multiaddr.Multiaddr(f"/p2p/{infos[b].peer_id}"))
            await self._hosts[a].get_network().dial_addr(address, infos[b].peer_id)

    async def _run(self, number: int, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        import multiaddr  # noqa: PLC0415 - see above
        from libp2p import new_host  # noqa: PLC0415
        from libp2p.crypto.ed25519 import create_new_key_pair  # noqa: PLC0415
        from libp2p.crypto.x25519 import create_new_key_pair as create_static  # noqa: PLC0415
        from libp2p.pubsub.gossipsub import PROTOCOL_ID_V11, GossipSub  # noqa: PLC0415
        from libp2p.pubsub.pubsub import Pubsub  # noqa: PLC0415
        from libp2p.security.noise.transport import PROTOCOL_ID, Transport  # noqa: PLC0415
        from libp2p.tools.anyio_service import background_trio_service  # noqa: PLC0415

        pair = create_new_key_pair()
        security: Any = {PROTOCOL_ID: Transport(pair, noise_privkey=create_static().private_key)}
        host = new_host(key_pair=pair, sec_opt=security)
        router = GossipSub(
            protocols=[PROTOCOL_ID_V11],
            degree=6,
            degree_low=4,
            degree_high=12,
            heartbeat_interval=1,
            max_messages_per_topic_per_second=1e9,
        )
        pubsub = Pubsub(host, router)
        take: Callable[[Any, Any], Awaitable[None]] = pubsub.push_msg

        async def counted(peer: object, message: object) -> None:
            self._tally.arrivals += 1
            await take(peer, message)

        pubsub.push_msg = counted  # type: ignore[method-assign]  # counts what the mesh carries
        scope = trio.CancelScope()
        with scope:
            async with host.run([multiaddr.Multiaddr("/ip4/127.0.0.1/tcp/0")]):
                network: Any = host.get_network()
                await network.auto_connector.stop()  # it dials by itself
                async with background_trio_service(pubsub), background_trio_service(router):
                    await pubsub.wait_until_ready()
                    news = await pubsub.subscribe("karma")
                    self._hosts.append(host)
                    self._pubsubs.append(pubsub)
                    self._scopes.append(scope)
                    self._signers.append(Signer(number.to_bytes(32, "big")))
                    task_status.started()
                    while True:
                        message = await news.get()
                        self._tally.arrived(number, int.from_bytes(message.data[:8], "big"))
        with trio.CancelScope(shield=True), suppress(Exception):  # its end under traffic raises at times
            await host.close()

    async def publish(self, node: int, number: int) -> None:
        data = encode(sealed(self._signers[node], number))
        await self._pubsubs[node].publish("karma", number.to_bytes(8, "big") + data)

    def kill(self, node: int) -> None:
        self._scopes[node].cancel()


# --- the scenario ---------------------------------------------------------------------------------


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


@dataclass(frozen=True)
class Load:
    nodes: int
    messages: int
    gap_s: float


async def burst(
    swarm: Swarm, tally: Tally, load: Load, rng: random.Random, *, victims: Sequence[int], idle: float
) -> dict[str, float]:
    """Publish messages from survivors while the victims die one after the other. `idle`: the share of a core
    that the swarm uses when nothing is published; it is not counted.
    """
    survivors = [node for node in range(load.nodes) if node not in victims]
    first, count = len(tally.sent), load.messages
    arrivals, used, began = tally.arrivals, cpu_s(), trio.current_time()
    dying = list(victims)
    for i in range(count):
        while dying and (len(victims) - len(dying)) * count <= i * len(victims):
            swarm.kill(dying.pop())
        node = rng.choice(survivors)
        tally.sent[first + i] = (node, time.perf_counter())
        await swarm.publish(node, first + i)
        await trio.sleep_until(began + (i + 1) * load.gap_s)
    await trio.sleep(TAIL_S)
    spent = cpu_s() - used - idle * (trio.current_time() - began)
    latencies: list[float] = []
    for number in range(first, first + count):
        publisher, at = tally.sent[number]
        got = tally.got.get(number, {})
        latencies += [1000 * (got[node] - at) for node in survivors if node in got and node != publisher]
    wanted = count * (len(survivors) - 1)
    reached = sum(len(tally.got.get(n, {})) for n in range(first, first + count))
    return {
        "delivery_percent": 100 * len(latencies) / wanted,
        "repeats": (tally.arrivals - arrivals) / max(1, reached) - 1,
        "p50_ms": percentile(latencies, 0.5) if latencies else float("nan"),
        "p99_ms": percentile(latencies, 0.99) if latencies else float("nan"),
        "cpu_ms": 1000 * spent / max(1, reached),
    }


async def scenario(kind: str, load: Load, seed: int) -> None:
    nodes = load.nodes
    rng = random.Random(seed)
    edges = {
        tuple(sorted((a, b)))
        for a in range(nodes)
        for b in rng.sample([n for n in range(nodes) if n != a], DEGREE)
    }
    tally = Tally()
    swarm: Swarm = OurSwarm(tally) if kind == "ours" else SubSwarm(tally)
    async with trio.open_nursery() as nursery:
        await swarm.start(nodes, sorted((a, b) for a, b in edges), nursery)
        await trio.sleep(SETTLE_S)
        used = cpu_s()
        await trio.sleep(IDLE_S)
        idle = (cpu_s() - used) / IDLE_S
        calm = await burst(swarm, tally, load, rng, victims=(), idle=idle)
        victims = rng.sample(range(nodes), round(0.3 * nodes))
        churn = await burst(swarm, tally, load, rng, victims=victims, idle=idle)
        sys.stdout.write(json.dumps({"idle": {"cpu_percent": 100 * idle}, "calm": calm, "churn": churn}) + "\n")
        sys.stdout.flush()
        os._exit(0)  # the library's services do not all end


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=["ours", "gossipsub"])
    parser.add_argument("nodes", type=int)
    parser.add_argument("messages", type=int)
    parser.add_argument("gap_s", type=float)
    parser.add_argument("seed", type=int)
    chosen = parser.parse_args()
    logging.disable(logging.CRITICAL)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    trio.run(scenario, chosen.kind, Load(chosen.nodes, chosen.messages, chosen.gap_s), chosen.seed)


if __name__ == "__main__":
    main()
