"""Whose sessions a stage takes: permits, guests, and what of it goes round."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from protocol.envelope import Envelope, Signer
from protocol.ids import PeerId
from protocol.instants import SECOND_NS, Instant, UnixNs
from protocol.machine import Emit, Ordered, Received, Send
from protocol.ring import (
    MAX_PERMIT_BYTES,
    SESSION_PERMIT_KIND,
    Chain,
    RingEnd,
    RingFault,
    RingOpen,
    RingOpened,
    SessionPermit,
    Stage,
    StagePeer,
)
from routing.chains import events as ev
from routing.chains.ring import RingMachine
from routing.chains.ring_door import Door

CARGO = "sha256:" + "d" * 64
OFFSET_NS = 1_800_000_000 * SECOND_NS
GATEWAY, STRANGER = Signer(bytes([1]) * 32), Signer(bytes([2]) * 32)
CHAIN = Chain(
    CARGO, (Stage(StagePeer("a"), 0, 4), Stage(StagePeer("b"), 4, 8), Stage(StagePeer("h"), 8, 12)), "f32"
)


def name_of(number: int) -> str:
    return f"{number:032}"


def permit_of(signer: Signer, number: int, *, cargo: str = CARGO, expires_s: int = 600) -> Envelope:
    permit = SessionPermit(name_of(number), cargo)
    expires = UnixNs(OFFSET_NS + expires_s * SECOND_NS)
    return signer.seal(SESSION_PERMIT_KIND, permit, sequence=1, expires_unix_ns=expires)


class Doorman:
    """Stage b, or the head, with four slots, which works for the gateway."""

    def __init__(self, sign: Any, me: str = "b", door: bool = True) -> None:  # noqa: FBT001, FBT002 - a test's
        self.machine = RingMachine(
            PeerId(me),
            sign=sign,
            unix_offset_ns=OFFSET_NS,
            door=Door(lambda _: {GATEWAY.peer}) if door else None,
        )
        first, last = (4, 8) if me == "b" else (8, 12)
        self.give(Ordered(ev.ShardHeldHere(CARGO, first, last, 4)))

    def give(self, what: Any) -> list[Any]:
        effects = self.machine.receive(Instant(0), what)
        return [e.message if isinstance(e, Send) else e.event for e in effects if isinstance(e, Send | Emit)]

    def open(self, signer: Signer, number: int, **how: Any) -> str:
        fields: dict[str, Any] = {"consumer": signer.peer, "permit": permit_of(signer, number)}
        message = RingOpen(name_of(number), CHAIN, 1, 0, 8, **(fields | how))
        out = self.give(Received(PeerId("a"), message))
        admitted = sum(isinstance(each, ev.Admit) for each in out)
        fault = next((each.code for each in out if isinstance(each, RingFault)), None)
        assert (fault is None) == bool(admitted)
        return fault or "admitted"

    def end(self, number: int) -> None:
        self.give(Received(PeerId("a"), RingEnd(name_of(number))))


@pytest.fixture
def doorman(ring_sign: Any) -> Any:
    return lambda me="b", door=True: Doorman(ring_sign, me, door)


def test_guests_get_half_of_the_slots_together(doorman: Any) -> None:
    b, others = doorman(), [Signer(bytes([seed]) * 32) for seed in range(10, 14)]
    assert [b.open(other, n) for n, other in enumerate(others)] == ["admitted", "admitted", "busy", "busy"]
    assert [b.open(GATEWAY, n) for n in range(10, 14)] == ["admitted"] * 4  # the engine counts its slots
    b.end(0)
    assert b.open(others[3], 3) == "admitted"
    assert b.open(others[2], 2) == "busy"


def test_guests_get_one_lane(doorman: Any) -> None:
    b = doorman()
    assert b.open(STRANGER, 0, deterministic=True) == "admitted"
    assert b.open(STRANGER, 1, deterministic=True) == "busy"
    assert b.open(STRANGER, 2) == "admitted"
    assert b.open(GATEWAY, 3, deterministic=True) == "admitted"


@pytest.mark.parametrize(
    "permit",
    [
        None,
        permit_of(STRANGER, 5),
        permit_of(GATEWAY, 6),
        permit_of(GATEWAY, 5, cargo="sha256:" + "e" * 64),
        permit_of(GATEWAY, 5, expires_s=-100),
        msgspec.structs.replace(permit_of(GATEWAY, 5), signature=bytes(64)),
        msgspec.structs.replace(permit_of(GATEWAY, 5), kind="receipt"),
        msgspec.structs.replace(permit_of(GATEWAY, 5), issuer=bytes(MAX_PERMIT_BYTES)),
    ],
)
def test_what_permits_nothing(doorman: Any, permit: Envelope | None) -> None:
    assert doorman().open(GATEWAY, 5, permit=permit) == "refused"
    assert doorman().open(GATEWAY, 5) == "admitted"


def test_what_a_permit_takes_is_bounded_without_a_door_too(doorman: Any) -> None:
    """It is kept, and passed on beside much else."""
    b = doorman(door=False)
    assert b.open(STRANGER, 1, permit=None) == "admitted"
    large = msgspec.structs.replace(permit_of(STRANGER, 2), body=bytes(MAX_PERMIT_BYTES))
    assert b.open(STRANGER, 2, permit=large) == "refused"


def test_the_permit_goes_on_to_the_next_stage(doorman: Any) -> None:
    permit = permit_of(GATEWAY, 1)
    opening = RingOpen(name_of(1), CHAIN, 1, 0, 8, GATEWAY.peer, permit=permit)
    out = doorman().give(Received(PeerId("a"), opening))
    assert [each.permit for each in out if isinstance(each, RingOpen)] == [permit]


def test_a_session_stays_its_consumers(doorman: Any) -> None:
    b = doorman()
    assert b.open(STRANGER, 1, began=1) == "admitted"
    message = RingOpen(name_of(1), CHAIN, 1, 0, 8, GATEWAY.peer, began=2, permit=permit_of(GATEWAY, 1))
    (fault,) = b.give(Received(PeerId("a"), message))
    assert fault.code == "refused"
    again = msgspec.structs.replace(message, consumer=STRANGER.peer)  # a new head's
    assert any(isinstance(each, RingOpened) for each in b.give(Received(PeerId("a"), again)))


def test_a_head_asks_for_permits_too(doorman: Any) -> None:
    head = doorman("h")

    def begin(signer: Signer, number: int, permit: Envelope | None) -> str:
        command = ev.Begin(name_of(number), CHAIN, signer.peer, deterministic=False, permit=permit)
        before = head.machine.turned_away(Instant(0), command)
        failed = [e.code for e in head.give(Ordered(command)) if isinstance(e, ev.SessionFailed)]
        assert failed == ([] if before is None else [before[0]])
        if failed:
            head.give(Ordered(ev.Finish(command.session)))
        return failed[0] if failed else "begun"

    assert begin(GATEWAY, 1, None) == "refused"
    assert begin(GATEWAY, 1, permit_of(GATEWAY, 1)) == "begun"
    assert [begin(STRANGER, n, permit_of(STRANGER, n)) for n in (2, 3, 4)] == ["begun", "begun", "busy"]
    head.give(Ordered(ev.Finish(name_of(2))))
    assert begin(STRANGER, 4, permit_of(STRANGER, 4)) == "begun"
    assert begin(GATEWAY, 5, permit_of(GATEWAY, 5)) == "begun"
