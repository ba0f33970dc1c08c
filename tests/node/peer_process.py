"""A peer for the tests, in a process of its own. Arguments: seed, port, address to keep (or empty)."""

from __future__ import annotations

import sys
from pathlib import Path

import structlog
import trio

sys.path.insert(0, str(Path(__file__).parents[2]))

from node.identity import Identity
from node.p2p import Stream, open_host
from node.peers import open_peers
from protocol.adverts import HELLO, Hello
from protocol.dice import Dice
from protocol.ids import PeerId


async def echo(stream: Stream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)


async def drip(stream: Stream) -> None:
    while True:
        await stream.send_all(b"drop")
        await trio.sleep(0.05)


async def main(seed: str, port: str, keep: str) -> None:
    async with open_host(Identity(bytes.fromhex(seed)), [f"/ip4/127.0.0.1/tcp/{port}"]) as host:
        host.handle("/echo/1", echo)
        host.handle("/drip/1", drip)
        async with open_peers(host, hello=Hello("process", "0", ("island",)), dice=Dice(1)) as peers:

            async def answer(_: PeerId, hello: Hello) -> Hello:
                return hello

            peers.serve("echo", HELLO, answer)
            if keep:
                peers.keep(keep)
            sys.stdout.write(f"{host.addresses[0]}\n")
            sys.stdout.flush()
            await trio.sleep_forever()


structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
trio.run(main, *sys.argv[1:])
