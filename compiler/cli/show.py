"""`rolemesh show`: a run at a glance, and a stage by module or node by node."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING

from rolemesh.compiler.cli.conventions import (
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
from rolemesh.compiler.cli.filters import add_filters, filters_of
from rolemesh.compiler.cli.source import SOURCE_HELP, add_program, add_source, add_stage

if TYPE_CHECKING:
    from rolemesh.compiler.dump.reader import Run

__all__ = ["register"]

_DESCRIPTION = """\
Show what the compiler made. Of a run directory: its programs and stages, and how many ops each
pass added and removed. Of one program: its modules with their ops, collectives and bytes, layers
that are alike on one line. With --module, --op or --name: the nodes that fit, each with its layout,
operands, source line and the reason a pass had to insert it.
"""

_EPILOG = f"""\
{SOURCE_HELP}
Every mesh axis has a colour. --json prints the stage itself, which other commands read from
standard input; with filters, --depth or a whole run, it prints what the text shows.

examples:
  rolemesh show run
  rolemesh show run --program decode --stage partition
  rolemesh show run --program decode --depth 3
  rolemesh show run --program decode --op 'mesh.*'
  rolemesh show run --program decode --module '*.0.self_attn.o_proj' --color always | less -R
  rolemesh show run --program decode --name '*'
  rolemesh show run --program decode --stage partition --json | rolemesh show -

{EXIT_CODES}"""


def register(commands: Commands[Parser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "show",
        help="show a run, or a stage by module or node by node",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    parser.set_defaults(command=_run)
    add_source(parser)
    add_program(parser)
    add_stage(parser)
    parser.set_defaults(stage=None)  # whether one was named decides what is shown
    add_filters(parser)
    parser.add_argument(
        "--depth",
        type=count,
        metavar="N",
        help="collapse by module, to N components of its path (default: by module, in full, if "
        "no filter is given)",
    )
    add_color(parser)
    add_json(parser)


def _run(parsed: argparse.Namespace) -> int:
    from rolemesh.compiler.dump.reader import open_source

    filters = filters_of(parsed)
    run = open_source(parsed.run, parsed.rank)
    narrowed = parsed.program or parsed.stage or parsed.depth or filters
    if run.only is None and not narrowed:
        return _summary(run, parsed)
    from rolemesh.compiler.debug.paint import Painter
    from rolemesh.compiler.debug.show.collapse import module_rows
    from rolemesh.compiler.debug.show.select import select
    from rolemesh.compiler.debug.show.show import modules_text, nodes_text

    stage = run.program(parsed.program).stage(parsed.stage or "last")
    painter = Painter(stage.mesh, use_color(parsed.color))
    if parsed.json and not filters and parsed.depth is None:
        print(json.dumps(stage.data, ensure_ascii=False))
        return FINE
    nodes = select(stage, filters)
    where = {"program": stage.program, "stage": stage.name}
    if filters and parsed.depth is None:
        if parsed.json:
            print_json({**where, "nodes": [node.data for node in nodes]})
        else:
            print_text(nodes_text(stage, nodes, painter))
        return FINE
    rows = module_rows(stage, nodes, parsed.depth)
    if parsed.json:
        print_json({**where, "modules": [dataclasses.asdict(row) for row in rows]})
    else:
        print_text(modules_text(stage, rows, painter))
    return FINE


def _summary(run: Run, parsed: argparse.Namespace) -> int:
    from rolemesh.compiler.debug.paint import Painter
    from rolemesh.compiler.debug.show.summary import summarise, summary_text

    programs = summarise(run)
    if parsed.json:
        print_json({"programs": [dataclasses.asdict(program) for program in programs]})
        return FINE
    on = use_color(parsed.color)
    print_text(summary_text(programs, {p.id: Painter(p.mesh, on) for p in programs}))
    return FINE
