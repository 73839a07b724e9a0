"""`rolemesh doctor`: what is installed, what is missing and how to get it."""

from __future__ import annotations

import argparse
import json

from rolemesh.compiler.cli.conventions import (
    DIFFERENT,
    EXIT_CODES,
    FINE,
    Commands,
    Parser,
    add_json,
)

__all__ = ["register"]

_EPILOG = f"""\
examples:
  rolemesh doctor
  rolemesh doctor --json

{EXIT_CODES}"""


def register(commands: Commands[Parser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "doctor",
        help="say what is installed, what is missing and how to get it",
        description="Say what is installed, what is missing and how to get it.",
        epilog=_EPILOG,
    )
    parser.set_defaults(command=_run)
    add_json(parser)


def _run(parsed: argparse.Namespace) -> int:
    from rolemesh.compiler.command.doctor import examine

    findings = examine()
    print(json.dumps(findings.as_json(), indent=2) if parsed.json else findings.as_text())
    return FINE if findings.ok else DIFFERENT
