"""`rolemesh explain`: why a value lies as it does, and why a collective is there."""

from __future__ import annotations

import argparse

from rolemesh.compiler.cli.conventions import (
    EXIT_CODES,
    FINE,
    Commands,
    Parser,
    add_color,
    add_json,
    print_json,
    print_text,
    use_color,
)
from rolemesh.compiler.cli.source import add_program, add_source, program_of

__all__ = ["register"]

_DESCRIPTION = """\
Explain one node of a recorded program. Of a value: on each mesh axis, the decisions that led from
what was given (a seed of the role, or your annotation) to its layout. Of an inserted op: the layout
that the value has, the one that is needed and by which op, and why both are so. Each decision comes
with the sharding rule, what of it is split, the reason, and what else was priced: bytes that a rank
receives, and work as bytes.
"""

_EPILOG = f"""\
RUN is a run directory: decisions are told from the stages propagate and push_back together. A
program is named by role/phase, or by either if that is enough.

NODE is the name of a node in any stage from propagate on, with or without %, the fully qualified
name of a weight, a cache or an input, or a pattern such as *0.self_attn.o_proj.weight that fits one
of these.

examples:
  rolemesh explain run all_to_all --program decode
  rolemesh explain run model.layers.0.self_attn.o_proj.weight --program prefill
  rolemesh explain run mm_7 --program decode --axis tp --all
  rolemesh explain run mm_7 --program decode --json

{EXIT_CODES}"""


def register(commands: Commands[Parser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "explain",
        help="why a value lies as it does, and why a collective is there",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    parser.set_defaults(command=_run)
    add_source(parser)
    parser.add_argument("node", metavar="NODE", help="a node, a weight's name, or a pattern")
    add_program(parser)
    parser.add_argument("--axis", metavar="A", help="explain one mesh axis (default: all)")
    parser.add_argument("--all", action="store_true", help="write every decision in full")
    add_color(parser)
    add_json(parser)


def _run(parsed: argparse.Namespace) -> int:
    from rolemesh.compiler.debug.explain.explain import explain
    from rolemesh.compiler.debug.explain.explain_text import explanation_text
    from rolemesh.compiler.debug.paint import Painter

    program = program_of(parsed)
    found = explain(program, parsed.node, parsed.axis)
    if parsed.json:
        print_json(found.as_json())
    else:
        painter = Painter(program.entry["mesh"], use_color(parsed.color))
        print_text(explanation_text(found, painter, full=parsed.all))
    return FINE
