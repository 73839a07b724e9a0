"""`rolemesh compare`: the single device against every stage, every rank, and the GE graphs."""

from __future__ import annotations

import argparse

from rolemesh.compiler.cli.conventions import (
    DIFFERENT,
    EXIT_CODES,
    FINE,
    Commands,
    Parser,
    Progress,
    add_json,
    print_json,
    print_text,
)
from rolemesh.compiler.cli.model import MODEL_HELP, add_model, add_tolerance, options_of

__all__ = ["register"]

_DESCRIPTION = """\
Run a model on a single device and keep every value; then run what each pass made of it, and say
which value differs first: the node, its module and source line, the ranks, and by how much.
"""

_EPILOG = f"""\
{MODEL_HELP}
Each phase starts from what its real predecessor left: decode from the cache of a prefill. Stages
before partition have no ops on local tensors yet. Of canonicalise, compose and absorb the ops run
on one device, of seed each input is cut and put together again, of propagate and push_back each
op runs alone on all ranks from right operands. From partition on all ranks run in lock-step, with
NaN wherever a rank must not read. With --target ge, the ranks' GE graphs run on the reference
executor too, and what they say is the value of a node of the program is compared.

examples:
  rolemesh compare hf:llama --role decode --mesh tp=4
  rolemesh compare hf:deepseek_v32 --role pd_mixed --mesh tp=4 --phase decode --all
  rolemesh compare hf:llama --role prefill --mesh tp=3 --stage partition --rank 2
  rolemesh compare hf:llama --role decode --mesh tp=2 --target ge --json

{EXIT_CODES}"""


def register(commands: Commands[Parser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "compare",
        help="compare every stage and every rank with the single device, value by value",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    parser.set_defaults(command=_run)
    add_model(parser)
    add = parser.add_argument
    add("--phase", metavar="P", help="the only phase to compare (default: all)")
    add("--stage", metavar="S", help="the only stage to compare: a pass, or ge (default: all)")
    add("--rank", type=int, metavar="R", help="the only rank whose part is compared (default: all)")
    add("--all", action="store_true", help="list every value, not only the first that differs")
    add_tolerance(parser)
    add_json(parser)


def _run(parsed: argparse.Namespace) -> int:
    progress = Progress()
    progress("importing torch")
    options = options_of(parsed)
    from rolemesh.compiler.debug.compare.compare_model import compare_model
    from rolemesh.compiler.debug.compare.compare_report import report_json, report_text

    report = compare_model(options, progress, parsed.phase, parsed.stage, parsed.rank)
    ok = all(stage.ok for stages in report.values() for stage in stages)
    if parsed.json:
        print_json(
            {
                "ok": ok,
                "model": options.model,
                "role": options.role,
                "mesh": dict(zip(options.mesh.names, options.mesh.sizes, strict=True)),
                "target": options.target,
                "tolerance": options.allowed,
                "phases": report_json(report),
            }
        )
    else:
        print_text(report_text(report, everything=parsed.all))
    return FINE if ok else DIFFERENT
