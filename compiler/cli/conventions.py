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
from collections.abc import Mapping
from typing import NoReturn

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
    "count",
    "print_json",
    "print_text",
    "use_color",
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
        super().__init__(**kwargs)  # type: ignore[arg-type] # argparse's own parameters

    def error(self, message: str) -> NoReturn:
        """Print the usage, the error and the closest name, and exit with 2."""
        self.print_usage(sys.stderr)
        self.exit(USAGE, f"{self.prog}: error: {message}{self._meant(message)}\n")

    def _meant(self, message: str) -> str:
        """`; did you mean --json?` for an option or a choice that does not exist."""
        words = message.split()
        if message.startswith("unrecognized arguments:"):
            wrong = words[2].partition("=")[0]
            known = [name for action in self._actions for name in action.option_strings]
        elif "invalid choice:" in message:
            wrong = message.partition("invalid choice: ")[2].partition(" (choose")[0].strip("'")
            known = [str(choice) for action in self._actions for choice in action.choices or ()]
        else:
            return ""
        close = difflib.get_close_matches(wrong, known, n=1, cutoff=0.5)
        return f"; did you mean {close[0]}?" if close else ""


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
    try:
        subprocess.run(command, shell=True, input=text, text=True, check=False)
    except OSError:
        print(text)


class Progress:
    """Says on stderr what is being done, on a terminal or once it has taken a second."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._pending: list[str] = []

    def __call__(self, message: str) -> None:
        """Note what is done next."""
        self._pending.append(message)
        if sys.stderr.isatty() or time.monotonic() - self._started > 1.0:
            for text in self._pending:
                print(f"rolemesh: {text} ...", file=sys.stderr, flush=True)
            self._pending.clear()
