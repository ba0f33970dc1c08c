"""`archi demo`: a whole archipelag on one machine, each part a process of its own.

For scripts it prints, each on a line of its own: `gateway pid N`, `island NAME pid N` for each Island, and
`ready URL key KEY` once it answers. All processes end with this one, however it ends: they watch their
standard input, which closes with us.
"""

from __future__ import annotations

import argparse
import errno
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack, aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, Final

import httpx
import trio
from rich.console import Console

from cargos.catalogue import CargoEntry
from cargos.cli_progress import show_progress
from cargos.errors import CargoError
from cargos.progress import FetchProgress, ProgressCallback
from cargos.resolve import resolve_cargo
from cargos.store import CargoStore
from gateway.chat import figures, terminal_safe
from gateway.chat_client import Answering, ChatClient, ChatFailed, Closed, HandedOver
from gateway.chat_client import Text as AnswerText
from gateway.connection import Connection, connection_path, remove_connection, write_connection
from gateway.demo.children import Child, last_words, row_of
from gateway.demo.screen import (
    ChainShown,
    IslandRow,
    NoChainShown,
    Screen,
    Tally,
    chain_untrusted,
    islands_table,
    told_untrusted,
)
from gateway.demo.words import how_to, island_command, too_little
from gateway.keys import new_key
from node.control import NotRunning, ask_status
from node.runner import flatten
from protocol.limits import MIB

DEFAULT_PORT: Final = 8080
DEFAULT_CARGO: Final = "smollm2-135m"
NAMES: Final = ("coral", "atoll", "lagoon", "reef", "skerry", "cay", "holm", "islet")
QUESTION: Final = "In two sentences: why is the sea salty?"

#: A tebibyte for each Island: more than any machine of today has.
MAX_MEMORY_MIB: Final = 1 << 20
#: With little memory there is room for short conversations only.
SMALL_SEQUENCES: Final = ("shards.slots=2", "shards.context_length=2048")
#: Islands that joined are told of this much later at most; then it is clear whether they have room enough.
SETTLED_S: Final = 8.0
#: A process's log in its folder, if that is kept: a JSON object on each line, and what it said as it broke.
LOG_NAME: Final = "log.jsonl"
#: Loading a Cargo on a busy two-core machine takes seconds; minutes mean that something is wrong.
READY_TIMEOUT_S: Final = 180
#: What a child said before it ended is read within this time, unless its own children still hold the pipe.
LAST_WORDS_S: Final = 1
#: How long a child may take to end before it is killed.
STOP_S: Final = 5
#: The Islands are asked this often, and the screen is drawn this often while something moves.
ASK_S: Final = 0.5
DRAW_S: Final = 0.1
#: The answer to the first question: short, and the same at each start.
ANSWER_OPTIONS: Final = {"max_tokens": 120, "temperature": 0.3, "seed": 1}


class DemoFailed(Exception):
    """The demo can not go on; the message says why and what to do."""


def register(subparsers: Any) -> None:  # noqa: ANN401 - argparse has no public name for it
    """Add `demo` to `archi`."""
    parser = subparsers.add_parser(
        "demo",
        help="three Islands and a gateway on this machine, and a first answer from a real model",
        description="Start Islands and a gateway on loopback, each in a process of its own, until Ctrl-C.",
    )
    parser.add_argument("--islands", type=int, default=3, metavar="N", help="how many Islands (default 3)")
    parser.add_argument(
        "--port", type=int, metavar="P", help=f"HTTP port (default {DEFAULT_PORT}, or a free one)"
    )
    parser.add_argument(
        "--memory-mb",
        type=int,
        metavar="M",
        help="memory that each Island gives to parts of Cargos too large for it, MiB: they make chains then",
    )
    parser.add_argument("--cargo", default=DEFAULT_CARGO, help="Cargo to run: a name or a manifest file")
    parser.add_argument("--key", help="API key to use (default: a fresh one)")
    parser.add_argument("--no-question", action="store_true", help="do not ask a first question")
    parser.add_argument("--data-dir", type=Path, help="keep the processes' state and logs (log.jsonl) there")
    parser.add_argument(
        "--set-gateway", action="append", default=[], metavar="NAME=VALUE", help="a setting of the gateway"
    )
    parser.add_argument(
        "--set-island", action="append", default=[], metavar="NAME=VALUE", help="a setting of every Island"
    )
    parser.set_defaults(handler=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    if not 1 <= arguments.islands <= 64:
        print("error: --islands must be between 1 and 64", file=sys.stderr)
        return 2
    if arguments.memory_mb is not None and not 1 <= arguments.memory_mb <= MAX_MEMORY_MIB:
        print(f"error: --memory-mb must be between 1 and {MAX_MEMORY_MIB}", file=sys.stderr)
        return 2
    demo = Demo(arguments)
    failures: list[Exception] = []
    try:
        trio.run(demo.run)
    except* (DemoFailed, CargoError, httpx.HTTPError) as group:
        failures.extend(flatten(group))
    # When a process dies, others complain of it: the reason alone is of use.
    for failure in [f for f in failures if isinstance(f, DemoFailed)] or failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures or demo.question_failed else 0


class Demo:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._screen = Screen(Console(highlight=False))
        self._tally = Tally()
        self._key: str = arguments.key or new_key()
        self._children: list[Child] = []
        self._url = ""
        self._mesh = ""
        self._chain: ChainShown | None = None
        self._no_chain: NoChainShown | None = None
        self._connection = connection_path(os.environ)
        self._logs = ExitStack()
        self._short_since = 0.0
        self._is_ready = False
        self.question_failed = False

    async def run(self) -> None:
        """Until a signal. Raises DemoFailed, CargoError, httpx.HTTPError (in groups)."""
        async with trio.open_nursery() as outer:
            inner = trio.CancelScope()
            await outer.start(self._stop_on_signal, inner)
            with inner, self._logs:
                try:
                    await self._run()
                finally:
                    with trio.CancelScope(shield=True):
                        await self._stop()
            outer.cancel_scope.cancel()

    async def _run(self) -> None:
        entry = resolve_cargo(self._arguments.cargo)
        await self._fetch(entry)
        with tempfile.TemporaryDirectory(prefix="archipelag-demo-") as temporary:
            root: Path = self._arguments.data_dir or Path(temporary)
            try:
                async with trio.open_nursery() as nursery:
                    await self._start(root, nursery)
                    await self._show(entry.manifest.name)
            finally:
                with trio.CancelScope(shield=True):
                    await self._stop()  # before their folders go

    # --- start --------------------------------------------------------------------------------------

    async def _fetch(self, entry: CargoEntry) -> None:
        """The Cargo's files, before any Island asks for them, so that it happens once and is seen."""
        store = CargoStore()
        with ExitStack() as stack:
            draw: ProgressCallback | None = None

            def show(progress: FetchProgress) -> None:
                nonlocal draw
                if draw is None:
                    if progress.state == "done":
                        return  # it was there
                    size = -(-entry.manifest.total_bytes // MIB)
                    self._say(f"fetching {entry.manifest.name}, {size} MiB; it is kept for the next time")
                    draw = stack.enter_context(show_progress())
                draw(progress)

            await store.ensure(entry.manifest, base=entry.base, progress=show)

    async def _start(self, root: Path, nursery: trio.Nursery) -> None:
        port = self._arguments.port if self._arguments.port is not None else _free_port(DEFAULT_PORT)
        if self._arguments.port is None and port != DEFAULT_PORT:
            self._say(f"port {DEFAULT_PORT} is taken; using another one")
        gateway_dir = root / "gateway"
        gateway = await self._spawn(
            nursery,
            "gateway",
            gateway_dir,
            [
                *("gateway.cli", "run", "--until-stdin-closes", "--name", "demo-gateway"),
                *("--data-dir", str(gateway_dir), "--port", str(port)),
                *("--listen", "/ip4/127.0.0.1/tcp/0", "--log-format", "json"),
                *_assignments(self._arguments.set_gateway),
            ],
            {"ARCHI_API_KEY": self._key},
        )
        self._say(f"gateway pid {gateway.process.pid}")
        lines = await self._lines_of(gateway, lambda line: line.startswith("mesh "))
        self._mesh = lines[-1].removeprefix("mesh ")
        self._url = next(line for line in lines if line.startswith("listening ")).split()[1] + "/v1"
        for index in range(self._arguments.islands):
            name = NAMES[index] if index < len(NAMES) else f"island-{index + 1}"
            data_dir = root / name
            island = await self._spawn(
                nursery,
                name,
                data_dir,
                [
                    *("node.cli", "run", "--until-stdin-closes", "--name", name),
                    *("--data-dir", str(data_dir), "--cargo", self._arguments.cargo),
                    *("--coordinator", self._mesh, "--log-format", "json"),
                    *_assignments(self._island_settings),
                ],
                {},
            )
            self._say(f"island {name} pid {island.process.pid}")
            nursery.start_soon(self._drain, island)
        nursery.start_soon(self._drain, gateway)
        await self._wait_ready()
        self._is_ready = True
        for line in () if self._chain is None else self._chain.lines():
            self._say(line)
        self._say(f"ready {self._url} key {self._key}")
        try:
            write_connection(self._connection, Connection(self._url, self._key, os.getpid()))
        except OSError as error:
            self._say(f"archi chat will need --url and --key: {self._connection}: {error.strerror}")

    async def _spawn(
        self, nursery: trio.Nursery, label: str, data_dir: Path, module: list[str], extra: Mapping[str, str]
    ) -> Child:
        environment = {name: value for name, value in os.environ.items() if name != "ARCHI_CONFIG"}
        log = self._log_in(data_dir)
        process = await trio.lowlevel.open_process(
            [sys.executable, "-m", *module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**environment, **extra, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # Ctrl-C is for us; we end the children in order
        )
        child = Child(label, process, data_dir, log)
        self._children.append(child)
        nursery.start_soon(self._read_logs, child)
        nursery.start_soon(self._watch, child)
        return child

    async def _wait_ready(self) -> None:
        with trio.move_on_after(READY_TIMEOUT_S):
            async with httpx.AsyncClient() as client:
                while True:
                    response = await client.get(self._url + "/models", headers=self._headers)
                    if response.status_code == 200 and await self._islands_ready():
                        return
                    self._check_room()
                    await trio.sleep(0.1)
        words = "\n".join(filter(None, map(last_words, self._children)))
        raise DemoFailed(f"the Islands were not ready within {READY_TIMEOUT_S} s\n{words}")

    def _check_room(self) -> None:
        """Raises DemoFailed if all Islands are there and have too little memory together."""
        short = self._no_chain
        if short is None or short.islands < self._arguments.islands:
            self._short_since = trio.current_time()
        elif trio.current_time() - self._short_since > SETTLED_S:
            raise DemoFailed(too_little(short, self._arguments.memory_mb or short.room_mib))

    @property
    def _island_settings(self) -> list[str]:
        """Ours first: what the user sets counts."""
        memory = self._arguments.memory_mb
        ours = [] if memory is None else [f"shards.memory_mib={memory}", *SMALL_SEQUENCES]
        return [*ours, *self._arguments.set_island]

    async def _islands_ready(self) -> bool:
        if self._chain is not None:
            return True
        for child in self._children[1:]:
            if child.fate is not None:
                with trio.move_on_after(LAST_WORDS_S):
                    await child.read.wait()
                raise DemoFailed(f"{child.label} was not ready yet and {child.fate}\n{last_words(child)}")
            try:
                snapshot = await ask_status(child.data_dir)
            except NotRunning:
                return False
            failed = next((cargo for cargo in snapshot.cargos if cargo.state == "failed"), None)
            if failed is not None:
                raise DemoFailed(f"{child.label} can not run {failed.name}: {failed.detail}")
            if not snapshot.cargos or any(cargo.state != "ready" for cargo in snapshot.cargos):
                return False
            if any(cargo.shard is not None for cargo in snapshot.cargos):
                return False  # it is ready when the gateway says that all layers are there
            if not any("coordinator" in peer.roles for peer in snapshot.peers):
                return False
        return True

    # --- while it runs ------------------------------------------------------------------------------

    async def _show(self, model: str) -> None:
        async with trio.open_nursery() as nursery:
            if self._screen.is_terminal:
                nursery.start_soon(self._keep_live)
            if not self._arguments.no_question:
                await self._ask_first_question(model)
            self._screen.verbatim(how_to(self._url, self._key, model, self._mesh, self._island_options))
            await trio.sleep_forever()

    async def _ask_first_question(self, model: str) -> None:
        self._screen.line(f"\n> {QUESTION}", style="bold")
        closing = ""
        client = ChatClient(self._url, self._key)
        messages = [{"role": "user", "content": QUESTION}]
        self._screen.answer_begins()
        try:
            async with aclosing(client.ask(model, messages, ANSWER_OPTIONS)) as events:
                async for event in events:
                    match event:
                        case AnswerText(text):
                            self._screen.answer_piece(terminal_safe(text))
                        case HandedOver(island):
                            self._screen.answer_piece(f" [goes on at {island}] ", style="bold cyan")
                        case Closed():
                            closing = f"[{terminal_safe(figures(event))}]"
                        case Answering():
                            pass
        except ChatFailed as failure:
            self.question_failed = True
            closing = f"no answer: {terminal_safe(str(failure))}"
        self._screen.answer_ends()
        self._screen.line(closing, style="red" if self.question_failed else "dim")

    async def _keep_live(self) -> None:
        with self._screen.live():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._keep_table)
                while True:
                    self._screen.draw()
                    await trio.sleep(DRAW_S)

    async def _keep_table(self) -> None:
        while True:
            rows: dict[str, IslandRow] = {}

            async def look(child: Child, rows: dict[str, IslandRow] = rows) -> None:
                rows[child.label] = await row_of(child)

            async with trio.open_nursery() as nursery:
                for child in self._children[1:]:
                    nursery.start_soon(look, child)
            shown = [rows[child.label] for child in self._children[1:]]
            if (chain := self._chain) is not None:
                shown = [replace(row, layers=chain.of(row.name)) for row in shown]
            self._screen.below(islands_table(shown, self._tally))
            await trio.sleep(ASK_S)

    async def _watch(self, child: Child) -> None:
        await child.process.wait()
        if child.stopping:
            return
        with trio.move_on_after(LAST_WORDS_S):
            await child.read.wait()
        if child.label != "gateway":
            if not self._is_ready:
                return  # `_wait_ready` ends the demo, with the reason
            self._say(f"{child.label} {child.fate}", style="red")
            if (child.process.returncode or 0) > 0:  # not killed: it says why
                self._say(terminal_safe(last_words(child)), style="red")
            if all(other.fate is not None for other in self._children[1:]):
                command = island_command(self._mesh, self._island_options)
                self._say(f"no Island is left. Start one: {command}", style="yellow")
        elif self._url:  # else `_start` tells
            words = last_words(child) if child.process.returncode != -signal.SIGKILL else ""
            raise DemoFailed(f"the gateway: {child.fate}; the Islands were stopped\n{words}".rstrip())

    async def _read_logs(self, child: Child) -> None:
        assert child.process.stderr is not None  # noqa: S101 - opened with a pipe
        buffer = b""
        async for chunk in child.process.stderr:
            if child.log is not None:
                child.log.write(chunk)
            *lines, buffer = (buffer + chunk).split(b"\n")
            for line in lines:
                text = line.decode("utf-8", "replace")
                child.last_lines.append(text)
                if child.label == "gateway" and (chain := chain_untrusted(text)) is not None:
                    self._take_chain(chain)
                if (told := told_untrusted(child.label, text, self._tally)) is not None:
                    self._say(terminal_safe(told[0]), style=told[1])
        child.read.set()

    def _log_in(self, data_dir: Path) -> BinaryIO | None:
        """Where a process's log is kept, if its folder is. Raises DemoFailed."""
        if self._arguments.data_dir is None:
            return None
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            return self._logs.enter_context((data_dir / LOG_NAME).open("ab", buffering=0))
        except OSError as error:
            raise DemoFailed(f"{data_dir}: {error.strerror}; choose another place with --data-dir") from error

    def _take_chain(self, chain: ChainShown | NoChainShown) -> None:
        """Before the demo is ready, its end is waited for; after, changes are told at once."""
        if isinstance(chain, NoChainShown):
            self._no_chain = chain
            if self._chain is not None:
                command = island_command(self._mesh, self._island_options)
                self._say(f"  too little memory is left: {chain.reason}", style="red")
                self._say(f"  start one more Island: {command}", style="yellow")
            return
        running, self._chain, self._no_chain = self._chain, chain, None
        if running is not None:
            for line in chain.lines():
                self._say(terminal_safe(line), style="bold cyan")

    @property
    def _island_options(self) -> str:
        """What else one more Island for this demo needs on its command line."""
        cargo = self._arguments.cargo
        options = "" if cargo == DEFAULT_CARGO else f" --cargo {shlex.quote(cargo)}"
        return options + "".join(f" --set {shlex.quote(each)}" for each in self._island_settings)

    async def _drain(self, child: Child) -> None:
        """Keep reading standard output, so that the child never blocks on it."""
        assert child.process.stdout is not None  # noqa: S101 - opened with a pipe
        async for _ in child.process.stdout:
            pass

    async def _lines_of(self, child: Child, enough: Callable[[str], bool]) -> list[str]:
        assert child.process.stdout is not None  # noqa: S101 - opened with a pipe
        text = ""
        with trio.move_on_after(READY_TIMEOUT_S):
            async for chunk in child.process.stdout:
                text += chunk.decode()
                lines = text.split("\n")[:-1]
                if lines and enough(lines[-1]):
                    return lines
            with trio.CancelScope(shield=True), trio.move_on_after(1):
                await child.process.wait()
        raise DemoFailed(f"the {child.label} did not start\n{last_words(child)}")

    # --- end ----------------------------------------------------------------------------------------

    async def _stop_on_signal(
        self, scope: trio.CancelScope, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
            task_status.started()
            impatient = False
            async for number in signals:
                if number == signal.SIGHUP:
                    _to_nowhere()  # the terminal is gone, and our folder should go, too
                if not impatient:
                    self._say("\nstopping")
                    scope.cancel()
                for child in self._children if impatient else ():
                    child.process.kill()
                impatient = True

    async def _stop(self) -> None:
        remove_connection(self._connection)
        running = [child for child in self._children if not child.stopping]
        for child in running:
            child.stopping = True
            if child.process.returncode is None:
                child.process.send_signal(signal.SIGCONT)  # a frozen one could not end
                child.process.terminate()
        with trio.move_on_after(STOP_S):
            for child in running:
                await child.process.wait()
        for child in running:
            if child.process.returncode is None:
                child.process.kill()
                await child.process.wait()
        if running:
            self._say("stopped")

    @property
    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._key}"}

    def _say(self, text: str, *, style: str = "") -> None:
        self._screen.line(text, style=style)


def _to_nowhere() -> None:
    """From here on, what is printed goes nowhere: a terminal that was closed fails each write."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _assignments(texts: list[str]) -> list[str]:
    return [part for text in texts for part in ("--set", text)]


def _free_port(wanted: int) -> int:
    """The wanted port if nobody has it, else 0 (any)."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError as error:
            if error.errno in {errno.EADDRINUSE, errno.EACCES}:
                return 0
            raise
    return wanted
