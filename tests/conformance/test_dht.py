"""What the overlay promises, said once: every scenario runs in the simulator and with real processes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

Keys = Callable[[int], list[int]]


async def stored(scenario: Any, store: Callable[[], Awaitable[int]]) -> None:
    """Enough peers keep what `store` puts."""

    async def enough() -> bool:
        return await store() >= scenario.enough_copies

    await scenario.holds("enough peers keep it", enough)


async def test_who_joins_is_known_and_finds_others(scenario: Any, keys: Keys) -> None:
    net = scenario.net
    newcomers = await net.join(2)
    await net.settle(scenario.k)
    for newcomer in newcomers:
        for asker in scenario.some(4, but=(newcomer,)):
            assert await scenario.still_missing(asker, net.keys[newcomer]) == 0
        for key in keys(3):
            assert await scenario.still_missing(newcomer, key) == 0


async def test_lookups_find_the_closest_of_all(scenario: Any, keys: Keys) -> None:
    net = scenario.net
    missing = lookups = 0
    for asker in scenario.some(scenario.size // 3):
        for key in keys(2):
            found = await net.find_closest(asker, key)
            assert 1 <= found.queries <= 40
            lookups += 1
            if lacking := scenario.missing(asker, key, found):
                missing += lacking
                assert await scenario.still_missing(asker, key) == 0
    assert missing <= scenario.first_tries * lookups * scenario.k


async def test_records_are_found_from_everywhere_and_the_newest_stands(scenario: Any) -> None:
    net = scenario.net
    one, other = scenario.some(2)
    await stored(scenario, lambda: net.put(one, "greeting", b"first"))
    await stored(scenario, lambda: net.put(one, "greeting", b"second"))

    async def found_is(asker: int, value: bytes) -> bool:
        # An order to store is done before all have done so: one of those it goes on with may hold the first.
        return (await net.get(asker, "greeting")).values == (value,)

    for asker in scenario.some(6):
        await scenario.holds("the newest record is found", lambda asker=asker: found_is(asker, b"second"))
    # A second issuer's record at the same key stands beside the first one's. Who asks for one answer is content
    # with whoever holds something, and who put one with its own.
    await stored(scenario, lambda: net.put(other, "greeting", b"from another"))

    async def both_are_told() -> bool:
        answers = [(await net.get(asker, "greeting")).values for asker in scenario.some(6, but=(one, other))]
        assert all(b"first" not in values for values in answers)
        return all(answers) and any(sorted(values) == [b"from another", b"second"] for values in answers)

    await scenario.holds("both issuers' records are found", both_are_told)
    assert not (await net.get(one, "nothing")).values


async def test_providers_are_found_from_everywhere(scenario: Any, keys: Keys) -> None:
    net = scenario.net
    [key] = keys(1)
    providers = scenario.some(3)
    for provider in providers:
        await stored(scenario, lambda provider=provider: net.provide(provider, key))

    async def all_are_found(asker: int) -> bool:
        return sorted((await net.find_providers(asker, key)).peers) == providers

    for asker in scenario.some(6):
        await scenario.holds("all providers are found", lambda asker=asker: all_are_found(asker))
    for provider in providers:
        await net.withdraw(provider, key)


async def test_what_nobody_repeats_expires(scenario: Any, keys: Keys) -> None:
    net = scenario.net
    kept, dropped = keys(2)
    provider, asker = scenario.some(2)
    ttl_s = scenario.provider_ttl_s
    assert await net.provide(provider, kept)
    assert await net.provide(provider, dropped)

    async def found_while_it_holds() -> bool:
        assert await net.put(provider, "short", b"soon gone", ttl_s=ttl_s)
        return (await net.get(asker, "short")).values == (b"soon gone",)

    async def provided(key: int) -> bool:
        return (await net.find_providers(asker, key)).peers == (provider,)

    await scenario.holds("a record is found before it expires", found_while_it_holds)
    await scenario.holds("a provider is found", lambda: provided(dropped))
    await net.withdraw(provider, dropped)
    await net.wait(ttl_s + 2)

    async def forgotten() -> bool:
        return (
            not (await net.find_providers(asker, dropped)).peers and not (await net.get(asker, "short")).values
        )

    await scenario.holds("what nobody repeats is forgotten", forgotten)
    # What is still provided was told again before it expired.
    await scenario.holds("what is repeated stays", lambda: provided(kept))
    await net.withdraw(provider, kept)


async def test_after_a_third_died_lookups_are_right_and_the_dead_are_forgotten(
    scenario: Any, keys: Keys
) -> None:
    net = scenario.net
    [key, *others] = keys(9)
    provider = scenario.some(1)[0]
    await stored(scenario, lambda: net.put(provider, "survivor", b"still here"))
    dead = [peer for peer in scenario.some(round(0.3 * len(net.live))) if peer != provider]
    await net.kill(dead)
    # At once: lookups get past all that is dead.
    truth = [net.closest(key, 1, but=asker)[0] for asker in scenario.some(4)]

    async def past_the_dead() -> bool:
        found = [(await net.find_closest(asker, key)).peers[0] for asker in scenario.some(4)]
        assert set(found) <= set(net.live)
        return sum(f == t for f, t in zip(found, truth, strict=True)) >= 3

    await scenario.holds("the nearest live peer is found", past_the_dead)

    async def mostly_forgotten() -> bool:
        return await net.dead_share() <= 0.05

    await net.until(mostly_forgotten, "at most 5 % of table entries are dead", within_s=60)
    await net.settle(scenario.k, within_s=120)
    for asker, target in zip(scenario.some(8), others, strict=True):
        assert await scenario.still_missing(asker, target) == 0
    asker = scenario.some(5)[3]

    async def survived() -> bool:
        return (await net.get(asker, "survivor")).values == (b"still here",)

    await scenario.holds("the record survived", survived)


async def test_a_cut_network_works_on_each_side_and_grows_together_again(
    scenario_to_part: Any, keys: Keys
) -> None:
    scenario, net = scenario_to_part, scenario_to_part.net
    sides = [net.live[0::2], net.live[1::2]]
    before, within, after = keys(3)
    asker = sides[1][0]
    assert await scenario.still_missing(asker, before) == 0

    async def on_its_own() -> bool:
        for side in sides:
            for asker in side[:2]:
                found = await net.find_closest(asker, within)
                if list(found.peers) != net.closest(within, scenario.k, side, but=asker):
                    return False
        return True

    async def together() -> bool:
        for asker in (*sides[0][:3], *sides[1][:3]):
            found = await net.find_closest(asker, after)
            if list(found.peers) != net.closest(after, scenario.k, but=asker):
                return False
        return True

    await net.partition(sides)
    await net.until(on_its_own, "each side finds all of its own and nobody else", within_s=120)
    assert await net.put(asker, "of one side", b"news") >= 1
    await net.heal()
    await net.until(together, "both sides find each other", within_s=180)
    await net.settle(scenario.k, within_s=120)
    assert await scenario.still_missing(sides[0][1], after) == 0
