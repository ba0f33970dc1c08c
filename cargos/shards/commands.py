"""`archi-node cargo split|inspect|pieces`: models by layers, for those who publish or study them."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from cargos.errors import CargoError
from protocol.limits import MIB

if TYPE_CHECKING:
    from cargos.manifest import Sharding
    from cargos.progress import ProgressCallback

#: Chains that `inspect` tells of.
SHOWN_STAGES: Final = (2, 3, 4)
_LAYERS: Final = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?\Z", re.ASCII)


@dataclass(frozen=True, slots=True)
class Target:
    """What a command is about: a GGUF file, or a Cargo whose model is not here: only its manifest tells."""

    name: str
    path: Path | None
    sharding: Sharding | None = None


#: Finds a Cargo's model: reference, whether it must be here, arguments.
Find = Callable[[str, bool, argparse.Namespace], Target]

SPLIT_HELP: Final = """
Cut a model into slices that each hold some of its layers. Islands do this by themselves; the command is
there to look at slices, to bring them to machines by hand, and to try them out.

The first slice has the embeddings and takes token ids; the last one has the vocabulary and the tokenizer.
Each is a GGUF file of its own. Layers are counted from 0, the last one of a range included.

  archi-node cargo split smollm2-135m --stages 3           three slices of about equal size
  archi-node cargo split model.gguf --layers 0-9 --out /tmp
"""
INSPECT_HELP: Final = """
Say what is in a model: its architecture and layers, whether it can be spread over several Islands (and if
not, why not), and what each Island of a chain needs.
"""
PIECES_HELP: Final = """
Make the piece list of a file (FILE.pieces) and print what belongs into its manifest: size, hashes, and for
models the section that says how their layers can be spread.

With these lines in the manifest, Islands fetch the file from each other piece by piece, and those that hold
only some layers fetch only what they need. If the file is served over https, put FILE.pieces beside it.
"""


def register(add: Callable[..., argparse.ArgumentParser], find: Find) -> None:
    """Add the commands. `add(name, handler, help, description)` makes a parser."""

    def split_it(arguments: argparse.Namespace) -> int:
        return split_model(arguments, find)

    def inspect_it(arguments: argparse.Namespace) -> int:
        return inspect_model(arguments, find)

    split = add("split", split_it, "cut a model by layers", SPLIT_HELP)
    split.add_argument("model", metavar="CARGO|FILE.gguf", help="what to cut")
    how = split.add_mutually_exclusive_group(required=True)
    how.add_argument("--stages", type=int, metavar="N", help="cut it into N slices")
    how.add_argument("--layers", type=_layers, metavar="A-B", help="cut out layers A to B (included)")
    split.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="where to (default: here)")
    inspect = add("inspect", inspect_it, "what is in a model, and what a chain of it needs", INSPECT_HELP)
    inspect.add_argument("model", metavar="CARGO|FILE.gguf")
    pieces = add("pieces", make_pieces, "the piece list of a file, for its manifest", PIECES_HELP)
    pieces.add_argument("file", type=Path, metavar="FILE")
    pieces.add_argument(
        "--piece-kib", type=int, metavar="KIB", help="size of a piece (default: by the file's size)"
    )


def split_model(arguments: argparse.Namespace, find: Find) -> int:
    from cargos.shards.cut import read_model, write_slice  # noqa: PLC0415 - as in cargos/cli.py
    from cargos.shards.layout import balanced_stages, sharding_of, slice_of  # noqa: PLC0415

    target = find(arguments.model, True, arguments)
    if target.path is None:
        raise CargoError(f"the model of {target.name} is not here")
    model = read_model(target.path)
    if arguments.layers is not None:
        first, last = arguments.layers
        if last >= model.layers:
            raise CargoError(f"there is no layer {last}: the model has layers 0 to {model.layers - 1}")
        ranges = ((first, last + 1),)
    else:
        ranges = balanced_stages(sharding_of(model), arguments.stages)
    rows: list[dict[str, Any]] = []
    for first, last in ranges:
        wanted = slice_of(model, first, last)
        path = arguments.out / f"{target.name}.{first}-{last - 1}of{model.layers}.gguf"
        if path.exists() and path.samefile(target.path):
            raise CargoError(f"{path} is the model itself")
        write_slice(target.path, path, wanted)
        rows.append({"first": first, "last": last - 1, "size_bytes": wanted.size_bytes, "path": str(path)})
        if not arguments.json:
            print(
                f"layers {first}-{last - 1} of {model.layers}  {_mib(wanted.size_bytes):>6} MiB  {path}",
                flush=True,
            )
    if arguments.json:
        _print_json(rows)
    return 0


def inspect_model(arguments: argparse.Namespace, find: Find) -> int:
    from cargos.shards.architectures import CanNotCut  # noqa: PLC0415 - as in cargos/cli.py
    from cargos.shards.cut import read_header  # noqa: PLC0415
    from cargos.shards.layout import model_of, sharding_of  # noqa: PLC0415

    target = find(arguments.model, False, arguments)
    facts: dict[str, Any] = {"model": target.name}
    sharding, reason = target.sharding, None
    if target.path is not None:
        header = read_header(target.path)
        name = header.text("general.architecture") or "?"
        facts["architecture"] = name
        facts["layers"] = header.integer(f"{name}.block_count")
        facts["size_bytes"] = target.path.stat().st_size
        facts["tensors"] = len(header.tensors)
        part = [header.integer(f"slice.{key}") for key in ("first", "last", "of")]
        if None not in part:
            facts["slice"] = part
        try:
            model = model_of(header)
        except CanNotCut as error:
            sharding, reason = None, error
        else:
            sharding = sharding_of(model)
            facts["vocabulary"] = model.vocabulary
            facts["tied"] = model.tied
    elif sharding is None:
        raise CargoError(
            f"{target.name} is not fetched, and its manifest says nothing of layers",
            f"'archi-node cargo fetch {target.name}' brings the model itself.",
        )
    if sharding is not None:
        facts |= _facts(sharding)
    facts["can_be_spread"] = sharding is not None
    if reason is not None:
        facts["reason"] = reason.problem
    if arguments.json:
        _print_json(facts)
    else:
        _show(facts, sharding, reason)
    return 0


def _facts(sharding: Sharding) -> dict[str, Any]:
    from cargos.shards.layout import balanced_stages  # noqa: PLC0415 - as in cargos/cli.py

    chains = {
        str(stages): [
            {"first": first, "last": last - 1, "weights_bytes": sharding.stage_bytes(first, last)}
            for first, last in balanced_stages(sharding, stages)
        ]
        for stages in SHOWN_STAGES
        if stages <= sharding.layers
    }
    return {
        "architecture": sharding.architecture,
        "layers": sharding.layers,
        "width": sharding.width,
        "layer_bytes": list(sharding.layer_bytes),
        "embedding_bytes": sharding.embedding_bytes,
        "head_bytes": sharding.head_bytes,
        "kv_bytes": sharding.kv_bytes,
        "chains": chains,
    }


def _show(facts: dict[str, Any], sharding: Sharding | None, reason: CargoError | None) -> None:
    def line(label: str, value: object) -> None:
        print(f"  {label:<14}{value}")

    print(facts["model"])
    line("architecture", facts["architecture"])
    if "size_bytes" in facts:
        line("file", f"{_mib(facts['size_bytes'])} MiB, {facts['tensors']} tensors")
    if "slice" in facts:
        first, last, of = facts["slice"]
        line("slice", f"layers {first}-{last - 1} of {of}")
    if sharding is None:
        line("layers", facts["layers"])
        line("in a chain", f"no: {reason.problem if reason else ''}")
        if reason is not None and reason.hint:
            line("", reason.hint)
        return
    least, most = min(sharding.layer_bytes), max(sharding.layer_bytes)
    each = f"{_tenths(least)}" + (f" to {_tenths(most)}" if _tenths(least) != _tenths(most) else "")
    line("layers", f"{sharding.layers}, each of {each} MiB; rows of {sharding.width} values between them")
    shared = " (the same matrix)" if facts.get("tied") else ""
    line(
        "ends",
        f"embeddings {_tenths(sharding.embedding_bytes)} MiB, head {_tenths(sharding.head_bytes)} MiB{shared}",
    )
    line("memory", f"{sharding.kv_bytes} bytes for each token in each layer (f16)")
    line("in a chain", "yes; weights of each Island, balanced:")
    for stages, parts in facts["chains"].items():
        words = ", ".join(f"{p['first']}-{p['last']}: {_mib(p['weights_bytes'])} MiB" for p in parts)
        line("", f"{stages} Islands   {words}")


def make_pieces(arguments: argparse.Namespace) -> int:
    from cargos.cli_progress import show_progress  # noqa: PLC0415 - as in cargos/cli.py
    from cargos.manifest import MAX_PIECE_BYTES, MIN_PIECE_BYTES  # noqa: PLC0415
    from cargos.progress import FetchProgress  # noqa: PLC0415
    from cargos.shards.pieces import hash_pieces, list_sha256, piece_bytes_for  # noqa: PLC0415

    path: Path = arguments.file
    try:
        size = path.stat().st_size
    except OSError as error:
        raise CargoError(f"can not read {path}: {error.strerror}", "Check the path.") from error
    if not path.is_file() or not size:
        raise CargoError(f"{path} is no file with content")
    piece = piece_bytes_for(size) if arguments.piece_kib is None else arguments.piece_kib * 1024
    if not MIN_PIECE_BYTES <= piece <= MAX_PIECE_BYTES or piece & (piece - 1):
        raise CargoError(
            f"pieces of {piece} bytes",
            f"A power of two between {MIN_PIECE_BYTES // 1024} and {MAX_PIECE_BYTES // 1024} KiB, please.",
        )

    def hashed(progress: ProgressCallback) -> tuple[bytes, str]:
        return hash_pieces(
            path, piece, lambda done: progress(FetchProgress(path.name, "", done, size, "checking"))
        )

    out = path.with_name(f"{path.name}.pieces")
    try:
        with show_progress() as progress:
            hashes, sha256 = hashed(progress)
        out.write_bytes(hashes)
    except OSError as error:
        raise CargoError(
            f"{error.filename or path}: {error.strerror}", "Check the disk and its rights."
        ) from error
    file = {"size_bytes": size, "sha256": sha256, "piece_bytes": piece, "pieces_sha256": list_sha256(hashes)}
    sharding, reason = _sharding_of(path)
    if arguments.json:
        import msgspec  # noqa: PLC0415 - as in cargos/cli.py

        _print_json({**file, "list": str(out), "sharding": msgspec.to_builtins(sharding), "reason": reason})
        return 0
    print(f"wrote {out} ({len(hashes)} bytes). The manifest's lines:", file=sys.stderr)
    print("\n".join(f"{key} = {_toml(value)}" for key, value in file.items()))
    if sharding is not None:
        print("\n[sharding]")
        for key in sharding.__struct_fields__:
            print(f"{key} = {_toml(getattr(sharding, key))}")
    elif reason is not None:
        print(f"# no [sharding]: {reason}")
    return 0


def _sharding_of(path: Path) -> tuple[Sharding | None, str | None]:
    """How the model's layers can be spread; else why not (None: it is no model)."""
    from cargos.shards.cut import read_model  # noqa: PLC0415 - as in cargos/cli.py
    from cargos.shards.layout import sharding_of  # noqa: PLC0415

    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            return None, None
    try:
        return sharding_of(read_model(path)), None
    except CargoError as error:
        return None, error.problem


def _layers(text: str) -> tuple[int, int]:
    found = _LAYERS.match(text)
    if found is None:
        raise argparse.ArgumentTypeError("write A-B, such as 0-9: layers from 0 on, the last one included")
    first = int(found[1])
    last = int(found[2]) if found[2] is not None else first
    if last < first:
        raise argparse.ArgumentTypeError(f"{first}-{last} are no layers")
    return first, last


def _toml(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, cast('tuple[int, ...]', value)))}]"
    return f'"{value}"' if isinstance(value, str) else str(value)


def _mib(size: int) -> int:
    return -(-size // MIB)


def _tenths(size: int) -> str:
    return f"{size / MIB:.1f}"


def _print_json(value: object) -> None:
    import msgspec  # noqa: PLC0415 - as in cargos/cli.py

    print(msgspec.json.format(msgspec.json.encode(value)).decode())
