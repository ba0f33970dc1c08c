"""Ask a gateway one question and write the answer as it comes: what the demo shows first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import msgspec


class QuestionFailed(Exception):
    """The gateway answered with an error, in its own words."""


async def ask(url: str, key: str, model: str, question: str, *, write: Callable[[str], None]) -> str:
    """Stream the answer to `write`; returns one line on who answered and how fast.

    Raises QuestionFailed, httpx.HTTPError.
    """
    request = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 120,
        "temperature": 0.3,
        "seed": 1,
    }
    usage: dict[str, Any] = {}
    async with (
        httpx.AsyncClient(timeout=httpx.Timeout(60.0)) as client,
        client.stream(
            "POST", f"{url}/chat/completions", json=request, headers={"Authorization": f"Bearer {key}"}
        ) as response,
    ):
        if response.status_code != 200:
            body = (await response.aread()).decode("utf-8", "replace")
            raise QuestionFailed(f"{response.status_code}: {body}")
        island = response.headers.get("x-archipelag-island", "?")
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = msgspec.json.decode(line[6:], type=dict[str, Any])
            if "error" in chunk:
                raise QuestionFailed(str(chunk["error"].get("message")))
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                write(choice["delta"].get("content") or "")
    extra: dict[str, Any] = usage.get("archipelag", {})
    return f"[{island}: {usage.get('completion_tokens')} tokens, {extra.get('tokens_per_second')} tokens/s]"
