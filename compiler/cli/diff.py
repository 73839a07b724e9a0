"""`rolemesh diff`: what differs between stages, runs, ranks, phases or roles."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rolemesh.compiler.cli.conventions import (
    DIFFERENT,
    EXIT_CODES,
    FINE,
    Commands,
    Parser,
    Progress,
    add_color,
    add_json,
    print_json,
    print_text,
    use_color,
)
from rolemesh.compiler.cli.source import SOURCE_HELP, add_program, add_source

if TYPE_CHECKING:
    from rolemesh.compiler.debug.diff.differences import Difference
    from rolemesh.compiler.dump.reader import RecordedProgram, Run, Stage

__all__ = ["register"]

_DESCRIPTION = """\
Compare two passes of a program, two runs, two ranks, two phases or two roles. Nodes are matched by
where they come from (module, source line, op), so renumbered names are no difference.
"""

_EPILOG = f"""\
{SOURCE_HELP}
Signs: + added, - removed, > moved among its neighbours, ~ changed op, arguments or shape,
@ other layout, * other choice with the same layout. Rows stand for like modules and nodes and show
the first; --full gives every node its own. Between runs and ranks all programs and stages are
compared, or those that are named; otherwise the last stage, or the one that is named.

examples:
  rolemesh diff run --program decode --stage push_back --to-stage partition
  rolemesh diff run --program prefill --to-program decode
  rolemesh diff run_of_prefill run_of_decode --program prefill --to-program decode
  rolemesh diff before after
  rolemesh diff run_of_torchrun --rank 0 --to-rank 1

exit code 0 if there is no difference, 1 if there is any

{EXIT_CODES}"""


def register(commands: Commands[Parser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "diff",
        help="compare two passes, runs, ranks, phases or roles",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    parser.set_defaults(command=lambda parsed: _run(parser, parsed))
    add_source(parser)
    parser.add_argument("to_run", nargs="?", metavar="RUN2", help="the other run (default: RUN)")
    parser.add_argument("--to-rank", type=int, metavar="R", help="whose run to compare with")
    add_program(parser)
    parser.add_argument("--to-program", metavar="P", help="the other program (default: the same)")
    parser.add_argument("--stage", metavar="S", help="which stage")
    parser.add_argument("--to-stage", metavar="S", help="the other stage (default: the same)")
    parser.add_argument("--full", action="store_true", help="a row for every node")
    add_color(parser)
    add_json(parser)


@dataclass(frozen=True)
class _Compared:
    """Two stages with what to call them."""

    names: tuple[str, str]
    found: Difference


def _run(parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> int:
    given = (parsed.to_run, parsed.to_rank, parsed.to_program, parsed.to_stage)
    if all(value is None for value in given):
        parser.error("nothing to compare with: name RUN2, --to-rank, --to-program or --to-stage")
    if parsed.run == "-" and parsed.to_run in ("-", None):
        parser.error("standard input can be read once: name a file as RUN2")
    from rolemesh.compiler.debug.diff.differences_text import difference_json, difference_text
    from rolemesh.compiler.debug.paint import Painter
    from rolemesh.compiler.dump.reader import open_source

    left = open_source(parsed.run, parsed.rank)
    right = left
    if parsed.to_run is not None or parsed.to_rank is not None:
        rank = parsed.rank if parsed.to_rank is None else parsed.to_rank
        right = open_source(parsed.to_run or parsed.run, rank)
    pairs, alone = _programs(left, right, parsed)
    progress = Progress(patient=True)
    stages = [_stages(*pair, parsed, progress) for pair in pairs]
    for one in stages:
        alone |= one.alone
    compared = [found for one in stages for found in one.compared]
    differs = bool(alone) or any(entry.found for entry in compared)
    if parsed.json:
        comparisons = [{"names": e.names, **difference_json(e.found)} for e in compared]
        print_json({"equal": not differs, "comparisons": comparisons, "only_in": alone})
        return DIFFERENT if differs else FINE
    on = use_color(parsed.color)
    texts = []
    equal = [entry for entry in compared if not entry.found]
    for entry in compared:
        if entry.found:
            painter = Painter(dict.fromkeys([*entry.found.meshes[0], *entry.found.meshes[1]]), on)
            texts.append(difference_text(entry.found, entry.names, painter, full=parsed.full))
    texts += [f"only in {where}: {what}" for what, where in alone.items()]
    if len(equal) == 1:
        texts.append(f"no difference: {' -> '.join(equal[0].names)}")
    elif equal:
        texts.append(f"no difference in {len(equal)} of {len(compared)} stages")
    print_text("\n\n".join(texts))
    return DIFFERENT if differs else FINE


_Pair = tuple["RecordedProgram", "RecordedProgram"]


def _programs(
    left: Run, right: Run, parsed: argparse.Namespace
) -> tuple[list[_Pair], dict[str, str]]:
    """Programs to compare, and those without a partner with where they are."""
    if parsed.program is not None or parsed.to_program is not None or left is right:
        first = left.program(parsed.program)
        return [(first, right.program(parsed.to_program or parsed.program or first.id))], {}
    ids = [{program.id: program for program in run.programs} for run in (left, right)]
    if not ids[0].keys() & ids[1].keys() and len(ids[0]) == len(ids[1]) == 1:
        return [(left.program(), right.program())], {}
    pairs = [(program, ids[1][name]) for name, program in ids[0].items() if name in ids[1]]
    alone = {name: str(left.folder) for name in ids[0] if name not in ids[1]}
    alone |= {name: str(right.folder) for name in ids[1] if name not in ids[0]}
    return pairs, alone


@dataclass(frozen=True)
class _Stages:
    """Two programs, stage by stage, and the stages that only one has."""

    compared: tuple[_Compared, ...]
    alone: Mapping[str, str]


def _stages(
    left: RecordedProgram,
    right: RecordedProgram,
    parsed: argparse.Namespace,
    progress: Progress,
) -> _Stages:
    from rolemesh.compiler.debug.diff.differences import difference

    one_program = left.folder == right.folder and left.id == right.id
    sizes = _sizes(left), _sizes(right)

    def compare(first: Stage, second: Stage) -> _Compared:
        names = _names((left, first), (right, second))
        progress(f"comparing {' with '.join(names)}")
        return _Compared(names, difference(first, second, one_program=one_program, sizes=sizes))

    named = parsed.stage is not None or parsed.to_stage is not None
    across = parsed.to_run is not None or parsed.to_rank is not None
    if named or not across or left.id != right.id or left.loaded or right.loaded:
        first = left.stage(parsed.stage or "last")
        return _Stages(
            (compare(first, right.stage(parsed.to_stage or parsed.stage or "last")),), {}
        )
    both = [name for name in left.stage_names if name in right.stage_names]
    alone = {
        f"stage {name} of {program.id}": str(program.folder)
        for program in (left, right)
        for name in program.stage_names
        if name not in both
    }
    return _Stages(tuple(compare(left.stage(name), right.stage(name)) for name in both), alone)


def _names(*sides: tuple[RecordedProgram, Stage]) -> tuple[str, str]:
    """What tells two stages apart: the run or rank, the program, the pass."""
    (left, first), (right, second) = sides
    differ = left.folder != right.folder
    folders = [f"{_shown(p.folder)}: " if differ else "" for p in (left, right)]
    return f"{folders[0]}{left.id} {first.name}", f"{folders[1]}{right.id} {second.name}"


def _shown(folder: Path) -> str:
    return f"{folder.parent.name}/{folder.name}" if folder.name.startswith("rank_") else folder.name


def _sizes(program: RecordedProgram) -> Mapping[str, int]:
    """B, T and the ranks of each axis, which a program's last stage has for all of them."""
    found: Mapping[str, int] = program.stage().data.get("sizes", {})
    return found
