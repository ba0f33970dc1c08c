"""Starts many `archi-node` and `archi-gateway` processes at the price of one: import once, then fork for each.

`python -m bench.networks.spawner` reads one order a line from standard input, JSON, and answers each with the
new process's id. Every node is a process of its own that runs what the command runs; it shares with the others
only the memory of the imported code. When standard input closes, or this process dies, all of them are killed.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Final, Literal, NoReturn

import msgspec

# All that a node will need, so that a forked one imports nothing.
import node.island  # noqa: F401
import node.logs  # noqa: F401
from gateway import cli as gateway_cli
from node import cli

_PR_SET_PDEATHSIG: Final = 1
_CLONE_NEWNET: Final = 0x40000000

_libc: Final = ctypes.CDLL(None, use_errno=True)


class Order(msgspec.Struct, frozen=True):
    """`argv`: what follows the program's name. `out`, `err`: files for its output. `namespace`: a network
    namespace's file to live in; empty: ours.
    """

    program: Literal["archi-node", "archi-gateway"]
    argv: list[str]
    out: str
    err: str
    namespace: str = ""


def main() -> int:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries them
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever started us
    decode = msgspec.json.Decoder(Order).decode
    gc.freeze()  # what is shared stays shared: the collector does not touch it
    print("ready", flush=True)
    for line in sys.stdin:
        order = decode(line)
        if order.program == "archi-gateway":
            import gateway.server  # noqa: F401, PLC0415 - the web framework is for those who need it

            gc.freeze()
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            _become(order, parent)
        print(pid, flush=True)
    return 0


def _become(order: Order, parent: int) -> NoReturn:
    """Turn this fork into a node."""
    code = 1
    try:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)  # it died before we could ask to be told
        os.setsid()
        for number in (signal.SIGCHLD, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        for path, descriptor in ((os.devnull, 0), (order.out, 1), (order.err, 2)):
            flags = os.O_RDONLY if descriptor == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND
            opened = os.open(path, flags, 0o600)
            os.dup2(opened, descriptor)
            os.close(opened)
        if order.namespace:
            _enter(order.namespace)
        code = (cli if order.program == "archi-node" else gateway_cli).main(order.argv)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException as error:  # noqa: BLE001 - the outermost boundary: a fork must not return into `main`
        with Path(order.err).open("a", encoding="utf-8") as file:
            traceback.print_exception(error, file=file)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _enter(namespace: str) -> None:
    home = os.open(namespace, os.O_RDONLY)
    if _libc.setns(home, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), f"setns: {namespace}")
    os.close(home)


if __name__ == "__main__":
    sys.exit(main())
