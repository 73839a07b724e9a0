"""Arguments of commands that read a run directory: RUN, which program, which stage, which rank."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rolemesh.compiler.dump.reader import RecordedProgram, Stage

__all__ = ["SOURCE_HELP", "add_program", "add_source", "add_stage", "program_of", "stage_of"]

SOURCE_HELP = """\
RUN is a run directory (rolemesh dump, option dump, ROLEMESH_DUMP), the JSON file of one stage, or -
for such JSON on standard input. A program is named by role/phase, or by either if that is enough;
a stage by its number, its pass, or last.
"""


def add_source(parser: argparse.ArgumentParser) -> None:
    """Add RUN and `--rank`."""
    parser.add_argument("run", metavar="RUN", help="a run directory, a stage's JSON, or -")
    parser.add_argument(
        "--rank", type=int, metavar="R", help="whose run, if several ranks wrote one (default 0)"
    )


def add_program(parser: argparse._ActionsContainer) -> None:
    """Add `--program`."""
    parser.add_argument(
        "--program", metavar="P", help="which program, such as decode (default: the only one)"
    )


def add_stage(parser: argparse.ArgumentParser) -> None:
    """Add `--stage`."""
    parser.add_argument("--stage", default="last", metavar="S", help="which stage (default last)")


def program_of(parsed: argparse.Namespace) -> RecordedProgram:
    """The program that was named.

    Raises:
        RolemeshError: RM035 if the run cannot be read, RM018 if there is no such program.
    """
    from rolemesh.compiler.dump.reader import open_source

    return open_source(parsed.run, parsed.rank).program(parsed.program)


def stage_of(parsed: argparse.Namespace) -> Stage:
    """The stage that was named.

    Raises:
        RolemeshError: RM035 if the run cannot be read, RM018 if there is no such program or stage.
    """
    return program_of(parsed).stage(parsed.stage)
