"""The mesh over real connections: a gateway's Mesh, and Islands whose engines are scripts, in one process."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from gateway.mesh import READY_STREAMS, Mesh, open_mesh
from gateway.mesh_job import MeshJob
from gateway.service import Completed, Failed, JobEvent, Placed, Preparing, Released
from node.coordination.coordinator import CoordinatorConfig, CoordinatorService, open_coordinator
from node.coordination.gossip import ROLE_COORDINATOR
from node.coordination.port import CoordinationPort
from node.identity import Identity, new_identity
from node.island import ROLE_ISLAND, monotonic_now, unix_now
from node.jobs import JobService
from node.overlay.overlay import OverlayConfig, open_overlay
from node.p2p import Host, open_host
from node.peers import Peers, open_peers
from node.streams import MessageStream
from protocol.adverts import ADVERT_KIND, Hello, IslandAdvert, OfferedCargo
from protocol.coordination import COORDINATION, METHOD_COORDINATION, AdvertPut, AdvertTaken, Declined
from protocol.dice import Dice
from protocol.ids import CargoDigest
from protocol.instants import MILLISECOND_NS, SECOND_NS, UnixNs
from protocol.jobs import (
    FROM_ISLAND,
    JOB_PROTOCOL,
    TO_ISLAND,
    FromIsland,
    JobAccept,
    JobError,
    JobOffer,
    JobProgress,
    JobReject,
    JobTokens,
    ToIsland,
    Token,
)
from protocol.limits import MAX_OFFER_BYTES
from protocol.work import Generation, Sampling, TextPrompt
from routing.coordinator_events import CoordinatorPolicy
from routing.job_events import SupervisionPolicy

CARGO = CargoDigest("sha256:" + "c" * 64)
POLICY = SupervisionPolicy(
    window=16, wait_ns=20 * SECOND_NS, accept_ns=20 * SECOND_NS, stall_floor_ns=20 * SECOND_NS
)
IslandEnd = MessageStream[FromIsland, ToIsland]
Liar = Callable[[IslandEnd, JobOffer], Awaitable[None]]


def offered(**changes: Any) -> OfferedCargo:
    base = OfferedCargo(CARGO, "m", "1", "scripted", "ready", 4096, 100, 0, 0, 50.0, 500.0, "us")
    return msgspec.structs.replace(base, **changes)


def work(count: int | None = 40, text: str = "hi") -> Generation:
    return Generation(TextPrompt(text), Sampling(seed=3), max_tokens=count)


class NotTaken(Exception):
    """The coordinator declined an advert; the argument is its code."""


class Island:
    """A peer that advertises by hand. Its jobs go to a JobService over `runtime`, or to a liar."""

    def __init__(self, identity: Identity, host: Host, peers: Peers, gateway: Host, runtime: Any) -> None:
        self.identity = identity
        self.host = host
        self.peers = peers
        self.gateway = gateway
        self.runtime = runtime
        self.sequence = unix_now()
        self.calls = 0
        self.answers: dict[int, AdvertTaken | Declined] = {}
        peers.serve_notice(METHOD_COORDINATION, COORDINATION, self._answered)
        self.service = JobService(
            signer=identity.signer,
            runtimes={CARGO: runtime},
            queue=4,
            unix_now=unix_now,
            changed=lambda: None,
        )

    def lie(self, liar: Liar) -> None:
        async def handle(stream: Any) -> None:
            messages: IslandEnd = MessageStream(stream, FROM_ISLAND, TO_ISLAND)
            offer = await messages.receive()
            if isinstance(offer, JobOffer):
                await liar(messages, offer)

        self.host.handle(JOB_PROTOCOL, handle)

    async def advertise(
        self, *cargos: OfferedCargo, signer: Any = None, ttl_ns: int = 10 * SECOND_NS, **changes: Any
    ) -> None:
        """The next advert. Raises NotTaken if the gateway declines it."""
        self.sequence += 1
        advert = IslandAdvert(self.host.peer[-4:], cargos or (offered(),))
        envelope = (signer or self.identity.signer).seal(
            ADVERT_KIND,
            msgspec.structs.replace(advert, **changes),
            sequence=self.sequence,
            expires_unix_ns=UnixNs(unix_now() + ttl_ns),
        )
        await self.say(envelope)

    async def say(self, envelope: Any) -> None:
        self.calls += 1
        call = self.calls
        self.peers.notify(self.gateway.peer, METHOD_COORDINATION, AdvertPut(call, envelope))
        await until(lambda: call in self.answers)
        answer = self.answers[call]
        if isinstance(answer, Declined):
            raise NotTaken(answer.code)

    def _answered(self, _: object, message: object) -> None:
        if isinstance(message, AdvertTaken | Declined):
            self.answers[message.call] = message

    async def die(self) -> None:
        await self.host.disconnect(self.gateway.peer, "the test pulled the cable")


class World:
    """A gateway and the means to add Islands."""

    def __init__(
        self,
        mesh: Mesh,
        host: Host,
        coordinator: CoordinatorService,
        stack: AsyncExitStack,
        runtime: Callable[..., Any],
    ) -> None:
        self.mesh = mesh
        self.coordinator = coordinator
        self.host = host
        self._stack = stack
        self._runtime = runtime

    async def island(self, runtime: Any = None, *, liar: Liar | None = None, advertise: Any = True) -> Island:
        identity = new_identity()
        host = await self._stack.enter_async_context(open_host(identity))
        hello = Hello("island", "0", (ROLE_ISLAND,))
        peers = await self._stack.enter_async_context(open_peers(host, hello=hello, dice=Dice(1)))
        up = trio.Event()
        peers.subscribe(lambda _: up.set())
        peers.keep(self.host.addresses[0])
        with trio.fail_after(30):
            await up.wait()
        island = Island(identity, host, peers, self.host, runtime or self._runtime())
        if liar is None:
            host.handle(JOB_PROTOCOL, island.service.handle)
        else:
            island.lie(liar)
        if advertise:
            await island.advertise()
        return island

    @asynccontextmanager
    async def job(self, asked: Generation | None = None) -> AsyncGenerator[MeshJob]:
        model = self.mesh.model("m")
        assert model is not None
        with trio.fail_after(60):
            async with self.mesh.run(model, asked or work()) as job:
                yield job

    async def whole(self, asked: Generation | None = None) -> list[JobEvent]:
        async with self.job(asked) as job:
            return [event async for event in job]


@pytest.fixture
def world(scripted_runtime: Callable[..., Any], tmp_path: Path):
    @asynccontextmanager
    async def make(
        policy: SupervisionPolicy = POLICY, island_ttl_ns: int = 300 * SECOND_NS
    ) -> AsyncGenerator[World]:
        async with AsyncExitStack() as stack:
            identity = new_identity()
            host = await stack.enter_async_context(open_host(identity))
            hello = Hello("gateway", "0", (ROLE_COORDINATOR,))
            peers = await stack.enter_async_context(open_peers(host, hello=hello, dice=Dice(2)))
            overlay = await stack.enter_async_context(
                open_overlay(host, peers, OverlayConfig(tmp_path), identity)
            )
            port = CoordinationPort(peers)
            coordination = CoordinatorPolicy(island_ttl_ns=island_ttl_ns)
            config = CoordinatorConfig("gateway", tmp_path, policy=coordination)
            coordinator = await stack.enter_async_context(
                open_coordinator(host, peers, overlay, port=port, signer=identity.signer, config=config)
            )
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
                yield World(mesh, host, coordinator, islands, scripted_runtime)

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


async def test_a_job_is_placed_and_told_from_begin_to_end(world, ids_of) -> None:
    async with world() as here:
        island = await here.island()
        events = await here.whole()
        assert isinstance(events[0], Placed)
        assert (events[0].peer, events[0].hand_over) == (island.host.peer, 0)
        assert ids(events) == ids_of(40)
        done = events[-1]
        assert isinstance(done, Completed)
        assert (done.finish, done.hand_overs, done.usage.completion_tokens) == ("length", 0, 40)
        await until(lambda: island.service.jobs == {})
        known = here.mesh.book.get(island.host.peer)
        assert known is not None
        await until(lambda: known.experience.reserved == 0)
        assert known.experience.suspect_until == 0


@pytest.mark.parametrize("at", [0, 1, 17, 39])
async def test_an_island_that_leaves_in_mid_stream_costs_no_token(
    world, scripted_runtime, ids_of, at: int
) -> None:
    async with world() as here:
        first, second = await here.island(scripted_runtime(may_reach=at)), await here.island(advertise=False)
        async with here.job() as job:
            events: list[JobEvent] = []

            async def read() -> None:
                async for event in job:
                    events.append(event)  # noqa: PERF401 - each is looked at as it comes

            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                await until(lambda: first.runtime.sessions and len(ids(events)) == at)
                await second.advertise()
                await first.die()
        assert ids(events) == ids_of(40)
        assert second.runtime.sessions[0].resume == tuple(ids_of(at))
        done = events[-1]
        assert isinstance(done, Completed)
        assert done.hand_overs == 1
        placed = [event for event in events if isinstance(event, Placed)]
        assert placed[-1].peer == second.host.peer
        assert placed[-1].queue_ns < 10 * SECOND_NS
        with trio.fail_after(30):
            await first.runtime.sessions[0].ended.wait()


async def test_one_that_died_is_suspect_when_it_comes_back(world, scripted_runtime) -> None:
    async with world() as here:
        first = await here.island(scripted_runtime(may_reach=2))
        async with here.job() as job:
            events = aiter(job)
            await anext(events)
            await first.die()
            await until(lambda: first.host.peer not in here.host.connected())
            await until(first.peers.up)
            await first.advertise()
            known = here.mesh.book.get(first.host.peer)
            assert known is not None
            await until(lambda: known.experience.suspect_until > monotonic_now())
            await events.aclose()


async def say_twice(stream: IslandEnd, _: JobOffer) -> None:
    await stream.send(JobAccept())
    for _i in range(2):
        await stream.send(JobTokens(0, (Token(1, "x"),)))


async def flood(stream: IslandEnd, _: JobOffer) -> None:
    await stream.send(JobAccept())
    while True:
        await stream.send(JobProgress("prompt", 1, 2))


async def ahead_of_grants(stream: IslandEnd, _: JobOffer) -> None:
    await stream.send(JobAccept(ahead=1_000_000))
    await stream.send(JobTokens(0, tuple(Token(1, "x" * 1000) for _ in range(200))))


async def refuse_all(stream: IslandEnd, _: JobOffer) -> None:
    await stream.send(JobReject("too-long", "no"))
    await stream.receive()


async def error_out(stream: IslandEnd, _: JobOffer) -> None:
    await stream.send(JobAccept())
    await stream.send(JobError("invalid", "no", retryable=False))
    await stream.receive()


async def hang_up(stream: IslandEnd, _: JobOffer) -> None:
    await stream.send(JobAccept())
    await stream.aclose()


async def break_off(stream: IslandEnd, _: JobOffer) -> None:
    stream.reset()


@pytest.mark.parametrize("liar", [say_twice, flood, ahead_of_grants, refuse_all, error_out, hang_up, break_off])
async def test_a_liar_delays_a_job_and_is_suspected(world, ids_of, liar: Liar) -> None:
    async with world() as here:
        bad = await here.island(liar=liar, advertise=False)
        await bad.advertise(offered(decode_tps=1e9, prefill_tps=1e9))
        good = await here.island()
        events = await here.whole()
        got = ids(events)
        assert got[-39:] == ids_of(40)[-39:]
        assert isinstance(events[-1], Completed)
        assert len(good.runtime.sessions) == 1
        known = here.mesh.book.get(bad.host.peer)
        assert known is not None
        assert known.experience.suspect_until > 0
        assert known.experience.reserved == 0


async def test_a_slow_consumer_pauses_the_island(world, ids_of) -> None:
    async with world() as here:
        island = await here.island()
        async with here.job(work(200)) as job:
            events = aiter(job)
            seen = [await anext(events)]
            (session,) = island.runtime.sessions
            await until(lambda: session.next == POLICY.window)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert session.next == POLICY.window
            seen += [event async for event in events]
        assert ids(seen) == ids_of(200)


@pytest.mark.parametrize("moment", ["offered", "placed", "token", "paused"])
async def test_leaving_ends_the_session_on_the_island(world, scripted_runtime, moment: str) -> None:
    async with world() as here:
        reach = {"offered": 0, "placed": 1, "token": 3, "paused": 1000}[moment]
        island = await here.island(scripted_runtime(may_reach=reach, preparations=1))
        async with here.job(work(500)) as job:
            if moment != "offered":
                events = aiter(job)
                async for event in events:
                    if isinstance(event, Placed if moment == "placed" else Released):
                        break
                await events.aclose()
            await until(lambda: island.runtime.sessions)
            if moment == "paused":
                await until(lambda: island.runtime.sessions[0].next == POLICY.window)
        with trio.fail_after(30):
            await island.runtime.sessions[0].ended.wait()
        await until(lambda: not island.service.jobs)
        known = here.mesh.book.get(island.host.peer)
        assert known is not None
        await until(lambda: known.experience.reserved == 0)
        assert known.experience.suspect_until == 0


async def test_leaving_at_once_leaves_nothing(world) -> None:
    async with world() as here:
        island = await here.island()
        for _ in range(5):
            async with here.job():
                pass
        await until(lambda: not island.service.jobs)
        assert len(ids(await here.whole())) == 40


async def test_a_job_waits_for_an_island_and_wakes_when_one_comes(world, ids_of) -> None:
    async with world() as here:
        first, second = await here.island(), await here.island(advertise=False)
        model = here.mesh.model("m")
        await first.die()
        await until(lambda: len(here.mesh.book) == 0)
        with trio.fail_after(60):
            async with here.mesh.run(model, work()) as job:
                events = aiter(job)
                assert await anext(events) == Preparing("waiting", 0, 0)
                await second.advertise()
                rest = [event async for event in events]
        assert ids(rest) == ids_of(40)
        assert len(second.runtime.sessions) == 1


async def test_a_model_is_known_for_a_while_after_its_last_island(world) -> None:
    """So that a job for it waits, and then fails for want of Islands, not because nobody heard of it."""
    async with world() as here:
        first = await here.island()
        known = here.mesh.model("m")
        await first.die()
        await until(lambda: len(here.mesh.book) == 0)
        gone = here.mesh.model("m")
        assert (gone.digest, gone.islands, gone.ready) == (known.digest, 0, 0)
        assert here.mesh.model(known.digest) == gone
        assert here.mesh.models() == ()
        assert here.mesh.model("never seen") is None


async def test_nobody_comes(world) -> None:
    async with world(SupervisionPolicy(wait_ns=50 * MILLISECOND_NS)) as here:
        first = await here.island()
        model = here.mesh.model("m")
        await first.die()
        await until(lambda: len(here.mesh.book) == 0)
        with trio.fail_after(30):
            async with here.mesh.run(model, work()) as job:
                events = [event async for event in job]
        assert isinstance(events[-1], Failed)
        assert events[-1].code == "no-islands"


async def test_adverts_that_are_refused(world) -> None:
    async with world() as here:
        island = await here.island(advertise=False)
        other = await here.island(advertise=False)
        for lie in (
            lambda: island.advertise(signer=other.identity.signer),
            lambda: island.advertise(ttl_ns=-60 * SECOND_NS),
            lambda: island.advertise(offered(), offered(name="again")),
            lambda: island.advertise(offered(digest="x" * 71)),
            lambda: island.advertise(offered(decode_tps=float("nan"))),
            lambda: island.advertise(offered(prefill_tps=-1.0)),
        ):
            with pytest.raises(NotTaken, match="invalid"):
                await lie()
        assert len(here.mesh.book) == 0
        await island.advertise(name="new")
        island.sequence -= 2
        await island.advertise(name="replayed")
        known = here.mesh.book.get(island.host.peer)
        assert known is not None
        assert known.advert.name == "new"


async def test_a_flood_of_adverts_is_turned_away(world) -> None:
    async with world() as here:
        island = await here.island()

        async def flood_with_adverts() -> None:
            for _ in range(200):
                await island.advertise()

        with pytest.raises(NotTaken, match="too-fast"):
            await flood_with_adverts()
        await trio.sleep(0.5)
        await island.advertise(name="later")
        known = here.mesh.book.get(island.host.peer)
        assert known is not None
        assert known.advert.name == "later"


async def test_absurd_rates_stop_no_job(world) -> None:
    async with world() as here:
        absurd = await here.island(advertise=False)
        await absurd.advertise(offered(decode_tps=5e-324, prefill_tps=5e-324))
        await here.island()
        assert isinstance((await here.whole())[-1], Completed)


async def test_one_island_renames_no_model(world) -> None:
    async with world() as here:
        await here.island()
        await here.island()
        liar = await here.island(advertise=False)
        await liar.advertise(offered(name="evil", context_length=0))
        model = here.mesh.model("m")
        assert model is not None
        assert (model.islands, model.context_length) == (3, 4096)
        assert here.mesh.model("evil") is None


async def test_on_a_tie_a_model_keeps_its_name(world) -> None:
    async with world() as here:
        honest = await here.island()
        assert here.mesh.model("m") is not None
        liar = await here.island(advertise=False)
        await liar.advertise(offered(name="evil"))
        await honest.advertise()  # now the liar is the one heard of longest ago
        assert here.mesh.model("m") is not None


def ready_streams(here: World, island: Island) -> int:
    return len(here.mesh._ready.get(island.host.peer, ()))  # noqa: SLF001 - nothing outside shows them


async def test_streams_are_kept_ready_refilled_and_never_too_many(world) -> None:
    async with world() as here:
        island = await here.island()
        await until(lambda: ready_streams(here, island) == READY_STREAMS)
        opened = here.host.counters.streams_opened
        async with trio.open_nursery() as nursery:
            for _ in range(50):
                nursery.start_soon(here.whole)
        await until(lambda: ready_streams(here, island) == READY_STREAMS)
        await trio.testing.wait_all_tasks_blocked(0.1)
        assert ready_streams(here, island) == READY_STREAMS
        assert here.host.counters.streams_opened - opened <= 50 + READY_STREAMS
        await island.die()
        await until(lambda: not ready_streams(here, island))


async def test_a_ready_stream_that_broke_is_not_the_islands_fault(world, ids_of) -> None:
    async with world() as here:
        island = await here.island()
        await until(lambda: ready_streams(here, island) == READY_STREAMS)
        for stream in here.mesh._ready[island.host.peer]:  # noqa: SLF001
            stream.reset()
        assert ids(await here.whole()) == ids_of(40)
        known = here.mesh.book.get(island.host.peer)
        assert known is not None
        assert known.experience.suspect_until == 0


async def test_silent_islands_lose_their_streams(world) -> None:
    async with world(island_ttl_ns=2 * SECOND_NS) as here:
        island = await here.island()
        await until(lambda: ready_streams(here, island) == READY_STREAMS)
        await until(lambda: len(here.mesh.book) == 0)
        await until(lambda: not ready_streams(here, island))
        await until(lambda: island.host.inbound_streams <= 1)  # the kept link's


async def test_speed_is_measured_here(world, scripted_runtime) -> None:
    """An Island's own figures say 0 ns; the book learns what the gateway saw."""
    async with world() as here:
        runtime = scripted_runtime(may_reach=1)
        island = await here.island(runtime)

        async def drip() -> None:
            for reach in range(2, 41):
                await trio.sleep(0.005)
                runtime.proceed(reach)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(drip)
            await here.whole()
        known = here.mesh.book.get(island.host.peer)
        assert known is not None
        assert 0 < known.experience.decode_tps[CARGO] < 250


async def test_two_readers_of_one_job_both_end(world) -> None:
    async with world() as here:
        await here.island()
        counts: list[int] = []

        async def read(job: MeshJob) -> None:
            counts.append(len([event async for event in job]))

        async with here.job() as job, trio.open_nursery() as nursery:
            nursery.start_soon(read, job)
            nursery.start_soon(read, job)
        assert len(counts) == 2


async def test_a_request_too_large_for_the_wire_is_the_consumers_to_mend(world) -> None:
    async with world() as here:
        await here.island()
        events = await here.whole(work(5, "x" * (MAX_OFFER_BYTES + 200_000)))
        assert events[-1] == Failed("too-long", "the request is larger than a job can be")


async def test_a_gateway_that_was_stopped_blames_nobody(world, scripted_runtime, ids_of) -> None:
    """What an Island sent meanwhile waits in the socket when all timers are overdue at once."""
    policy = SupervisionPolicy(window=16, stall_ns=SECOND_NS // 4, stall_floor_ns=SECOND_NS // 4)
    async with world(policy) as here:
        island = await here.island(scripted_runtime(may_reach=5))
        async with here.job() as job:
            events = aiter(job)
            seen: list[JobEvent] = []
            while len(ids(seen)) < 5:
                seen.append(await anext(events))
            time.sleep(1)  # noqa: ASYNC251 - that is the point: this process does nothing
            island.runtime.proceed()
            seen += [event async for event in events]
        assert ids(seen) == ids_of(40)
        done = seen[-1]
        assert isinstance(done, Completed)
        assert done.hand_overs == 0


async def test_the_end_of_the_gateway_ends_jobs_on_islands(world, scripted_runtime) -> None:
    async with world() as here:
        island = await here.island(scripted_runtime(may_reach=3))

        async with trio.open_nursery() as nursery:

            async def consume() -> None:
                async with here.job() as job:
                    async for _ in job:
                        pass

            nursery.start_soon(consume)
            await until(lambda: island.runtime.sessions and island.runtime.sessions[0].next == 3)
            nursery.cancel_scope.cancel()
        with trio.fail_after(30):
            await island.runtime.sessions[0].ended.wait()
