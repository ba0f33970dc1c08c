"""`archi-node dht ...`: ask the running node about the overlay, through its control socket."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Final, TypeVar

import msgspec
import trio
from rich.console import Console
from rich.table import Table

from node.control import ControlRefused, NotRunning, ask
from node.overlay.views import (
    ContactView,
    CostView,
    FindView,
    NameParams,
    PutParams,
    RecordParams,
    RecordsView,
    StoredView,
    TableView,
)
from node.status import render_overlay
from protocol.codec import excerpt

T = TypeVar("T")

#: A reader that is no terminal gets whole lines.
_PIPE_WIDTH: Final = 500

#: A value on the command line of "-" is read from standard input, up to this and no more.
_MAX_STDIN_BYTES: Final = 64 * 1024


def run_dht(arguments: argparse.Namespace, data_dir: Path) -> int:
    """One command; the exit code. 1: it failed, or found nothing."""
    try:
        return _Command(data_dir, as_json=arguments.json).run(arguments)
    except (NotRunning, ControlRefused) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


class _Command:
    def __init__(self, data_dir: Path, *, as_json: bool) -> None:
        self._data_dir = data_dir
        self._json = as_json
        self._console = Console()
        if not self._console.is_terminal:
            self._console = Console(width=_PIPE_WIDTH)

    def run(self, arguments: argparse.Namespace) -> int:
        match arguments.dht_command:
            case "peers":
                return self._peers()
            case "find":
                return self._found(self._ask("dht.find", NameParams(arguments.name), FindView), "peers")
            case "providers":
                found = self._ask("dht.providers", NameParams(arguments.name), FindView)
                return self._found(found, "providers")
            case "get":
                params = RecordParams(arguments.namespace, arguments.name)
                return self._records(self._ask("dht.get", params, RecordsView))
            case "put":
                value = _value(arguments.value)
                params = PutParams(arguments.namespace, arguments.name, value, arguments.ttl * 3600)
                return self._stored(self._ask("dht.put", params, StoredView))
            case "provide":
                return self._stored(self._ask("dht.provide", NameParams(arguments.name), StoredView))
            case _:
                return self._stored(self._ask("dht.withdraw", NameParams(arguments.name), StoredView), want=0)

    def _ask(self, method: str, params: object, result: type[T]) -> T:
        async def asking() -> T:
            return await ask(self._data_dir, method, params, result=result)

        return trio.run(asking)

    def _peers(self) -> int:
        found = self._ask("dht.peers", {}, TableView)
        if self._json:
            self._print_json(found)
            return 0
        self._console.print(render_overlay(found.overlay))
        if found.peers:
            self._console.print(_contacts(found.peers))
        return 0

    def _found(self, found: FindView, what: str) -> int:
        if self._json:
            self._print_json(found)
        else:
            if found.peers:
                self._console.print(_contacts(found.peers))
            else:
                self._console.print(f"no {what} found")
            self._console.print(f"key {found.key}  {_cost(found.cost)}", style="dim")
        return 0 if found.peers else 1

    def _records(self, found: RecordsView) -> int:
        if self._json:
            self._print_json(found)
        else:
            for record in found.records:
                self._console.print(f"{record.issuer}  number {record.sequence}", style="dim")
                self._console.print(excerpt(record.value.decode("utf-8", "replace")), markup=False)
            if not found.records:
                self._console.print("no record found")
            self._console.print(f"key {found.key}  {_cost(found.cost)}", style="dim")
        return 0 if found.records else 1

    def _stored(self, stored: StoredView, *, want: int = 1) -> int:
        if self._json:
            self._print_json(stored)
        elif want:
            self._console.print(f"stored at {stored.copies} peers")
            self._console.print(f"key {stored.key}  {_cost(stored.cost)}", style="dim")
        return 0 if stored.copies >= want else 1

    def _print_json(self, view: object) -> None:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(view)).decode() + "\n")


def _contacts(peers: tuple[ContactView, ...]) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("Peer", "RTT ms", "link", "address"):
        table.add_column(name, justify="right" if name == "RTT ms" else "left", no_wrap=True)
    for peer in peers:
        address = peer.addresses[0].removesuffix(f"/p2p/{peer.peer}") if peer.addresses else "-"
        rtt = "-" if peer.rtt_ms is None else f"{peer.rtt_ms:.2f}"
        link = "up" if peer.connected else "" if peer.verified else "unproved"
        table.add_row(peer.peer, rtt, link, address)
    return table


def _cost(cost: CostView) -> str:
    return f"{cost.took_ms:.1f} ms, {cost.queries} queries, {cost.failures} failed, {cost.hops} hops"


def _value(text: str) -> bytes:
    return sys.stdin.buffer.read(_MAX_STDIN_BYTES) if text == "-" else text.encode()
