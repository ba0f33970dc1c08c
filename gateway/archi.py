"""`archi`: the demo and the terminal chat."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from typing import Final

from node.runner import add_version_flag, guarded

#: Command -> module with `register(subparsers)`, and what it does. Only the wanted command's module is
#: imported: they take most of a second.
_COMMANDS: Final = {
    "demo": (
        "gateway.demo.demo",
        "three Islands and a gateway on this machine, and a first answer",
    ),
    "chat": ("gateway.chat", "talk to a model in the terminal"),
}

_EPILOG = """\
examples:
  archi demo                          three Islands and a gateway on this machine, and a first answer
  archi demo --islands 5 --port 9000
  archi demo --islands 4 --memory-mb 150 --cargo smollm2-135m-f16    a model too large for any one of them
  archi chat                          talk to the demo's gateway (in another terminal)
  archi chat --url https://gateway.example/v1 --key ak_...
"""


def build_parser(wanted: str | None) -> argparse.ArgumentParser:
    """The parser, whole for the wanted command; the others are there by name only."""
    parser = argparse.ArgumentParser(
        prog="archi",
        description="archipelag: AI inference over a mesh of Islands.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_version_flag(parser)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, text) in _COMMANDS.items():
        if name == wanted:
            import_module(module).register(commands)
        else:
            commands.add_parser(name, help=text)
    return parser


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv

    def command(_: argparse.Namespace) -> int:
        wanted = next((word for word in words if not word.startswith("-")), None)
        arguments = build_parser(wanted).parse_args(words)
        return int(arguments.handler(arguments))

    return guarded(command, argparse.Namespace())


if __name__ == "__main__":
    sys.exit(main())
