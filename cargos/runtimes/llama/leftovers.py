"""What importing llama-cpp-python leaves open, closed."""

from __future__ import annotations

from typing import Any, cast

from llama_cpp import _utils


def close_leftovers() -> None:
    """Its high-level API, which we do not use, opens /dev/null twice at import and never closes it.

    Called by each module that imports the package; closing twice does no harm.
    """
    for null in (cast("Any", _utils).outnull_file, cast("Any", _utils).errnull_file):
        null.close()
