"""Fixtures of the tests of cutting: the synthetic models and the native chain, which lie beside this file."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest


def _load(name: str) -> ModuleType:
    unique = f"archipelag_tests_shards_{name.replace('/', '_')}"
    if unique not in sys.modules:
        spec = importlib.util.spec_from_file_location(unique, Path(__file__).parent / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[unique] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[unique]


@pytest.fixture(scope="session")
def synthetic() -> ModuleType:
    """`synthetic.write_model(path, synthetic.Shape(...))`."""
    return _load("synthetic")


@pytest.fixture(scope="session")
def native() -> ModuleType:
    """`native.run_chain(paths, tokens, more)`."""
    return _load("native_chain")


@pytest.fixture
def server() -> Iterator[object]:
    """The file server of the store's tests: `server.serve(path, data, ...)`."""
    store = _load("../store/conftest")
    with store.running(store.FileServer()) as server:
        yield server
