"""`rolemesh trace`: the simulated or measured timeline of all ranks, for Perfetto."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rolemesh.compiler.cli.conventions import (
    EXIT_CODES,
    FINE,
    Commands,
    Parser,
    Progress,
    add_output,
    print_json,
    write_output,
)
from rolemesh.compiler.cli.model import MODEL_HELP, add_sizes, options_of
from rolemesh.compiler.cli.source import (
    SOURCE_HELP,
    add_program,
    add_source,
    add_stage,
    stage_of,
)

if TYPE_CHECKING:
    from rolemesh.compiler.debug.timeline.timeline import Event
    from rolemesh.compiler.dump.reader import Stage

__all__ = ["register"]

_DESCRIPTION = """\
Write when each rank computes and communicates as JSON that Perfetto (https://ui.perfetto.dev) and
chrome://tracing open: a process per rank, a thread for compute and one for communication, arrows
from each collective that starts early to its wait. What it adds up to, per rank and layer, is said
on stderr.
"""

_EPILOG = f"""\
{SOURCE_HELP}
The timeline is simulated from the FLOPs and bytes of a partitioned stage: it shows what waits for
what, and about how long, on a machine whose rates you give. Their defaults are near the peaks of
one die of an Ascend 910C.

With --measured, MODEL takes the place of RUN, and the timeline is that of the role's phase on one
process per rank, over gloo on this machine's CPU. Events have the same names in both.

{MODEL_HELP}
examples:
  rolemesh trace run --program prefill -o prefill.json
  rolemesh trace run --program decode --link-gbps 25 --latency-us 20 -o decode.json
  rolemesh trace run --program decode --json
  rolemesh trace hf:llama --measured --role prefill --mesh tp=2 --layers 2 -o measured.json

{EXIT_CODES}"""

_RATES = {
    "tflops": "10^12 floating-point operations a second of a rank (default 400)",
    "memory_gbps": "10^9 bytes a second to and from its memory (default 1600)",
    "link_gbps": "10^9 bytes a second that it receives from others (default 200)",
    "latency_us": "microseconds that each exchange takes on top (default 10)",
}
_SIMULATED = ("rank", "stage", *_RATES)
_MEASURED = ("role", "mesh", "tokens", "batch", "dtype", "layers", "attn", "experts")
"""Arguments that only one of the timelines has."""


def register(commands: Commands[Parser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "trace",
        help="write a simulated or measured timeline for Perfetto",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    parser.set_defaults(command=functools.partial(_run, parser), target_options=[])
    add_source(parser)
    add_program(parser)
    add_stage(parser)
    add_output(parser)
    parser.add_argument(
        "--json",
        action="store_true",
        help="print what the timeline adds up to as JSON; the timeline goes to the file, if any",
    )
    rates = parser.add_argument_group("the machine that is simulated")
    for name, what in _RATES.items():
        rates.add_argument(f"--{name.replace('_', '-')}", type=float, metavar="X", help=what)
    measured = parser.add_argument_group("a measured timeline")
    measured.add_argument(
        "--measured", action="store_true", help="run the ranks; RUN is a MODEL, see below"
    )
    add_sizes(measured, required=False)


def _run(parser: Parser, parsed: argparse.Namespace) -> int:
    _refuse(parser, parsed, _SIMULATED if parsed.measured else _MEASURED)
    about: dict[str, object]
    if parsed.measured:
        if parsed.role is None or parsed.mesh is None:
            parser.error("--measured needs --role and --mesh")
        stage, events = _measured(parsed)
        about = {"timeline": "measured"}
    else:
        from rolemesh.compiler.debug.timeline.timeline import Machine, timeline

        given = {name: getattr(parsed, name) for name in _RATES}
        machine = Machine(**{name: rate for name, rate in given.items() if rate is not None})
        stage = stage_of(parsed)
        events = timeline(stage, machine)
        about = {"timeline": "simulated", "machine": dataclasses.asdict(machine)}
    from rolemesh.compiler.debug.timeline.overlap import loads, loads_text
    from rolemesh.compiler.debug.timeline.trace import trace_text

    ranks = loads(events)
    if parsed.out is not None or not parsed.json:
        write_output(trace_text(stage, events, about), parsed.out)
    if parsed.json:
        where = {"program": stage.program, "stage": stage.name}
        print_json({**where, **about, "ranks": [rank.as_json() for rank in ranks]})
    else:
        print(loads_text(ranks), end="", file=sys.stderr)
    return FINE


def _refuse(parser: Parser, parsed: argparse.Namespace, names: Sequence[str]) -> None:
    """A usage error for arguments that the timeline that was asked for does not have."""
    for name in names:
        if getattr(parsed, name) != parser.get_default(name):
            other = "the simulated" if parsed.measured else "a measured"
            parser.error(f"--{name.replace('_', '-')} is of {other} timeline")


def _measured(parsed: argparse.Namespace) -> tuple[Stage, list[Event]]:
    progress = Progress()
    progress("importing torch")
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler's, read when torch is imported
    options = options_of(argparse.Namespace(**vars(parsed), model=parsed.run))
    from rolemesh.compiler.debug.timeline.measure import measure

    return measure(options, parsed.program, progress)
