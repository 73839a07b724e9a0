"""`rolemesh show`: a run or an artefact at a glance, and a stage by module or node by node."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
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
operands, source line and the reason a pass had to insert it. Of an artefact (rolemesh.save): what
it was made for, and its programs; every byte of it is checked.
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
  rolemesh show artefact

{EXIT_CODES}"""


def register(commands: Commands[Parser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "show",
        help="show a run, an artefact, or a stage by module or node by node",
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
    narrowed = parsed.program or parsed.stage or parsed.depth or filters
    if _is_artefact(parsed.run) and not narrowed:
        return _artefact(parsed)
    run = open_source(parsed.run, parsed.rank)
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


def _is_artefact(source: str) -> bool:
    """Whether a folder has an artefact's index, whole or not."""
    try:
        with Path(source, "index.json").open("rb") as index:
            return b'"rolemesh artefact' in index.read()
    except OSError:
        return False


def _artefact(parsed: argparse.Namespace) -> int:
    from rolemesh.compiler.artefact.folder import read_folder
    from rolemesh.compiler.debug.paint import Painter
    from rolemesh.compiler.debug.show.artefact import artefact_text, summarise_artefact

    found = summarise_artefact(read_folder(Path(parsed.run)))
    if parsed.json:
        print_json(dataclasses.asdict(found))
    else:
        print_text(artefact_text(found, Painter({}, use_color(parsed.color))))
    return FINE
