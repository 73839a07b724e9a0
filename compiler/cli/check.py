"""`rolemesh check`: a role's sharded programs against the single device."""

from __future__ import annotations

import argparse
import json
import sys

from rolemesh.compiler.cli.conventions import (
    DIFFERENT,
    EXIT_CODES,
    FINE,
    Commands,
    Parser,
    Progress,
    add_json,
    count,
)
from rolemesh.compiler.cli.model import MODEL_HELP, add_model, add_tolerance, options_of

__all__ = ["register"]

_DESCRIPTION = """\
Compile every phase of a role, run all ranks, and compare results, every updated tensor (such as
caches) and greedy tokens with the model on a single device. Report what each phase moves and how
each tensor is stored.
"""

_EPILOG = f"""\
{MODEL_HELP}
Ranks run in lock-step in this process, with NaN wherever a rank must not read. With --processes, or
the target inductor, they are processes that talk over gloo; then the traffic of the process groups
and the size of every shard are compared with the report too. With the target ge, the ranks' GE
graphs are executed, on CPU tensors where there is no NPU.

examples:
  rolemesh check hf:llama --role decode --mesh tp=4
  rolemesh check hf:deepseek_v32 --role pd_mixed --mesh tp=4 --batch 4 --decode-steps 8
  rolemesh check hf:qwen3_moe --role prefill --mesh tp=2 --target inductor --json
  rolemesh check hf:deepseek_v32 --role decode --mesh tp=4 --target ge --target-option dump=graphs
  rolemesh check hf:encoder/bert --role prefill --mesh tp=4
  rolemesh check hf:llama --role decode --mesh tp=4 --dump run
  rolemesh check my_model.py:case --role pd_mixed --mesh tp=2 --processes

{EXIT_CODES}"""


def register(commands: Commands[Parser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "check",
        help="compare a role's sharded programs with the single device",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    parser.set_defaults(command=_run)
    add_model(parser)
    add = parser.add_argument
    add(
        "--decode-steps",
        type=count,
        default=1,
        metavar="N",
        help="greedy tokens to decode, for language models (default 1)",
    )
    add("--processes", action="store_true", help="run ranks as processes over gloo")
    add_tolerance(parser)
    add(
        "--dump",
        metavar="DIR",
        help="write a run directory of what was compiled; see rolemesh dump",
    )
    add_json(parser)


def _run(parsed: argparse.Namespace) -> int:
    progress = Progress()
    progress("importing torch")
    options = options_of(parsed)
    from rolemesh.compiler.command.check import check

    report = check(options, progress)
    print(json.dumps(report.as_json(), indent=2) if parsed.json else report.as_text())
    if parsed.json:
        for problem in report.all_problems:
            print(problem, file=sys.stderr)
    return FINE if report.ok else DIFFERENT
