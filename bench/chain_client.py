"""A client that streams answers as any OpenAI client would, also out of a namespace of the delay laboratory."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.lab import Lab
from protocol.dice import Dice

KEY = "ak_bench_0123456789abcdef"

ANSWER_S = 300

WORDS = (
    *(
        "harbour",
        "salt",
        "wind",
        "tide",
        "rope",
        "sail",
        "gull",
        "pier",
        "storm",
        "chart",
        "lamp",
        "reef",
        "island",
    ),
    *("cloud", "letter", "market", "bread", "candle", "garden", "window", "river", "stone", "copper", "winter"),
)


def prose(dice: Dice, words: int) -> str:
    """Words in no order, so that no cache knows them and nothing repeats for long."""
    return " ".join(dice.choice(WORDS) for _ in range(words))


@dataclass
class Answer:
    """What a client saw. Times are of `time.perf_counter`, in seconds."""

    began: float = 0.0
    pieces: list[str] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)
    ended: float = 0.0
    finish: str = ""
    error: str = ""
    usage: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def tokens(self) -> int:
        return int(self.usage.get("completion_tokens", 0))

    @property
    def prompt_tokens(self) -> int:
        return int(self.usage.get("prompt_tokens", 0))

    @property
    def ttft_s(self) -> float:
        return self.arrivals[0] - self.began

    @property
    def decode_tps(self) -> float:
        """Tokens/s behind the first. Those that arrived in the first piece together with it count as later
        ones; that is one piece in some dozens.
        """
        return (self.tokens - 1) / (self.arrivals[-1] - self.arrivals[0])

    @property
    def longest_gap_s(self) -> float:
        return max((b - a for a, b in zip(self.arrivals, self.arrivals[1:], strict=False)), default=0.0)


def checked(answer: Answer) -> Answer:
    """The answer itself. Raises SystemExit if it was none: a figure of it would mean nothing."""
    if answer.error or not answer.finish or len(answer.arrivals) < 1:
        raise SystemExit(f"no answer: {answer.error or answer.finish or 'the stream broke'}")
    return answer


class Client:
    """Of whatever answers at `host` and `port`. With a laboratory it asks from within its node 0."""

    def __init__(self, host: str, port: int, model: str, *, lab: Lab | None = None) -> None:
        self.host, self.port, self.model, self.lab = host, port, model, lab

    def _connect(self) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=ANSWER_S)

        def open_socket() -> socket.socket:
            made = socket.create_connection((self.host, self.port), ANSWER_S)
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return made

        connection.sock = open_socket() if self.lab is None else self.lab.inside(0, open_socket)
        return connection

    def get(self, path: str) -> Any:  # noqa: ANN401 - JSON
        connection = self._connect()
        connection.request("GET", path, headers={"Authorization": f"Bearer {KEY}"})
        response = connection.getresponse()
        body = response.read()
        connection.close()
        return json.loads(body) if response.status == 200 else None

    def ask(
        self,
        prompt: str,
        tokens: int,
        *,
        at: Callable[[Answer], None] | None = None,
        **fields: Any,  # noqa: ANN401 - JSON
    ) -> Answer:
        """Stream an answer, greedy unless `fields` say otherwise; `at` is called after each piece."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": tokens,
            "temperature": 0,
            "seed": 1,
            "ignore_eos": True,
            "timeout_s": ANSWER_S,
            **fields,
        }
        answer = Answer()
        connection = self._connect()
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        answer.began = time.perf_counter()
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            answer.error = f"{response.status}: {response.read(2000).decode('utf-8', 'replace')}"
        else:
            self._read(response, answer, at)
        answer.ended = time.perf_counter()
        connection.close()
        return answer

    @staticmethod
    def _read(response: http.client.HTTPResponse, answer: Answer, at: Callable[[Answer], None] | None) -> None:
        while line := response.readline():
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                answer.error = chunk["error"]["message"]
                return
            answer.usage = chunk.get("usage") or answer.usage
            for choice in chunk["choices"]:
                answer.finish = choice["finish_reason"] or answer.finish
                if choice["delta"].get("content"):
                    answer.pieces.append(choice["delta"]["content"])
                    answer.arrivals.append(time.perf_counter())
                    if at is not None:
                        at(answer)

    def ask_many(self, prompts: Sequence[str], tokens: int) -> list[Answer]:
        answers: list[Answer] = [Answer() for _ in prompts]

        def one(index: int) -> None:
            answers[index] = self.ask(prompts[index], tokens)

        threads = [threading.Thread(target=one, args=(index,)) for index in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for answer in answers:
            checked(answer)
        return answers
