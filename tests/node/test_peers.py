"""The peer table over real hosts, and over processes that die."""

# ruff: noqa: SIM117 - a host outlives its peer table: the nesting shows it

from __future__ import annotations

import math

import pytest
import trio
import trio.testing

from node.identity import new_identity
from node.p2p import AddressInvalid, open_host
from node.peers import PeerDown, PeersConfig, PeerUp, open_peers
from node.rpc import CallFailed, PeerUnreachable
from protocol.adverts import HELLO, Hello
from protocol.dice import Dice
from protocol.instants import MILLISECOND_NS, SECOND_NS
from protocol.rpc import RPC_PROTOCOL

PATIENCE_S = 30
QUICK = PeersConfig(backoff_first_ns=20 * MILLISECOND_NS, backoff_max_ns=SECOND_NS)


class Watch:
    """Waits for events instead of sleeping."""

    def __init__(self, peers) -> None:
        self.events = []
        self._more = trio.lowlevel.ParkingLot()
        peers.subscribe(self._take)

    def _take(self, event) -> None:
        self.events.append(event)
        self._more.unpark_all()

    async def next(self, kind):
        with trio.fail_after(PATIENCE_S):
            while True:
                for at, event in enumerate(self.events):
                    if isinstance(event, kind):
                        del self.events[: at + 1]
                        return event
                await self._more.park()


def peers_of(host, name: str, config: PeersConfig = QUICK):
    return open_peers(host, hello=Hello(name, "0", (name,)), config=config, dice=Dice(len(name)))


async def test_hello_calls_and_the_table(until) -> None:
    async with open_host(new_identity()) as a, open_host(new_identity()) as b:
        async with peers_of(a, "gateway") as pa, peers_of(b, "island") as pb:
            watch_a, watch_b = Watch(pa), Watch(pb)

            async def answer(peer, hello: Hello) -> Hello:
                assert peer == a.peer
                return Hello(hello.name[::-1], "1")

            noted = trio.Event()
            pb.serve("turn", HELLO, answer)
            pa.serve_notice("note", HELLO, lambda peer, _: noted.set() if peer == b.peer else None)
            pa.keep(b.addresses[0])
            pa.keep(b.addresses[0])
            assert await watch_a.next(PeerUp) == PeerUp(b.peer, Hello("island", "0", ("island",)))
            assert await watch_b.next(PeerUp) == PeerUp(a.peer, Hello("gateway", "0", ("gateway",)))
            assert pa.hello(b.peer) == Hello("island", "0", ("island",))
            got = await pa.call(b.peer, "turn", Hello("abc", "0"), HELLO, deadline_ns=PATIENCE_S * SECOND_NS)
            assert got.name == "cba"
            pb.notify(a.peer, "note", Hello("x", "0"))  # the other way over the same stream
            with trio.fail_after(PATIENCE_S):
                await noted.wait()
            await until(lambda: pa.rtt_ns(b.peer))
            [row] = pa.table()
            assert (row.peer, row.name, row.roles, row.address) == (
                b.peer,
                "island",
                ("island",),
                b.addresses[0],
            )
            assert (row.state, row.rtt_ns) == ("connected", pa.rtt_ns(b.peer))
            assert row.last_seen is not None
            assert pb.table()[0].address.startswith("127.0.0.1:")
            assert a.counters.streams_opened == 1
            with pytest.raises(CallFailed, match="unknown-method"):
                await pa.call(b.peer, "nobody", Hello("", ""), HELLO, deadline_ns=SECOND_NS * PATIENCE_S)
        assert (await watch_b.next(PeerDown)).peer == a.peer
        with pytest.raises(PeerUnreachable):
            await pa.call(b.peer, "turn", Hello("", ""), HELLO, deadline_ns=SECOND_NS)
        assert pa.hello(b.peer) is None


async def test_both_dial_at_once_and_settle_on_one_stream(until) -> None:
    for _ in range(5):
        async with open_host(new_identity()) as a, open_host(new_identity()) as b:
            async with peers_of(a, "left") as pa, peers_of(b, "right") as pb:
                watch_a, watch_b = Watch(pa), Watch(pb)
                pa.keep(b.addresses[0])
                pb.keep(a.addresses[0])
                await watch_a.next(PeerUp)
                await watch_b.next(PeerUp)
                await until(lambda pa=pa, pb=pb: len(pa._links) == len(pb._links) == 1)
                assert watch_a.events == watch_b.events == []  # nobody went down and up again
                assert pa._known[b.peer].ours is not pb._known[a.peer].ours
                for peers, other in ((pa, b.peer), (pb, a.peer)):
                    with pytest.raises(CallFailed, match="unknown-method"):
                        await peers.call(
                            other, "nobody", Hello("", ""), HELLO, deadline_ns=PATIENCE_S * SECOND_NS
                        )


async def test_a_link_that_is_up_is_not_replaced_by_the_larger_peer() -> None:
    smaller, larger = sorted((new_identity(), new_identity()), key=lambda identity: identity.peer)
    async with open_host(smaller) as a, open_host(larger) as b:
        async with peers_of(a, "a") as pa, peers_of(b, "b") as pb:
            watch = Watch(pa)
            pa.keep(b.addresses[0])
            await watch.next(PeerUp)
            link = pa._known[b.peer].link
            with pytest.raises(CallFailed, match="busy"):
                await pb._open_link(a.peer, a.addresses[0])
            assert pa._known[b.peer].link is link
            assert watch.events == []
            # The smaller one's new stream does replace the larger one's.
            assert await pa._open_link(b.peer, b.addresses[0]) is pa._known[b.peer].link
            with trio.fail_after(PATIENCE_S):
                await link.ended.wait()
            assert watch.events == []


async def test_a_peer_that_dies_and_comes_back(peer_process, until) -> None:
    identity = new_identity()
    async with open_host(new_identity()) as host, peers_of(host, "test") as peers:
        watch = Watch(peers)
        async with peer_process(identity) as first:
            peers.keep(first.address)
            await watch.next(PeerUp)
            first.process.kill()  # SIGKILL: the kernel closes its sockets
            down = await watch.next(PeerDown)
            assert down.peer == identity.peer
            assert "closed" in down.reason or "reset" in down.reason
        await until(lambda: peers.table()[0].detail == "connection refused")
        assert peers.table()[0].state in {"waiting", "connecting"}
        async with peer_process(identity, first.port) as second:
            up = await watch.next(PeerUp)
            assert (up.peer, second.address) == (identity.peer, first.address)
            answer = await peers.call(
                identity.peer, "echo", Hello("back", "0"), HELLO, deadline_ns=PATIENCE_S * SECOND_NS
            )
            assert answer.name == "back"


async def test_backoff_grows_with_jitter_and_is_bounded() -> None:
    async with open_host(new_identity()) as host:
        async with open_peers(host, hello=Hello("x", "0"), dice=Dice(7)) as peers:
            config = PeersConfig()
            for failures in (*range(12), 1000):
                whole = min(config.backoff_max_ns, config.backoff_first_ns * 2**failures)
                draws = [peers._keeper.backoff_ns(failures) for _ in range(20)]
                assert all(whole // 2 - 1 <= draw <= whole for draw in draws)
                assert len(set(draws)) > 10
            assert math.isclose(config.backoff_max_ns, 30e9)


async def test_forgotten_addresses_are_dialled_no_more(peer_process) -> None:
    async with open_host(new_identity()) as a, open_host(new_identity()) as b:
        async with peers_of(a, "a") as pa, peers_of(b, "b") as pb:
            watch = Watch(pa)
            pa.keep(b.addresses[0])
            await watch.next(PeerUp)
            pa.forget(b.addresses[0])
            pa.forget(b.addresses[0])
            assert pa.up() == (b.peer,)  # the link stays
            await b.disconnect(a.peer)
            await watch.next(PeerDown)
            await trio.sleep(0.3)
            assert pa.table() == ()
            assert pb.table() == ()
            assert a.counters.connections_dialled == 1


async def test_bad_addresses_are_refused_at_once() -> None:
    async with open_host(new_identity()) as host, peers_of(host, "x") as peers:
        with pytest.raises(AddressInvalid):
            peers.keep("localhost:4001")
        with pytest.raises(AddressInvalid, match="itself"):
            peers.keep(host.addresses[0])


async def test_nothing_is_answered_before_hello() -> None:
    from node.rpc import Methods, RpcCounters, RpcLink

    async with open_host(new_identity()) as a, open_host(new_identity()) as b, peers_of(b, "b") as pb:

        async def never(*_):
            raise AssertionError

        pb.serve("secret", HELLO, never)
        await a.connect(b.addresses[0])
        link = RpcLink(await a.open_stream(b.peer, RPC_PROTOCOL), Methods(), RpcCounters())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(link.run)
            with pytest.raises(CallFailed, match="say hello first"):
                await link.call("secret", Hello("", ""), HELLO, deadline_ns=PATIENCE_S * SECOND_NS)
            assert pb.up() == ()
            link.close("done")


async def test_a_peer_that_sends_garbage_is_disconnected(until) -> None:
    async with open_host(new_identity()) as a, open_host(new_identity()) as b, peers_of(b, "b") as pb:
        await a.connect(b.addresses[0])
        stream = await a.open_stream(b.peer, RPC_PROTOCOL)
        await stream.send_all(b"\xff" * 100)
        await until(lambda: not b.connected())
        assert pb.counters.malformed == 1


async def test_who_has_ever_more_to_say_of_itself_is_heard_at_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.peers.HELLOS_PER_MINUTE", 5)
    async with open_host(new_identity()) as a, open_host(new_identity()) as b:
        async with peers_of(a, "a") as pa, peers_of(b, "b") as pb:
            watch_a, watch = Watch(pa), Watch(pb)
            pa.keep(b.addresses[0])
            await watch_a.next(PeerUp)
            await watch.next(PeerUp)
            refused = 0
            for i in range(20):
                try:
                    hello = Hello(f"a{i}", "0")
                    await pa.call(b.peer, "hello", hello, HELLO, deadline_ns=PATIENCE_S * SECOND_NS)
                except CallFailed as error:
                    assert error.code == "busy"
                    refused += 1
            assert refused >= 10
            assert len(watch.events) == 20 - refused
            assert pb.up() == (a.peer,)


async def test_our_own_sleep_is_not_held_against_others(monkeypatch) -> None:
    """After this process was frozen itself, peers get time to be heard before they are judged."""
    config = PeersConfig(heartbeat_ns=100 * MILLISECOND_NS, dead_after_ns=400 * MILLISECOND_NS)
    async with open_host(new_identity()) as a, open_host(new_identity()) as b:
        async with peers_of(a, "a", config) as pa, peers_of(b, "b", config) as pb:
            watch = Watch(pa)
            pa.keep(b.addresses[0])
            await watch.next(PeerUp)
            import time

            time.sleep(1.0)  # noqa: ASYNC251 - the whole loop stands still, as under SIGSTOP
            await trio.sleep(0.3)
            assert watch.events == []
            assert pa.up() == (b.peer,)
            assert pb.up() == (a.peer,)
