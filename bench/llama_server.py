"""llama.cpp's own server, built once from the very source of our locked engine, and LiteLLM beside it.

Both are peers in a benchmark only; they live in `.cache/bench` and nothing of them is installed elsewhere.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "bench"
LITELLM = "litellm[proxy]==1.106.2"

_OFF = ("CURL", "OPENSSL", "BUILD_TESTS", "BUILD_EXAMPLES", "BUILD_APP", "BUILD_UI", "USE_PREBUILT_UI")


def build_llama_server() -> Path:
    """The server's binary; takes some minutes the first time."""
    return _build(CACHE / "llama.cpp", "llama-server")[0]


def build_llama_rpc() -> tuple[Path, Path]:
    """llama.cpp's server that can use other machines, and what runs on those. A build of its own: the other
    one's figures stay those of a server without it.
    """
    server, rpc = _build(CACHE / "llama.cpp-rpc", "llama-server", "ggml-rpc-server", options=("-DGGML_RPC=ON",))
    return server, rpc


def _build(build: Path, *targets: str, options: tuple[str, ...] = ()) -> list[Path]:
    binaries = [build / "bin" / target for target in targets]
    if all(binary.exists() for binary in binaries):
        return binaries
    print(f"  building llama.cpp's own {' and '.join(targets)} (some minutes, once)", flush=True)
    sources = CACHE / "sources"
    shutil.rmtree(sources, ignore_errors=True)
    sources.mkdir(parents=True)
    run(
        *(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"),
        *("--no-build-isolation", "--require-hashes", "-d", str(sources), "-r", str(ROOT / "locks/native.txt")),
    )
    with tarfile.open(next(sources.glob("*.tar.gz"))) as archive:
        archive.extractall(sources, filter="data")
    vendored = next(sources.glob("*/vendor/llama.cpp"))
    tools = ROOT / ".venv" / "bin"
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    off = [f"-DLLAMA_{name}=OFF" for name in _OFF]
    run(
        *("cmake", "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", *off, *options),
        *("-S", str(vendored), "-B", str(build)),
        env=environment,
    )
    run("ninja", "-C", str(build), *targets, env=environment)
    return binaries


def install_litellm() -> Path:
    """Its command, in a virtual environment of its own: its pins are not ours."""
    folder = CACHE / "litellm"
    command = folder / "bin" / "litellm"
    if not command.exists():
        print("  installing LiteLLM (once)", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        run(str(folder / "bin" / "python"), "-m", "pip", "install", "-q", LITELLM)
    return command


def run(*command: str, env: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"failed: {' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_llama_server(model: Path, *, threads: int = 1, slots: int = 1) -> tuple[subprocess.Popen[bytes], int]:
    port = free_port()
    process = subprocess.Popen(
        [
            *(str(build_llama_server()), "-m", str(model), "--host", "127.0.0.1", "--port", str(port)),
            *("-t", str(threads), "-tb", str(threads), "-np", str(slots), "-c", str(2048 * slots)),
            *("--no-webui", "--jinja"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(threads)},
    )
    wait_answer(f"http://127.0.0.1:{port}/health", process)
    return process, port


def start_llama_rpc(model: Path, machines: int, *, slots: int = 1) -> tuple[list[subprocess.Popen[bytes]], int]:
    """llama.cpp's server with its layers spread over so many processes, one thread each."""
    server, rpc = build_llama_rpc()
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}

    def begin(*command: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)

    ports = [free_port() for _ in range(machines)]
    processes = [begin(str(rpc), "-H", "127.0.0.1", "-p", str(port), "-t", "1") for port in ports]
    for port in ports:
        _wait_port(port)
    served = free_port()
    processes.append(
        begin(
            *(str(server), "-m", str(model), "--host", "127.0.0.1", "--port", str(served)),
            *("--rpc", ",".join(f"127.0.0.1:{port}" for port in ports), "-ngl", "99"),
            *("-t", "1", "-tb", "1", "-np", str(slots), "-c", str(2048 * slots), "--no-webui", "--jinja"),
        )
    )
    wait_answer(f"http://127.0.0.1:{served}/health", processes[-1])
    return processes, served


def _wait_port(port: int, timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise SystemExit(f"nothing listens on port {port}")


def start_litellm(upstream_port: int, model: str, key: str) -> tuple[subprocess.Popen[bytes], int]:
    """LiteLLM's proxy as its manual sets it up: one model, no database, no callbacks, one worker."""
    command, port = install_litellm(), free_port()
    config = CACHE / "litellm.yaml"
    config.write_text(
        f"model_list:\n  - model_name: {model}\n    litellm_params:\n      model: openai/{model}\n"
        f"      api_base: http://127.0.0.1:{upstream_port}/v1\n      api_key: none\n"
        "litellm_settings:\n  telemetry: false\n"
    )
    process = subprocess.Popen(
        [
            str(command),
            "--config",
            str(config),
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--num_workers",
            "1",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={
            **os.environ,
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "LITELLM_LOG": "ERROR",
            "LITELLM_MASTER_KEY": key,
        },
    )
    wait_answer(f"http://127.0.0.1:{port}/health/liveliness", process)
    return process, port


def wait_answer(url: str, process: subprocess.Popen[bytes], timeout_s: float = 180) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"{process.args!r} ended with code {process.returncode}")
        try:
            with urllib.request.urlopen(url, timeout=2) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            pass
        time.sleep(0.2)
    raise SystemExit(f"{url} did not answer within {timeout_s:.0f} s")
