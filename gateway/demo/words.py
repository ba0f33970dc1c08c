"""What the demo tells its spectator to type: commands that work as they are copied."""

from __future__ import annotations

import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

from gateway.demo.screen import NoChainShown


def _beside_us(command: str) -> str:
    """How to call another program of this installation: as it lies, seen from here."""
    path = Path(sys.executable).with_name(command)
    if not path.exists():
        return command
    here = Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))


def island_command(mesh: str, options: str = "") -> str:
    """Start one more Island for the gateway at this multiaddr."""
    start = f"{_beside_us('archi-node')} run --name isle --data-dir ~/.cache/archipelag/isle"
    return f"{start} --coordinator {mesh}{options}"


def too_little(chain: NoChainShown, memory_mib: int) -> str:
    """Why no chain can be made, and the ways out."""
    ways: list[str] = []
    if chain.enough_islands is not None and chain.enough_islands > chain.islands:
        ways.append(f"start {chain.enough_islands} Islands (--islands {chain.enough_islands})")
    if chain.enough_room_mib is not None:
        each = memory_mib + max(1, chain.enough_room_mib - chain.room_mib)
        ways.append(f"give each of the {chain.islands} at least {each} MiB (--memory-mb {each})")
    out = f": {', or '.join(ways)}" if ways else ""
    return f"the Islands have too little memory for this Cargo ({chain.reason}){out}"


def how_to(url: str, key: str, model: str, mesh: str, options: str = "") -> str:
    """How to reach the demo: `archi chat`, curl, the OpenAI client; how to kill and to add."""
    install = "" if find_spec("openai") else "pip install openai; "
    return f"""
Ask it yourself, from another terminal:

  {_beside_us("archi")} chat

or with curl and the OpenAI client:

  export OPENAI_BASE_URL={url}
  export OPENAI_API_KEY={key}

  curl $OPENAI_BASE_URL/chat/completions -H "Authorization: Bearer $OPENAI_API_KEY" \\
    -H "Content-Type: application/json" \\
    -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello!"}}], "stream": true}}'

  {install}{_beside_us("python")} -c "from openai import OpenAI; print(OpenAI().chat.completions.create(
    model='{model}', messages=[dict(role='user', content='Hello!')]).choices[0].message.content)"

Kill an Island while it answers (kill -9 PID) and watch the sentence go on. Add one at any time:

  {island_command(mesh, options)}
"""
