"""`archi-node cargo ...`: what Cargos there are, fetch them, check them, name them.

Each command imports what it needs itself: every `archi-node` command loads this module.
"""

from __future__ import annotations

import argparse
import functools
import json
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cargos.errors import CargoError, UnknownCargo
from cargos.shards import commands as shards
from protocol.limits import MIB

if TYPE_CHECKING:
    import trio

    from cargos.catalogue import CargoEntry
    from cargos.manifest import Manifest
    from cargos.store import CargoStore, StoredCargo

#: What a shell reports for a program that Ctrl-C ended.
INTERRUPTED = 130


class Subparsers(Protocol):
    """What argparse's add_subparsers returns, as far as it is needed."""

    def add_parser(self, name: str, *, help: str) -> argparse.ArgumentParser: ...  # noqa: A002 - argparse's


def register(subparsers: Subparsers) -> None:
    """Add the `cargo` command. Each sub-command sets `handler`: namespace in, exit code out."""
    cargo = subparsers.add_parser("cargo", help="list, fetch and check models (Cargos)")
    commands = cargo.add_subparsers(dest="cargo_command", required=True, metavar="COMMAND")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--json", action="store_true", help="for scripts")
    shared.add_argument("--cache", type=Path, default=None, help="the store's folder (default: ARCHI_CACHE)")
    named = "a name, name@version, digest, or the path of a manifest file"

    def add(
        name: str, handler: Callable[[argparse.Namespace], int], text: str, description: str | None = None
    ) -> argparse.ArgumentParser:
        parser = commands.add_parser(
            name,
            help=text,
            description=description or text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            parents=[shared],
        )
        parser.set_defaults(handler=functools.partial(_handle, handler))
        return parser

    add("list", list_cargos, "the Cargos that ship with archipelag, and those fetched")
    add("show", show_cargo, "one manifest").add_argument("cargo", help=named)
    add("fetch", fetch_cargos, "download and verify").add_argument("cargo", nargs="+", help=named)
    add("verify", verify_cargos, "hash fetched files again; damaged ones are fetched anew").add_argument(
        "cargo", nargs="*", help=f"{named} (default: all that were fetched)"
    )
    add("remove", remove_cargo, "delete a Cargo's files").add_argument("cargo", help=named)
    digest = add("digest", digest_manifest, "the digest of a manifest file")
    digest.add_argument("manifest", type=Path, help="a .toml or .json file")
    digest.add_argument("--canonical", action="store_true", help="print the canonical bytes instead")
    shards.register(add, _find_model)


def _handle(handler: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    return _guarded(lambda: handler(arguments))


def list_cargos(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    def work() -> int:
        rows = _known(_store(arguments))
        if arguments.json:
            _print_json([_describe(manifest, present) for manifest, present in rows])
            return 0
        table = Table(box=None, pad_edge=False)
        for column in ("NAME", "VERSION", "RUNTIME", "SIZE", "MEMORY", "STATE", "DIGEST"):
            justify = "right" if column in ("SIZE", "MEMORY") else "left"
            table.add_column(column, justify=justify, no_wrap=column == "NAME", min_width=len(column))
        for manifest, present in rows:
            table.add_row(
                manifest.name,
                manifest.version,
                manifest.runtime,
                f"{-(-manifest.total_bytes // MIB)} MiB",
                f"{manifest.needs.memory_mib} MiB",
                "fetched" if present else "not fetched",
                manifest.digest[:19],
            )
        Console(highlight=False).print(table)
        return 0

    return _guarded(work)


def show_cargo(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from cargos.manifest import canonical_json

    def work() -> int:
        store = _store(arguments)
        manifest = _resolve(arguments.cargo, store).manifest
        if arguments.json:
            _print_json({**json.loads(canonical_json(manifest)), "digest": manifest.digest})
            return 0
        needs, out = manifest.needs, Console(highlight=False, markup=False, soft_wrap=True)
        gpu = "no GPU" if needs.gpu == "none" else f"GPU {needs.gpu} ({needs.vram_mib} MiB)"
        out.print(f"{manifest.title}\n{manifest.description}".rstrip())
        for label, value in (
            ("name", f"{manifest.name}@{manifest.version}"),
            ("digest", manifest.digest),
            ("publisher", f"{manifest.publisher} (not signed)"),
            ("licence", f"{manifest.licence.spdx} {manifest.licence.url}".rstrip()),
            ("runtime", str(manifest.runtime)),
            ("context", f"{manifest.context_length} tokens" if manifest.context_length else "-"),
            ("needs", f"{needs.memory_mib} MiB memory, {needs.cpu_cores} core(s), {gpu}"),
            ("capabilities", ", ".join(manifest.capabilities) or "-"),
            ("in a chain", _chain_words(manifest)),
        ):
            out.print(f"  {label:<13}{value}")
        for file in manifest.files:
            out.print(f"  file         {file.name} ({file.role}, {file.size_bytes} bytes)")
            out.print(f"{'':15}sha256 {file.sha256}")
            for source in file.sources:
                out.print(f"{'':15}from {source}")
        return 0

    return _guarded(work)


def _chain_words(manifest: Manifest) -> str:
    sharding = manifest.sharding
    if sharding is None:
        return "no (the manifest does not say how its layers can be spread)"
    return f"yes: {sharding.layers} layers ('archi-node cargo inspect {manifest.name}' says what Islands need)"


def fetch_cargos(arguments: argparse.Namespace) -> int:
    return _guarded(lambda: _run(_ensure_all, arguments, _resolve_all(arguments), False))


def verify_cargos(arguments: argparse.Namespace) -> int:
    from cargos.catalogue import CargoEntry

    def work() -> int:
        store = _store(arguments)
        stored = {cargo.digest: cargo for cargo in store.list()}
        if not arguments.cargo:
            entries = [CargoEntry(cargo.manifest, cargo.digest) for cargo in stored.values()]
        else:
            entries = _resolve_all(arguments)
        for entry in entries:
            if entry.digest not in stored:
                raise CargoError(
                    f"{entry.manifest.name} was not fetched", "Run 'archi-node cargo fetch' first."
                )
        return _run(_ensure_all, arguments, entries, True)

    return _guarded(work)


def remove_cargo(arguments: argparse.Namespace) -> int:
    import trio

    from cargos.shards.store import ShardStore

    def work() -> int:
        store = _store(arguments)
        entry = _resolve(arguments.cargo, store)
        freed = trio.run(ShardStore(store).forget, entry.manifest)
        if not freed or any(cargo.digest == entry.digest for cargo in store.list()):
            freed += trio.run(store.remove, entry.digest)
        if arguments.json:
            _print_json({"digest": entry.digest, "freed_bytes": freed})
        else:
            print(f"removed {entry.manifest.name}@{entry.manifest.version}, {freed // MIB} MiB freed")
        return 0

    return _guarded(work)


def digest_manifest(arguments: argparse.Namespace) -> int:
    from cargos.manifest import canonical_bytes
    from cargos.resolve import load_manifest

    def work() -> int:
        manifest = load_manifest(arguments.manifest)
        if arguments.canonical:
            sys.stdout.buffer.write(canonical_bytes(manifest))
            sys.stdout.buffer.flush()
        elif arguments.json:
            _print_json({"name": manifest.name, "version": manifest.version, "digest": manifest.digest})
        else:
            print(manifest.digest)
        return 0

    return _guarded(work)


async def _ensure_all(arguments: argparse.Namespace, entries: Sequence[CargoEntry], verify: bool) -> int:  # noqa: FBT001 - called through trio.run
    from cargos.cli_progress import show_progress

    store = _store(arguments)
    results: list[dict[str, Any]] = []
    with show_progress() as progress:
        for entry in entries:
            paths = await store.ensure(entry.manifest, base=entry.base, progress=progress, verify=verify)
            files = {name: str(path) for name, path in paths.items()}
            results.append({"name": entry.manifest.name, "digest": entry.digest, "files": files})
    if arguments.json:
        _print_json(results)
    else:
        for result in results:
            for path in result["files"].values():
                print(path)
    return 0


def _run(
    work: Callable[[argparse.Namespace, Sequence[CargoEntry], bool], Awaitable[int]],
    arguments: argparse.Namespace,
    entries: Sequence[CargoEntry],
    verify: bool,  # noqa: FBT001 - as above
) -> int:
    """Run under trio; Ctrl-C and SIGTERM cancel, which keeps what can be resumed."""
    import trio

    code = INTERRUPTED
    failure: CargoError | None = None

    async def main() -> None:
        nonlocal code, failure
        async with trio.open_nursery() as nursery:

            async def watch(task_status: trio.TaskStatus[None]) -> None:
                with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                    task_status.started()
                    async for _ in signals:
                        print("stopping; what came so far is kept", file=sys.stderr)
                        nursery.cancel_scope.cancel()

            await nursery.start(watch)
            try:
                code = await work(arguments, entries, verify)
            except CargoError as error:
                failure = error
            nursery.cancel_scope.cancel()

    trio.run(main)
    if failure is not None:
        raise failure
    return code


def _guarded(work: Callable[[], int]) -> int:
    try:
        return work()
    except CargoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _store(arguments: argparse.Namespace) -> CargoStore:
    from cargos.store import CargoStore

    return CargoStore(arguments.cache)


def _known(store: CargoStore) -> list[tuple[Manifest, bool]]:
    """Shipped Cargos and fetched ones, each once, with whether its files are here."""
    from cargos.resolve import builtin_catalogue

    stored: dict[str, StoredCargo] = {cargo.digest: cargo for cargo in store.list()}
    shipped = [
        (entry.manifest, entry.digest in stored and stored.pop(entry.digest).present)
        for entry in builtin_catalogue()
    ]
    return shipped + [(cargo.manifest, cargo.present) for cargo in stored.values()]


def _resolve(reference: str, store: CargoStore) -> CargoEntry:
    """As `resolve_cargo`, and Cargos that were fetched from elsewhere by name, name@version or digest."""
    from cargos.catalogue import CargoEntry
    from cargos.resolve import resolve_cargo

    try:
        return resolve_cargo(reference)
    except UnknownCargo:
        for cargo in store.list():
            manifest = cargo.manifest
            if reference in (cargo.digest, manifest.name, f"{manifest.name}@{manifest.version}"):
                return CargoEntry(manifest, cargo.digest)
        raise


def _resolve_all(arguments: argparse.Namespace) -> list[CargoEntry]:
    store = _store(arguments)
    return [_resolve(reference, store) for reference in arguments.cargo]


def _find_model(reference: str, needed: bool, arguments: argparse.Namespace) -> shards.Target:  # noqa: FBT001 - as `shards.Find` has it
    """The model file that is meant: a path to a GGUF, or a Cargo's, fetched if it is needed."""
    if reference.endswith(".gguf"):
        path = Path(reference)
        return shards.Target(path.stem, path)
    store = _store(arguments)
    entry = _resolve(reference, store)
    file = entry.manifest.file_with_role("model")
    if file is None or not file.name.endswith(".gguf"):
        raise CargoError(f"{entry.manifest.name} has no GGUF model", "Only those have layers that we can cut.")
    path = store.verified_path(file)
    if path is None and needed:
        _run(_fetch_quietly, arguments, [entry], False)
        path = store.verified_path(file)
    return shards.Target(entry.manifest.name, path, entry.manifest.sharding)


async def _fetch_quietly(arguments: argparse.Namespace, entries: Sequence[CargoEntry], verify: bool) -> int:  # noqa: FBT001 - as above
    from cargos.cli_progress import show_progress

    with show_progress() as progress:
        for entry in entries:
            await _store(arguments).ensure(entry.manifest, base=entry.base, progress=progress, verify=verify)
    return 0


def _describe(manifest: Manifest, present: bool) -> dict[str, Any]:  # noqa: FBT001 - a field of the row
    return {
        "name": manifest.name,
        "version": manifest.version,
        "digest": manifest.digest,
        "runtime": str(manifest.runtime),
        "size_bytes": manifest.total_bytes,
        "memory_mib": manifest.needs.memory_mib,
        "fetched": present,
    }


def _print_json(value: object) -> None:
    import msgspec

    print(msgspec.json.format(msgspec.json.encode(value)).decode())
