"""How our programs start and end: settings from flags, logs, signals, one exit code.

Exit codes: 0 ended as asked (Ctrl-C and SIGTERM included), 1 could not start or broke, 2 wrong usage, 130 a
command that Ctrl-C cut short.

What takes long to import is imported where it is used: `--help` and a typing slip answer at once.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar, cast

from node.config import LogSettings
from node.settings import (
    Settings,
    SettingsError,
    likely_slips,
    list_settings,
    load_settings,
    parse_assignment,
)

if TYPE_CHECKING:
    import trio

S = TypeVar("S", bound=Settings)
E = TypeVar("E", bound=BaseException)

#: Exceptions that a person can mend: shown as one message, without a traceback.
Expected = tuple[type[Exception], ...]

CONFIG_ENV: Final = "ARCHI_CONFIG"

#: What a shell reports for a program that Ctrl-C ended.
INTERRUPTED: Final = 130


class _ShowVersion(argparse.Action):
    """`--version`, looked up only when asked for: it reads the installed package's metadata."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        from importlib.metadata import version

        print(f"{parser.prog} {version('archipelag')}")
        parser.exit()


def add_version_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="print the version and leave")


def add_settings_flags(parser: argparse.ArgumentParser, shortcuts: Sequence[tuple[str, str, str]]) -> None:
    """`--config`, `--set`, and one flag per (flag, dotted setting, help)."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        help=f"settings in TOML (else ${CONFIG_ENV}); ARCHI_* variables override it, flags override both",
    )
    parser.add_argument(
        "--set",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        dest="assignments",
        help="any setting by its dotted name, for example --set engine.threads=2; may be repeated",
    )
    for flag, setting, text in shortcuts:
        parser.add_argument(
            flag, metavar="VALUE", action="append", dest=f"setting:{setting}", help=f"{text} [{setting}]"
        )


def settings_from(arguments: argparse.Namespace, kind: type[S]) -> S:
    """Settings of this kind from file, environment and the parsed flags. Raises SettingsError.

    A flag that is given twice adds to a list; of any other setting the last one counts.
    """
    overrides: dict[str, object] = {}
    lists = list_settings(kind)
    for name, value in vars(arguments).items():
        if name.startswith("setting:") and value:
            setting = name.removeprefix("setting:")
            overrides[setting] = ",".join(value) if setting in lists else value[-1]
    for variable, meant in likely_slips(kind, os.environ):
        print(f"warning: {variable} is no setting; did you mean {meant}?", file=sys.stderr)
    for text in arguments.assignments:
        path, value = parse_assignment(text)
        overrides[path] = value
    file = arguments.config or os.environ.get(CONFIG_ENV)
    return load_settings(
        kind, file=Path(file).expanduser() if file else None, environ=os.environ, overrides=overrides
    )


def run_program(
    main: Callable[[], Awaitable[None]],
    *,
    logs: LogSettings,
    expected: Expected = (),
    until_stdin_closes: bool = False,
) -> int:
    """Run a trio program until it ends, a signal comes or (if wanted) standard input closes."""
    import trio

    from node.logs import set_up_logs

    set_up_logs(logs)
    failures: list[Exception] = []

    async def supervised() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_stop_on_signal, nursery.cancel_scope)
            if until_stdin_closes:
                nursery.start_soon(_stop_on_eof, nursery.cancel_scope)
            try:
                await main()
            except* expected as group:
                failures.extend(flatten(group))
            nursery.cancel_scope.cancel()

    try:
        trio.run(supervised)
    except* SettingsError as group:
        failures.extend(flatten(group))
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


def guarded(command: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    """Run a command; what a person can mend, or did herself, becomes one message and an exit code."""
    try:
        code = command(arguments)
        sys.stdout.flush()  # a reader that has gone is noticed here, not while the interpreter ends
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, BrokenPipeError) as error:
        return _own_doing(error)
    except BaseExceptionGroup as group:  # the same out of a trio nursery
        rest = group.split((KeyboardInterrupt, BrokenPipeError, SystemExit))[1]
        if rest is not None:
            raise
        return _own_doing(flatten(group)[0])
    return code


def _own_doing(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    # The reader of our output (head, a pager) is gone; that is no error. (Rich says so with SystemExit.)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


async def _stop_on_signal(scope: trio.CancelScope) -> None:
    import structlog
    import trio

    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for number in signals:
            structlog.get_logger("run").info("stopping", signal=signal.Signals(number).name)
            scope.cancel()
            return


async def _stop_on_eof(scope: trio.CancelScope) -> None:
    import trio

    async with trio.lowlevel.FdStream(os.dup(sys.stdin.fileno())) as stdin:
        while await stdin.receive_some(4096):
            pass
    scope.cancel()


def flatten(group: BaseExceptionGroup[E]) -> list[E]:
    """The exceptions in a group, however deep."""
    flat: list[E] = []
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            flat.extend(flatten(cast("BaseExceptionGroup[E]", error)))
        else:
            flat.append(error)
    return flat
