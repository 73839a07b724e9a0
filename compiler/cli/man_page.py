"""The manual page, `rolemesh.1`, from the parser: what `--help` says of every command, as roff.

The text does not depend on the terminal, the time or the machine; a test compares it with the page
in `docs/`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from rolemesh import __version__
from rolemesh.compiler.cli.conventions import EXIT_CODES

__all__ = ["man_page"]

_WIDTH = 78
"""Columns of a synopsis; what is around it is filled by man."""

_ENVIRONMENT = {
    "ROLEMESH_DUMP": "Folder for the run directory of everything that is compiled.",
    "ROLEMESH_CACHE": "If 0, torch.compile keeps nothing for the next process, and loads nothing.",
    "ROLEMESH_CACHE_DIR": "Folder of what is kept (default rolemesh in torch's own folder).",
    "ROLEMESH_TIMEOUT": "Seconds that a collective may wait for other ranks (default 300).",
    "TORCH_TRACE": "Folder for torch's structured trace; each stage is an artifact of it.",
    "NO_COLOR": "If set, and not empty, no colour unless --color always asks for it.",
    "PAGER": "Shows what is longer than the terminal (default less -FRX).",
}


def man_page(parser: argparse.ArgumentParser) -> str:
    """The page.

    Args:
        parser: The parser of the whole command line.
    """
    return "\n".join(_page(parser)) + "\n"


def _page(parser: argparse.ArgumentParser) -> Iterator[str]:
    yield f'.TH ROLEMESH 1 "" "rolemesh {__version__}" "User Commands"'
    yield ".nh"
    yield ".SH NAME"
    yield _roff("rolemesh - one single-device PyTorch model in, one sharded program per role out")
    yield ".SH SYNOPSIS"
    yield from _synopsis(parser)
    yield ".SH DESCRIPTION"
    yield from _text(parser.description or "")
    yield ".SH OPTIONS"
    yield from _arguments(parser)
    yield ".SH COMMANDS"
    for commands in parser._actions:
        if isinstance(commands, argparse._SubParsersAction):
            for name, command in commands.choices.items():
                yield from _command(name, command)
    yield ".SH EXIT STATUS"
    yield from _text(EXIT_CODES.partition("\n")[2])
    yield ".SH ENVIRONMENT"
    for name, text in _ENVIRONMENT.items():
        yield from (".TP", rf"\fB{_roff(name)}\fR", _roff(text))


def _command(name: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    yield f".SS {_roff(name)}"
    yield from _synopsis(parser)
    yield from _text(parser.description or "")
    yield from _arguments(parser)
    yield from _text((parser.epilog or "").replace(EXIT_CODES, ""))


def _synopsis(parser: argparse.ArgumentParser) -> Iterator[str]:
    formatter = argparse.HelpFormatter(parser.prog, width=_WIDTH)
    formatter.add_usage(parser.usage, parser._actions, parser._mutually_exclusive_groups, "")
    yield from _as_it_is(formatter.format_help().strip())


def _arguments(parser: argparse.ArgumentParser) -> Iterator[str]:
    formatter = argparse.HelpFormatter(parser.prog, width=_WIDTH)
    for group in parser._action_groups:
        for action in group._group_actions:
            if isinstance(action, argparse._SubParsersAction | argparse._HelpAction):
                continue
            yield ".TP"
            if action.option_strings:
                value = "" if action.nargs == 0 else " " + _value(action)
                yield ", ".join(rf"\fB{_roff(o)}\fR{value}" for o in action.option_strings)
            else:
                yield _value(action)
            yield _roff(formatter._expand_help(action)) if action.help else r"\&"


def _value(action: argparse.Action) -> str:
    if action.choices is not None and action.metavar is None:
        return "|".join(rf"\fB{_roff(str(choice))}\fR" for choice in action.choices)
    return rf"\fI{_roff(str(action.metavar or action.dest))}\fR"


def _text(text: str) -> Iterator[str]:
    """Paragraphs, filled; those with indented lines are tables or examples and stay as they are."""
    for paragraph in text.strip("\n").split("\n\n"):
        if any(line.startswith("  ") for line in paragraph.splitlines()):
            yield ".PP"
            yield from _as_it_is(paragraph)
        elif paragraph:
            yield ".PP"
            yield from (_roff(line) for line in paragraph.splitlines())


def _as_it_is(text: str) -> Iterator[str]:
    yield ".nf"
    yield from (_roff(line) for line in text.splitlines())
    yield ".fi"


def _roff(text: str) -> str:
    escaped = text.replace("\\", r"\e").replace("-", r"\-")
    return r"\&" + escaped if escaped.startswith((".", "'")) else escaped
