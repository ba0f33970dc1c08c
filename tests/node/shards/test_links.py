"""Links of the ring over real connections: nobody waits, loss is told at once, all is bounded."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import msgspec
import pytest
import trio
import trio.lowlevel

import node.shards.links as links_module
from node.identity import new_identity
from node.p2p import open_host
from node.p2p.relay_client import RelayClient, RelayClientConfig
from node.p2p.relay_dial import is_direct
from node.p2p.relay_service import RelayLimits, RelayService
from node.shards.links import LinkUser, RingLinks
from node.streams import MessageStream
from protocol.dice import Dice
from protocol.ring import (
    FROM_STAGE,
    RING_PROTOCOL,
    TO_STAGE,
    Chain,
    RingAck,
    RingFeed,
    RingOpen,
    RingOpened,
    RingPing,
    Stage,
    StagePeer,
)

SESSION = "5" * 32
CARGO = "sha256:" + "c" * 64
ROOT = Path(__file__).parents[3]

SINK = """
import sys, trio
sys.path.insert(0, sys.argv[1])
from node.identity import new_identity
from node.p2p import open_host

async def take(stream):
    while await stream.receive_some():
        pass

async def main():
    async with open_host(new_identity()) as host:
        host.handle("/archipelag/ring/1.0.0", take, bulk=True)
        print(host.addresses[0], flush=True)
        await trio.sleep_forever()

trio.run(main)
"""


class End:
    """One node's links, and what they told."""

    def __init__(self, host, nursery) -> None:
        self.host = host
        self.got = []
        self.alive = 0
        self.down_lost = []
        self.up_lost = []
        self.room = True
        self.used = set()
        self.needed = set()
        user = LinkUser(
            self._take,
            lambda peer, reason: self.down_lost.append((peer, reason)),
            self.up_lost.append,
            lambda: self.room,
            lambda peer: peer in self.used,
            lambda peer: peer in self.needed,
        )
        self.links = RingLinks(host, nursery, user)

    def _take(self, peer, message) -> None:
        """Signs of life from within a large message depend on how busy this machine is."""
        if message == RingPing(0):
            self.alive += 1
        else:
            self.got.append((peer, message))

    @property
    def peer(self):
        return self.host.peer


@pytest.fixture
async def make_end():
    @asynccontextmanager
    async def make() -> AsyncGenerator[End]:
        async with open_host(new_identity()) as host, trio.open_nursery() as nursery:
            end = End(host, nursery)
            yield end
            end.links.close()
            nursery.cancel_scope.cancel()

    return make


def open_to(peer: str, addresses: tuple[str, ...] = (), session: str = SESSION) -> RingOpen:
    head = Stage(StagePeer("me"), 4, 8)
    chain = Chain(CARGO, (Stage(StagePeer(peer, addresses), 0, 4), head))
    return RingOpen(session, chain, 0, 0, 5, "consumer")


def feed(size: int, position: int = 0) -> RingFeed:
    return RingFeed(SESSION, position, 1, bytes(size))


async def test_messages_go_both_ways_in_order_and_large_ones_too(make_end, until) -> None:
    async with make_end() as a, make_end() as b:
        a.links.send_to_stage(b.peer, RingPing(1))  # no link: its loss was told long ago
        a.links.send_to_stage(b.peer, open_to(b.peer, b.host.addresses))
        sent = [feed(1), feed(3_000_000), feed(70_000), feed(2), RingPing(2)]
        for message in sent:
            a.links.send_to_stage(b.peer, message)
        await until(lambda: len(b.got) == 6)
        came = [message for _, message in b.got]
        assert [m for m in came if isinstance(m, RingFeed)] == sent[:-1]
        assert came.index(RingPing(2)) < came.index(sent[1])  # it does not wait behind bulk
        assert {peer for peer, _ in b.got} == {a.peer}
        b.links.send_from_stage(a.peer, RingOpened(SESSION, 0))
        b.links.send_from_stage(a.peer, RingAck(SESSION, 1))
        await until(lambda: len(a.got) == 2)
        assert a.got == [(b.peer, RingOpened(SESSION, 0)), (b.peer, RingAck(SESSION, 1))]
        assert a.host.bulk_connections(b.peer) == 1
        assert a.links.counters.dropped == 1
        assert not a.down_lost + b.up_lost
        a.links.drop(b.peer, "no longer needed")
        await until(lambda: b.up_lost == [a.peer])
        assert a.down_lost == []  # who drops it knows


async def test_a_killed_process_is_noticed_at_once(make_end, until) -> None:
    process = await trio.lowlevel.open_process(
        [sys.executable, "-c", SINK, str(ROOT)], stdout=subprocess.PIPE, cwd=ROOT
    )
    assert process.stdout is not None
    try:
        with trio.fail_after(60):
            text = b""
            while not text.endswith(b"\n"):
                text += await process.stdout.receive_some()
        address = text.decode().strip()
        peer = address.rpartition("/")[2]
        async with make_end() as a:
            a.links.send_to_stage(peer, open_to(peer, (address,)))
            await until(lambda: a.links.counters.opened)
            os.kill(process.pid, signal.SIGKILL)
            await until(lambda: a.down_lost)  # nobody pings it here
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
            await process.stdout.aclose()


async def test_who_can_not_be_reached_is_lost(make_end, until) -> None:
    async with make_end() as a:
        nobody = new_identity().peer
        a.links.send_to_stage(nobody, open_to(nobody, (f"/ip4/127.0.0.1/tcp/1/p2p/{nobody}", "nonsense")))
        a.links.send_to_stage(nobody, feed(5))
        await until(lambda: a.down_lost)
        assert [peer for peer, _ in a.down_lost] == [nobody]
        assert a.links.downstreams == ()


async def test_a_peer_that_does_not_read_is_given_up(make_end, until, monkeypatch) -> None:
    monkeypatch.setattr(links_module, "MAX_OUTBOX_BYTES", 4 << 20)
    async with make_end() as a, make_end() as b:
        b.room = False  # nothing more is read once a message came
        a.links.send_to_stage(b.peer, open_to(b.peer, b.host.addresses))
        await until(lambda: b.got)
        count = 0
        while not a.down_lost and count < 100:
            a.links.send_to_stage(b.peer, feed(500_000))
            count += 1
            await trio.lowlevel.checkpoint()
        assert 8 <= count < 30
        assert "unsent" in a.down_lost[0][1]
        await until(lambda: b.up_lost == [a.peer])
        assert len(b.got) == 1


async def test_rows_are_read_as_fast_as_they_are_computed(make_end, until) -> None:
    async with make_end() as a, make_end() as b:
        a.links.send_to_stage(b.peer, open_to(b.peer, b.host.addresses))
        await until(lambda: b.got)
        b.room = False
        for position in range(3):
            a.links.send_to_stage(b.peer, feed(1, position))
        await until(lambda: len(b.got) == 2)
        await trio.sleep(0.05)
        assert len(b.got) == 2
        b.room = True
        b.links.note_room()
        await until(lambda: len(b.got) == 4)


async def test_strangers_fill_no_memory(make_end, until, monkeypatch) -> None:
    monkeypatch.setattr(links_module, "MAX_UPSTREAMS", 2)
    monkeypatch.setattr(links_module, "MAX_DOWNSTREAMS", 1)
    async with make_end() as a, make_end() as b, make_end() as c, make_end() as d:
        a.used = {b.peer, c.peer}
        for end in (b, c, d):
            end.links.send_to_stage(a.peer, open_to(a.peer, a.host.addresses))
            await until(lambda: a.got or end.down_lost)  # noqa: B023 - awaited here
            if end is not d:
                a.got.clear()
        await until(lambda: d.down_lost)
        assert a.links.counters.refused == 1
        # Bytes that are no message end that link only.
        raw = await b.host.open_bulk_stream(a.peer, RING_PROTOCOL)
        await raw.send_all(b"\x00\x00\x00\x05hello")
        await until(lambda: a.links.counters.malformed == 1)
        assert a.up_lost == [b.peer]  # the newer one that replaced it
        assert c.peer in a.links.upstreams
        # No more links out than are allowed.
        c.needed = {a.peer}
        c.links.send_to_stage(b.peer, open_to(b.peer, b.host.addresses))
        await until(lambda: c.down_lost)
        assert "allowed" in c.down_lost[0][1]


async def test_links_without_sessions_keep_nobody_out(make_end, until, monkeypatch) -> None:
    monkeypatch.setattr(links_module, "MAX_UPSTREAMS", 2)
    monkeypatch.setattr(links_module, "UNUSED_UPSTREAM_S", 0.0)
    async with make_end() as a, make_end() as b, make_end() as c, make_end() as d:
        a.used = {b.peer}
        for end in (b, c, d):
            end.links.send_to_stage(a.peer, open_to(a.peer, a.host.addresses))
            await until(lambda: any(peer == end.peer for peer, _ in a.got))  # noqa: B023 - awaited here
        assert a.up_lost == [c.peer]  # newer than b's, but no session runs over it
        assert set(a.links.upstreams) == {b.peer, d.peer}


async def test_links_out_that_no_session_needs_keep_none_from_being_opened(
    make_end, until, monkeypatch
) -> None:
    """Who opens a session decides which stage is next, and the one after that."""
    monkeypatch.setattr(links_module, "MAX_DOWNSTREAMS", 2)
    async with make_end() as a, make_end() as b, make_end() as c, make_end() as d:
        a.needed = {b.peer}
        for end in (b, c, d):
            a.links.send_to_stage(end.peer, open_to(end.peer, end.host.addresses))
            await until(lambda: end.got)  # noqa: B023 - awaited here
        assert a.links.downstreams == (b.peer, d.peer)
        await until(lambda: c.up_lost == [a.peer])
        assert a.down_lost == []


async def test_a_newer_link_of_a_peer_replaces_the_older(make_end, until) -> None:
    async with make_end() as a, make_end() as b:
        a.links.send_to_stage(b.peer, open_to(b.peer, b.host.addresses))
        await until(lambda: b.got)
        stream = await a.host.open_bulk_stream(b.peer, RING_PROTOCOL)
        messages = MessageStream(stream, TO_STAGE, FROM_STAGE)
        await messages.send(RingPing(7))
        await until(lambda: (a.peer, RingPing(7)) in b.got)
        assert b.up_lost == []
        b.links.send_from_stage(a.peer, RingAck(SESSION, 3))
        with trio.fail_after(30):
            assert await messages.receive() == RingAck(SESSION, 3)
        await until(lambda: a.down_lost)


async def test_bytes_of_a_large_message_are_signs_of_life(make_end, until, monkeypatch) -> None:
    monkeypatch.setattr(links_module, "_PROGRESS_S", 0.01)
    async with make_end() as a, make_end() as b:
        stream = await a.host.open_bulk_stream(b.peer, RING_PROTOCOL, b.host.addresses)
        frame = TO_STAGE.encode_frame(feed(2_000_000))
        for start in range(0, 1_000_000, 100_000):
            await stream.send_all(frame[start : start + 100_000])
            await trio.sleep(0.02)
        await until(lambda: b.alive)
        assert b.got == []
        await stream.send_all(frame[1_000_000:])
        await until(lambda: b.got == [(a.peer, feed(2_000_000))])


async def test_spares_get_a_connection_in_advance(make_end, until) -> None:
    async with make_end() as a, make_end() as b, make_end() as c:
        message = open_to(b.peer, b.host.addresses)
        spare = StagePeer(c.peer, c.host.addresses)
        stages = (msgspec.structs.replace(message.chain.stages[0], spares=(spare,)), message.chain.stages[1])
        chain = msgspec.structs.replace(message.chain, stages=stages)
        a.links.send_to_stage(b.peer, msgspec.structs.replace(message, chain=chain))
        await until(lambda: a.host.bulk_connections(c.peer) and c.host.bulk_connections(a.peer))
        assert c.got == []
        assert a.links.downstreams == (b.peer,)


async def test_a_link_that_no_session_uses_ends(make_end, until, monkeypatch) -> None:
    monkeypatch.setattr(links_module, "IDLE_DOWNSTREAM_S", 2.0)
    async with make_end() as a, make_end() as b:
        a.links.send_to_stage(b.peer, open_to(b.peer, b.host.addresses))
        for number in range(8):
            await trio.sleep(0.3)
            a.links.send_to_stage(b.peer, RingPing(number + 1))
        await until(lambda: len(b.got) == 9)
        await until(lambda: b.up_lost == [a.peer])
        assert a.links.downstreams == ()
        assert a.down_lost == []
        a.links.send_to_stage(b.peer, open_to(b.peer, b.host.addresses))
        await until(lambda: len(b.got) == 10)


async def test_messages_in_part_are_bounded_in_all(make_end, until, monkeypatch) -> None:
    monkeypatch.setattr(links_module, "MAX_PARTIAL_BYTES", 3_000_000)
    frame = TO_STAGE.encode_frame(feed(2_000_000))
    async with make_end() as a, make_end() as b, make_end() as c:
        early = await b.host.open_bulk_stream(a.peer, RING_PROTOCOL, a.host.addresses)
        await early.send_all(frame[:1_900_000])
        await until(lambda: b.peer in a.links.upstreams)
        late = await c.host.open_bulk_stream(a.peer, RING_PROTOCOL, a.host.addresses)
        await late.send_all(frame)
        await until(lambda: a.up_lost == [b.peer])
        await until(lambda: a.got == [(c.peer, feed(2_000_000))])


async def test_a_link_moves_off_its_relay_in_the_midst_of_its_work(make_end, until) -> None:
    async with (
        make_end() as a,
        make_end() as b,
        open_host(new_identity()) as relay,
        trio.open_nursery() as nursery,
    ):
        RelayService(relay, RelayLimits(), unix_now_s=lambda: 1)
        place = RelayClient(
            b.host,
            RelayClientConfig(backoff_first_s=0.05),
            dice=Dice(1),
            unix_now_s=lambda: 1,
            on_circuit=lambda _: None,
            changed=lambda: None,
        )
        place.offer(relay.addresses[0])
        nursery.start_soon(place.run)
        await until(lambda: place.addresses)
        a.links.send_to_stage(b.peer, open_to(b.peer, place.addresses))
        await until(lambda: b.got)
        assert [path.relay for path in a.host.paths(b.peer)] == [relay.peer]
        down: list[RingFeed] = []
        up: list[RingAck] = []

        async def talk() -> None:
            """Small messages among large ones, both ways, before, while and after the link moves."""
            for n in range(300):
                down.append(feed(100_000 if n % 10 == 0 else 10, n))
                a.links.send_to_stage(b.peer, down[-1])
                up.append(RingAck(SESSION, n))
                b.links.send_from_stage(a.peer, up[-1])
                if n == 100:
                    nursery.start_soon(partial(a.host.connect, b.host.addresses[0], over=is_direct))
                if n == 200:
                    await until(lambda: a.links.counters.moved)
                await trio.lowlevel.checkpoint()

        await talk()
        await until(lambda: len(a.got) == len(up))
        await until(lambda: len(b.got) == len(down) + 1)
        assert [message for _, message in a.got] == up
        assert [message for _, message in b.got][1:] == down
        assert a.links.counters.moved == 1
        await until(lambda: not any(c.streams for c in a.host._connections[b.peer] if c.path.relay))
        assert a.down_lost == b.up_lost == []
        assert b.links.upstreams == (a.peer,)
        a.links.drop(b.peer, "over")
        await until(lambda: b.up_lost == [a.peer])
        nursery.cancel_scope.cancel()
