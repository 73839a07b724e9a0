"""What a timeline adds up to: compute, and communication that compute hides or does not.

Communication is overlapped while the compute stream of its rank runs an op, and exposed else.

Invariants: exposed and overlapped time of an event add up to its duration; what layers add up to is
what the rank has.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

from rolemesh.compiler.debug.timeline.timeline import COMPUTE, WAIT, Event

__all__ = ["OUTSIDE", "Load", "RankLoad", "loads", "loads_text"]

OUTSIDE = "(outside of layers)"
"""What stands for the layer of ops that belong to none."""


@dataclass
class Load:
    """Microseconds, and bytes received, of a rank or of one of its layers.

    Attributes:
        compute: Time of ops.
        exposed: Time of collectives while no op ran.
        overlapped: Time of collectives while ops ran.
        received: Bytes.
    """

    compute: float = 0.0
    exposed: float = 0.0
    overlapped: float = 0.0
    received: int = 0

    def as_json(self) -> dict[str, object]:
        """The load for `--json`."""
        return {
            "compute_us": round(self.compute, 3),
            "exposed_us": round(self.exposed, 3),
            "overlapped_us": round(self.overlapped, 3),
            "bytes": self.received,
        }


@dataclass
class RankLoad(Load):
    """The load of a rank.

    Attributes:
        rank: The rank.
        total: Microseconds from the first event of any rank to the last of this one.
        layers: Its layers, in the order of their first event; a layer is named by its module path.
    """

    rank: int = 0
    total: float = 0.0
    layers: dict[str, Load] = field(default_factory=dict)

    def as_json(self) -> dict[str, object]:
        """The load for `--json`."""
        layers = {name: load.as_json() for name, load in self.layers.items()}
        total: dict[str, object] = {"rank": self.rank, "total_us": round(self.total, 3)}
        return {**total, **super().as_json(), "layers": layers}


def loads(events: Sequence[Event]) -> list[RankLoad]:
    """What each rank's events add up to.

    Args:
        events: Those of all ranks. Ops of one rank do not overlap each other.
    """
    found = []
    for rank in sorted({event.rank for event in events}):
        mine = [event for event in events if event.rank == rank]
        busy = _Busy([event for event in mine if event.kind == COMPUTE])
        load = RankLoad(rank=rank, total=max(event.end for event in mine))
        for event in mine:
            layer = load.layers.setdefault(_layer(event.module), Load())
            for part in (load, layer):
                _add(part, event, busy)
        found.append(load)
    return found


def _add(load: Load, event: Event, busy: _Busy) -> None:
    if event.kind == COMPUTE:
        load.compute += event.duration
    elif event.kind != WAIT:
        hidden = min(busy.within(event.start, event.end), event.duration)
        load.overlapped += hidden
        load.exposed += event.duration - hidden
        load.received += event.received


class _Busy:
    """When the compute stream of a rank runs ops."""

    def __init__(self, ops: Sequence[Event]) -> None:
        ordered = sorted(ops, key=lambda event: event.start)
        self.starts = [event.start for event in ordered]
        self.ends = [event.end for event in ordered]

    def within(self, start: float, end: float) -> float:
        """How much of an interval ops fill."""
        filled = 0.0
        first = max(0, bisect_left(self.starts, start) - 1)
        for i in range(first, bisect_left(self.starts, end)):
            filled += max(0.0, min(end, self.ends[i]) - max(start, self.starts[i]))
        return filled


def _layer(module: str) -> str:
    """`model.layers.3` for all that is in it."""
    found = re.match(r"(?:.*?\.)?\d+(?=\.|$)", module)
    return found.group() if found else OUTSIDE


def loads_text(ranks: Sequence[RankLoad]) -> str:
    """The loads as a table: ranks, then the layers of the rank that ends last."""
    if not ranks:
        return "nothing runs\n"
    last = max(ranks, key=lambda rank: rank.total)
    rows: list[tuple[str, ...]] = [
        ("us", "total", "compute", "exposed", "overlapped", "bytes received")
    ]
    rows += [_row(f"rank {rank.rank}", rank, f"{rank.total:,.1f}") for rank in ranks]
    rows += [_row(f"rank {last.rank}, {name}", load) for name, load in last.layers.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for name, *cells in rows:
        right = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *right]).rstrip())
    return "\n".join(lines) + "\n"


def _row(name: str, load: Load, total: str = "") -> tuple[str, ...]:
    times = (f"{time:,.1f}" for time in (load.compute, load.exposed, load.overlapped))
    return (name, total, *times, f"{load.received:,}")
