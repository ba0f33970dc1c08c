"""What a fetch tells about itself while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

#: 'waiting': another process on this machine fetches the file (its bytes so far are counted). 'checking':
#: hashing what is there. 'downloading', 'copying' (file:), 'extracting' (out of a wheel), 'rewriting' (f16:),
#: 'cutting' (a slice of a model). 'retrying': the source broke off, the next attempt starts soon. 'done':
#: verified, in the store.
FetchState: TypeAlias = Literal[
    "waiting", "checking", "downloading", "copying", "extracting", "rewriting", "cutting", "retrying", "done"
]


@dataclass(frozen=True, slots=True)
class FetchProgress:
    """`source` as the manifest writes it, '' when none is in use. `total_bytes` None: not known (pip does not
    tell how large a wheel is).
    """

    file: str
    source: str
    done_bytes: int
    total_bytes: int | None
    state: FetchState


ProgressCallback: TypeAlias = Callable[[FetchProgress], None]
#: What a source calls: state, bytes done, bytes in all.
Report: TypeAlias = Callable[[FetchState, int, "int | None"], None]
