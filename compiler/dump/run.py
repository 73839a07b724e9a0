"""A run directory of a whole case: every phase of a role, compiled and not run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from rolemesh.compiler.api import Sharded, lower, shard
from rolemesh.compiler.capture.tracing import trace
from rolemesh.compiler.command.check_options import CheckOptions
from rolemesh.compiler.roles import role_named

__all__ = ["Dumped", "dump_case", "shard_case"]


@dataclass(frozen=True)
class Dumped:
    """What was written.

    Attributes:
        folder: The run directory.
        seconds: By program, the seconds that each pass took, by stage.
    """

    folder: Path
    seconds: Mapping[str, Mapping[str, float]]


def shard_case(
    options: CheckOptions, progress: Callable[[str], None], folder: str | None = None
) -> dict[str, Sharded]:
    """A case's sharded Programs, by phase of the role.

    Args:
        options: The model, the role, the mesh and sizes.
        progress: Called with what is being done.
        folder: Where to write a run directory; None for what ROLEMESH_DUMP says.

    Raises:
        RolemeshError: For what cannot be compiled, or written.
    """
    role = role_named(options.role)
    progress(f"loading {options.model}")
    case = options.load()
    found = {}
    with torch.no_grad():
        for phase in role.phases:
            if phase not in case.phases:
                continue
            progress(f"compiling {phase}")
            args, kwargs = case.phases[phase]
            traced = trace(case.model, *args, **kwargs)
            found[phase] = shard(
                traced,
                options.mesh,
                role.name,
                phase=phase,
                optimise=options.optimise,
                dump=folder,
            )
    return found


def dump_case(options: CheckOptions, folder: str, progress: Callable[[str], None]) -> Dumped:
    """Compile a case and write its run directory; for the target `ge`, with every rank's graph.

    Args:
        options: The model, the role, the mesh, sizes and the target.
        folder: The run directory.
        progress: Called with what is being done.

    Raises:
        RolemeshError: For what cannot be compiled, or written.
    """
    seconds = {}
    for phase, sharded in shard_case(options, progress, folder).items():
        if options.target == "ge":
            progress(f"lowering {phase} for {options.mesh.size} ranks")
            lower(sharded, options.target, options.parsed_options).lockstep()
        record = sharded.stages.record
        assert record is not None
        seconds[str(record.entry["id"])] = record.seconds
    return Dumped(Path(folder), seconds)
