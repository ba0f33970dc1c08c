"""Text generation with llama.cpp: `open_llama` loads a GGUF Cargo into a supervised worker process."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cargos.runtimes.llama.runtime import LlamaRuntime, open_llama

__all__ = ["LlamaRuntime", "open_llama"]


def __getattr__(name: str) -> object:
    # Late, because the worker process imports this package too and has no use for trio: it starts sooner.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from cargos.runtimes.llama import runtime  # noqa: PLC0415  (the reason is the line above)

    return getattr(runtime, name)
