"""`rolemesh completion`: completion of commands and options for a shell, and the manual page."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from rolemesh.compiler.cli.conventions import EXIT_CODES, FINE, Commands, Parser

__all__ = ["register"]

_EPILOG = f"""\
bash: put the script where bash-completion looks, or source it in ~/.bashrc. zsh: put it in a folder
of $fpath, as _rolemesh. tcsh: source it in ~/.tcshrc. man prints the manual page, which the package
installs as share/man/man1/rolemesh.1.

examples:
  rolemesh completion bash > ~/.local/share/bash-completion/completions/rolemesh
  rolemesh completion zsh > ~/.zfunc/_rolemesh
  rolemesh completion tcsh > ~/.rolemesh.tcsh
  rolemesh completion man | man -l -

{EXIT_CODES}"""

_FILES = frozenset({"FILE", "RUN", "MODEL", "CHECKPOINT", "TARGET"})
_FOLDERS = frozenset({"DIR"})
"""What arguments are called whose values are files, and folders."""


def register(commands: Commands[Parser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "completion",
        help="print a shell's completion script, or the manual page",
        description="Print a script that completes commands, options and files in a shell.",
        epilog=_EPILOG,
    )
    parser.set_defaults(command=_run)
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh", "man"), help="what to print")


def _run(parsed: argparse.Namespace) -> int:
    from rolemesh.compiler.cli.main import make_parser

    parser = make_parser()
    if parsed.shell == "man":
        from rolemesh.compiler.cli.man_page import man_page

        print(man_page(parser), end="")
        return FINE
    import shtab

    for action in _actions(parser):
        if action.metavar in _FILES | _FOLDERS:
            files = action.metavar in _FILES
            setattr(action, "complete", shtab.FILE if files else shtab.DIRECTORY)  # noqa: B010
    print(shtab.complete(parser, parsed.shell))
    return FINE


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """All arguments of a parser and of the commands in it."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
