"""The JavaScript client against real peers: libp2p's own protocols, our RPC, look-ups, and liars."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from time import time_ns
from typing import Any, ClassVar

import pytest
import trio

from dht.keys import key_of_capability, key_of_cargo, key_of_peer, key_of_record, key_of_region, key_of_role
from dht.records import open_record_untrusted, seal_record
from dht.wire import DHT_CODEC, METHOD_DHT, WireMessage, WireRecord
from node.identity import new_identity
from node.p2p import Stream, open_host
from node.p2p.identify import identify, serve_identify
from node.p2p.ping import ping, serve_ping
from node.p2p.relay_client import RelayClient, RelayClientConfig
from node.p2p.relay_service import RelayLimits, RelayService
from node.peers import open_peers
from protocol.adverts import Hello
from protocol.codec import LENGTH, Message, encode
from protocol.dice import Dice
from protocol.ids import CargoDigest, PeerId
from protocol.instants import SECOND_NS
from protocol.limits import MAX_RPC_BYTES
from protocol.rpc import RPC_PROTOCOL, Reply

pytestmark = [pytest.mark.npm, pytest.mark.slow, pytest.mark.timeout(300)]

PATIENCE_S = 60
ROOT = Path(__file__).parents[2]
README = ROOT / "sdk" / "js" / "README.md"
Network = Callable[[int], AbstractAsyncContextManager[list[Any]]]


async def test_libp2p_s_own_protocols_and_the_link(js: Any, network: Network) -> None:
    async with network(1) as [node]:
        hello = await js.connect(node.address)
        assert hello == {"peer": node.peer, "name": node.peer[-6:], "version": "0", "roles": ["island"]}
        for _ in range(10):
            assert 0 <= await js.ping(node.peer) < PATIENCE_S * 1000
            assert 0 < await js.pingLink(node.peer) < PATIENCE_S * 1000
        told = await js.identify(node.peer)
        assert (told["peer"], told["agent"]) == (node.peer, "archipelag/test")
        assert told["addresses"] == [node.address.removesuffix(f"/p2p/{node.peer}")]
        assert told["observed"].startswith("/ip4/127.0.0.1/tcp/")
        assert set(told["protocols"]) == set(node.host.protocols)
        # And the other way round, over the connection that it opened.
        [peer] = node.peers.up()
        assert await ping(node.host, peer) > 0
        back = await identify(node.host, peer)
        assert back.agent.startswith("archipelag-js/")
        assert back.observed == node.address.removesuffix(f"/p2p/{node.peer}")
        greeting = {"type": "hello", "name": "again", "version": "1"}
        assert (await js.call(node.peer, "hello", greeting))["name"] == node.peer[-6:]
        with pytest.raises(Exception, match="unknown-method"):
            await js.call(node.peer, "nothing-like-that", greeting)
        assert await js.peers() == [node.peer]


async def test_it_finds_what_the_network_holds(js: Any, network: Network) -> None:
    async with network(24) as nodes:
        await js.connect(nodes[0].address)

        by_peer = {node.peer: node for node in nodes}
        target = key_of_role("coordinator", "eu")
        found = await js.findNode("role:coordinator@eu")
        names = [contact["peer"] for contact in found["contacts"]]
        wanted = sorted(by_peer, key=lambda peer: key_of_peer(PeerId(peer)) ^ target)
        assert names[:3] == wanted[:3]
        assert len(set(names) & set(wanted[:20])) >= 14  # tables differ a little right after joining
        assert len(names) == 20
        for contact in found["contacts"]:
            assert contact["addresses"] == [by_peer[contact["peer"]].address]

        # Ours, found there.
        assert (await js.putRecord("notes", "from-js", "grüße"))["copies"] >= 15
        records = (await nodes[-1].overlay.get_records(key_of_record("notes", "from-js"))).records
        [opened] = [open_record_untrusted(record, nodes[-1].overlay.unix_now()) for record in records]
        assert opened.body.value.decode() == "grüße"
        client = await js.open({"seed": "11" * 32, "listen": ["/ip4/127.0.0.1/tcp/0"]})
        await js.connect(nodes[1].address, client=1)
        assert (await js.provide("capability:js", client=1))["copies"] >= 15
        providers = (await nodes[-2].overlay.find_providers(key_of_capability("js"))).providers
        assert providers == (client["peer"],)

        # Theirs, found here.
        now = nodes[5].overlay.unix_now()
        for node in nodes[5:8]:
            record = seal_record(
                node.identity.signer,
                "notes",
                "theirs",
                node.peer.encode(),
                sequence=now,
                expires_unix_ns=now + 3600 * SECOND_NS,
            )
            assert (await node.overlay.put_record(record)).copies >= 15
            assert (await node.overlay.provide(key_of_region("eu"))).copies >= 15
        expected = {node.peer for node in nodes[5:8]}
        got = (await js.getRecords("notes", "theirs", {"quorum": 3}))["records"]
        assert {record["issuer"] for record in got} == {record["value"] for record in got} == expected
        got = (await js.findProviders("region:eu"))["providers"]
        assert {provider["peer"] for provider in got} == expected
        assert all(provider["addresses"] == [by_peer[provider["peer"]].address] for provider in got)

        # Whoever finds it can dial it: hello, ping, and what it says of itself.
        seeker = nodes[-3]
        await seeker.overlay.find_providers(key_of_capability("js"))
        await seeker.overlay.reach(PeerId(client["peer"]))
        assert seeker.peers.hello(PeerId(client["peer"])).addresses == tuple(client["addresses"])
        assert await ping(seeker.host, PeerId(client["peer"])) > 0

        # It asked everywhere, and stands nowhere.
        ours = {client["peer"], (await js.open({}))["peer"]}
        met = set().union(*(node.peers.up() for node in nodes))
        assert client["peer"] in met
        assert not any(node.tabled() - set(by_peer) for node in nodes), ours


async def test_it_goes_on_when_peers_are_gone(js: Any, network: Network) -> None:
    async with network(8) as nodes:
        await js.connect(nodes[0].address)
        assert len((await js.findNode("role:x"))["contacts"]) == 8
        for node in nodes[4:]:  # they are still in everybody's tables
            node.overlay.driver.closed = True
            await node.host.disconnect(PeerId((await js.peers())[0]))
            await node.host.shut_down()
        found = await js.findNode("role:x")
        assert {node.peer for node in nodes[:4]} <= {contact["peer"] for contact in found["contacts"]}


async def test_it_reaches_hidden_peers_through_relays(js: Any) -> None:
    """Our relay, our hidden peer, js-libp2p's circuits."""

    def unix_now_s() -> int:
        return time_ns() // 10**9

    async with (
        open_host(new_identity()) as relay,
        open_host(new_identity()) as hidden,
        open_peers(hidden, hello=Hello("hidden", "0"), dice=Dice(1)),
        trio.open_nursery() as nursery,
    ):
        RelayService(relay, RelayLimits(), unix_now_s=unix_now_s)
        serve_identify(hidden, agent="archipelag/test")
        serve_ping(hidden)
        placed = trio.Event()
        client = RelayClient(
            hidden,
            RelayClientConfig(),
            dice=Dice(1),
            unix_now_s=unix_now_s,
            on_circuit=lambda _: None,
            changed=placed.set,
        )
        client.offer(relay.addresses[0])
        nursery.start_soon(client.run)
        with trio.fail_after(PATIENCE_S):
            await placed.wait()
        [address] = client.addresses
        assert (await js.connect(address))["name"] == "hidden"
        assert await js.ping(hidden.peer) >= 0
        assert await js.pingLink(hidden.peer) > 0
        assert (await js.identify(hidden.peer))["agent"] == "archipelag/test"
        assert relay.connected() == (hidden.peer, (await js.me())["peer"])
        nursery.cancel_scope.cancel()


def run_js(program: str, *arguments: str, sdk: Path, node_program: Path) -> list[str]:
    """The words that it prints."""
    return subprocess.run(
        [node_program, "--input-type=module", "-e", program, *arguments],
        cwd=sdk,
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE_S,
    ).stdout.split()


def test_addresses_are_believed_as_far_as_their_teller_sees(sdk: Path, node_program: Path) -> None:
    """As node/overlay/addresses.py has it; port 1 stands for each."""
    peer, relay = new_identity().peer, new_identity().peer
    hosts = {
        "/ip4/127.0.0.1": 0,
        "/ip6/::1": 0,
        "/ip4/10.1.2.3": 1,
        "/ip4/172.31.0.1": 1,
        "/ip4/192.168.1.1": 1,
        "/ip4/100.64.0.1": 1,
        "/ip6/fd00::1": 1,
        "/ip4/8.8.8.8": 2,
        "/ip4/172.32.0.1": 2,
        "/ip6/2001:4860::1": 2,
        "/ip4/0.0.0.0": -1,
        "/ip4/169.254.1.1": -1,
        "/ip4/224.0.0.1": -1,
        "/ip6/fe80::1": -1,
        "/ip6/ff02::1": -1,
        "/ip6/::": -1,
        "/dns4/localhost": -1,
        "/ip4/1.2.3": -1,
        "/ip4/1.2.3.999": -1,
    }
    program = (
        "import { usableAddresses, scopeOfRemote } from './src/addresses.js'\n"
        "const [peer, ...texts] = process.argv.slice(1)\n"
        "const scope = text => [0, 1, 2].filter(n => usableAddresses(peer, [text], n).length).length - 1\n"
        "for (const text of texts) console.log(scope(text))\n"
        "for (const text of texts) console.log(scopeOfRemote(text))\n"
    )
    plain = [f"{host}/tcp/1" for host in hosts]
    ended = [f"{text}/p2p/{peer}" for text in plain]
    relayed = [f"{text}/p2p/{relay}/p2p-circuit" for text in plain]
    odd = [
        f"/ip4/8.8.8.8/tcp/1/p2p/{relay}",
        f"/ip4/8.8.8.8/tcp/1/p2p/{peer}/p2p-circuit",
        "/ip4/8.8.8.8/tcp/1/p2p/x/p2p-circuit",
        "/ip4/8.8.8.8/tcp/0",
        "/ip4/8.8.8.8/udp/1",
        "/ip4/8.8.8.8/tcp/70000",
        "8.8.8.8:1",
    ]
    for texts, scopes in ((plain, hosts), (ended, hosts), (relayed, hosts), (odd, dict.fromkeys(odd, -1))):
        out = run_js(program, peer, *texts, sdk=sdk, node_program=node_program)
        assert dict(zip(texts, map(int, out[: len(texts)]), strict=True)) == dict(
            zip(texts, scopes.values(), strict=True)
        )
        if texts is ended:  # what is no address of one peer counts as the world
            assert [int(word) for word in out[len(texts) :]] == [s if s >= 0 else 2 for s in scopes.values()]
        if texts is relayed:
            assert set(out[len(texts) :]) == {"2"}


def test_keys_are_the_network_s(sdk: Path, node_program: Path) -> None:
    peer = new_identity().peer
    digest = CargoDigest("sha256:" + "ab" * 32)
    cases = {
        peer: key_of_peer(peer),
        digest: key_of_cargo(digest),
        "role:coordinator": key_of_role("coordinator"),
        "role:coordinator@eu": key_of_role("coordinator", "eu"),
        "capability:runtime:llama@us": key_of_capability("runtime:llama", "us"),
        "region:eu": key_of_region("eu"),
        "0F" * 32: int("0f" * 32, 16),
    }
    program = (
        "import { keyOfName, keyOfRecord } from 'archipelag-client'\n"
        "for (const name of process.argv.slice(1)) console.log(Buffer.from(keyOfName(name)).toString('hex'))\n"
        "console.log(Buffer.from(keyOfRecord('namespace', 'näme')).toString('hex'))\n"
        "for (const name of ['', 'role:', 'sha256:ab', 'x', 'region:a@b']) {\n"
        "  try { keyOfName(name) } catch (error) { console.log(error.name) }\n"
        "}\n"
    )
    out = run_js(program, *cases, sdk=sdk, node_program=node_program)
    keys = [*cases.values(), key_of_record("namespace", "näme")]
    assert out == [*(f"{key:064x}" for key in keys), *["TypeError"] * 5]


# --- liars ----------------------------------------------------------------------------------------


class Lie(Message, frozen=True, tag="nodes"):
    """Any shape under an answer's name."""

    max_bytes: ClassVar[int] = MAX_RPC_BYTES
    c: int
    n: Any
    r: Any = None
    p: Any = None
    x: Any = 0
    e: Any = 0
    u: bool = False


class RecordsLie(Lie, frozen=True, tag="records"):
    pass


class ProvidersLie(Lie, frozen=True, tag="providers"):
    pass


LIES: dict[str, type[Lie]] = {"find": Lie, "get": RecordsLie, "who": ProvidersLie}


@asynccontextmanager
async def liar(answer: Callable[[WireMessage], Message | None]) -> AsyncGenerator[str]:
    """A peer that answers DHT queries as the test likes; its address."""
    async with (
        open_host(new_identity()) as host,
        open_peers(host, hello=Hello("liar", "0"), dice=Dice(1)) as peers,
    ):

        def take(peer: PeerId, message: WireMessage) -> None:
            told = answer(message)
            if told is not None:
                peers.notify(peer, METHOD_DHT, told)

        peers.serve_notice(METHOD_DHT, DHT_CODEC, take)
        yield host.addresses[0]
        assert not peers.counters.handler_failures  # it did lie


PORT = "/ip4/127.0.0.1/tcp/9"


@pytest.mark.parametrize(
    "contacts",
    [
        None,
        7,
        "text",
        [[1, 2, 3]],
        [["no peer", [PORT], 0]],
        [[new_identity().peer, [PORT, 5, "x" * 9999, "/dns4/localhost/tcp/1", "/ip4/127.0.0.1/udp/1"], 0]] * 8,
        [[new_identity().peer, [PORT]] for _ in range(10)],
        [[7, [PORT], 0]] * 2000,
        [{"peer": new_identity().peer}],
    ],
)
async def test_contacts_that_make_no_sense_cost_little(js: Any, network: Network, contacts: object) -> None:
    def lie(message: WireMessage) -> Message:
        return LIES[type(message).__struct_config__.tag](message.c, contacts, contacts, contacts)

    async with network(3) as nodes, liar(lie) as address:
        await js.connect(address)
        await js.connect(nodes[0].address)
        honest = {node.peer for node in nodes}
        found = await js.findNode("role:x")
        assert honest <= {contact["peer"] for contact in found["contacts"]}
        assert found["cost"]["queries"] <= 100
        assert (await js.getRecords("notes", "nothing"))["records"] == []
        await nodes[2].overlay.provide(key_of_role("x"))
        assert nodes[2].peer in {p["peer"] for p in (await js.findProviders("role:x"))["providers"]}


async def test_records_are_checked(js: Any) -> None:
    identity = new_identity()

    def sealed(namespace: str, name: str, *, key: Any = identity, age_ns: int = 0) -> list[Any]:
        now = time_ns() - age_ns
        record = seal_record(
            key.signer, namespace, name, b"v", sequence=now, expires_unix_ns=now + 60 * SECOND_NS
        )
        return [getattr(record, field) for field in WireRecord.__struct_fields__]

    good = sealed("notes", "n")
    forged = [*good[:4], good[4].replace(b"\xa1", b"\xa2"), good[5]]
    unsigned = [*good[:5], bytes(64)]
    elsewhere = sealed("notes", "m")
    expired = sealed("notes", "n", age_ns=3600 * SECOND_NS)
    renumbered = [*good[:2], good[2] + 1, *good[3:]]
    told = [None, [], [1] * 6, unsigned, forged, elsewhere, expired, renumbered, [*good[:2], -1, *good[3:]]]

    def answer(message: WireMessage) -> Message:
        return RecordsLie(message.c, [], [*told, *([good] if asked_well else [])])

    asked_well = False
    async with liar(answer) as address:
        await js.connect(address)
        assert (await js.getRecords("notes", "n"))["records"] == []
        asked_well = True
        assert (await js.getRecords("notes", "n"))["records"] == [{"issuer": identity.peer, "value": "v"}]


async def test_who_answers_nothing_or_anything_else_is_given_up(js: Any, network: Network) -> None:
    async with network(2) as nodes, liar(lambda _: None) as silent, liar(lambda m: Lie(m.c + 1, [])) as other:
        for address in (silent, other, nodes[0].address):
            await js.connect(address)
        with trio.fail_after(PATIENCE_S):
            found = await js.getRecords("notes", "nothing")
        assert found["cost"]["failures"] == 2


async def test_a_signal_ends_the_wait(js: Any) -> None:
    async with liar(lambda _: None) as silent:
        await js.connect(silent)
        began = trio.current_time()
        with pytest.raises(Exception, match="TimeoutError"):
            await js.findNode("role:x", {"abortAfterMs": 50})
        assert trio.current_time() - began < 4  # the answer's own time is 5 s


def frame(body: bytes, size: int | None = None) -> bytes:
    return LENGTH.pack(len(body) if size is None else size) + body


HELLO_REPLY = encode(Reply(0, encode(Hello("liar", "0"))))


@pytest.mark.parametrize(
    ("greets", "words", "raw"),
    [
        (False, "frame of 4294967295 bytes", frame(b"", 0xFFFFFFFF)),
        (False, "protocol", frame(b"\xc1")),
        (False, "protocol", frame(b"\xdd\xff\xff\xff\xff")),
        (False, "map was expected", frame(b"\x90")),
        (False, "unknown type", frame(b"\x81\xa4type\xa1?")),
        (False, "protocol", frame(encode(Reply(0, b"\xc1")))),
        (True, "frame of", frame(b"", 1 << 20)),
        (True, "protocol", frame(b"\x81\xa4type" * 2000)),
        (True, "protocol", frame(b"\x91" * 200_000)),
        (True, "closed", b""),
    ],
)
async def test_frames_that_make_no_sense_end_the_link_only(
    js: Any, network: Network, greets: object, words: str, raw: bytes
) -> None:
    async def lie(stream: Stream) -> None:
        await stream.receive_some()
        if greets:
            # In pieces, with the start of the next frame: it must wait for the rest.
            reply = frame(HELLO_REPLY)
            await stream.send_all(reply[:3])
            await stream.send_all(reply[3:])
            await stream.receive_some()
        await stream.send_all(raw)

    async with open_host(new_identity()) as host, network(1) as [node]:
        host.handle(RPC_PROTOCOL, lie)
        if greets:
            await js.connect(host.addresses[0])
            with pytest.raises(Exception, match=words):
                await js.pingLink(host.peer)
        else:
            with pytest.raises(Exception, match=words):
                await js.connect(host.addresses[0])
        await js.connect(node.address)
        assert await js.pingLink(node.peer) > 0


async def test_clear_errors(js: Any, network: Network) -> None:
    with pytest.raises(Exception, match="not connected to anybody"):
        await js.findNode("role:x")
    with pytest.raises(Exception, match="add /p2p/PEER"):
        await js.connect("/ip4/127.0.0.1/tcp/1")
    with pytest.raises(Exception, match="names no key"):
        await js.findNode("what?")
    with pytest.raises(Exception, match="4096 bytes"):
        await js.putRecord("notes", "n", "x" * 5000)
    with pytest.raises(Exception, match="own name"):
        await js.putRecord("peer", new_identity().peer, "x")
    async with network(1) as [node]:
        wrong = node.address.replace(node.peer, new_identity().peer)
        with pytest.raises(Exception, match=r"."):
            await js.connect(wrong)
        assert (await js.connect(node.address))["peer"] == node.peer


# --- real programs --------------------------------------------------------------------------------


@asynccontextmanager
async def archi_node(folder: Path, *arguments: str) -> AsyncGenerator[str]:
    """An Island without Cargos in a process of its own; its address."""
    process = await trio.lowlevel.open_process(
        [
            *(sys.executable, "-m", "node.cli", "run", "--cargo", "", "--data-dir", str(folder)),
            *("--listen", "/ip4/127.0.0.1/tcp/0", *arguments),
        ],
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    assert process.stdout is not None
    try:
        text = b""
        with trio.fail_after(PATIENCE_S):
            while b"\n" not in text:
                chunk = await process.stdout.receive_some()
                assert chunk, "archi-node ended"
                text += chunk
        yield text.decode().split()[1]
    finally:
        with trio.CancelScope(shield=True):
            process.terminate()
            await process.wait()
            await process.stdout.aclose()


async def test_the_readme_s_example_against_real_nodes(
    sdk: Path, node_program: Path, tmp_path: Path, js: Any
) -> None:
    example = (sdk / "examples" / "lookup.js").read_text().rstrip()
    assert f"```js\n{example}\n```" in README.read_text()
    async with (
        archi_node(tmp_path / "a", "--name", "one") as first,
        archi_node(tmp_path / "b", "--name", "two", "--bootstrap", first) as second,
    ):
        await js.connect(second)
        with trio.fail_after(PATIENCE_S):
            while len((await js.findNode("role:x"))["contacts"]) < 2:  # noqa: ASYNC110 - no event
                await trio.sleep(0.1)
            done = await trio.run_process(
                [node_program, "examples/lookup.js", first], cwd=sdk, capture_stdout=True
            )
        lines = done.stdout.decode().splitlines()
        assert lines[0].startswith("met one (island), ")
        assert lines[1] == "a record lies at 2 peers"
        assert lines[2].startswith("12D3KooW")
        assert lines[2].endswith(" says: hello")
        assert lines[3] == "0 coordinators"
        [record] = (await js.getRecords("notes", "greeting"))["records"]
        assert record["value"] == "hello"
