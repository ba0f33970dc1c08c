"""`archi-node doctor`: what this machine can run, what is missing and how to get it.

Every finding is looked at, none assumed: the engine is loaded, a socket is bound, coordinators are dialled.
"""

from __future__ import annotations

import os
import platform
import shutil
import stat
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal

import psutil
import trio
from rich.console import Console
from rich.text import Text

from cargos.catalogue import CargoEntry
from cargos.errors import CargoError
from cargos.manifest import RuntimeType
from cargos.resolve import builtin_catalogue, resolve_cargo
from cargos.store import default_root
from node.config import NodeSettings
from node.control import NotRunning, ask_status
from node.identity import new_identity
from node.p2p import AddressInvalid, ListenFailed, Unreachable, open_host, parse_peer_address

MIB: Final = 1024 * 1024
#: Loading the engine in a fresh process takes about a second on a slow disk.
ENGINE_TIMEOUT_S: Final = 60
DIAL_TIMEOUT_S: Final = 5
#: A host must listen somewhere; this one only dials.
NOWHERE_ELSE: Final = "/ip4/127.0.0.1/tcp/0"
#: Several Cargos of the smaller kind, with room for a download beside its unpacked file.
SHORT_OF_DISK_MIB: Final = 2048
_CACHE_REMEDY: Final = "choose another folder with ARCHI_CACHE or cache_dir"

State = Literal["ok", "note", "missing"]


@dataclass(frozen=True, slots=True)
class Finding:
    """`state`: ok; note (works, could be better); missing (does not work). `remedy` says what to do."""

    topic: str
    state: State
    text: str
    remedy: str = ""

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


async def examine(settings: NodeSettings) -> list[Finding]:
    """Look at everything; takes a few seconds."""
    findings = [_python(), *_machine(settings), _gpu(), await _engine(), _identity(settings)]
    findings += await _listening(settings)
    findings += await _coordinators(settings.network.coordinators)
    findings += _cargos(settings)
    findings += _later_runtimes()
    return findings


def show_findings(findings: list[Finding]) -> None:
    marks = {"ok": ("ok", "green"), "note": ("note", "yellow"), "missing": ("missing", "bold red")}
    console = Console(highlight=False, soft_wrap=True)  # a remedy is there to be copied: no breaks in it
    for finding in findings:
        mark, style = marks[finding.state]
        text = Text.assemble((f"{mark:<9}", style), f"{finding.topic:<14}{finding.text}")
        if finding.remedy:
            text.append(f"\n{'':23}-> {finding.remedy}", style="dim")
        console.print(text)
    missing = sum(finding.state == "missing" for finding in findings)
    console.print(f"\n{missing} missing: see -> above" if missing else "\nthis machine is ready")


def _python() -> Finding:
    version = platform.python_version()
    if sys.version_info < (3, 11):  # noqa: UP036 - the doctor may be run by any Python
        return Finding("python", "missing", version, "install Python 3.11 or newer")
    return Finding("python", "ok", f"{version} on {platform.system()} {platform.machine()}")


def _machine(settings: NodeSettings) -> list[Finding]:
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    memory = psutil.virtual_memory()
    findings = [
        Finding("processor", "ok", f"{cores} cores, {_cpu_name()}"),
        Finding(
            "memory",
            "ok" if memory.available > 1024 * MIB else "note",
            f"{memory.available // MIB} MiB free of {memory.total // MIB}",
            "" if memory.available > 1024 * MIB else "close programs, or choose smaller Cargos",
        ),
    ]
    if settings.engine.threads > cores:
        findings.append(
            Finding(
                "threads",
                "note",
                f"{settings.engine.threads} engine threads on {cores} cores: much slower, not faster",
                f"--threads {cores}",
            )
        )
    return [*findings, _cache(settings)]


def _cache(settings: NodeSettings) -> Finding:
    root = Path(settings.cache_dir).expanduser() if settings.cache_dir else default_root(os.environ)
    folder = root.absolute()
    while not folder.exists():
        folder = folder.parent
    try:
        # Permission bits alone say nothing to root, nor of read-only and special file systems.
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free // MIB
    except OSError as error:
        why = "is a file" if folder.is_file() else error.strerror
        return Finding("cache", "missing", f"nothing can be written to {root}: {folder}: {why}", _CACHE_REMEDY)
    if free < SHORT_OF_DISK_MIB:
        return Finding(
            "cache", "note", f"{root}, only {free} MiB free", f"free some disk space, or {_CACHE_REMEDY}"
        )
    return Finding("cache", "ok", f"{root}, {free} MiB free")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    flags = next((line for line in lines if line.startswith("flags")), "")
    best = next((flag for flag in ("avx512f", "avx2", "avx", "neon") if f" {flag}" in flags), "no vector")
    return f"{name} ({best})"


def _gpu() -> Finding:
    if shutil.which("nvidia-smi") is None:
        return Finding("gpu", "note", "no NVIDIA driver found: models run on the processor")
    return Finding("gpu", "note", "an NVIDIA driver is there; this version's engine runs on the processor")


async def _engine() -> Finding:
    """In a process of its own: a library built for another processor dies with a signal."""
    code = "import llama_cpp, sys; llama_cpp.llama_backend_init(); sys.stdout.write(llama_cpp.__version__)"
    with trio.move_on_after(ENGINE_TIMEOUT_S):
        done = await trio.run_process(
            [sys.executable, "-c", code], capture_stdout=True, capture_stderr=True, check=False
        )
        if done.returncode == 0:
            return Finding("engine", "ok", f"llama.cpp by llama-cpp-python {done.stdout.decode().strip()}")
        if done.returncode < 0:
            return Finding(
                "engine",
                "missing",
                f"the native engine dies with signal {-done.returncode}: built for another processor?",
                "rm -r .cache/wheels .venv && make setup",
            )
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        return Finding("engine", "missing", " ".join(last) or "does not load", "make setup")
    return Finding(
        "engine", "missing", f"did not load within {ENGINE_TIMEOUT_S} s", "is the machine overloaded?"
    )


def _identity(settings: NodeSettings) -> Finding:
    file = settings.data_path / "identity.key"
    try:
        mode = stat.S_IMODE(file.stat().st_mode)
    except FileNotFoundError:
        return Finding("identity", "ok", f"none yet; made at the first start in {file}")
    except OSError as error:
        return Finding(
            "identity", "missing", f"{file}: {error.strerror}", "set --data-dir to a folder of yours"
        )
    if mode & 0o077:
        return Finding(
            "identity", "missing", f"{file} is readable by others (mode {mode:o})", f"chmod 600 {file}"
        )
    return Finding("identity", "ok", str(file))


async def _listening(settings: NodeSettings) -> list[Finding]:
    try:
        running = await ask_status(settings.data_path)
    except NotRunning:
        running = None
    if running is not None:
        return [Finding("island", "ok", f"running: {running.name}, {len(running.peers)} peers")]
    findings: list[Finding] = []
    for address in settings.network.listen:
        try:
            async with open_host(new_identity(), [address]):
                findings.append(Finding("listen", "ok", address))
        except AddressInvalid as error:
            findings.append(Finding("listen", "missing", error.reason, "use /ip4/0.0.0.0/tcp/4002"))
        except ListenFailed as error:
            findings.append(Finding("listen", "missing", str(error), "--listen /ip4/127.0.0.1/tcp/0"))
    return findings


async def _coordinators(addresses: Sequence[str]) -> list[Finding]:
    """Dialled as an Island does it, handshake included, by an identity that is thrown away."""
    if not addresses:
        remedy = "--coordinator MULTIADDR (a gateway prints its own at start)"
        return [Finding("coordinators", "note", "none configured: nobody will send jobs", remedy)]
    return [await _coordinator(address) for address in addresses]


async def _coordinator(address: str) -> Finding:
    try:
        parse_peer_address(address)
        # A host of its own: one that knows the peer already would not dial this address.
        async with open_host(new_identity(), [NOWHERE_ELSE]) as host:
            with trio.fail_after(DIAL_TIMEOUT_S):
                await host.connect(address)
    except AddressInvalid as error:
        return Finding("coordinator", "missing", error.reason, "use /ip4/HOST/tcp/PORT/p2p/PEER")
    except (Unreachable, trio.TooSlowError) as error:
        reason = error.reason if isinstance(error, Unreachable) else f"silent for {DIAL_TIMEOUT_S} s"
        text = f"{address} does not answer: {reason}"
        return Finding("coordinator", "missing", text, "is the gateway up, the port open, the peer id its own?")
    return Finding("coordinator", "ok", address)


def _cargos(settings: NodeSettings) -> list[Finding]:
    findings: list[Finding] = []
    entries: dict[str, CargoEntry] = {entry.digest: entry for entry in builtin_catalogue()}
    for reference in settings.cargos:
        try:
            entry = resolve_cargo(reference)
        except CargoError as error:
            findings.append(Finding("cargo", "missing", error.problem, error.hint))
        else:
            entries[entry.digest] = entry
    available = psutil.virtual_memory().available // MIB
    for entry in entries.values():
        manifest = entry.manifest
        label = f"{manifest.name}: {manifest.title}"
        if manifest.runtime is not RuntimeType.LLMCPP:
            findings.append(
                Finding("cargo", "note", f"{label}: no runtime for {manifest.runtime} in this version")
            )
        elif manifest.needs.memory_mib > available:
            findings.append(
                Finding(
                    "cargo", "note", f"{label}: needs {manifest.needs.memory_mib} MiB, {available} are free"
                )
            )
        else:
            findings.append(Finding("cargo", "ok", f"{label}: fits ({manifest.needs.memory_mib} MiB)"))
    return findings


def _later_runtimes() -> list[Finding]:
    have = [name for name in ("crun", "runc", "bwrap") if shutil.which(name)]
    text = f"container sandbox tools here: {', '.join(have)}" if have else "no container sandbox tools here"
    return [Finding("containers", "note", f"{text}; container Cargos are not run by this version")]
