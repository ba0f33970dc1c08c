"""`archi chat`: a conversation in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import tomllib
from collections.abc import Callable, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, cast

import trio
from rich.console import Console

from gateway.chat_client import Answering, ChatClient, ChatEvent, ChatFailed, Closed, HandedOver, Text
from gateway.connection import connection_path, read_connection

with contextlib.suppress(ImportError):  # line editing and recall with the arrow keys, where Python has it
    import readline  # noqa: F401  # pyright: ignore[reportUnusedImport]  # imported for its effect on input()

DEFAULT_URL: Final = "http://127.0.0.1:8080/v1"

#: Turns kept of a conversation; older ones are forgotten first. A long one exceeds the model's context anyway.
MAX_TURNS: Final = 200

_HELP: Final = """\
/model          list the models; /model NAME changes to one
/reset          forget the conversation
/help           this
/quit           leave (so does Ctrl-D)
Ctrl-C stops an answer; at the prompt it leaves."""

_EPILOG: Final = """\
The key and the address come from the flags, else from ARCHIPELAG_API_KEY and ARCHIPELAG_URL, else from
~/.config/archipelag/chat.toml (url = "...", key = "...", model = "..."), else from a demo that runs on this
machine. Any OpenAI-compatible server will do.
"""


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """`model` None: the first that the server lists."""

    url: str
    key: str | None
    model: str | None


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:  # pyright: ignore[reportPrivateUsage]  # argparse has no public name for it
    """Add the `chat` command to an argparse parser's subparsers; its `handler` returns the exit code."""
    parser = subparsers.add_parser(
        "chat",
        help="talk to a model in the terminal",
        description="Talk to a model over the mesh, in the terminal.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--url", help=f"the API's address, with its /v1 (default {DEFAULT_URL})")
    parser.add_argument("--key", help="API key (better: ARCHIPELAG_API_KEY, which other users can not see)")
    parser.add_argument("--model", help="model to start with (default: the first that is offered)")
    parser.add_argument("--system", metavar="TEXT", help="instructions for the model")
    parser.add_argument("-p", "--prompt", metavar="TEXT", help="ask this, print the answer and leave")
    parser.set_defaults(handler=run_chat)


def run_chat(arguments: argparse.Namespace) -> int:
    """0 when the user leaves; 1 if the server can not be used at all, or `--prompt` got no answer."""
    console = Console(highlight=False, soft_wrap=True)
    complain = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        settings = _settings(arguments, os.environ)
        client = ChatClient(settings.url, settings.key)
        model = settings.model or _first_model(client)
        chat = Chat(client, model, console, system=cast("str | None", arguments.system))
        prompt = cast("str | None", arguments.prompt)
        if prompt is not None:
            chat.answer(prompt)
            return 0
    except ChatFailed as failure:
        complain.print(f"error: {terminal_safe(str(failure))}", markup=False)
        return 1
    return chat.loop(input)


def _settings(arguments: argparse.Namespace, environ: Mapping[str, str]) -> ChatSettings:
    path = Path(environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "archipelag" / "chat.toml"
    stored: dict[str, object] = {}
    if path.is_file():
        try:
            stored = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ChatFailed(f"{path} can not be read: {error}") from error

    def setting(flag: str, variable: str) -> str | None:
        given = cast("str | None", getattr(arguments, flag))
        value = given or environ.get(variable) or stored.get(flag)
        if value is not None and not isinstance(value, str):
            raise ChatFailed(f"{path}: {flag} must be text")
        return value

    url, key = setting("url", "ARCHIPELAG_URL"), setting("key", "ARCHIPELAG_API_KEY")
    if url is None and key is None and (demo := read_connection(connection_path(environ))) is not None:
        url, key = demo.url, demo.key
    return ChatSettings(url or DEFAULT_URL, key, setting("model", "ARCHIPELAG_MODEL"))


def _first_model(client: ChatClient) -> str:
    models = trio.run(client.models)
    if not models:
        raise ChatFailed(f"{client.url} offers no model at the moment.")
    return models[0]


def terminal_safe(text: str) -> str:
    """Text of a model or a server without what could steer the terminal (escape sequences, bells, ...)."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t")


@dataclass(slots=True)
class Chat:
    """The conversation and its screen."""

    client: ChatClient
    model: str
    console: Console
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list[dict[str, str]])

    def loop(self, ask_user: Callable[[str], str]) -> int:
        """Read, answer, until the user leaves."""
        self._note(f"{self.model} at {self.client.url}. /help tells what else there is.")
        while True:
            try:
                line = ask_user("> ").strip()
            except (EOFError, KeyboardInterrupt):
                self.console.out()
                return 0
            if line == "/quit":
                return 0
            try:
                if line.startswith("/"):
                    self._command(line)
                elif line:
                    self.answer(line)
            except ChatFailed as failure:
                self._note(f"error: {failure}")

    def answer(self, question: str) -> None:
        """Ask, show the answer as it comes, and remember both. Raises ChatFailed.

        An answer that Ctrl-C stops is remembered as far as it came; one that fails is not, nor its question.
        """
        asked = [*self.messages, {"role": "user", "content": question}]
        try:
            said = trio.run(self._show_answer, asked)
        except BaseExceptionGroup as group:
            if group.subgroup(KeyboardInterrupt) is None:
                raise
            raise KeyboardInterrupt from None
        self.messages = [*asked, {"role": "assistant", "content": said}][-2 * MAX_TURNS :]

    async def _show_answer(self, asked: list[dict[str, str]]) -> str:
        said: list[str] = []
        failure: ChatFailed | None = None
        closed = False
        system = [{"role": "system", "content": self.system}] if self.system else []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_on_ctrl_c, nursery.cancel_scope)
            try:
                async with aclosing(self.client.ask(self.model, [*system, *asked])) as events:
                    async for event in events:
                        self._show(event, said)
                        closed = isinstance(event, Closed)
            except ChatFailed as failed:
                failure = failed
            nursery.cancel_scope.cancel()
        if failure is not None:
            if said:
                self.console.out()
            raise failure
        if not closed:
            self._note("\nstopped")
        return "".join(said)

    def _show(self, event: ChatEvent, said: list[str]) -> None:
        match event:
            case Answering():
                pass
            case Text(text):
                said.append(text)
                self.console.out(terminal_safe(text), end="", highlight=False)
                self.console.file.flush()
            case HandedOver(island):
                self._note(f" [goes on at {island}] ", end="")
            case Closed():
                self.console.out()
                self._note(figures(event))

    def _command(self, line: str) -> None:
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        if name == "/reset":
            self.messages = []
            self._note("forgotten")
        elif name == "/model" and argument:
            self.model = argument
            self._note(f"now {self.model}")
        elif name == "/model":
            for model in trio.run(self.client.models):
                self._note(f"{'*' if model == self.model else ' '} {model}")
        elif name == "/help":
            self._note(_HELP)
        else:
            self._note(f"{name} is no command.\n{_HELP}")

    def _note(self, text: str, *, end: str = "\n") -> None:
        self.console.out(terminal_safe(text), style="dim", end=end, highlight=False)


def figures(closed: Closed) -> str:
    """Who answered, how fast: one line."""
    parts = [closed.island] if closed.island else []
    if closed.stages:
        parts = ["layers " + ", ".join(closed.stages)]
    if closed.tokens_per_second is not None:
        parts.append(f"{closed.tokens_per_second:.1f} tokens/s")
    if closed.completion_tokens is not None:
        parts.append(f"{closed.completion_tokens} tokens")
    if closed.ttft_ms is not None:
        parts.append(f"first after {closed.ttft_ms:.0f} ms")
    if closed.hand_overs:
        parts.append(f"{closed.hand_overs} hand-over{'s' if closed.hand_overs > 1 else ''}")
    if closed.stages_lost:
        parts.append(f"{closed.stages_lost} stage{'s' if closed.stages_lost > 1 else ''} replaced")
    if closed.finish == "length":
        parts.append("cut off at the longest length")
    return " | ".join(parts)


async def _cancel_on_ctrl_c(scope: trio.CancelScope) -> None:
    """The first Ctrl-C cancels the scope; a second one, while that takes its time, ends the program."""
    with trio.open_signal_receiver(signal.SIGINT) as signals:
        async for _ in signals:
            scope.cancel()
            return


def main() -> int:
    """For `python -m gateway.chat`."""
    parser = argparse.ArgumentParser(prog="archi")
    register(parser.add_subparsers(dest="command", required=True))
    arguments = parser.parse_args()
    with suppress(KeyboardInterrupt):
        return cast("int", arguments.handler(arguments))
    return 130


if __name__ == "__main__":
    sys.exit(main())
