"""`archi`: the demo and the terminal chat."""

from __future__ import annotations

import argparse
import sys

from gateway import chat, demo
from node.island import VERSION
from node.runner import guarded

_EPILOG = """\
examples:
  archi demo                          three Islands and a gateway on this machine, and a first answer
  archi demo --islands 5 --port 9000
  archi chat                          talk to the demo's gateway (in another terminal)
  archi chat --url https://gateway.example/v1 --key ak_...
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="archi",
        description="archipelag: AI inference over a mesh of Islands.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"archi {VERSION}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo.register(commands)
    chat.register(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    return guarded(arguments.handler, arguments)


if __name__ == "__main__":
    sys.exit(main())
