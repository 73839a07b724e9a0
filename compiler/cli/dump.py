"""`rolemesh dump`: compile a model for a role and write a run directory."""

from __future__ import annotations

import argparse
import sys

from rolemesh.compiler.cli.conventions import (
    EXIT_CODES,
    FINE,
    Commands,
    Parser,
    Progress,
    add_json,
    print_json,
)
from rolemesh.compiler.cli.model import MODEL_HELP, add_model, options_of

__all__ = ["register"]

_DESCRIPTION = """\
Compile every phase of a role and write a run directory: each Program after each pass, as text and
as JSON, and with the target ge the GE graph of every rank. Nothing runs. Other commands read it.
"""

_EPILOG = f"""\
{MODEL_HELP}
How long each pass took is said on stderr. The folder itself says nothing of time or machine: two
runs of the same compiler on the same model write the same bytes.

examples:
  rolemesh dump hf:deepseek_v32 --role pd_mixed --mesh tp=4 --out run
  rolemesh dump hf:llama --role decode --mesh tp=4 --target ge --out run
  rolemesh show run --program decode --stage partition

{EXIT_CODES}"""


def register(commands: Commands[Parser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "dump",
        help="compile a model for a role and write a run directory",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    parser.set_defaults(command=_run)
    add_model(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="the run directory to write")
    add_json(parser)


def _run(parsed: argparse.Namespace) -> int:
    progress = Progress()
    progress("importing torch")
    options = options_of(parsed)
    from rolemesh.compiler.dump.run import dump_case

    found = dump_case(options, parsed.out, progress)
    for program, seconds in found.seconds.items():
        passes = ", ".join(f"{stage[4:]} {1000 * took:.0f}" for stage, took in seconds.items())
        print(f"rolemesh: {program}, ms: {passes}", file=sys.stderr)
    if parsed.json:
        print_json({"folder": str(found.folder), "programs": list(found.seconds)})
    else:
        print(found.folder / "index.md")
    return FINE
