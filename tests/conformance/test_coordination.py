"""What coordinators promise, said once for the simulator and for real processes."""

from __future__ import annotations

from typing import Any

import pytest

COORDINATORS = 4
ISLANDS = 6

#: What the overlay promises, and how long a busy machine may take for it in real time.
PICKED_UP_S = {"sim": 10.0, "node": 30.0}


async def served(net: Any) -> None:
    """Every Island has at least two coordinators."""

    async def all_have_two() -> bool:
        return all([len(await net.coordinators_of(island)) >= 2 for island in range(ISLANDS)])

    await net.until(all_have_two, "every Island has two coordinators", within_s=90)


async def test_what_coordinators_state_is_the_same_everywhere(coordination: Any) -> None:
    net = coordination
    await net.start(COORDINATORS, ISLANDS)
    await served(net)

    async def agreed() -> bool:
        for island in range(ISLANDS):
            stating = await net.coordinators_of(island)
            for coordinator in range(COORDINATORS):
                if not await net.issuers_about(coordinator, island) >= stating:
                    return False
        return True

    await net.until(agreed, "every coordinator knows what each states about each Island", within_s=120)


@pytest.mark.parametrize("silent", [False, True], ids=["killed", "frozen"])
async def test_islands_of_a_lost_coordinator_are_picked_up(coordination: Any, *, silent: bool) -> None:
    net = coordination
    await net.start(COORDINATORS, ISLANDS)
    await served(net)
    having = [await net.coordinators_of(island) for island in range(ISLANDS)]
    # Not the first: the others entered by it, and whether they do without it is another question.
    busiest = max(range(1, COORDINATORS), key=lambda one: sum(one in known for known in having))
    assert any(busiest in known for known in having)
    await net.kill(busiest, silent=silent)

    async def picked_up() -> bool:
        for island in range(ISLANDS):
            known = await net.coordinators_of(island)
            if busiest in known or len(known) < 2:
                return False
        return True

    await net.until(picked_up, "every Island has two live coordinators again", PICKED_UP_S[net.kind])
