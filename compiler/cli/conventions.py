"""What all subcommands share: exit codes, colour, paging, JSON, progress, and usage errors.

Results go to stdout and everything else to stderr. Importing this module imports nothing outside
the standard library, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from rolemesh.compiler.ir.errors import RolemeshError

__all__ = [
    "BAD_INPUT",
    "DIFFERENT",
    "EXIT_CODES",
    "FINE",
    "INTERNAL",
    "INTERRUPTED",
    "SCHEMA_VERSION",
    "USAGE",
    "Commands",
    "Parser",
    "Progress",
    "add_color",
    "add_json",
    "add_output",
    "count",
    "forsake_stdout",
    "print_json",
    "print_text",
    "use_color",
    "write_output",
]

FINE, DIFFERENT, USAGE, BAD_INPUT, INTERNAL, INTERRUPTED = 0, 1, 2, 3, 4, 130
EXIT_CODES = """\
exit codes:
  0  fine                                3  bad input: model, role, mesh, option or file
  1  a difference, or a failed check     4  internal error
  2  usage                             130  interrupted
"""
SCHEMA_VERSION = 1
"""Of what `--json` prints; raised with every change that a reader could trip over."""

Commands = argparse._SubParsersAction


class Parser(argparse.ArgumentParser):
    """A parser whose usage errors say what was probably meant."""

    def __init__(self, **kwargs: object) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        kwargs.setdefault("allow_abbrev", False)
        self._given: Sequence[str] = ()
        super().__init__(**kwargs)  # type: ignore[arg-type] # argparse's own parameters

    def parse_known_args(  # type: ignore[override] # argparse overloads it over namespaces
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Refuse what is left over where it was found: a command knows its own options best."""
        self._given = list(sys.argv[1:] if args is None else args)
        found, left = super().parse_known_args(args, namespace)
        if left:
            self.error(f"unrecognized arguments: {' '.join(left)}")
        return found, left

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """Leave with a status; quietly if nobody reads the help."""
        with suppress(BrokenPipeError):
            sys.stdout.flush()
            super().exit(status, message)
        forsake_stdout()
        super().exit(status, message)

    def error(self, message: str) -> NoReturn:
        """Print the usage, the error and the closest name, and exit with 2."""
        self.print_usage(sys.stderr)
        self.exit(USAGE, f"{self.prog}: error: {message}{self._meant(message)}\n")

    def _meant(self, message: str) -> str:
        """`; did you mean --json?` for an option or a choice that does not exist."""
        options = [name for action in self._actions for name in action.option_strings]
        if message.startswith("unrecognized arguments:"):
            words = message.split()[2:]
            wrong = next((w for w in words if w.startswith("-")), words[0]).partition("=")[0]
            close = difflib.get_close_matches(wrong, options, n=1, cutoff=0.5)
        elif "invalid choice:" in message:
            wrong = message.partition("invalid choice: ")[2].partition(" (choose")[0].strip("'")
            choices = [str(choice) for action in self._actions for choice in action.choices or ()]
            close = difflib.get_close_matches(wrong, choices, n=1, cutoff=0.5)
        elif "are required:" in message:
            # An option that was misspelt is missing, or hides that something else is.
            written = [word.partition("=")[0] for word in self._given if word.startswith("--")]
            unknown = [name for name in written if name not in options]
            close = [c for w in unknown for c in difflib.get_close_matches(w, options, n=1)]
        else:
            return ""
        return f"; did you mean {close[0]}?" if close else ""


def forsake_stdout() -> None:
    """Send what is still to be printed nowhere: whoever read stdout has seen enough."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def count(text: str) -> int:
    """A positive number given as an argument."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add `--json`."""
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def add_color(parser: argparse.ArgumentParser) -> None:
    """Add `--color`."""
    parser.add_argument(
        "--color",
        choices=("auto", "always", "never"),
        default="auto",
        help="colour the output: auto is on a terminal, unless NO_COLOR is set (default auto)",
    )


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add `--out`."""
    parser.add_argument(
        "-o", "--out", metavar="FILE", help="the file to write (default: standard output)"
    )


def write_output(text: str, file: str | None) -> None:
    """Write a result for other programs, to a file or stdout.

    Raises:
        RolemeshError: RM018 if the file cannot be written.
    """
    if file is None or file == "-":
        sys.stdout.write(text)
        return
    try:
        Path(file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise RolemeshError(
            "RM018",
            what=f"cannot write {file!r}",
            where="option --out",
            why=f"{type(error).__name__}: {error.strerror}",
            fix="name a file in a folder that exists",
        ) from error


def use_color(choice: str) -> bool:
    """Whether to colour stdout. NO_COLOR, if set to anything, turns `auto` off."""
    if choice == "auto":
        return sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    return choice == "always"


def print_json(result: Mapping[str, object]) -> None:
    """Print a result as JSON, with `schema_version`."""
    print(json.dumps({"schema_version": SCHEMA_VERSION, **result}, indent=2))


def print_text(text: str) -> None:
    """Print a result; on a terminal, through a pager if it is longer than the screen."""
    if not sys.stdout.isatty() or text.count("\n") < shutil.get_terminal_size().lines:
        print(text)
        return
    command = os.environ.get("PAGER") or "less -FRX"
    if subprocess.run(command, shell=True, input=text, text=True, check=False).returncode == 127:
        print(text)  # the shell knows no such pager


class Progress:
    """Says on stderr what is being done, on a terminal or once it has taken a second.

    Args:
        patient: Wait for that second on a terminal too, and leave out what is done by then: for
            many short steps.
    """

    def __init__(self, *, patient: bool = False) -> None:
        self._started = time.monotonic()
        self._at_once = sys.stderr.isatty() and not patient
        self._patient = patient
        self._pending: list[str] = []

    def __call__(self, message: str) -> None:
        """Note what is done next."""
        if self._patient:
            self._pending.clear()
        self._pending.append(message)
        if self._at_once or time.monotonic() - self._started > 1.0:
            for text in self._pending:
                print(f"rolemesh: {text} ...", file=sys.stderr, flush=True)
            self._pending.clear()
