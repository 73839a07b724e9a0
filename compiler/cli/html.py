"""`rolemesh html`: a run as one page for a browser."""

from __future__ import annotations

import argparse

from rolemesh.compiler.cli.conventions import (
    EXIT_CODES,
    FINE,
    Commands,
    Parser,
    Progress,
    add_json,
    print_json,
)
from rolemesh.compiler.cli.source import SOURCE_HELP, add_source

__all__ = ["register"]

_DESCRIPTION = """\
Write a run as one HTML file that works from disk, without network: the graph by module with its
shardings in colour, every stage and the difference of two, the ledger of collectives, the
simulated timeline of each rank, and of each node why it lies as it does. The address holds what is
shown, so a copied link opens the same view.
"""

_EPILOG = f"""\
{SOURCE_HELP}
examples:
  rolemesh html run
  rolemesh html run -o decode.html --program decode
  rolemesh html run/pd_mixed/decode/012_verify.json -o last.html

{EXIT_CODES}"""


def register(commands: Commands[Parser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "html",
        help="write a run as one page for a browser",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    parser.set_defaults(command=_run)
    add_source(parser)
    parser.add_argument(
        "--program", metavar="P", help="only this program, such as decode (default: all)"
    )
    parser.add_argument(
        "-o",
        "--out",
        default="rolemesh.html",
        metavar="FILE",
        help="the file to write (default rolemesh.html)",
    )
    add_json(parser)


def _run(parsed: argparse.Namespace) -> int:
    from rolemesh.compiler.debug.page.page import write_page
    from rolemesh.compiler.dump.reader import open_source

    progress = Progress()
    progress("reading the run")
    run = open_source(parsed.run, parsed.rank)
    programs = run.programs if parsed.program is None else (run.program(parsed.program),)
    progress("writing the page")
    size = write_page(parsed.out, run, programs)
    if parsed.json:
        shown = [program.id for program in programs]
        print_json({"file": parsed.out, "bytes": size, "programs": shown})
    else:
        print(parsed.out)
    return FINE
