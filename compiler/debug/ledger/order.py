"""Whether all ranks of a run issue the same collectives in the same order.

A collective ends when every rank of its group has come to it. Ranks that issue different ones, or
the same in another order, wait for each other for ever or exchange the wrong bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from rolemesh.compiler.debug.ledger.ledger import Entry, ledger_of
from rolemesh.compiler.dump.reader import Run, open_run

__all__ = ["Divergence", "divergences", "ranks_in"]


@dataclass(frozen=True)
class Divergence:
    """The first place where ranks differ in one program.

    Attributes:
        program: Id of the program.
        position: Which collective, from 0; None if a rank has no such program at all.
        by_rank: What each rank issues there.
    """

    program: str
    position: int | None
    by_rank: Mapping[int, str]

    @property
    def text(self) -> str:
        """What differs, a rank a line."""
        where = "" if self.position is None else f", collective {self.position}"
        lines = [f"{self.program}{where}: the ranks differ"]
        lines += [f"  rank {rank}: {issued}" for rank, issued in self.by_rank.items()]
        return "\n".join(lines)


def ranks_in(folder: str) -> dict[int, Run]:
    """The runs of all ranks that wrote to a folder, by rank; empty if it is not shared by ranks.

    Raises:
        RolemeshError: RM035 if one of them cannot be read.
    """
    names = [path.name.removeprefix("rank_") for path in Path(folder).glob("rank_*")]
    ranks = sorted(int(name) for name in names if name.isdecimal())
    return {rank: open_run(folder, rank) for rank in ranks}


def divergences(runs: Mapping[int, Run]) -> list[Divergence]:
    """The first divergence of every program; a rank that wrote nothing diverges too.

    Args:
        runs: The run of each rank.

    Raises:
        RolemeshError: RM035 if a stage cannot be read.
    """
    issued: dict[str, dict[int, tuple[Entry, ...]]] = {}
    world = 0
    for rank, run in runs.items():
        for program in run.programs:
            stage = program.stage() if program.stage_names else None
            if stage is not None and "partition" in stage.head["history"]:
                issued.setdefault(program.id, {})[rank] = ledger_of(stage).entries
                world = max(world, math.prod(stage.mesh.values()))
    found = []
    for program_id, by_rank in issued.items():
        absent = [rank for rank in sorted({*range(world), *runs}) if rank not in by_rank]
        if absent:
            here = dict.fromkeys(by_rank, "has the program")
            found.append(Divergence(program_id, None, here | dict.fromkeys(absent, "has it not")))
            continue
        for position, entries in enumerate(zip_longest(*by_rank.values())):
            if len({_key(entry) for entry in entries}) > 1:
                texts = [_text(entry) for entry in entries]
                found.append(
                    Divergence(program_id, position, dict(zip(by_rank, texts, strict=True)))
                )
                break
    return found


def _key(entry: Entry | None) -> object:
    if entry is None:
        return None
    what = entry.op, entry.reduction, entry.owner
    return *what, entry.axes, entry.dim, entry.shape, entry.dtype


def _text(entry: Entry | None) -> str:
    if entry is None:
        return "no more collectives"
    how = f" {entry.reduction}" if entry.reduction else ""
    owner = "" if entry.owner is None else f" from {entry.owner}"
    return f"{entry.text}{how}{owner} of {entry.sent} (%{entry.node}, {entry.module or 'root'})"
