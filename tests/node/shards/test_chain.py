"""Jobs on chains, from the offer to the receipt: nodes over real connections, engines of arithmetic."""

from __future__ import annotations

import msgspec
import trio

from node.streams import MessageStream
from protocol.codec import excerpt
from protocol.envelope import open_untrusted
from protocol.instants import UnixNs
from protocol.jobs import RECEIPT, RECEIPT_KIND, JobDone, JobError, JobReject
from protocol.ring import (
    FROM_STAGE,
    RING_PROTOCOL,
    STAGE_RECEIPT,
    STAGE_RECEIPT_KIND,
    TO_STAGE,
    RingFault,
    RingFeed,
    RingOpen,
    StagePeer,
)

CARGO = "sha256:" + "c" * 64


async def test_a_chain_answers_like_the_whole_and_all_stages_sign(toys, answer) -> None:
    a, b, c = await toys.nodes((0, 4), (4, 9), (9, 12))
    stream = await toys.offer(toys.chain_of([a, b, c]), 20)
    ids, done = await toys.tokens(stream)
    assert ids == answer(20, 12)
    assert isinstance(done, JobDone)
    assert [(work.peer, work.index, work.first, work.last, work.failed) for work in done.stages] == [
        (a.host.peer, 0, 0, 4, False),
        (b.host.peer, 1, 4, 9, False),
        (c.host.peer, 2, 9, 12, False),
    ]
    for work in done.stages:
        opened = open_untrusted(work.receipt, STAGE_RECEIPT_KIND, STAGE_RECEIPT, UnixNs(0))
        assert opened.issuer == work.peer
        assert opened.body.consumer == toys.gateway.peer
        assert opened.body.kept >= 80 + 19
    receipt = open_untrusted(done.receipt, RECEIPT_KIND, RECEIPT, UnixNs(0)).body
    assert [(share.peer, share.first, share.last) for share in receipt.stages] == [
        (a.host.peer, 0, 4),
        (b.host.peer, 4, 9),
        (c.host.peer, 9, 12),
    ]


async def test_sessions_share_the_chain(toys, answer) -> None:
    nodes = await toys.nodes((0, 6), (6, 12))
    chain = toys.chain_of(nodes)
    streams = [await toys.offer(chain, 10 + n, str(n) * 32) for n in range(4)]
    for n, stream in enumerate(streams):
        ids, _ = await toys.tokens(stream)
        assert ids == answer(10 + n, 12)
    fifth = [await toys.offer(chain, 300, f"{n}a" * 16) for n in range(5)]  # four slots
    outcomes = [await toys.tokens(stream, until=1) for stream in fifth]
    rejected = [message for _, message in outcomes if isinstance(message, JobReject)]
    assert [message.code for message in rejected] == ["busy"]


async def test_a_stage_that_is_killed_in_mid_token_is_replaced(toys, answer) -> None:
    a, b, c = await toys.nodes((0, 4), (4, 9), (9, 12))
    spare = await toys.node(4, 9)
    for node in (a, b, c):
        node.stage.pace_s = 0.002
    stream = await toys.offer(toys.chain_of([a, b, c], {1: [spare]}), 60)
    first, _ = await toys.tokens(stream, until=20)
    b.kill()
    rest, done = await toys.tokens(stream)  # patient, but not for as long as an engine may hang
    assert first + rest == answer(60, 12)
    assert isinstance(done, JobDone)
    assert {(work.peer, work.failed) for work in done.stages if work.index == 1} == {
        (b.host.peer, True),
        (spare.host.peer, False),
    }
    assert c.stage.rows < 80 + 60 + 20  # it kept its memory


async def test_two_stages_killed_at_once_and_the_first_among_them(toys, answer) -> None:
    a, b, c = await toys.nodes((0, 4), (4, 9), (9, 12))
    spares = await toys.nodes((0, 4), (4, 9))
    for node in (a, b, c):
        node.stage.pace_s = 0.002
    stream = await toys.offer(toys.chain_of([a, b, c], {0: spares[:1], 1: spares[1:]}), 60)
    first, _ = await toys.tokens(stream, until=20)
    a.kill()
    b.kill()
    rest, done = await toys.tokens(stream)
    assert first + rest == answer(60, 12)
    assert {work.peer for work in done.stages if work.failed} == {a.host.peer, b.host.peer}


async def test_an_engine_that_dies_costs_a_pause(toys, answer) -> None:
    nodes = await toys.nodes((0, 4), (4, 9), (9, 12))
    for node in nodes:
        node.stage.pace_s = 0.002
    stream = await toys.offer(toys.chain_of(nodes), 50)
    ids: list[int] = []
    for node in nodes:
        ids += (await toys.tokens(stream, until=8))[0]
        node.stage.crash()
    rest, done = await toys.tokens(stream)
    assert ids + rest == answer(50, 12)
    assert isinstance(done, JobDone)


async def test_without_a_spare_the_job_fails_and_says_whose_fault_it_was(toys, until) -> None:
    a, b, c = await toys.nodes((0, 4), (4, 9), (9, 12))
    for node in (a, b, c):
        node.stage.pace_s = 0.002
    stream = await toys.offer(toys.chain_of([a, b, c]), 500)
    await toys.tokens(stream, until=5)
    b.kill()
    _, error = await toys.tokens(stream)
    assert isinstance(error, JobError)
    assert error.retryable
    assert error.code.startswith("chain-")
    assert [(work.peer, work.failed) for work in error.stages] == [(b.host.peer, True)]
    await until(lambda: not a.stage.memories and not c.stage.memories and not c.ring.is_known("1" * 32))


async def test_another_head_goes_on_where_the_first_died(toys, answer) -> None:
    a, b, c = await toys.nodes((0, 4), (4, 9), (9, 12))
    spare = await toys.node(9, 12)
    for node in (a, b, c, spare):
        node.stage.pace_s = 0.002
    stream = await toys.offer(toys.chain_of([a, b, c]), 60)
    first, _ = await toys.tokens(stream, until=20)
    c.kill()
    chain = toys.chain_of([a, b, spare])
    stages = tuple(msgspec.structs.replace(stage, generation=1) for stage in chain.stages)
    rows = a.stage.rows, b.stage.rows
    stream = await toys.offer(msgspec.structs.replace(chain, stages=stages), 60, resume=tuple(first))
    rest, done = await toys.tokens(stream)
    assert first + rest == answer(60, 12)
    assert isinstance(done, JobDone)
    # Nothing was computed again before the new head.
    assert a.stage.rows - rows[0] < 60
    assert b.stage.rows - rows[1] < 60


async def test_who_leaves_frees_all_stages(toys, until) -> None:
    nodes = await toys.nodes((0, 6), (6, 12))
    for node in nodes:
        node.stage.pace_s = 0.002
    stream = await toys.offer(toys.chain_of(nodes), 4000)
    await toys.tokens(stream, until=5)
    assert all(node.stage.memories for node in nodes)
    stream.reset()
    await until(lambda: not any(node.stage.memories for node in nodes))
    await until(lambda: not any(node.ring.sessions_of(CARGO) for node in nodes))


async def test_offers_that_do_not_fit_are_refused(toys) -> None:
    a, b, c = await toys.nodes((0, 4), (4, 9), (9, 12))
    chain = toys.chain_of([a, b, c])
    swapped = msgspec.structs.replace(chain, stages=(chain.stages[0], chain.stages[2]))
    wrong = toys.chain_of([a, c])
    other = msgspec.structs.replace(
        chain, stages=(*chain.stages[:2], msgspec.structs.replace(chain.stages[2], last=13))
    )
    for number, (offered, to) in enumerate([(chain, b), (swapped, c), (wrong, c), (other, c), (None, c)]):
        stream = await toys.offer(offered, 5, str(number) * 32, to=to)
        _, message = await toys.tokens(stream)
        assert isinstance(message, JobReject)
        assert message.code == "unknown-cargo", excerpt(message.detail)


async def test_strangers_take_no_more_than_their_share(toys, until, answer) -> None:
    """Sessions without end, rows without sense: the stage stays bounded and goes on serving others."""
    a, b = await toys.nodes((0, 6), (6, 12))
    chain = toys.chain_of([a, b])
    raw = await toys.gateway.open_bulk_stream(a.host.peer, RING_PROTOCOL, a.host.addresses)
    stream = MessageStream(raw, TO_STAGE, FROM_STAGE)
    faults = 0

    async def count() -> None:
        nonlocal faults
        async for message in stream:
            faults += isinstance(message, RingFault)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(count)
        for number in range(300):
            name = f"{number:032}"
            await stream.send(RingOpen(name, chain, 0, 0, 5, "me"))
            await stream.send(RingFeed(name, 4_000, 2, bytes(8)))
            await stream.send(RingFeed(name, 0, 4, bytes(3)))
        await until(lambda: faults >= 200)
        assert len(a.stage.memories) <= a.stage.slots
        assert a.ring._waiting_bytes < 1 << 20  # noqa: SLF001
        nursery.cancel_scope.cancel()
    raw.reset()
    job = await toys.offer(chain, 5, "9" * 32)
    with trio.fail_after(90):  # three times as long as an orphan is kept
        while True:
            ids, message = await toys.tokens(job)
            if isinstance(message, JobDone):
                break
            await trio.sleep(1)  # orphans keep their slots for a while
            job = await toys.offer(chain, 5, "9" * 32)
    assert ids == answer(5, 12)


async def test_links_that_break_are_made_anew(toys, answer) -> None:
    nodes = await toys.nodes((0, 4), (4, 9), (9, 12))
    for node in nodes:
        node.stage.pace_s = 0.002
    stream = await toys.offer(toys.chain_of(nodes), 60)
    ids: list[int] = []
    for node in nodes:
        ids += (await toys.tokens(stream, until=8))[0]
        for connection in node.host._bulk.all:  # noqa: SLF001
            connection.abort("cut")
    rest, done = await toys.tokens(stream)
    assert ids + rest == answer(60, 12)
    assert isinstance(done, JobDone)
    assert [
        share.peer for share in open_untrusted(done.receipt, RECEIPT_KIND, RECEIPT, UnixNs(0)).body.stages
    ] == [node.host.peer for node in nodes]


async def test_a_slow_line_is_no_dead_stage(toys, answer) -> None:
    """The prompt's rows take seconds to the next stage, longer than a stage may be silent."""
    a, b, c = await toys.nodes((0, 4), (4, 9), (9, 12))
    a.stage.width = b.stage.wide = 24_000  # the prompt: 1.9 MB
    b.ring.hold(CARGO, 4, 9, b.stage)
    chain = toys.chain_of([a, b, c])
    slow = StagePeer(b.host.peer, await toys.slowly(b, 600_000))
    stages = (chain.stages[0], msgspec.structs.replace(chain.stages[1], holder=slow), chain.stages[2])
    started = trio.current_time()
    stream = await toys.offer(msgspec.structs.replace(chain, stages=stages), 4)
    ids, done = await toys.tokens(stream)
    assert trio.current_time() - started > 2.5
    assert ids == answer(4, 12)
    assert isinstance(done, JobDone)
    assert not any(work.failed for work in done.stages)
