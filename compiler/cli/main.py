"""The `rolemesh` command.

Each subcommand is a module of this package with a `register` function, which adds its parser and
names what runs it. Parsers are made without importing torch; what runs imports what it needs.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence

from rolemesh import __version__
from rolemesh.compiler.cli import (
    bisect,
    check,
    compare,
    completion,
    diff,
    doctor,
    dump,
    explain,
    export,
    html,
    ledger,
    reshard,
    show,
    trace,
    verify,
)
from rolemesh.compiler.cli.conventions import (
    BAD_INPUT,
    EXIT_CODES,
    FINE,
    INTERNAL,
    INTERRUPTED,
    Parser,
    forsake_stdout,
)
from rolemesh.compiler.ir.errors import RolemeshError

__all__ = ["COMMANDS", "main", "make_parser"]

COMMANDS = (
    dump,
    show,
    diff,
    explain,
    ledger,
    html,
    trace,
    export,
    compare,
    bisect,
    check,
    reshard,
    verify,
    doctor,
    completion,
)
"""The subcommands, in the order of the help."""

_OUR_FAULT = frozenset({"RM013", "RM016"})
"""Errors that no input explains: a rank that died, and a program that the verifier refused."""

_DESCRIPTION = """\
One single-device PyTorch model in, one sharded program per node role out.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Arguments without the program's name; those of the process if None.

    Returns:
        The exit code.

    Raises:
        SystemExit: For `--help`, `--version` (0) and usage errors (2).
    """
    parsed = make_parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = parsed.command
    try:
        code = command(parsed)
        sys.stdout.flush()
    except RolemeshError as error:
        print(error, file=sys.stderr)
        return INTERNAL if error.code in _OUR_FAULT else BAD_INPUT
    except BrokenPipeError:
        forsake_stdout()  # at exit nothing may be written to it either
        return FINE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception:  # noqa: BLE001 - reported in full, with its own exit code
        traceback.print_exc()
        print(
            "\nrolemesh: internal error; please report it with the command and this traceback",
            file=sys.stderr,
        )
        return INTERNAL
    return code


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = Parser(
        prog="rolemesh",
        description=_DESCRIPTION,
        epilog=f"rolemesh COMMAND --help explains a command, with examples.\n\n{EXIT_CODES}",
    )
    parser.add_argument("--version", action="version", version=f"rolemesh {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    for module in COMMANDS:
        module.register(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
