"""Reachability: whom a node believes, whom it dials back, and what follows."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from node.identity import new_identity
from node.p2p import Host, Unreachable, open_host
from node.p2p.identify import serve_identify
from node.p2p.nat import Nat, NatConfig, ReachabilityChanged, open_nat
from node.p2p.nat_messages import (
    AUTONAT_PROTOCOL,
    DialRequest,
    DialResponse,
    decode_dial_request_untrusted,
    decode_dial_response_untrusted,
    encode_dial_request,
    encode_dial_response,
    receive_message_untrusted,
    send_message,
)
from node.p2p.own_addresses import OwnAddresses
from node.p2p.reachability import (
    DialBackLimits,
    DialBackServer,
    Reachability,
    Verdicts,
    ask_to_be_dialled,
    dialable_back,
)
from node.p2p.relay_client import RelayClientConfig
from protocol.dice import Dice
from protocol.ids import PeerId

PATIENCE_S = 30
SERVERS = [new_identity().peer for _ in range(12)]
HERE = "/ip4/1.2.3.4/tcp/4001"
QUICK = RelayClientConfig(renew_s=0.3, min_renew_s=0.1, backoff_first_s=0.05, backoff_max_s=0.2)


def plain(address: str) -> str:
    return address.partition("/p2p/")[0]


# --- beliefs ------------------------------------------------------------------------------------


def test_a_belief_needs_as_many_servers_as_there_are_up_to_the_number_wanted() -> None:
    verdicts = Verdicts(3)
    assert not verdicts.record(SERVERS[0], HERE, available=5)
    assert not verdicts.record(SERVERS[0], HERE, available=5)  # the same one counts once
    assert not verdicts.record(SERVERS[1], HERE, available=5)
    assert verdicts.record(SERVERS[2], HERE, available=5)
    assert verdicts.belief is Reachability.PUBLIC
    assert verdicts.met_at == (HERE,)
    lonely = Verdicts(3)
    assert lonely.record(SERVERS[0], None, available=1)
    assert lonely.belief is Reachability.PRIVATE
    assert not lonely.settled


def test_a_liar_or_two_change_no_belief() -> None:
    verdicts = Verdicts(3)
    for server in SERVERS[:5]:
        verdicts.record(server, HERE, available=12)
    for server in SERVERS[5:8]:
        assert not verdicts.record(server, None, available=12)
    assert verdicts.belief is Reachability.PUBLIC
    assert verdicts.settled


def test_a_belief_follows_when_the_world_changes() -> None:
    verdicts = Verdicts(3)
    for server in SERVERS[:5]:
        verdicts.record(server, HERE, available=5)
    changes = [verdicts.record(server, None, available=5) for server in SERVERS[:5]]
    assert changes == [False, False, True, False, False]
    assert verdicts.belief is Reachability.PRIVATE
    verdicts.forget()
    assert verdicts.belief is Reachability.PRIVATE
    assert not verdicts.settled


@given(st.lists(st.tuples(st.sampled_from(SERVERS), st.sampled_from([None, HERE]), st.integers(0, 12))))
def test_beliefs_have_the_majority_when_they_change(words) -> None:
    verdicts = Verdicts(3)
    for server, met_at, available in words:
        changed = verdicts.record(server, met_at, available=available)
        good = sum(word is not None for word in verdicts._words.values())
        bad = len(verdicts._words) - good
        assert len(verdicts._words) <= 8
        if changed:
            assert (good > bad) is (verdicts.belief is Reachability.PUBLIC)


# --- serving ------------------------------------------------------------------------------------


def test_only_the_ip_that_a_request_comes_from_is_dialled() -> None:
    peer = SERVERS[0]
    asked = [
        "/ip4/1.2.3.4/tcp/4001",
        f"/ip4/1.2.3.4/tcp/4001/p2p/{peer}",
        "/ip4/9.9.9.9/tcp/4001",
        "/ip4/1.2.3.4/tcp/0",
        "/dns4/victim.example/tcp/443",
        f"/ip4/1.2.3.4/tcp/1/p2p/{SERVERS[1]}/p2p-circuit/p2p/{peer}",
        "/ip4/1.2.3.4/udp/4001",
        "nonsense",
        "/ip4/1.2.3.4/tcp/4002",
    ]
    found = [str(address) for address in dialable_back(asked, "1.2.3.4:55555")]
    assert found == ["/ip4/1.2.3.4/tcp/4001", "/ip4/1.2.3.4/tcp/4002"]
    assert dialable_back(asked, f"relayed by {peer}") == ()
    assert [str(a) for a in dialable_back(["/ip6/2001:db8::1/tcp/1"], "2001:db8::1:9")] == [
        "/ip6/2001:db8::1/tcp/1"
    ]


@asynccontextmanager
async def server_and_client(limits: DialBackLimits | None = None) -> AsyncGenerator:
    async with open_host(new_identity()) as a, open_host(new_identity()) as b:
        server = DialBackServer(a, limits or DialBackLimits())
        await b.connect(a.addresses[0])
        yield a, server, b


async def ask(host: Host, server: Host, data: bytes) -> DialResponse:
    stream = await host.open_stream(server.peer, AUTONAT_PROTOCOL)
    with trio.fail_after(PATIENCE_S):
        await send_message(stream, data)
        answer = decode_dial_response_untrusted(await receive_message_untrusted(stream))
    await stream.aclose()
    return answer


async def test_a_node_that_listens_is_met_and_one_that_does_not_is_not() -> None:
    async with server_and_client() as (a, server, b):
        assert await ask_to_be_dialled(b, a.peer, b.listening) == plain(b.listening[0])
        assert await ask_to_be_dialled(b, a.peer, ["/ip4/127.0.0.1/tcp/1"]) is None
        # Somebody listens there, but it is not us.
        assert await ask_to_be_dialled(b, a.peer, [plain(a.listening[0])]) is None
        assert len(b.paths(a.peer)) == 1  # nothing of it stays
        assert server.served == 3


async def test_nobody_else_is_dialled(until) -> None:
    came = []

    async def victim(stream) -> None:
        came.append(stream)

    async with server_and_client() as (a, server, b), trio.open_nursery() as nursery:
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.2")
        nursery.start_soon(trio.serve_listeners, victim, [listener])
        port = listener.socket.getsockname()[1]
        with pytest.raises(Unreachable, match="101"):
            await ask_to_be_dialled(b, a.peer, [f"/ip4/127.0.0.2/tcp/{port}"])
        assert (server.served, server.refused) == (0, 1)
        assert came == []
        nursery.cancel_scope.cancel()


async def test_requests_for_others_floods_and_garbage_are_refused() -> None:
    async with server_and_client(DialBackLimits(per_peer_per_minute=2)) as (a, server, b):
        wrong = await ask(b, a, encode_dial_request(DialRequest(a.peer, b.listening)))
        assert wrong.status == 200
        assert (await ask(b, a, b"\xff\xff")).status == 200
        good = encode_dial_request(DialRequest(b.peer, b.listening))
        assert [(await ask(b, a, good)).status for _ in range(4)] == [0, 0, 101, 101]
        assert server.served == 2
        assert a.counters.handler_failures == 0


async def test_answers_that_make_no_sense_say_nothing() -> None:
    answers = [
        encode_dial_response(DialResponse(0, "/ip4/9.9.9.9/tcp/1")),
        encode_dial_response(DialResponse(300)),
        b"\xff",
        b"",
    ]

    async def liar(stream) -> None:
        decode_dial_request_untrusted(await receive_message_untrusted(stream))
        await send_message(stream, answers.pop())

    async with open_host(new_identity()) as a, open_host(new_identity()) as b:
        a.handle(AUTONAT_PROTOCOL, liar)
        await b.connect(a.addresses[0])
        for _ in range(4):
            with pytest.raises(Unreachable):
                await ask_to_be_dialled(b, a.peer, b.listening)
        assert answers == []


# --- the facade ---------------------------------------------------------------------------------


class Opinion:
    """A peer whose answers the test decides."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.answer: str | None = None
        self.asked = 0
        serve_identify(host, agent="opinion/1")
        host.handle(AUTONAT_PROTOCOL, self._serve)

    async def _serve(self, stream) -> None:
        request = decode_dial_request_untrusted(await receive_message_untrusted(stream))
        self.asked += 1
        met = self.answer == "met"
        response = DialResponse(0, request.addresses[0]) if met else DialResponse(100)
        await send_message(stream, encode_dial_response(response))


@asynccontextmanager
async def nat_of(host: Host, **config: object) -> AsyncGenerator[Nat]:
    settings = NatConfig(unsettled_s=0.2, settled_s=0.3, relay_client=QUICK, **config)  # type: ignore[arg-type]
    async with open_nat(host, settings, dice=Dice(3), unix_now_s=lambda: int(time.time())) as nat:
        yield nat


async def test_places_at_relays_come_and_go_with_the_belief(until) -> None:
    async with (
        open_host(new_identity()) as relay,
        open_host(new_identity()) as host,
        open_host(new_identity()) as first,
        open_host(new_identity()) as second,
        nat_of(relay, serve_relay=True),
        nat_of(host, relays=(relay.addresses[0],), confirmations=2) as nat,
    ):
        events = []
        nat.subscribe(events.append)
        opinions = [Opinion(first), Opinion(second)]
        assert nat.reachability is Reachability.UNKNOWN
        assert nat.addresses == host.listening
        for opinion in opinions:
            await host.connect(opinion.host.addresses[0])
        await until(lambda: nat.relay_client.relays == (relay.peer,))
        assert nat.reachability is Reachability.PRIVATE
        assert ReachabilityChanged(Reachability.PRIVATE) in events
        relayed = f"{relay.addresses[0]}/p2p-circuit/p2p/{host.peer}"
        assert nat.addresses == (relayed, *host.listening)
        for opinion in opinions:
            opinion.answer = "met"
        await until(lambda: nat.reachability is Reachability.PUBLIC)
        await until(lambda: not nat.relay_client.relays)
        assert nat.addresses == host.listening
        for opinion in opinions:  # against the relay, which can dial it
            opinion.answer = None
        await until(lambda: nat.reachability is Reachability.PRIVATE)
        await until(lambda: nat.addresses == (relayed, *host.listening))


async def test_where_most_see_us_comes_before_what_a_few_invent() -> None:
    async with open_host(new_identity()) as host:
        for i in range(20):
            host.note_observed(PeerId(f"liar-{i}"), f"/ip4/1.0.0.{i}/tcp/{i + 1}")
        for i in range(3):
            host.note_observed(PeerId(f"honest-{i}"), f"/ip4/8.8.8.8/tcp/{4000 + i}")
        port = host.addresses[0].split("/")[4]
        assert OwnAddresses(host).candidates()[0] == f"/ip4/8.8.8.8/tcp/{port}"


async def test_those_who_came_by_themselves_do_not_outvote_those_whom_we_chose(until) -> None:
    """Ten identities that connect and say that they can not dial us would make a client of any node."""
    async with AsyncExitStack() as stack:
        host = await stack.enter_async_context(open_host(new_identity()))
        chosen = []
        for _ in range(3):
            server = await stack.enter_async_context(open_host(new_identity()))
            opinion = Opinion(server)
            opinion.answer = "met"
            await host.connect(server.addresses[0])
            chosen.append(opinion)
        nat = await stack.enter_async_context(nat_of(host))
        await until(lambda: nat.reachability is Reachability.PUBLIC)
        liars = []
        for _ in range(10):
            liar = await stack.enter_async_context(open_host(new_identity()))
            liars.append(Opinion(liar))
            await liar.connect(host.addresses[0])
        rounds = sum(opinion.asked for opinion in chosen)
        await until(lambda: sum(opinion.asked for opinion in chosen) >= rounds + 9)  # asked again and again
        assert nat.reachability is Reachability.PUBLIC
        assert sum(liar.asked for liar in liars) == 0


async def test_what_is_known_is_not_asked_and_peers_that_do_not_serve_are_left_alone(until) -> None:
    async with (
        open_host(new_identity()) as host,
        open_host(new_identity()) as other,
        open_host(new_identity()) as mute,
    ):
        serve_identify(mute, agent="mute/1")
        opinion = Opinion(other)
        async with nat_of(host, assume=Reachability.PUBLIC) as nat:
            await host.connect(other.addresses[0])
            await trio.sleep(0.5)
            assert nat.reachability is Reachability.PUBLIC
            assert opinion.asked == 0
        async with open_host(new_identity()) as second, nat_of(second) as nat:
            await second.connect(mute.addresses[0])
            await until(lambda: mute.peer in nat._mute)
            await second.disconnect(mute.peer)
            assert not nat._mute
            assert nat.reachability is Reachability.UNKNOWN


async def test_who_listens_nowhere_is_private_and_met_at_a_relay(until) -> None:
    async with (
        open_host(new_identity()) as relay,
        open_host(new_identity(), ()) as host,
        open_host(new_identity()) as other,
        nat_of(relay, serve_relay=True),
        nat_of(host, relays=(relay.addresses[0],)) as nat,
    ):
        await until(lambda: nat.addresses)
        await other.connect(nat.addresses[0])
        assert [path.relay for path in other.paths(host.peer)] == [relay.peer]
