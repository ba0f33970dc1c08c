"""A ring of two: the stage before the head is also the one behind it."""

from __future__ import annotations

from typing import Any

import pytest

from protocol.instants import MILLISECOND_NS, SECOND_NS

SESSION = "cd" * 16


@pytest.mark.parametrize("victim", ["0", "1"])
@pytest.mark.parametrize("how", ["kill", "freeze"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_either_of_two_dies(
    ring_world: Any, ring_reference: Any, victim: str, how: str, deterministic: object
) -> None:
    world = ring_world(3, policy=None, delay_ns=5 * MILLISECOND_NS)
    world.deterministic = deterministic
    chain = world.ring(2, spares=1, slots=8)
    prompt = list(range(50, 90))
    truth = ring_reference(chain, prompt, 20, deterministic=deterministic)
    order = world.gateway.start(
        SESSION, chain, prompt, 20, deterministic=deterministic, drafts=lambda tokens, goal: []
    )
    world.run(until=lambda: len(order.got) >= 7)
    struck = world.now
    getattr(world, how)(victim)
    world.run(until=lambda: order.done_at is not None, limit_ns=60 * SECOND_NS)
    assert order.got == truth
    assert order.done_at - struck < 3 * SECOND_NS
