"""Peers behind real NATs (Linux masquerade), each in a network namespace of its own."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.slow


async def test_what_a_crashed_run_left_is_swept(crashed_run, network) -> None:
    with pytest.raises(RuntimeError, match="No such file"):
        network._in(crashed_run, "true")
    network._in(network.public()[0], "true")


async def test_public_and_private_peers_know_what_they_are_and_a_hole_is_punched(network) -> None:
    relays = network.plan(network.public(), serve_relay=True)
    # These routers map ports to others: where the relay sees a peer is where it can be met, not its own port.
    mapping = {"ports": "to :20000-30000"}
    places = (network.private(**mapping), network.private(**mapping), network.public())
    others = [network.plan(place, relays=[relays.address]) for place in places]
    async with network.running(relays, *others) as (relay, island, gateway, public):
        for peer in (island, gateway, public):
            assert "error" not in await peer("connect", address=relay.address)

        state = await public.until(lambda s: s["reachability"] == "public")
        assert public.address in state["addresses"]
        assert not state["relays"]
        await relay.until(lambda s: s["reachability"] == "public")
        await gateway.until(lambda s: s["reachability"] == "private")
        state = await island.until(lambda s: s["reachability"] == "private" and s["relays"] == [relay.peer])
        relayed = f"{relay.address}/p2p-circuit/p2p/{island.peer}"
        assert state["addresses"][0] == relayed

        assert "error" in await gateway("connect", address=island.address)
        state = await gateway("connect", address=relayed)
        assert "relayed" in state["paths"][island.peer]
        assert "error" not in await gateway("echo", peer=island.peer, bytes=100_000)
        state = await gateway.until(lambda s: s["paths"][island.peer] == ["direct"])
        host, _, port = state["remote"][island.peer].rpartition(":")
        assert host.startswith("5.6.7.")
        assert 20000 <= int(port) <= 30000
        assert "error" not in await gateway("echo", peer=island.peer, bytes=1_000_000)
        state = await island("status")
        assert state["paths"][gateway.peer] == ["direct"]
        assert state["punched"] == 1
        before = (await relay("status"))["relayed_bytes"]
        assert "error" not in await gateway("echo", peer=island.peer, bytes=1_000_000)
        assert (await relay("status"))["relayed_bytes"] == before

        # Nobody is needed in between any more.
        relay.process.kill()
        await island.until(lambda s: not s["relays"])
        assert "error" not in await gateway("echo", peer=island.peer, bytes=1000)


async def test_nats_that_refuse_instead_of_dropping_are_punched_because_packets_take_time(network) -> None:
    """The SYNs cross on their way, so each NAT has seen one go out before the other comes in."""
    network.slow(0.02)
    relays = network.plan(network.public(), serve_relay=True)
    places = [network.private(unasked="accept") for _ in range(2)]
    others = [network.plan(place, relays=[relays.address]) for place in places]
    async with network.running(relays, *others) as (relay, island, gateway):
        for peer in (island, gateway):
            await peer("connect", address=relay.address)
        state = await island.until(lambda s: s["relays"] == [relay.peer])
        await gateway("connect", address=state["addresses"][0])
        await gateway.until(lambda s: s["paths"][island.peer] == ["direct"])
        assert (await island("status"))["punched"] == 1
        assert "error" not in await gateway("echo", peer=island.peer, bytes=100_000)


async def test_behind_nats_that_draw_ports_at_random_peers_stay_relayed(network) -> None:
    relays = network.plan(network.public(), serve_relay=True)
    places = [network.private(ports="random,fully-random") for _ in range(2)]
    others = [network.plan(place, relays=[relays.address], punch_gap_s=0.5) for place in places]
    async with network.running(relays, *others) as (relay, island, gateway):
        for peer in (island, gateway):
            await peer("connect", address=relay.address)
        state = await island.until(lambda s: s["relays"] == [relay.peer])
        state = await gateway("connect", address=state["addresses"][0])
        assert state["paths"][island.peer] == ["relayed"]
        await island.until(lambda s: s["failed"] == 1)
        state = await gateway("echo", peer=island.peer, bytes=300_000)
        assert state["paths"][island.peer] == ["relayed"]
        assert (await relay("status"))["circuits"] == 1


async def test_a_public_peer_that_came_through_a_relay_is_dialled(network) -> None:
    relays = network.plan(network.public(), serve_relay=True)
    others = [network.plan(place, relays=[relays.address]) for place in (network.private(), network.public())]
    async with network.running(relays, *others) as (relay, island, gateway):
        await island("connect", address=relay.address)
        state = await island.until(lambda s: s["relays"] == [relay.peer])
        await gateway("connect", address=state["addresses"][0])
        await gateway.until(lambda s: s["paths"][island.peer] == ["direct"])
        assert (await island("status"))["dialled"] == 1


async def test_another_relay_takes_over(network) -> None:
    plans = [network.plan(network.public(), serve_relay=True) for _ in range(3)]
    private = network.plan(network.private(), relays=[plan.address for plan in plans])
    async with network.running(*plans, private) as (*relays, island):
        await island("connect", address=relays[0].address)
        state = await island.until(lambda s: len(s["relays"]) == 2)
        dead = next(relay for relay in relays if relay.peer in state["relays"])
        dead.process.kill()
        others = {relay.peer for relay in relays} - {dead.peer}
        state = await island.until(lambda s: set(s["relays"]) == others)
        assert not any(dead.peer in address for address in state["addresses"])
