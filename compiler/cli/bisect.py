"""`rolemesh bisect`: the first pass that broke a program, and a script that reproduces it."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rolemesh.compiler.cli.conventions import (
    DIFFERENT,
    EXIT_CODES,
    FINE,
    Commands,
    Parser,
    Progress,
    add_json,
    print_json,
)
from rolemesh.compiler.cli.model import MODEL_HELP, add_sizes, add_tolerance, options_of
from rolemesh.compiler.cli.source import SOURCE_HELP, add_program

if TYPE_CHECKING:
    from rolemesh.compiler.debug.bisect.bisect import Fault

__all__ = ["register"]

_DESCRIPTION = """\
Find the first pass that broke a program.

Given a MODEL, that is the first pass whose stage computes something else than the single device, or
the first that raises. The smallest part of the program that shows it is written as a Python script,
with its data next to it, which reproduces the fault in one process with rolemesh alone.

Given a RUN and a command, it is the first stage of a recorded program that the command calls bad.
"""

_EPILOG = f"""\
{MODEL_HELP}
{SOURCE_HELP}
The command is run by the shell for one stage after another, with {{stage}} replaced by the stage's
JSON file and {{text}} by its text. It exits with 0 if the stage is good, with 125 if it cannot
tell, and with any other code below 128 if it is bad, as with `git bisect run`. What it prints goes
to stderr. Stages must be good up to some pass and bad from there on.

0 says that nothing is wrong, 1 that a pass was found.

examples:
  rolemesh bisect hf:llama --role decode --mesh tp=4
  rolemesh bisect hf:deepseek_v32 --role pd_mixed --mesh tp=4 --phase decode --out fault.py
  rolemesh bisect run --program decode --command '! grep -q mesh.all_to_all {{text}}'
  rolemesh bisect run --command 'python my_check.py {{stage}}'

{EXIT_CODES}"""


def register(commands: Commands[Parser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "bisect",
        help="find the first pass that broke a program",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    parser.set_defaults(command=_run, parser=parser)
    parser.add_argument("model", metavar="MODEL|RUN", help="a model, or a run directory")
    model = parser.add_argument_group("for a model")
    add_sizes(model, required=False)
    model.add_argument("--phase", metavar="P", help="the only phase to look at (default: all)")
    model.add_argument(
        "--out", default="fault.py", metavar="FILE", help="the script (default fault.py)"
    )
    add_tolerance(model)
    run = parser.add_argument_group("for a run directory")
    run.add_argument("--command", dest="predicate", metavar="CMD", help="what tells good from bad")
    add_program(run)
    run.add_argument("--rank", type=int, metavar="R", help="whose run, if several ranks wrote one")
    add_json(parser)


def _run(parsed: argparse.Namespace) -> int:
    if parsed.predicate is not None:
        return _run_command(parsed)
    missing = [name for name in ("role", "mesh") if getattr(parsed, name) is None]
    if missing:
        wanted = " and ".join(f"--{name}" for name in missing)
        parsed.parser.error(f"a model needs {wanted}, a run directory needs --command")
    return _run_model(parsed)


def _run_command(parsed: argparse.Namespace) -> int:
    from rolemesh.compiler.debug.bisect.bisect_command import bisect_stages
    from rolemesh.compiler.dump.reader import open_source

    program = open_source(parsed.model, parsed.rank).program(parsed.program)
    found = bisect_stages(program, parsed.predicate, Progress())
    if parsed.json:
        print_json({"ok": not found.stages, "stages": list(found.stages), "tried": found.tried})
    elif not found.stages:
        print(f"{program.id}: no stage is bad")
    elif len(found.stages) == 1:
        print(f"{program.id}: {found.stages[0]} is the first bad stage")
    else:
        print(f"{program.id}: the first bad stage is one of {', '.join(found.stages)}")
    return DIFFERENT if found.stages else FINE


def _run_model(parsed: argparse.Namespace) -> int:
    progress = Progress()
    progress("importing torch")
    options = options_of(parsed)
    from rolemesh.compiler.debug.bisect.bisect import bisect
    from rolemesh.compiler.debug.bisect.reproduce import write_script

    fault = bisect(options, progress, parsed.phase)
    if fault is None:
        if parsed.json:
            print_json({"ok": True})
        else:
            print("every stage is equal to the single device")
        return FINE
    script = Path(parsed.out)
    command = f"rolemesh bisect {shlex.join(_given(parsed))}"
    data = write_script(fault.repro, script, fault.title, command)
    if parsed.json:
        print_json({"ok": False, **_as_json(fault), "script": str(script), "data": str(data)})
    else:
        print(_as_text(fault))
        print(f"reproduce it with: {Path(sys.executable).name} {shlex.quote(str(script))}")
    return DIFFERENT


def _given(parsed: argparse.Namespace) -> list[str]:
    """What names the case, as arguments."""
    names = ("role", "mesh", "tokens", "batch", "dtype", "layers", "attn", "experts", "phase")
    values = ((name, getattr(parsed, name)) for name in names)
    options = [
        word for name, value in values if value is not None for word in (f"--{name}", str(value))
    ]
    return [parsed.model, *options]


def _as_json(fault: Fault) -> dict[str, object]:
    from rolemesh.compiler.debug.compare.compare_report import node_json

    return {
        "phase": fault.phase,
        "stage": fault.stage,
        "node": None if fault.node is None else node_json(fault.node),
        "error": fault.error,
        "ops": list(fault.ops),
    }


def _as_text(fault: Fault) -> str:
    from rolemesh.compiler.debug.compare.compare_report import node_lines

    lines = [f"phase {fault.phase}: {fault.title}"]
    if fault.node is not None:
        lines += [f"  {line}" for line in node_lines(fault.node)]
    count = len(fault.ops)
    some = ", ".join(f"%{name}" for name in fault.ops[:8]) + (", .." if count > 8 else "")
    ops = f"{count} op{'s' * (count != 1)}" + (f": {some}" if count else "")
    lines.append(f"  smallest part that fails: {ops}")
    return "\n".join(lines)
