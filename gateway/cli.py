"""`archi-gateway`: run a gateway, make keys for it.

Each command imports what it needs itself: network and web framework take seconds to load, `--help` must not.
"""

from __future__ import annotations

import argparse
import json
import sys

from gateway.config import GatewaySettings
from node.runner import add_settings_flags, add_version_flag, guarded, run_program, settings_from

_SHORTCUTS = (
    ("--name", "name", "the gateway's name, for people"),
    ("--data-dir", "data_dir", "where its identity lives"),
    ("--host", "http.host", "address of the HTTP API"),
    ("--port", "http.port", "port of the HTTP API; 0: any free one"),
    ("--listen", "mesh.listen", "multiaddrs where Islands connect, separated by commas"),
    ("--island", "mesh.islands", "full multiaddrs of Islands to dial, separated by commas"),
    ("--bootstrap", "mesh.bootstrap", "multiaddrs of peers to enter the overlay by, separated by commas"),
    ("--log-format", "log.format", "console or json"),
)

_EPILOG = """\
examples:
  archi-gateway key                                   make an API key for the configuration
  ARCHI_API_KEY=ak_... archi-gateway run              one key, on 127.0.0.1:8080
  archi-gateway run --config gateway.toml --port 9000
  archi-gateway run --port 8081 --bootstrap MULTIADDR  a second one, which serves what Islands anywhere offer

It prints the multiaddr that Islands need: archi-node run --coordinator MULTIADDR
Settings come from the file, then ARCHI_* variables, then flags; each overrides the one before.
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="archi-gateway",
        description="Run a gateway: an OpenAI-compatible API in front of a mesh of Islands.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_version_flag(parser)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="run the gateway until Ctrl-C")
    add_settings_flags(run, _SHORTCUTS)
    run.add_argument(
        "--open", action="append_const", const="true", dest="setting:open", help="answer without keys [open]"
    )
    run.add_argument("--until-stdin-closes", action="store_true", help="also stop when standard input closes")
    run.set_defaults(handler=_run)
    key = commands.add_parser("key", help="make an API key and show what to put into the configuration")
    key.add_argument("--name", default="consumer", help="whose key it is")
    key.set_defaults(handler=_key)
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    return guarded(arguments.handler, arguments)


def _run(arguments: argparse.Namespace) -> int:
    settings = settings_from(arguments, GatewaySettings)

    from gateway.keys import KeyConfigError
    from gateway.server import GatewayReady, run_gateway
    from node.data_dir import DataDirError, hold_data_dir
    from node.identity import IdentityError
    from node.p2p.errors import AddressInvalid, ListenFailed

    async def announce(ready: GatewayReady) -> None:
        print(f"listening {ready.url}", flush=True)
        for address in ready.addresses:
            print(f"mesh {address}", flush=True)

    async def gateway() -> None:
        with hold_data_dir(settings.data_path):
            await run_gateway(settings, ready=announce)

    return run_program(
        gateway,
        logs=settings.log,
        expected=(DataDirError, KeyConfigError, IdentityError, AddressInvalid, ListenFailed, OSError),
        until_stdin_closes=arguments.until_stdin_closes,
    )


def _key(arguments: argparse.Namespace) -> int:
    from gateway.keys import hash_of_key, new_key

    key = new_key()
    name = json.dumps(arguments.name, ensure_ascii=False)  # TOML's basic strings are JSON's
    print(f"{key}\n\n# the gateway needs only its hash:\n[[keys]]\nname = {name}")
    print(f'sha256 = "{hash_of_key(key)}"')
    return 0


if __name__ == "__main__":
    sys.exit(main())
