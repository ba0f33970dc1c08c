"""The memory that the laboratory and its router share (the structs of router.c), and what is counted in it."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

MAGIC: Final = 0x31424C41
HEADER_BYTES: Final = 4096
LATENESS_BUCKETS: Final = 32

_HEADER: Final = np.dtype(
    [
        ("magic", "u4"),
        ("nodes", "u4"),
        ("network", "u4"),
        ("ready", "u4"),
        ("queue_bytes", "u8"),
        ("held_bytes_max", "u8"),
        ("seed", "u8"),
        ("forwarded", "u8"),
        ("lost", "u8"),
        ("cut", "u8"),
        ("overflow", "u8"),
        ("unroutable", "u8"),
        ("failed", "u8"),
        ("held_bytes", "u8"),
        ("late_max_ns", "u8"),
        ("lateness", "u8", (LATENESS_BUCKETS,)),
    ]
)
_LINK: Final = np.dtype(
    [("delay_ns", "u8"), ("jitter_ns", "u8"), ("bytes_per_s", "u8"), ("loss", "u4"), ("cut", "u4")]
)


@dataclass(frozen=True, slots=True)
class LabFigures:
    """Packets since the start. `late_p50_us`, `late_p99_us`: how long after their time they were delivered,
    rounded up to a power of two. `overflow`: no room in a link's queue or in all; `failed`: no device took it.
    """

    forwarded: int
    lost: int
    cut: int
    overflow: int
    unroutable: int
    failed: int
    late_p50_us: int
    late_p99_us: int
    late_max_us: int


class Shared:
    """One mapping of that memory. `links[i, j]` is the link from i to j."""

    def __init__(self, nodes: int) -> None:
        size = HEADER_BYTES + nodes * nodes * _LINK.itemsize + nodes * 4
        self.descriptor = os.memfd_create("archipelag-lab")
        os.ftruncate(self.descriptor, size)
        self._memory = mmap.mmap(self.descriptor, size)
        buffer = np.frombuffer(self._memory, np.uint8)
        self._header: NDArray[Any] = buffer[: _HEADER.itemsize].view(_HEADER)
        tuns_at = HEADER_BYTES + nodes * nodes * _LINK.itemsize
        self.links: NDArray[Any] = buffer[HEADER_BYTES:tuns_at].view(_LINK).reshape(nodes, nodes)
        self.tuns: NDArray[np.int32] = buffer[tuns_at:].view(np.int32)
        self["magic"] = MAGIC
        self["nodes"] = nodes

    def __getitem__(self, name: str) -> int:
        return int(self._header[name][0])

    def __setitem__(self, name: str, value: int) -> None:
        self._header[name] = value

    def figures(self) -> LabFigures:
        counts = self._header["lateness"][0].astype(np.int64)
        names = ("forwarded", "lost", "cut", "overflow", "unroutable", "failed")
        return LabFigures(
            **{name: self[name] for name in names},
            late_p50_us=_percentile_us(counts, 0.50),
            late_p99_us=_percentile_us(counts, 0.99),
            late_max_us=self["late_max_ns"] // 1000,
        )

    def close(self) -> None:
        """Idempotent. The figures can still be read."""
        if self.descriptor < 0:
            return
        self._header, self.links, self.tuns = self._header.copy(), self.links.copy(), self.tuns.copy()
        self._memory.close()  # nothing looks into it any more
        os.close(self.descriptor)
        self.descriptor = -1


def _percentile_us(counts: NDArray[np.int64], share: float) -> int:
    total = int(counts.sum())
    if not total:
        return 0
    bucket = int(np.searchsorted(np.cumsum(counts), share * total))
    return 1 << min(bucket, LATENESS_BUCKETS - 1)
