"""Chains over real connections: a gateway's Mesh, and Islands that hold layers by a script, in one process."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from cargos.manifest import Manifest
from cargos.manifest_text import parse_manifest_untrusted
from gateway.mesh import Mesh, open_mesh
from gateway.service import Completed, Failed, JobEvent, Placed, Preparing, Released
from node.coordination.coordinator import CoordinatorConfig, open_coordinator
from node.coordination.gossip import ROLE_COORDINATOR
from node.coordination.port import CoordinationPort
from node.identity import Identity, new_identity
from node.island import ROLE_ISLAND, monotonic_now, unix_now
from node.manifests import serve_manifests
from node.overlay.overlay import OverlayConfig, open_overlay
from node.p2p import Host, StreamBroken, open_host
from node.peers import Peers, open_peers
from node.rpc import Method, Refused
from node.streams import MessageStream
from protocol.adverts import ADVERT_KIND, HELLO, METHOD_HELLO, Hello, IslandAdvert, OfferedCargo, ShardRange
from protocol.coordination import COORDINATION, METHOD_COORDINATION, AdvertPut
from protocol.dice import Dice
from protocol.ids import PeerId
from protocol.instants import SECOND_NS, UnixNs
from protocol.jobs import (
    FROM_ISLAND,
    JOB_PROTOCOL,
    RECEIPT_KIND,
    TO_ISLAND,
    JobAccept,
    JobDone,
    JobError,
    JobOffer,
    JobTokens,
    Receipt,
    Token,
    Usage,
    token_hash,
)
from protocol.ring import (
    HOLD_SHARD,
    METHOD_HOLD,
    STAGE_RECEIPT_KIND,
    HoldShard,
    ShardHeld,
    StageReceipt,
    StageShare,
    StageWork,
)
from protocol.work import Generation, Sampling, TextPrompt
from routing.chains.costs import VOCABULARY_LAYERS
from routing.chains.pairs import BROKEN_RTT_NS
from routing.coordinator_events import WorkSeen
from routing.job_events import SupervisionPolicy

POLICY = SupervisionPolicy(window=64, wait_ns=2 * SECOND_NS, accept_ns=20 * SECOND_NS)
LAYERS, LENGTH, PROMPT = 12, 8, 3
MIB = 1 << 20


def manifest_of() -> Manifest:
    plain = {
        "schema": 1,
        "name": "large",
        "version": "1.0.0",
        "title": "Too large for any of these Islands",
        "runtime": "llmcpp",
        "publisher": "archipelag",
        "context_length": 512,
        "licence": {"spdx": "Apache-2.0"},
        "needs": {"memory_mib": 200},
        "files": [
            {
                "name": "large.gguf",
                "role": "model",
                "size_bytes": 200 * MIB,
                "sha256": "0" * 64,
                "sources": ["file:large.gguf"],
            }
        ],
        "sharding": {
            "architecture": "llama",
            "layers": LAYERS,
            "width": 64,
            "layer_bytes": [10 * MIB] * LAYERS,
            "embedding_bytes": 20 * MIB,
            "head_bytes": 20 * MIB,
            "kv_bytes": 1,
        },
    }
    return parse_manifest_untrusted(msgspec.json.encode(plain), "json")


class Island:
    """Holds what it is told, shows it in its advert, and plays the head of chains by a script."""

    def __init__(self, identity: Identity, host: Host, peers: Peers, net: Net) -> None:
        self.identity = identity
        self.host = host
        self.peers = peers
        self.net = net
        self.peer = host.peer
        self.range = (0, 0)
        self.state = "ready"
        self.orders: list[HoldShard] = []
        self.offers: list[JobOffer] = []
        self.may_load = True
        self.obeys = True
        self.script: Callable[[Any, JobOffer], Any] | None = None
        self.sequence = unix_now()
        serve_manifests(peers, lambda digest: net.manifest if digest == net.manifest.digest else None)
        peers.serve(METHOD_HOLD, HOLD_SHARD, self.hold)
        peers.serve_notice(METHOD_COORDINATION, COORDINATION, lambda _peer, _message: None)
        host.handle(JOB_PROTOCOL, self.work)

    async def hold(self, _: PeerId, order: HoldShard) -> ShardHeld:
        await trio.lowlevel.checkpoint()
        self.orders.append(order)
        if not self.obeys:
            raise Refused("failed", "not now")
        self.range = (order.first, order.last)
        self.state = "ready" if self.may_load else "loading"
        self.advertise()
        return ShardHeld(order.first, order.last)

    def advertise(self) -> None:
        self.sequence += 1
        shard = ShardRange(*self.range, LAYERS, room_mib=80, layer_ns=1_000_000)
        digest = self.net.manifest.digest
        offered = OfferedCargo(
            digest,
            "large",
            "1.0.0",
            "llmcpp",
            self.state,
            512,
            4,
            0,
            0,
            0.0,
            0.0,
            shard=shard,  # type: ignore[arg-type]
        )
        envelope = self.identity.signer.seal(
            ADVERT_KIND,
            IslandAdvert(self.peer[-4:], (offered,), addresses=tuple(self.host.addresses)),
            sequence=self.sequence,
            expires_unix_ns=UnixNs(unix_now() + 600 * SECOND_NS),
        )
        self.peers.notify(self.net.gateway, METHOD_COORDINATION, AdvertPut(self.sequence % 2**40, envelope))

    def freeze(self) -> None:
        """It stays connected but answers nobody."""

        async def never(_peer: PeerId, _hello: Hello) -> Hello:
            await trio.sleep_forever()
            raise AssertionError

        self.peers._methods.requests[METHOD_HELLO] = Method(HELLO, never)  # noqa: SLF001 - no process to stop here

    async def die(self) -> None:
        await self.host.disconnect(self.net.gateway, "the test pulled the cable")

    # --- the head -----------------------------------------------------------------------------------

    async def work(self, stream: Any) -> None:
        messages: Any = MessageStream(stream, FROM_ISLAND, TO_ISLAND)
        offer = await messages.receive()
        if isinstance(offer, JobOffer):
            self.offers.append(offer)
            try:
                await messages.send(JobAccept())
                await (self.script or self.answer)(messages, offer)
                await messages.receive()
            except StreamBroken:
                pass

    async def tokens(self, messages: Any, offer: JobOffer, until: int) -> None:
        first = len(offer.resume)
        await messages.send(JobTokens(first, tuple(Token(100 + n, f" {n}") for n in range(first, until))))

    async def answer(self, messages: Any, offer: JobOffer, stand_in: PeerId | None = None) -> None:
        """The rest of the answer, and its end. `stand_in`: took the place of the second stage on the way."""
        await self.tokens(messages, offer, LENGTH)
        await self.finish(messages, offer, stand_in)

    async def finish(self, messages: Any, offer: JobOffer, stand_in: PeerId | None = None) -> None:
        chain = offer.chain
        assert chain is not None
        assert chain.head.peer == self.peer
        receipt = Receipt(
            job=offer.job,
            cargo=offer.cargo,
            consumer=self.net.gateway,
            prompt_hash=b"",
            output_hash=token_hash([100 + n for n in range(LENGTH)]),
            prompt_tokens=PROMPT,
            completion_tokens=LENGTH,
            first=len(offer.resume),
            seed=3,
            started_unix_ns=unix_now(),
            finished_unix_ns=unix_now(),
            stages=tuple(
                StageShare((n == 1 and stand_in) or s.holder.peer, s.first, s.last)
                for n, s in enumerate(chain.stages)
            ),
        )
        works = [self.net.signed(offer, n) for n in range(len(chain.stages))]
        if stand_in is not None:
            works[1] = msgspec.structs.replace(works[1], failed=True, reason="silent", receipt=None)
            works.append(self.net.signed(offer, 1, stand_in))
        usage = Usage(PROMPT, LENGTH, LENGTH - len(offer.resume))
        envelope = self.identity.signer.seal(
            RECEIPT_KIND, receipt, sequence=1, expires_unix_ns=UnixNs(unix_now() + SECOND_NS * 60)
        )
        await messages.send(JobDone("length", "", usage, envelope, tuple(works)))


class Net:
    def __init__(self, mesh: Mesh, host: Host, stack: AsyncExitStack, seen: list[WorkSeen[PeerId]]) -> None:
        self.mesh = mesh
        self.host = host
        self.gateway = host.peer
        self.manifest = manifest_of()
        self.islands: dict[PeerId, Island] = {}
        self.seen = seen
        self._stack = stack

    async def island(self) -> Island:
        identity = new_identity()
        host = await self._stack.enter_async_context(open_host(identity))
        hello = Hello("island", "0", (ROLE_ISLAND,))
        peers = await self._stack.enter_async_context(open_peers(host, hello=hello, dice=Dice(1)))
        peers.keep(self.host.addresses[0])
        await until(peers.up)
        island = self.islands[host.peer] = Island(identity, host, peers, self)
        island.advertise()
        return island

    async def chain(self, count: int = 3) -> list[Island]:
        """So many Islands; the chain's stages in order, once it is complete. The rest are spares."""
        for _ in range(count):
            await self.island()
        digest = self.manifest.digest
        await until(lambda: self.mesh.chains.book.ready_tps(digest) is not None)
        await until(lambda: all(island.range[1] for island in self.islands.values()))
        layout = self.mesh.chains.book.layout(digest)
        assert layout is not None
        return [self.islands[peer] for peer, *_ in layout.stages]

    def signed(self, offer: JobOffer, index: int, peer: PeerId | None = None) -> StageWork:
        assert offer.chain is not None
        stage = offer.chain.stages[index]
        receipt = StageReceipt(
            session=offer.job,
            cargo=offer.cargo,
            consumer=self.gateway,
            index=index,
            first=stage.first,
            last=stage.last,
            rows=PROMPT + LENGTH,
            kept=PROMPT + LENGTH,
            compute_ns=1000,
            started_unix_ns=unix_now(),
            finished_unix_ns=unix_now(),
        )
        peer = peer or PeerId(stage.holder.peer)
        signer = self.islands[peer].identity.signer
        envelope = signer.seal(
            STAGE_RECEIPT_KIND, receipt, sequence=1, expires_unix_ns=UnixNs(unix_now() + 60 * SECOND_NS)
        )
        return StageWork(peer, index, stage.first, stage.last, 1000, receipt=envelope)

    async def job(self) -> list[JobEvent]:
        model = self.mesh.model("large")
        assert model is not None
        asked = Generation(TextPrompt("hi there"), Sampling(seed=3), max_tokens=LENGTH)
        with trio.fail_after(60):
            async with self.mesh.run(model, asked) as job:
                return [event async for event in job]

    def karma(self) -> dict[PeerId, tuple[int, int]]:
        """(units, failures) by Island."""
        sums: dict[PeerId, tuple[int, int]] = {}
        for seen in self.seen:
            units, failures = sums.get(seen.peer, (0, 0))
            sums[seen.peer] = (units + seen.work_units, failures + seen.failures + seen.timeouts)
        return sums


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    @asynccontextmanager
    async def make(policy: SupervisionPolicy = POLICY) -> AsyncGenerator[Net]:
        async with AsyncExitStack() as stack:
            identity = new_identity()
            host = await stack.enter_async_context(open_host(identity))
            hello = Hello("gateway", "0", (ROLE_COORDINATOR,))
            peers = await stack.enter_async_context(open_peers(host, hello=hello, dice=Dice(2)))
            overlay = await stack.enter_async_context(
                open_overlay(host, peers, OverlayConfig(tmp_path), identity)
            )
            port = CoordinationPort(peers)
            config = CoordinatorConfig("gateway", tmp_path)
            coordinator = await stack.enter_async_context(
                open_coordinator(host, peers, overlay, port=port, signer=identity.signer, config=config)
            )
            seen: list[WorkSeen[PeerId]] = []
            monkeypatch.setattr(coordinator, "note_work", seen.append)
            mesh = await stack.enter_async_context(
                open_mesh(
                    host,
                    peers,
                    overlay,
                    coordinator=coordinator,
                    port=port,
                    signer=identity.signer,
                    policy=policy,
                    now=monotonic_now,
                    unix_now=unix_now,
                )
            )
            async with AsyncExitStack() as islands:
                yield Net(mesh, host, islands, seen)

    return make


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(30):
        while not condition():  # noqa: ASYNC110 - there is no event
            await trio.sleep(0.005)


def ids(events: list[JobEvent]) -> list[int]:
    found: list[int] = []
    for event in events:
        if isinstance(event, Released):
            assert event.first == len(found), "a token twice, or one missing"
            found += [token.id for token in event.tokens]
    return found


WHOLE = [100 + n for n in range(LENGTH)]


async def test_islands_with_room_become_a_chain_that_answers_and_is_paid_by_the_layer(net) -> None:
    async with net() as here:
        first, middle, head = await here.chain()
        assert (first.range[0], middle.range[0], head.range) == (0, first.range[1], (middle.range[1], LAYERS))
        model = here.mesh.model("large")
        assert (model.islands, model.ready) == (3, 1)
        assert model.decode_tps > 0
        events = await here.job()
        assert ids(events) == WHOLE
        placed = next(event for event in events if isinstance(event, Placed))
        assert [(s.peer, s.first, s.last) for s in placed.stages] == [
            (island.peer, *island.range) for island in (first, middle, head)
        ]
        assert isinstance(events[-1], Completed)
        assert events[-1].stages_lost == 0
        (offer,) = head.offers
        assert all(stage.holder.addresses for stage in offer.chain.stages)
        karma = here.karma()
        assert all(karma[island.peer][0] > 0 and karma[island.peer][1] == 0 for island in (first, middle, head))
        rows = PROMPT + LENGTH
        work = [rows * (island.range[1] - island.range[0]) for island in (first, middle, head)]
        work[-1] += VOCABULARY_LAYERS * LENGTH
        total = sum(karma[island.peer][0] for island in (first, middle, head))
        for island, each in zip((first, middle, head), work, strict=True):
            assert abs(karma[island.peer][0] - total * each // sum(work)) <= 1


async def test_a_job_that_comes_while_layers_load_waits_for_them(net) -> None:
    async with net() as here:
        islands = [await here.island() for _ in range(3)]
        for island in islands:
            island.may_load = False
        async with trio.open_nursery() as nursery:
            events: list[JobEvent] = []

            async def ask() -> None:
                events.extend(await here.job())

            await until(lambda: here.mesh.model("large"))
            nursery.start_soon(ask)
            await until(lambda: all(island.range[1] for island in islands))
            await trio.sleep(POLICY.wait_ns / SECOND_NS + 1)
            assert events == [], "it is not given up while somebody loads"
            for island in islands:
                island.state = "ready"
                island.advertise()
        assert ids(events) == WHOLE
        assert any(isinstance(event, Preparing) and event.stage == "loading" for event in events)


async def test_too_little_memory_is_no_reason_to_wait_for_ever(net) -> None:
    async with net() as here:
        await here.island()
        await until(lambda: here.mesh.chains.book.shortage(here.manifest.digest))
        events = await here.job()
        assert isinstance(events[-1], Failed)
        assert events[-1].code == "no-islands"
        assert "too little memory" in events[-1].detail
        assert "1 Island offers 80 MiB" in events[-1].detail


async def test_a_head_that_dies_is_replaced_by_its_spare_in_the_same_session(net) -> None:
    async with net() as here:
        stages = await here.chain(6)
        first, middle, head = stages
        here.seen.clear()

        async def stop_after_three(messages: Any, offer: JobOffer) -> None:
            await head.tokens(messages, offer, 3)
            await head.die()

        head.script = stop_after_three
        events = await here.job()
        assert ids(events) == WHOLE
        (spare,) = [island for island in here.islands.values() if island.offers and island is not head]
        before, after = head.offers[0], spare.offers[0]
        assert (after.job, len(after.resume)) == (before.job, 3)
        assert after.chain.stages[:-1] == before.chain.stages[:-1]
        assert after.chain.stages[-1].generation == before.chain.stages[-1].generation + 1
        assert events[-1].hand_overs == 1
        karma = here.karma()
        assert karma[head.peer] == (0, 1), "the head is charged for its own stream"
        assert all(karma[island.peer][1] == 0 for island in (first, middle, spare))


@pytest.mark.parametrize("dead", [True, False])
async def test_an_accused_stage_is_charged_if_it_is_gone_and_only_then(net, *, dead: bool) -> None:
    async with net() as here:
        _, middle, head = await here.chain(6)
        here.seen.clear()

        async def accuse(messages: Any, offer: JobOffer) -> None:
            await head.tokens(messages, offer, 2)
            if dead:
                await middle.die()
                await until(lambda: middle.peer not in here.host.connected())
            accusation = StageWork(middle.peer, 1, *middle.range, failed=True, reason="silent")
            head.script = None
            await messages.send(JobError("chain-stranded", "no way on", stages=(accusation,)))

        head.script = accuse
        events = await here.job()
        assert ids(events) == WHOLE
        offers = [offer for island in here.islands.values() for offer in island.offers]
        again = next(offer for offer in offers if offer.resume)
        assert middle.peer not in {s.holder.peer for s in again.chain.stages}
        assert again.job != head.offers[0].job, "a new chain is a new session"
        if dead:
            await until(lambda: here.karma().get(middle.peer, (0, 0))[1] == 1)
        await trio.sleep(0.2)
        assert {peer for peer, (_, failures) in here.karma().items() if failures} == (
            {middle.peer} if dead else set()
        )
        if not dead:  # the link before it may have broken: the next job goes another way
            first = PeerId(head.offers[0].chain.stages[0].holder.peer)
            pairs = here.mesh.chains.pairs
            await until(lambda: pairs.is_broken(monotonic_now(), first, middle.peer))
            assert here.mesh.chains.book._rtt_of(middle.peer, first) == BROKEN_RTT_NS, (
                "what the planner is told"
            )
            assert ids(await here.job()) == WHOLE


async def test_a_stage_replaced_on_the_way_is_told_and_its_spare_earns(net) -> None:
    async with net() as here:
        _, middle, head = await here.chain(6)
        here.seen.clear()
        spares: list[PeerId] = []

        async def tell(messages: Any, offer: JobOffer) -> None:
            assert offer.chain is not None
            spares.extend(PeerId(spare.peer) for spare in offer.chain.stages[1].spares)
            await head.answer(messages, offer, spares[0])

        head.script = tell
        events = await here.job()
        assert ids(events) == WHOLE
        assert isinstance(events[-1], Completed)
        assert events[-1].stages_lost == 1
        assert events[-1].stages[1].peer == spares[0]
        karma = here.karma()
        assert karma[spares[0]][0] > 0
        assert middle.peer not in karma, "it lives, whatever the head says, but it signed nothing"


async def test_a_head_that_freezes_is_replaced_before_its_link_is_given_up(net) -> None:
    async with net() as here:
        _, _, head = await here.chain(6)
        here.seen.clear()

        async def freeze(messages: Any, offer: JobOffer) -> None:
            await head.tokens(messages, offer, 3)
            head.freeze()
            await trio.sleep_forever()

        head.script = freeze
        events = await here.job()
        assert ids(events) == WHOLE
        assert events[-1].hand_overs == 1
        assert head.peer in here.host.connected()
        (again,) = [offer for island in here.islands.values() for offer in island.offers if offer.resume]
        assert again.job == head.offers[0].job


async def test_a_head_that_thinks_for_long_is_left_alone(net) -> None:
    async with net() as here:
        _, _, head = await here.chain(6)

        async def think(messages: Any, offer: JobOffer) -> None:
            await head.tokens(messages, offer, 3)
            await trio.sleep(2.5)
            await messages.send(JobTokens(3, tuple(Token(100 + n, f" {n}") for n in range(3, LENGTH))))
            await head.finish(messages, offer)

        head.script = think
        events = await here.job()
        assert ids(events) == WHOLE
        assert events[-1].hand_overs == 0


async def test_layers_of_an_island_that_went_are_ordered_from_the_next_one_that_comes(net) -> None:
    async with net() as here:
        _, middle, _ = await here.chain()
        missing = middle.range
        await middle.die()
        digest = here.manifest.digest
        await until(lambda: here.mesh.chains.book.ready_tps(digest) is None)
        newcomer = await here.island()
        await until(lambda: newcomer.range == missing or (middle.range == missing and newcomer.range[1]))
        await until(lambda: here.mesh.chains.book.ready_tps(digest) is not None)
        assert ids(await here.job()) == WHOLE


async def test_an_island_that_refuses_is_worked_around(net) -> None:
    async with net() as here:
        islands = [await here.island() for _ in range(4)]
        islands[0].obeys = False
        await until(lambda: here.mesh.chains.book.ready_tps(here.manifest.digest) is not None)
        assert ids(await here.job()) == WHOLE
        assert not islands[0].offers
