"""Writes slices of model files. Data is copied by the kernel, from file to file, never loaded whole."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

from cargos.errors import CargoError
from cargos.part import store_errors
from cargos.shards.gguf import Header, Incomplete, parse_header_untrusted
from cargos.shards.layout import Model, Scaled, Segment, Slice, model_of, slice_of
from protocol.limits import KIB, MIB

#: What is read of a file first: enough for the header of a model with a vocabulary of 32,000.
FIRST_READ_BYTES: Final = MIB
#: Read and written at once where the kernel can not copy by itself.
COPY_BYTES: Final = 4 * MIB
#: File systems that can not copy between files say one of these.
_CAN_NOT_COPY: Final = frozenset({errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM})


def read_header(path: Path) -> Header:
    """The header of a GGUF file, which may come from anywhere. Raises BadGguf, CargoError (not readable)."""
    try:
        with path.open("rb", buffering=0) as file:
            file_bytes = os.fstat(file.fileno()).st_size
            wanted = FIRST_READ_BYTES
            while True:
                data = os.pread(file.fileno(), wanted, 0)
                try:
                    return parse_header_untrusted(data, file_bytes)
                except Incomplete as error:
                    if len(data) < min(wanted, file_bytes):
                        raise CargoError(f"{path} shrank while it was read") from error
                    wanted = max(error.needed + 64 * KIB, 2 * wanted)
    except OSError as error:
        raise CargoError(f"can not read {path}: {error.strerror or error}", "Check the path.") from error


def read_model(path: Path) -> Model:
    """The model in a GGUF file. Raises CanNotCut (with the reason), and as `read_header`."""
    return model_of(read_header(path))


def cut(source: Path, target: Path, first: int, last: int) -> Slice:
    """Write layers `first` to `last` (exclusive) of the model in `source` to `target`, by rename when it is
    complete and on the disk. What was there is replaced.

    Raises CanNotCut, BadGguf, CargoError (source not readable), StoreUnusable (target not writable).
    """
    wanted = slice_of(read_model(source), first, last)
    write_slice(source, target, wanted)
    return wanted


def write_slice(source: Path, target: Path, wanted: Slice) -> None:
    """As `cut`, for a slice that was laid out before. `source` needs only the bytes that it names."""
    new = target.with_name(f"{target.name}.{os.getpid()}.new")
    try:
        reader = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CargoError(f"can not read {source}: {error.strerror}", "Check the path.") from error
    try:
        with store_errors(target):
            writer = os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
            try:
                os.truncate(writer, wanted.size_bytes)  # what is not written stays a hole
                _write_all(writer, wanted.header, 0)
                for part in _joined(wanted.segments):
                    _copy(reader, writer, part)
                for part in wanted.scaled:
                    _write_all(writer, _scaled(reader, part), part.target)
                os.fsync(writer)
            finally:
                os.close(writer)
            new.replace(target)
            _sync_directory(target.parent)
    finally:
        os.close(reader)
        with suppress(OSError):
            new.unlink(missing_ok=True)


def _joined(segments: Iterable[Segment]) -> Iterable[Segment]:
    """Neighbours in both files as one."""
    last: Segment | None = None
    for part in segments:
        if last and last.target + last.size == part.target and last.start + last.size == part.start:
            last = Segment(last.target, last.start, last.size + part.size)
            continue
        if last:
            yield last
        last = part
    if last:
        yield last


def _copy(reader: int, writer: int, part: Segment) -> None:
    done = 0
    by_kernel = hasattr(os, "copy_file_range")  # Linux
    while done < part.size:
        left = part.size - done
        if by_kernel:
            try:
                copied = os.copy_file_range(reader, writer, left, part.start + done, part.target + done)
            except OSError as error:
                if error.errno not in _CAN_NOT_COPY:
                    raise
                by_kernel = False
                continue
        else:
            data = os.pread(reader, min(left, COPY_BYTES), part.start + done)
            _write_all(writer, data, part.target + done)
            copied = len(data)
        if not copied:
            raise CargoError("the model's file shrank while it was cut", "Fetch it again.")
        done += copied


def _scaled(reader: int, part: Scaled) -> bytes:
    data = os.pread(reader, part.size, part.start)  # a norm: some hundred values
    if len(data) != part.size:
        raise CargoError("the model's file shrank while it was cut", "Fetch it again.")
    count = part.size // 4
    return struct.pack(f"<{count}f", *(value * part.factor for value in struct.unpack(f"<{count}f", data)))


def _write_all(writer: int, data: bytes, at: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(writer, view, at)
        view, at = view[written:], at + written


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
