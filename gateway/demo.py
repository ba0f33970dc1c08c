"""`archi demo`: a whole archipelag on one machine, each part a process of its own.

For scripts it prints, each on a line of its own: `gateway pid N`, `island NAME pid N` for each Island, and
`ready URL key KEY` once it answers. All processes end with this one, however it ends: they watch their
standard input, which closes with us.
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

import httpx
import msgspec
import trio
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from cargos.errors import CargoError
from cargos.manifest import Manifest
from cargos.progress import FetchProgress
from cargos.resolve import resolve_cargo
from cargos.store import CargoStore
from gateway.keys import new_key
from gateway.questions import QuestionFailed, ask
from node.control import NotRunning, Snapshot, ask_status
from node.runner import flatten

DEFAULT_PORT: Final = 8080
NAMES: Final = ("coral", "atoll", "lagoon", "reef", "skerry", "cay", "holm", "islet")
QUESTION: Final = "In two sentences: why is the sea salty?"

#: Loading a Cargo on a busy two-core machine takes seconds; minutes mean that something is wrong.
READY_TIMEOUT_S: Final = 180
#: How long a child may take to end before it is killed.
STOP_S: Final = 5
#: A child's last words, kept for the error message.
LAST_LINES: Final = 30
REFRESH_S: Final = 0.5


class DemoFailed(Exception):
    """The demo can not go on; the message says why and what to do."""


@dataclass(slots=True)
class Child:
    """One process of the demo."""

    label: str
    process: trio.Process
    data_dir: Path
    last_lines: deque[str] = field(default_factory=lambda: deque[str](maxlen=LAST_LINES))
    stopping: bool = False


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
    parser.add_argument("--cargo", default="smollm2-135m", help="Cargo to run: a name or a manifest file")
    parser.add_argument("--key", help="API key to use (default: a fresh one)")
    parser.add_argument("--no-question", action="store_true", help="do not ask a first question")
    parser.add_argument("--data-dir", type=Path, help="keep the processes' state and logs there")
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
    demo = Demo(arguments)
    failures: list[Exception] = []
    try:
        trio.run(demo.run)
    except* (DemoFailed, CargoError, QuestionFailed, httpx.HTTPError) as group:
        failures.extend(flatten(group))
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


class Demo:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._console = Console(highlight=False, soft_wrap=True)
        self._key: str = arguments.key or new_key()
        self._children: list[Child] = []
        self._url = ""

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._stop_on_signal, nursery.cancel_scope)
            with tempfile.TemporaryDirectory(prefix="archipelag-demo-") as temporary:
                root: Path = self._arguments.data_dir or Path(temporary)
                entry = resolve_cargo(self._arguments.cargo)
                await self._fetch(entry.manifest, entry.base)
                try:
                    await self._start(root, nursery)
                    await self._show(entry.manifest.name)
                finally:
                    with trio.CancelScope(shield=True):
                        await self._stop()

    # --- start --------------------------------------------------------------------------------------

    async def _fetch(self, manifest: Manifest, base: object) -> None:
        """The Cargo's files, before any Island asks for them, so that it happens once and is seen."""
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, console=self._console, transient=True) as bar:
            tasks: dict[str, Any] = {}
            said: set[str] = set()

            def show(progress: FetchProgress) -> None:
                if progress.state == "done" and progress.file not in tasks:
                    return
                if progress.file not in tasks:
                    tasks[progress.file] = bar.add_task(progress.file, total=progress.total_bytes)
                    if not self._console.is_terminal and progress.file not in said:
                        said.add(progress.file)
                        self._say(f"fetching {progress.file} from {progress.source}")
                bar.update(
                    tasks[progress.file],
                    completed=progress.done_bytes,
                    total=progress.total_bytes,
                    description=f"{progress.file} ({progress.state})",
                )

            await CargoStore().ensure(manifest, base=cast("Path | None", base), progress=show)

    async def _start(self, root: Path, nursery: trio.Nursery) -> None:
        port = self._arguments.port if self._arguments.port is not None else _free_port(DEFAULT_PORT)
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
        mesh = lines[-1].removeprefix("mesh ")
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
                    *("--coordinator", mesh, "--log-format", "json"),
                    *_assignments(self._arguments.set_island),
                ],
                {},
            )
            self._say(f"island {name} pid {island.process.pid}")
            nursery.start_soon(self._drain, island)
        nursery.start_soon(self._drain, gateway)
        await self._wait_ready()
        self._say(f"ready {self._url} key {self._key}")

    async def _spawn(
        self, nursery: trio.Nursery, label: str, data_dir: Path, module: list[str], extra: Mapping[str, str]
    ) -> Child:
        environment = {name: value for name, value in os.environ.items() if name != "ARCHI_CONFIG"}
        process = await trio.lowlevel.open_process(
            [sys.executable, "-m", *module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**environment, **extra, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # Ctrl-C is for us; we end the children in order
        )
        child = Child(label, process, data_dir)
        self._children.append(child)
        nursery.start_soon(self._read_logs, child)
        nursery.start_soon(self._watch, child, nursery.cancel_scope)
        return child

    async def _wait_ready(self) -> None:
        with trio.move_on_after(READY_TIMEOUT_S):
            async with httpx.AsyncClient() as client:
                while True:
                    response = await client.get(self._url + "/models", headers=self._headers)
                    if response.status_code == 200 and await self._islands_ready():
                        return
                    await trio.sleep(0.1)
        raise DemoFailed(f"the Islands were not ready within {READY_TIMEOUT_S} s\n{self._last_words()}")

    async def _islands_ready(self) -> bool:
        for child in self._children[1:]:
            if child.process.returncode is not None:
                raise DemoFailed(f"{child.label} ended before it was ready\n{self._last_words()}")
            try:
                snapshot = await ask_status(child.data_dir)
            except NotRunning:
                return False
            failed = next((cargo for cargo in snapshot.cargos if cargo.state == "failed"), None)
            if failed is not None:
                raise DemoFailed(f"{child.label} can not run {failed.name}: {failed.detail}")
            if not snapshot.cargos or any(cargo.state != "ready" for cargo in snapshot.cargos):
                return False
            if not any("coordinator" in peer.roles for peer in snapshot.peers):
                return False
        return True

    # --- while it runs ------------------------------------------------------------------------------

    async def _show(self, model: str) -> None:
        if not self._arguments.no_question:
            self._say(f"\n> {QUESTION}")
            closing = await ask(self._url, self._key, model, QUESTION, write=self._write)
            self._say(f"\n{closing}")
            self._say(_HOW_TO.format(url=self._url, key=self._key, model=model))
        if self._console.is_terminal:
            with Live(console=self._console, auto_refresh=False, transient=True) as live:
                while True:
                    live.update(await self._table(), refresh=True)
                    await trio.sleep(REFRESH_S)
        await trio.sleep_forever()

    async def _table(self) -> Table:
        table = Table(box=None, header_style="dim", pad_edge=False)
        for column in ("Island", "pid", "state", "RTT ms", "jobs", "tokens", "tokens/s alone"):
            table.add_column(column, justify="left" if column in {"Island", "state"} else "right")
        for child in self._children[1:]:
            pid = str(child.process.pid)
            if child.process.returncode is not None:
                table.add_row(child.label, pid, Text("gone", style="red"))
                continue
            snapshot: Snapshot | None = None
            try:
                with trio.move_on_after(0.3):
                    snapshot = await ask_status(child.data_dir)
            except NotRunning:
                pass
            if snapshot is None or not snapshot.cargos:
                table.add_row(child.label, pid, Text("silent", style="yellow"))
                continue
            cargo, load = snapshot.cargos[0], snapshot.cargos[0].load
            rtt = next((peer.rtt_ms for peer in snapshot.peers if peer.rtt_ms is not None), None)
            table.add_row(
                child.label,
                pid,
                Text(cargo.state, style="green" if cargo.state == "ready" else "yellow"),
                "-" if rtt is None else f"{rtt:.2f}",
                str(len(snapshot.jobs)),
                str(load.tokens_total) if load else "-",
                f"{load.decode_tps:.0f}" if load else "-",
            )
        return table

    async def _watch(self, child: Child, scope: trio.CancelScope) -> None:
        code = await child.process.wait()
        if child.stopping:
            return
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        self._say(f"{child.label} {how}")
        if child.label == "gateway":
            self._say(self._last_words())
            scope.cancel()

    async def _read_logs(self, child: Child) -> None:
        assert child.process.stderr is not None  # noqa: S101 - opened with a pipe
        buffer = b""
        async for chunk in child.process.stderr:
            *lines, buffer = (buffer + chunk).split(b"\n")
            for line in lines:
                text = line.decode("utf-8", "replace")
                child.last_lines.append(text)
                if (event := _told(child.label, text)) is not None:
                    self._say(event)

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
        raise DemoFailed(f"the {child.label} did not start\n{self._last_words()}")

    def _last_words(self) -> str:
        return "\n".join(
            f"  {child.label}: {line}" for child in self._children for line in list(child.last_lines)[-5:]
        )

    # --- end ----------------------------------------------------------------------------------------

    async def _stop_on_signal(self, scope: trio.CancelScope) -> None:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async for _ in signals:
                self._say("\nstopping")
                scope.cancel()
                return

    async def _stop(self) -> None:
        for child in self._children:
            child.stopping = True
            if child.process.returncode is None:
                child.process.send_signal(signal.SIGCONT)  # a frozen one could not end
                child.process.terminate()
        with trio.move_on_after(STOP_S):
            for child in self._children:
                await child.process.wait()
        for child in self._children:
            if child.process.returncode is None:
                child.process.kill()
                await child.process.wait()
        if self._children:
            self._say("stopped")

    # --- words --------------------------------------------------------------------------------------

    @property
    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._key}"}

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False)
        self._console.file.flush()

    def _write(self, text: str) -> None:
        self._console.print(text, end="", markup=False)
        self._console.file.flush()


_HOW_TO: Final = """
Ask it yourself, from another terminal:

  curl {url}/chat/completions -H "Authorization: Bearer {key}" -H "Content-Type: application/json" \\
    -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello!"}}], "stream": true}}'

  python -c "from openai import OpenAI; print(OpenAI(base_url='{url}', api_key='{key}').chat.completions.create(
    model='{model}', messages=[dict(role='user', content='Hello!')]).choices[0].message.content)"

  archi chat --url {url} --key {key}

Kill an Island while it answers (kill -9 PID) and watch the sentence go on. Ctrl-C stops everything.
"""


def _told(label: str, line: str) -> str | None:
    """A log line as one for the spectator, or None if it is of no interest to her."""
    try:
        record = msgspec.json.decode(line, type=dict[str, Any])
    except msgspec.DecodeError:
        return None
    job = str(record.get("job", ""))[:4]
    match record.get("event"):
        case "island":
            return f"  {record['name']} has joined"
        case "island lost":
            return f"  {record['name']} is lost: {record['reason']}"
        case "job placed" if record["hand_over"]:
            return f"  job {job} goes on at {record['island']} from token {record['tokens']}"
        case "job placed":
            return f"  job {job} runs at {record['island']} (RTT {record['rtt_ms']} ms)"
        case "job completed":
            moved = f", {record['hand_overs']} hand-over(s)" if record["hand_overs"] else ""
            return f"  job {job} done: {record['tokens']} tokens, {record['tps']} tokens/s{moved}"
        case "job failed":
            return f"  job {job} failed: {record['detail']}"
        case "cargo state" if record["state"] == "ready":
            return f"  {label} has loaded the model: {record['decode_tps']} tokens/s"
        case "worker restarted":
            return f"  {label}: the engine died and was restarted"
        case _:
            return None


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
