"""`rolemesh ledger`: every collective, its bytes and its cause, and whether all ranks agree."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING

from rolemesh.compiler.cli.conventions import (
    DIFFERENT,
    EXIT_CODES,
    FINE,
    Commands,
    Parser,
    add_color,
    add_json,
    count,
    print_json,
    print_text,
    use_color,
)
from rolemesh.compiler.cli.source import SOURCE_HELP, add_program, add_source, add_stage

if TYPE_CHECKING:
    from rolemesh.compiler.debug.ledger.ledger import Ledger

__all__ = ["register"]

_DESCRIPTION = """\
List every collective of a program: what each rank puts in, the bytes it receives, the formula of
that, why it is there, and what could run meanwhile. Where several ranks wrote the folder, check
that all of them issue the same collectives in the same order.
"""

_EPILOG = f"""\
{SOURCE_HELP}
Formulas are in B (sequences), T (tokens per sequence) and the ranks of each mesh axis. --batch and
--tokens evaluate them at other sizes; the program itself stays the one that was compiled. window is
what the program runs between the start of a collective and the first use of its result;
independent is all that neither leads to it nor follows from it. A row for several collectives
shows the least of them.

examples:
  rolemesh ledger run
  rolemesh ledger run --program decode --by op
  rolemesh ledger run --program prefill --by layer --batch 16 --tokens 4096
  rolemesh ledger run --program decode --by none --json
  rolemesh ledger run_of_torchrun        # with rank_0, rank_1, ...: exits with 1 if they differ

{EXIT_CODES}"""


def register(commands: Commands[Parser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "ledger",
        help="list every collective, with bytes, formulas and causes",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    parser.set_defaults(command=_run)
    add_source(parser)
    add_program(parser)
    add_stage(parser)
    parser.add_argument(
        "--by",
        choices=("module", "op", "layer", "none"),
        default="module",
        help="a row for like modules, totals by op or layer, or a row for each (default module)",
    )
    parser.add_argument("--batch", type=count, metavar="N", help="sequences, for the formulas")
    parser.add_argument("--tokens", type=count, metavar="N", help="tokens each, for the formulas")
    add_color(parser)
    add_json(parser)


def _run(parsed: argparse.Namespace) -> int:
    from rolemesh.compiler.debug.ledger.ledger_text import ledger_json, ledger_text
    from rolemesh.compiler.debug.ledger.order import divergences, ranks_in
    from rolemesh.compiler.debug.paint import Painter

    ledgers = _ledgers(parsed)
    ranks = ranks_in(parsed.run)
    found = divergences(ranks)
    if parsed.json:
        order = {
            "ranks": list(ranks),
            "divergences": [dataclasses.asdict(divergence) for divergence in found],
        }
        print_json({"ok": not found, "programs": [*map(ledger_json, ledgers)], "order": order})
        return DIFFERENT if found else FINE
    on = use_color(parsed.color)
    texts = [ledger_text(ledger, parsed.by, Painter(ledger.mesh, on)) for ledger in ledgers]
    if ranks:
        agreed = f"{len(ranks)} ranks issue the same collectives in the same order"
        texts.append("\n".join(divergence.text for divergence in found) or agreed)
    print_text("\n\n".join(texts))
    return DIFFERENT if found else FINE


def _ledgers(parsed: argparse.Namespace) -> list[Ledger]:
    from rolemesh.compiler.debug.ledger.ledger import ledger_of
    from rolemesh.compiler.dump.reader import open_source

    run = open_source(parsed.run, parsed.rank)
    programs = run.programs if parsed.program is None else (run.program(parsed.program),)
    return [
        ledger_of(program.stage(parsed.stage), batch=parsed.batch, tokens=parsed.tokens)
        for program in programs
    ]
