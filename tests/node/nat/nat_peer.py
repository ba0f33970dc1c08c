"""A peer with NAT traversal, in a process of its own; a test runs it in a network namespace.

Arguments: seed, listen address, NatConfig's fields as JSON. It prints its peer id, then answers each line of
JSON on standard input with one line.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import structlog
import trio

sys.path.insert(0, str(Path(__file__).parents[3]))

from node.identity import Identity
from node.p2p import Host, Stream, StreamBroken, Unreachable, open_host
from node.p2p.identify import serve_identify
from node.p2p.nat import Nat, NatConfig, open_nat
from node.p2p.relay_client import RelayClientConfig
from protocol.dice import Dice

TIMES = RelayClientConfig(renew_s=2.0, min_renew_s=0.5, backoff_first_s=0.2, backoff_max_s=1.0)


async def echo(stream: Stream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)


async def obey(host: Host, nat: Nat, order: dict) -> dict:
    match order["do"]:
        case "connect":
            await host.connect(order["address"])
        case "echo":
            stream = await host.open_stream(order["peer"], "/echo/1")
            left = order["bytes"]
            await stream.send_all(bytes(left))
            while left:
                left -= len(await stream.receive_some())
            await stream.aclose()
        case "disconnect":
            await host.disconnect(order["peer"])
        case "status":
            pass
    counters = nat.puncher.counters
    return {
        "reachability": nat.reachability,
        "addresses": nat.addresses,
        "relays": nat.relay_client.relays,
        "paths": {
            peer: ["relayed" if path.relay else "direct" for path in host.paths(peer)]
            for peer in host.connected()
        },
        "remote": {peer: host.remote_of(peer) for peer in host.connected()},
        "punched": counters.punched,
        "dialled": counters.dialled,
        "failed": counters.failed,
        "circuits": nat.relay.circuits if nat.relay else 0,
        "relayed_bytes": nat.relay.counters.bytes_relayed if nat.relay else 0,
    }


async def main(seed: str, listen: str, config: str) -> None:
    settings = NatConfig(
        unsettled_s=1.0, settled_s=5.0, retire_s=20.0, relay_client=TIMES, **json.loads(config)
    )
    async with (
        open_host(Identity(bytes.fromhex(seed)), [listen]) as host,
        open_nat(host, settings, dice=Dice(int(seed[:8], 16)), unix_now_s=lambda: int(time.time())) as nat,
    ):
        serve_identify(host, agent="test/1")
        host.handle("/echo/1", echo)
        print(host.peer, flush=True)
        async with trio.lowlevel.FdStream(0) as stdin:
            text = b""
            while chunk := await stdin.receive_some():
                text += chunk
                while b"\n" in text:
                    order, _, text = text.partition(b"\n")
                    try:
                        with trio.fail_after(30):
                            answer = await obey(host, nat, json.loads(order))
                    except (Unreachable, StreamBroken, trio.TooSlowError) as error:
                        answer = {"error": str(error) or type(error).__name__}
                    print(json.dumps(answer), flush=True)


structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
trio.run(main, *sys.argv[1:])
