"""Networks of their own for tests: namespaces, joined by a "public" net, some behind NAT routers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from node.identity import Identity, new_identity

DELAY = Path(__file__).with_name("delay.py")
PEER = Path(__file__).with_name("nat_peer.py")
ROOT = Path(__file__).parents[3]
PREFIX = "archi-nat"

#: Real-looking addresses, because the code treats documentation and private ranges as not public. Nothing
#: leaves the namespaces.
PUBLIC = "5.6.7"
PORT = 4001

#: A router at home: masquerades, and drops (or, some do, refuses) what nobody inside asked for.
RULES = """
table ip nat {{
    chain outgoing {{
        type nat hook postrouting priority 100
        oifname "wan" meta l4proto tcp masquerade {ports}
    }}
}}
table ip filter {{
    chain unasked {{
        type filter hook input priority 0
        iifname "wan" ct state new {unasked}
    }}
    chain through {{
        type filter hook forward priority 0; policy drop
        iifname "lan" accept
        iifname "wan" ct state established,related accept
    }}
}}
"""


def run(*command: str, given: str | None = None) -> str:
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False, timeout=30)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def why_not() -> str | None:
    """Why namespaces can not be had here."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool, package in (("ip", "iproute2"), ("nft", "nftables"), ("sysctl", "procps")):
        if shutil.which(tool) is None:
            return f"{tool} is missing (Debian: apt-get install {package})"
    probe = f"{PREFIX}-{os.getpid()}-probe"
    try:
        run("ip", "netns", "add", probe)
        try:
            run("ip", "netns", "exec", probe, "nft", "add", "table", "ip", "nat")
            run("ip", "netns", "exec", probe, "sysctl", "-qw", "net.ipv4.ip_forward=1")
        finally:
            run("ip", "netns", "del", probe)
    except (RuntimeError, OSError) as error:
        return f"this kernel or container does not allow it: {error}"
    return None


def sweep() -> None:
    """Delete what this process, or one that is no more, has left."""
    for line in run("ip", "netns", "list").splitlines():
        name = line.split()[0]
        if not name.startswith(f"{PREFIX}-"):
            continue
        owner = int(name.split("-")[2])
        if owner == os.getpid() or not Path(f"/proc/{owner}").exists():
            run("ip", "netns", "del", name)


@dataclass
class Plan:
    """A peer before its process runs: where it will be met is known already."""

    place: tuple[str, str]
    identity: Identity
    config: dict

    @property
    def address(self) -> str:
        return f"/ip4/{self.place[1]}/tcp/{PORT}/p2p/{self.identity.peer}"


@dataclass
class Peer:
    """A process in a namespace."""

    process: trio.Process
    peer: str
    address: str

    async def __call__(self, do: str, **order: object) -> dict:
        """Let it do something; its state afterwards, or {"error": …}."""
        assert self.process.stdin
        assert self.process.stdout
        with trio.fail_after(60):
            await self.process.stdin.send_all(json.dumps({"do": do, **order}).encode() + b"\n")
            return json.loads(await read_line(self.process.stdout))

    async def until(self, condition, *, within_s: float = 120) -> dict:
        """Its state, as soon as that holds."""
        state: dict = {}
        with trio.move_on_after(within_s):
            while not condition(state := await self("status")):  # noqa: ASYNC110 - in another process
                await trio.sleep(0.1)
            return state
        pytest.fail(f"not within {within_s} s: {state}")


async def read_line(stream: trio.abc.ReceiveStream) -> bytes:
    text = b""
    while not text.endswith(b"\n"):
        more = await stream.receive_some()
        assert more, "the peer process ended"
        text += more
    return text


class Network:
    """A public net 5.6.7.0/24, and private ones behind it."""

    def __init__(self) -> None:
        self._name = f"{PREFIX}-{os.getpid()}"
        self._next = 1
        self._delay: subprocess.Popen[str] | None = None
        self._hub = self._add("hub")
        self._in(self._hub, "sysctl -qw net.ipv4.ip_forward=1")

    def slow(self, delay_s: float) -> None:
        """From now on each packet on the public net takes this long."""
        command = ["ip", "netns", "exec", self._hub, sys.executable, str(DELAY), str(delay_s)]
        self._delay = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._delay.stdout
        assert self._delay.stdout.readline() == "ready\n"
        self._in(self._hub, "ip link set tun0 up")
        self._in(self._hub, "ip route add default dev tun0 table 100")
        for setting in ("all.rp_filter", "tun0.rp_filter", "default.rp_filter"):
            self._in(self._hub, f"sysctl -qw net.ipv4.conf.{setting}=0")

    def close(self) -> None:
        """End what runs; the namespaces are swept."""
        if self._delay is not None:
            self._delay.kill()
            self._delay.wait()
            assert self._delay.stdin
            assert self._delay.stdout
            self._delay.stdin.close()
            self._delay.stdout.close()

    def public(self) -> tuple[str, str]:
        """A namespace on the public net and its address."""
        name = self._add(f"pub{self._next}")
        return name, self._plug(name)

    def private(self, *, ports: str = "", unasked: str = "drop") -> tuple[str, str]:
        """A namespace behind a NAT router of its own, and its private address. `ports`: flags of masquerade;
        `unasked`: what happens to a SYN that nobody expects.
        """
        number = self._next
        router, inside = self._add(f"nat{number}"), self._add(f"priv{number}")
        self._plug(router)
        self._in(router, f"ip link add lan type veth peer name eth0 netns {inside}")
        self._in(router, f"ip addr add 10.{number}.0.1/24 dev lan")
        self._in(router, "ip link set lan up")
        self._in(router, "sysctl -qw net.ipv4.ip_forward=1")
        run("ip", "netns", "exec", router, "nft", "-f", "-", given=RULES.format(ports=ports, unasked=unasked))
        self._in(inside, f"ip addr add 10.{number}.0.2/24 dev eth0")
        self._in(inside, "ip link set eth0 up")
        self._in(inside, f"ip route add default via 10.{number}.0.1")
        return inside, f"10.{number}.0.2"

    def plan(self, place: tuple[str, str], **config: object) -> Plan:
        """A peer to be started there, which listens on all addresses."""
        return Plan(place, new_identity(), config)

    @asynccontextmanager
    async def running(self, *plans: Plan) -> AsyncGenerator[list[Peer]]:
        """These peers, started together; killed on leaving."""
        processes: list[trio.Process] = []
        try:
            for plan in plans:
                seed, listen = plan.identity.seed.hex(), f"/ip4/0.0.0.0/tcp/{PORT}"
                arguments = [sys.executable, str(PEER), seed, listen, json.dumps(plan.config)]
                processes.append(
                    await trio.lowlevel.open_process(
                        ["ip", "netns", "exec", plan.place[0], *arguments],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        cwd=ROOT,
                    )
                )
            with trio.fail_after(90):  # imports take seconds on a busy machine
                for process in processes:
                    assert process.stdout
                    await read_line(process.stdout)
            yield [
                Peer(process, plan.identity.peer, plan.address)
                for plan, process in zip(plans, processes, strict=True)
            ]
        finally:
            with trio.CancelScope(shield=True):
                for process in processes:
                    process.kill()
                for process in processes:
                    await process.wait()
                    assert process.stdin
                    assert process.stdout
                    await process.stdin.aclose()
                    await process.stdout.aclose()

    def _add(self, suffix: str) -> str:
        name = f"{self._name}-{suffix}"
        run("ip", "netns", "add", name)
        self._in(name, "ip link set lo up")
        return name

    def _plug(self, namespace: str) -> str:
        """Join a namespace to the public net."""
        number, self._next = self._next, self._next + 1
        port, address, hub = f"p{number}", f"{PUBLIC}.{number}", f"{PUBLIC}.254"
        self._in(namespace, f"ip link add wan type veth peer name {port} netns {self._hub}")
        self._in(namespace, f"ip addr add {address}/32 dev wan")
        self._in(namespace, "ip link set wan up")
        self._in(self._hub, f"ip addr add {hub}/32 dev {port}")
        self._in(self._hub, f"ip link set {port} up")
        self._in(self._hub, f"ip route add {address}/32 dev {port}")
        self._in(namespace, f"ip route add {hub}/32 dev wan")
        self._in(namespace, f"ip route add default via {hub}")
        if self._delay is not None:
            self._in(self._hub, f"ip rule add iif {port} lookup 100")
        return address

    def _in(self, namespace: str, command: str) -> None:
        run("ip", "netns", "exec", namespace, *command.split())


@pytest.fixture(scope="session")
def namespaces() -> Generator[None]:
    """Skips where there are none; leaves nothing behind, also of earlier runs that crashed."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    sweep()
    yield
    sweep()


@pytest.fixture
def crashed_run(namespaces: None) -> Generator[str]:
    """A namespace that a test run left which is no more."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    name = f"{PREFIX}-{gone.pid}-hub"
    run("ip", "netns", "add", name)
    yield name
    sweep()


@pytest.fixture
def network(namespaces: None) -> Generator[Network]:
    sweep()
    net = Network()
    try:
        yield net
    finally:
        net.close()
        sweep()
