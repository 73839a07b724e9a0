"""`rolemesh export`: a run for other tools: Graphviz, Model Explorer, tlparse."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rolemesh.compiler.cli.conventions import (
    EXIT_CODES,
    FINE,
    Commands,
    Parser,
    Progress,
    add_output,
    write_output,
)
from rolemesh.compiler.cli.filters import add_filters, filters_of
from rolemesh.compiler.cli.source import SOURCE_HELP, add_program, add_source, add_stage

if TYPE_CHECKING:
    from rolemesh.compiler.dump.reader import Run, Stage

__all__ = ["register"]

_DESCRIPTION = """\
Write a run for other tools to read:
  dot             one stage for Graphviz; modules are clusters, collectives are coloured
  model-explorer  stages as a graph collection of Google's Model Explorer
  tlparse         stages as a structured trace of torch (TORCH_TRACE), each an artifact
"""

_EPILOG = f"""\
{SOURCE_HELP}
Without --program and --stage, model-explorer and tlparse get all stages of all programs, and dot
gets the last stage of the only one. Graphviz takes long for a thousand nodes: choose some.

examples:
  rolemesh export run --program decode --module 'model.layers.0' --format dot | dot -Tsvg -o a.svg
  rolemesh export run --format model-explorer -o run.json
  rolemesh export run --format tlparse -o trace.log
  rolemesh show run --program decode --json | rolemesh export - --format dot -o decode.dot

{EXIT_CODES}"""


def register(commands: Commands[Parser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "export",
        help="write a run for Graphviz, Model Explorer or tlparse",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    parser.set_defaults(command=_run)
    add_source(parser)
    parser.add_argument(
        "--format",
        required=True,
        choices=("dot", "model-explorer", "tlparse"),
        help="what to write",
    )
    add_program(parser)
    add_stage(parser)
    parser.set_defaults(stage=None)  # what is exported if none is named depends on the format
    add_filters(parser)
    add_output(parser)


def _run(parsed: argparse.Namespace) -> int:
    from rolemesh.compiler.dump.reader import open_source

    write_output(_exported(open_source(parsed.run, parsed.rank), parsed), parsed.out)
    return FINE


def _exported(run: Run, parsed: argparse.Namespace) -> str:
    from rolemesh.compiler.debug.show.select import select

    filters = filters_of(parsed)
    if parsed.format == "dot":
        from rolemesh.compiler.debug.export.dot import dot_text

        stage = run.program(parsed.program).stage(parsed.stage or "last")
        return dot_text(stage, select(stage, filters))
    if parsed.format == "model-explorer":
        from rolemesh.compiler.debug.export.model_explorer import graph_collection

        stages = [(stage, select(stage, filters)) for stage in _stages(run, parsed)]
        return json.dumps(graph_collection(f"rolemesh {run.folder.name}", stages)) + "\n"
    from rolemesh.compiler.debug.export.torch_trace import trace_text

    return trace_text(_stages(run, parsed))


def _stages(run: Run, parsed: argparse.Namespace) -> Iterator[Stage]:
    progress = Progress(patient=True)
    programs = run.programs if parsed.program is None else (run.program(parsed.program),)
    for program in programs:
        for name in program.stage_names if parsed.stage is None else (parsed.stage,):
            progress(f"writing {program.id} {name}")
            yield program.stage(name)
