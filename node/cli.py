"""`archi-node`: run an Island, look into a running one, see what this machine can do.

Each command imports what it needs itself: the network alone takes a second to load, `--help` must not.
"""

from __future__ import annotations

import argparse
import sys

from cargos import cli as cargo_cli
from node.config import NodeSettings
from node.runner import add_settings_flags, add_version_flag, guarded, run_program, settings_from

_SHORTCUTS = (
    ("--name", "name", "the Island's name, for people"),
    ("--data-dir", "data_dir", "where identity and state live"),
    ("--cargo", "cargos", "Cargos to run: names or manifest files, separated by commas"),
    ("--coordinator", "network.coordinators", "multiaddrs of gateways to work for, separated by commas"),
    ("--bootstrap", "network.bootstrap", "multiaddrs of peers to enter the overlay by, separated by commas"),
    ("--listen", "network.listen", "multiaddrs to listen on, separated by commas"),
    ("--threads", "engine.threads", "engine threads per Cargo"),
    ("--log-format", "log.format", "console or json"),
)

_EPILOG = """\
examples:
  archi-node doctor                                   what this machine can run, and what is missing
  archi-node run --coordinator /ip4/192.0.2.1/tcp/4001/p2p/12D3KooW...
  archi-node status                                   a live table of the Island on this machine
  archi-node dht providers role:coordinator           ask the running Island who coordinates
  ARCHI_ENGINE_THREADS=4 archi-node run --config island.toml

Settings come from the file, then ARCHI_* variables, then flags; each overrides the one before.
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="archi-node",
        description="Run an Island: this machine's share of the archipelag network.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_version_flag(parser)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run the Island until Ctrl-C")
    add_settings_flags(run, _SHORTCUTS)
    run.add_argument("--until-stdin-closes", action="store_true", help="also stop when standard input closes")
    run.set_defaults(handler=_run)

    ident = commands.add_parser("id", help="print this Island's peer id (made on first use)")
    add_settings_flags(ident, _SHORTCUTS[1:2])
    ident.set_defaults(handler=_id)

    status = commands.add_parser("status", help="a live table of the running Island")
    add_settings_flags(status, _SHORTCUTS[1:2])
    status.add_argument("--json", action="store_true", help="one snapshot as JSON")
    status.add_argument("--once", action="store_true", help="one snapshot, then exit")
    status.set_defaults(handler=_status)

    _add_dht(commands)

    karma = commands.add_parser("karma", help="what coordinators state about a peer, and what it is worth here")
    karma.add_argument("peer", nargs="?", default="", help="a peer id; this node itself if left out")
    karma.add_argument("--json", action="store_true", help="for scripts")
    add_settings_flags(karma, _SHORTCUTS[1:2])
    karma.set_defaults(handler=_karma)

    doctor = commands.add_parser("doctor", help="what this machine can run, what is missing and how to get it")
    add_settings_flags(doctor, _SHORTCUTS)
    doctor.add_argument("--json", action="store_true", help="for scripts")
    doctor.set_defaults(handler=_doctor)

    cargo_cli.register(commands)
    return parser


def _add_dht(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:  # pyright: ignore[reportPrivateUsage] - argparse gives its type no public name
    """`archi-node dht ...`, answered by the running node."""
    dht = commands.add_parser("dht", help="ask the overlay through the running Island")
    kinds = dht.add_subparsers(dest="dht_command", required=True, metavar="COMMAND")
    name_help = (
        "a peer id, sha256:DIGEST, role:NAME[@REGION], capability:NAME[@REGION], region:NAME, or a hex key"
    )
    record_help = {
        "namespace": "any word, such as notes; in 'peer' a node writes only under its own id",
        "name": "any text: the key is a hash of both",
        "value": "text, or - for what comes by standard input",
    }
    for command, words, text in (
        ("peers", (), "the routing table"),
        ("find", ("name",), "the peers closest to a key"),
        ("get", ("namespace", "name"), "records"),
        (
            "put",
            ("namespace", "name", "value"),
            "store a record, signed by this node ('-': from standard input)",
        ),
        ("provide", ("name",), "tell the network that this node provides a key, as long as it runs"),
        ("withdraw", ("name",), "tell it no longer"),
        ("providers", ("name",), "who provides a key"),
    ):
        parser = kinds.add_parser(command, help=text)
        for word in words:
            parser.add_argument(word, help=name_help if words == ("name",) else record_help[word])
        if command == "put":
            parser.add_argument("--ttl", type=int, default=24, metavar="HOURS", help="1 to 48; default 24")
        parser.add_argument("--json", action="store_true", help="for scripts")
        add_settings_flags(parser, _SHORTCUTS[1:2])
        parser.set_defaults(handler=_dht)


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    return guarded(arguments.handler, arguments)


def _run(arguments: argparse.Namespace) -> int:
    settings = settings_from(arguments, NodeSettings)

    import structlog

    from cargos.errors import CargoError
    from node.data_dir import DataDirError, hold_data_dir
    from node.identity import IdentityError
    from node.island import Island
    from node.p2p.errors import AddressInvalid, ListenFailed
    from node.state import IslandState

    async def announce(state: IslandState) -> None:
        for address in state.host.addresses:
            print(f"listening {address}", flush=True)

    async def island() -> None:
        if settings.cargos and not settings.network.coordinators:
            structlog.get_logger("run").warning(
                "no coordinator: only gateways that dial this Island send it jobs",
                remedy="--coordinator MULTIADDR, which a gateway prints at its start",
            )
        with hold_data_dir(settings.data_path):
            await Island(settings).run(ready=announce)

    return run_program(
        island,
        logs=settings.log,
        expected=(DataDirError, IdentityError, CargoError, AddressInvalid, ListenFailed, OSError),
        until_stdin_closes=arguments.until_stdin_closes,
    )


def _id(arguments: argparse.Namespace) -> int:
    settings = settings_from(arguments, NodeSettings)

    from node.identity import IdentityError, load_or_create_identity

    try:
        print(load_or_create_identity(settings.data_path / "identity.key").peer)
    except IdentityError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _status(arguments: argparse.Namespace) -> int:
    settings = settings_from(arguments, NodeSettings)

    import msgspec
    import trio

    from node.control import NotRunning, ask_status
    from node.status import show_status

    try:
        if arguments.json:
            snapshot = trio.run(ask_status, settings.data_path)
            print(msgspec.json.format(msgspec.json.encode(snapshot)).decode())
        else:
            trio.run(show_status, settings.data_path, arguments.once or not sys.stdout.isatty())
    except NotRunning as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        pass  # the way out of a live table
    return 0


def _dht(arguments: argparse.Namespace) -> int:
    settings = settings_from(arguments, NodeSettings)

    from node.overlay.commands import run_dht

    return run_dht(arguments, settings.data_path)


def _karma(arguments: argparse.Namespace) -> int:
    settings = settings_from(arguments, NodeSettings)

    from node.coordination.karma_command import show_karma

    return show_karma(settings.data_path, arguments.peer, as_json=arguments.json)


def _doctor(arguments: argparse.Namespace) -> int:
    settings = settings_from(arguments, NodeSettings)

    import json

    import trio

    from node.config import LogSettings
    from node.doctor import examine, show_findings
    from node.logs import set_up_logs

    set_up_logs(LogSettings(level="error"))  # findings say it better
    findings = trio.run(examine, settings)
    if arguments.json:
        print(json.dumps([finding.as_dict() for finding in findings], indent=2))
    else:
        show_findings(findings)
    return 1 if any(finding.state == "missing" for finding in findings) else 0


if __name__ == "__main__":
    sys.exit(main())
