"""Whatever comes, in whatever order: the ring machine does not raise, and once all is over it comes to rest."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol.ids import PeerId
from protocol.instants import SECOND_NS, Instant
from protocol.machine import Ordered, PeerLost, Received, Woken
from protocol.ring import (
    Chain,
    RingAck,
    RingEnd,
    RingFault,
    RingFeed,
    RingOpen,
    RingOpened,
    RingPing,
    RingPong,
    Stage,
    StagePeer,
)
from routing.chains import events as ev
from routing.chains.ring import RingMachine, RingPolicy

CARGO = "sha256:" + "d" * 64
SESSION = "5e" * 16
LAYERS = {"a": (0, 4), "b": (4, 8), "h": (8, 12)}


def chain_of(*spares: str, holder: str = "b") -> Chain:
    """head h, stages a, b, h; `spares` are b's."""
    stand_by = tuple(StagePeer(name) for name in spares)
    return Chain(
        CARGO,
        (
            Stage(StagePeer("a"), *LAYERS["a"]),
            Stage(StagePeer(holder), *LAYERS["b"], stand_by),
            Stage(StagePeer("h"), *LAYERS["h"]),
        ),
        "f32",
    )


_peers = st.sampled_from(["a", "b", "c", "h", "x"])
_sessions = st.sampled_from([SESSION, "0" * 32, "1" * 32])
_small = st.integers(0, 9)
_chains = st.builds(
    lambda generations, holder: msgspec.structs.replace(
        chain_of("c", "d", holder=holder),
        stages=tuple(
            msgspec.structs.replace(stage, generation=generation)
            for stage, generation in zip(chain_of("c", "d", holder=holder).stages, generations, strict=True)
        ),
    ),
    st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 2)),
    st.sampled_from(["b", "c"]),
)
_messages = st.one_of(
    st.builds(
        lambda session, chain, index, upto, began: RingOpen(
            session, chain, index, upto, 8, "gateway", began=began
        ),
        _sessions,
        _chains,
        st.integers(0, 7),
        _small,
        st.integers(6, 8),
    ),
    st.builds(
        lambda session, position, rows, size, turn: RingFeed(session, position, rows, b"r" * size * rows, turn),
        _sessions,
        _small,
        st.integers(1, 5),
        st.sampled_from([1, 4, 16]),
        st.integers(0, 3),
    ),
    st.builds(RingEnd, _sessions),
    st.builds(lambda session: RingEnd(session, replaced=True), _sessions),
    st.builds(RingPing, _small),
    st.builds(
        lambda session, have, turn, began, again: RingOpened(session, have, turn, began, again=again),
        _sessions,
        _small,
        st.integers(0, 3),
        st.integers(6, 8),
        st.booleans(),
    ),
    st.builds(RingAck, _sessions, _small),
    st.builds(
        RingFault, _sessions, st.sampled_from(["busy", "stranded", "unknown", "what?"]), st.integers(0, 7)
    ),
    st.builds(RingPong, _small),
)
_commands = st.one_of(
    st.builds(
        lambda session, chain: ev.Begin(session, chain, PeerId("g"), deterministic=False), _sessions, _chains
    ),
    st.builds(
        lambda session, position, rows: ev.Draw(session, position, rows, b"t" * 4 * rows, 3),
        _sessions,
        _small,
        st.integers(1, 5),
    ),
    st.builds(ev.Finish, _sessions),
    st.builds(
        lambda session, position, rows: ev.Done(session, position, rows, b"o" * 16 * rows, 5, 5),
        _sessions,
        _small,
        st.integers(1, 5),
    ),
    st.just(ev.EngineLost(CARGO)),
    st.builds(lambda session: ev.EngineRefused(session, "busy", ""), _sessions),
    st.sampled_from(
        [ev.ShardHeldHere(CARGO, 4, 8), ev.ShardHeldHere(CARGO, 0, 0), ev.ShardHeldHere(CARGO, 0, 4)]
    ),
    st.builds(lambda peer: ev.DownstreamLost(PeerId(peer), "gone"), _peers),
    st.builds(lambda peer: ev.UpstreamLost(PeerId(peer)), _peers),
)
_inputs = st.one_of(
    st.builds(lambda peer, message: Received(PeerId(peer), message), _peers, _messages),
    st.builds(Ordered, _commands),
    st.builds(lambda peer: PeerLost(PeerId(peer)), _peers),
    st.integers(1, 40 * SECOND_NS),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(me=st.sampled_from(["a", "b", "h"]), inputs=st.lists(_inputs, max_size=40))
def test_nothing_that_comes_makes_it_raise_and_it_comes_to_rest(
    ring_sign: Any, me: str, inputs: list[Any]
) -> None:
    policy = RingPolicy(window_rows=2, log_bytes=100, most_log_bytes=200)
    machine = RingMachine(PeerId(me), policy, sign=ring_sign, unix_offset_ns=1_800_000_000 * SECOND_NS)
    now = Instant(0)

    def wait(duration_ns: int) -> None:
        nonlocal now
        end = now + duration_ns
        while (wake := machine.next_wake()) is not None and wake <= end:
            now = Instant(max(now, wake))
            machine.receive(now, Woken())
        now = Instant(end)

    machine.receive(now, Ordered(ev.ShardHeldHere(CARGO, *LAYERS[me])))
    for what in inputs:
        if isinstance(what, int):
            wait(what)
        else:
            machine.receive(now, what)
    for session in (SESSION, "0" * 32, "1" * 32):
        machine.receive(now, Ordered(ev.Finish(session)))
    wait(300 * SECOND_NS)
    assert machine.sessions(CARGO) == 0
    assert machine.next_wake() is None
