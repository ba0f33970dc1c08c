"""Prepares `.venv`: what `make setup` runs. Standard library only; says what it does while it does it.

Steps, each skipped when its inputs have not changed since it last succeeded:
system packages (installed with apt-get when that is possible, else named in one line), the virtual
environment, build requirements, the native engine (llama.cpp: the long part, cached as a wheel), the rest.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
WHEELS = ROOT / ".cache" / "wheels"
STAMP = VENV / ".prepared"
LOCKS = ROOT / "locks"

# What must be there -> Debian's package for it. Python's headers and GMP: for the sources among our
# dependencies (fastecdsa); the compiler: for those and llama.cpp.
COMMANDS = {"gcc": "gcc", "g++": "g++", "make": "make"}
HEADERS = {"gmp.h": "libgmp-dev", "Python.h": "python3-dev"}

NINJA_STEP = re.compile(r"\[(\d+)/(\d+)\]")
# A line of progress at most this often; in a log file, where each stays, more seldom.
PROGRESS_S = 1.0 if sys.stdout.isatty() else 10.0


def main() -> int:
    dev = "--run-only" not in sys.argv[1:]
    lock = LOCKS / ("dev.txt" if dev else "run.txt")
    if sys.version_info < (3, 11):  # noqa: UP036 - run by whatever python3 the machine has
        return fail(f"Python 3.11 or newer is needed; this is {sys.version.split()[0]}")
    stamp = fingerprint(
        [lock, LOCKS / "build.txt", LOCKS / "native.txt", ROOT / "pyproject.toml", Path(__file__)]
    )
    if prepared(stamp):
        return 0
    with only_one():
        return 0 if prepared(stamp) else prepare(lock, stamp)


def prepared(stamp: str) -> bool:
    return STAMP.exists() and STAMP.read_text() == stamp and PYTHON.exists()


@contextmanager
def only_one() -> Generator[None]:
    """One set-up at a time in a checkout: a second `make` waits for the first."""
    (ROOT / ".cache").mkdir(exist_ok=True)
    with (ROOT / ".cache" / "setup.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another set-up is running here; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def prepare(lock: Path, stamp: str) -> int:
    started = time.monotonic()
    missing = missing_system_packages()
    if missing and not install_system_packages(missing):
        return fail(f"missing system packages; run:  sudo apt-get install {' '.join(missing)}")
    if not has_pip():
        say("virtual environment in .venv")
        try:
            venv.create(VENV, with_pip=True, clear=VENV.exists())
        except subprocess.CalledProcessError:
            return fail(
                "this Python can not make virtual environments; run:  sudo apt-get install python3-venv"
            )
    say("build requirements")
    pip(count(LOCKS / "build.txt"), "install", "--require-hashes", "-r", str(LOCKS / "build.txt"))
    wheel = native_wheel()
    say(f"{count(lock)} packages")
    pip(1, "install", "--no-deps", str(wheel))
    rest = without_native(lock)
    pip(count(rest), "install", "--require-hashes", "--no-build-isolation", "-r", str(rest))
    pip(1, "install", "--no-deps", "--no-build-isolation", "-e", str(ROOT))
    remove_obsolete_stubs()
    STAMP.write_text(stamp)
    say(f"ready after {time.monotonic() - started:.0f} s")
    return 0


def has_pip() -> bool:
    """Whether .venv is whole: a set-up that was interrupted early leaves a Python without pip."""
    if not PYTHON.exists():
        return False
    return subprocess.run([PYTHON, "-m", "pip", "--version"], capture_output=True, check=False).returncode == 0


def missing_system_packages() -> list[str]:
    missing = {package for command, package in COMMANDS.items() if shutil.which(command) is None}
    include = [Path(sysconfig.get_paths()["include"]), Path("/usr/include"), Path("/usr/local/include")]
    include += list(Path("/usr/include").glob("*-linux-gnu")) if Path("/usr/include").is_dir() else []
    for header, package in HEADERS.items():
        if not any((folder / header).exists() for folder in include):
            missing.add(package)
    return sorted(missing)


def install_system_packages(packages: list[str]) -> bool:
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        return False
    say(f"system packages: {' '.join(packages)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update", "-q"], ["apt-get", "install", "-qy", *packages]):
        if subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=False).returncode != 0:
            return False
    return not missing_system_packages()


def native_wheel() -> Path:
    """Build llama-cpp-python's wheel once per lock, machine type and Python; keep it in .cache."""
    slim = ROOT / "native" / "slim.cmake"
    key = fingerprint([LOCKS / "native.txt", slim])[:12] + f"-{sys.implementation.cache_tag}-{cpu_key()}"
    folder = WHEELS / key
    built = next(iter(folder.glob("llama_cpp_python-*.whl")), None)
    if built is not None:
        return built
    say("native engine (llama.cpp): a few minutes on two cores")
    partial = folder.with_suffix(".partial")
    partial.mkdir(parents=True, exist_ok=True)
    source = native_source(partial)
    slimming = f"-DLLAVA_BUILD=OFF -DCMAKE_PROJECT_llama.cpp_INCLUDE={slim}"
    environment = {
        **os.environ,
        "CMAKE_ARGS": f"{slimming} {os.environ.get('CMAKE_ARGS', '')}",
        "PATH": f"{VENV / 'bin'}{os.pathsep}{os.environ['PATH']}",
    }
    command = [
        *(str(PYTHON), "-m", "pip", "wheel", "-v", "--no-deps", "--no-cache-dir", "--no-build-isolation"),
        # Object files stay where they are, so that an interrupted build goes on where it stopped.
        *("-C", f"build-dir={partial / 'objects'}", "-w", str(partial), str(source)),
    ]
    log = partial / "build.log"
    with log.open("w") as out, running(command, environment) as (build, lines):
        shown = 0.0
        for line in lines:
            out.write(line)
            step = NINJA_STEP.search(line)
            if step and (time.monotonic() - shown > PROGRESS_S or step[1] == step[2]):
                progress(int(step[1]), int(step[2]))
                shown = time.monotonic()
    if sys.stdout.isatty():
        print("\r" + " " * 30 + "\r", end="", flush=True)
    if build.returncode != 0:
        tail = "".join(log.read_text(errors="replace").splitlines(keepends=True)[-25:])
        raise SystemExit(fail(f"the native engine did not build; the end of {log}:\n{tail}"))
    shutil.rmtree(partial / "objects")
    shutil.rmtree(source)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return next(folder.glob("llama_cpp_python-*.whl"))


def native_source(partial: Path) -> Path:
    """llama-cpp-python's source, checked against the lock and unpacked once."""
    source = partial / "source"
    if source.is_dir():
        return source
    say("fetching the source of the engine")
    lock = LOCKS / "native.txt"
    options = ("--no-deps", "--no-build-isolation", "--require-hashes", "--no-binary", ":all:")
    pip(1, "download", *options, "-d", str(partial), "-r", str(lock))
    archive = next(partial.glob("llama_cpp_python-*.tar.gz"))
    unpacked = partial / "unpacked"
    shutil.rmtree(unpacked, ignore_errors=True)
    shutil.unpack_archive(archive, unpacked)
    next(unpacked.iterdir()).rename(source)  # whole or not there
    unpacked.rmdir()
    archive.unlink()
    return source


def cpu_key() -> str:
    """The build uses this processor's instructions, so a wheel does not move to another kind of machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(flags.encode()).hexdigest()[:8]


def without_native(lock: Path) -> Path:
    """The lock less the engine, which is installed from our own build of the same source."""
    kept: list[str] = []
    skipping = False
    for line in lock.read_text().splitlines():
        if not line.startswith(" "):
            skipping = line.startswith("llama-cpp-python==")
        if not skipping:
            kept.append(line)
    target = VENV / f"{lock.stem}-without-native.txt"
    target.write_text("\n".join(kept) + "\n")
    return target


def remove_obsolete_stubs() -> None:
    """py-libp2p depends on trio-typing, whose stubs of 2023 hide trio's own, complete annotations."""
    for stubs in VENV.glob("lib/python*/site-packages/trio-stubs"):
        shutil.rmtree(stubs)


def pip(total: int, *arguments: str) -> None:
    """Run pip quietly: a counter of packages while it works, its own words if it fails."""
    command = [
        *(str(PYTHON), "-m", "pip", "--disable-pip-version-check", "--no-input", "--no-color"),
        *(*arguments, "--progress-bar", "off"),
    ]
    lines: list[str] = []
    done = 0
    with running(command, dict(os.environ)) as (process, output):
        for line in output:
            lines.append(line)
            if line.startswith(("Collecting ", "Requirement already satisfied", "Processing ")):
                done += 1
                if total > 1 and sys.stdout.isatty():
                    print(f"\r  fetching {min(done, total)}/{total} ", end="", flush=True)
            elif line.startswith("Installing collected packages") and total > 1 and sys.stdout.isatty():
                print("\r  installing          ", end="", flush=True)
            elif "WARNING: Retrying" in line:
                say(
                    f"no answer from the package index, trying again: {line.rsplit('/simple/')[-1].strip(' /')}"
                )
    if total > 1 and sys.stdout.isatty():
        print("\r" + " " * 30 + "\r", end="", flush=True)
    if process.returncode != 0:
        words = "".join([line for line in lines if line.startswith("ERROR")] or lines[-15:])
        raise SystemExit(
            fail(
                f"pip failed:\n{words}Is the package index within reach? A mirror goes into PIP_INDEX_URL, "
                "a proxy into HTTPS_PROXY; then run it again."
            )
        )


@contextmanager
def running(
    command: list[str], environment: dict[str, str]
) -> Generator[tuple[subprocess.Popen[str], Iterable[str]]]:
    """A command and the lines that it prints. If we are interrupted, it ends with all that it started.

    A compiler's whole tree stands below it, so it has a process group of its own to be ended by: otherwise a
    `kill` of the set-up left a build going on, and the next set-up compiled into the same folder.
    """
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        assert process.stdout is not None  # noqa: S101 - Popen(stdout=PIPE) guarantees it
        try:
            yield process, process.stdout
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            raise


def fingerprint(files: list[Path]) -> str:
    digest = hashlib.sha256(sys.version.encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def count(lock: Path) -> int:
    return sum(1 for line in lock.read_text().splitlines() if "==" in line)


def progress(done: int, total: int) -> None:
    text = f"  compiling {done}/{total}"
    if sys.stdout.isatty():
        print(f"\r{text}", end="", flush=True)
    else:
        print(text, flush=True)


def say(text: str) -> None:
    print(f"setup: {text}", flush=True)


def fail(text: str) -> int:
    print(f"setup: {text}", file=sys.stderr, flush=True)
    return 1


if __name__ == "__main__":
    # A `kill` ends it as Ctrl-C does: with what it started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main())
    except OSError as error:
        sys.exit(fail(f"{error.filename or 'the system'}: {error.strerror}. Checkout whole? Disk full?"))
    except KeyboardInterrupt:
        print("\nsetup: interrupted; run it again to go on", file=sys.stderr)
        sys.exit(130)
