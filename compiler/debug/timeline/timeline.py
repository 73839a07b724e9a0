"""The simulated timeline of a partitioned stage: when each rank computes and communicates.

The model, with times in microseconds:

* An op takes as long as the slower of its arithmetic and its memory traffic,
  `max(flops / arithmetic rate, bytes / memory bandwidth)`: the roofline of Williams, Waterman and
  Patterson, "Roofline: an insightful visual performance model for multicore architectures", 2009.
  FLOPs are those of contractions, bytes those of its operands and results on one rank, pads
  included. A lookup reads as many bytes of its table as it returns. Views take no time and have
  no event. Nothing is counted for starting an op, and nothing for the caches of a device.
* A collective takes `exchanges * latency + bytes / link bandwidth`, the model of Hockney, "The
  communication challenge for MPP: Intel Paragon and Meiko CS-2", 1994. Bytes are those a rank
  receives, by the convention of `compiler.ir.traffic`, as the ledger has them; over several axes it
  is one exchange per axis, as lowering makes it.
* A rank has two streams, and runs each in the order of the program. A collective starts when the
  ops and the collectives before it are done. Compute waits for a synchronous collective; one that
  is only started, such as `broadcast_start`, lets compute go on until its `wait`.
* Ranks run alike, for chunks are padded to one size: none ever waits for another. They differ in
  what they receive, for the owner of a weight receives nothing when it is broadcast.

Invariants: events of one stream of one rank do not overlap; every collective of the stage is one
event on each rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from rolemesh.compiler.debug.sizes import itemsize, sizes_of
from rolemesh.compiler.dump.reader import Node, Stage
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.mesh import Mesh

__all__ = [
    "COMMUNICATION",
    "COMPUTE",
    "WAIT",
    "Event",
    "Machine",
    "is_free",
    "received_by",
    "timeline",
]

COMPUTE, COMMUNICATION = "compute", "communication"
"""The streams of a rank."""

WAIT = "wait"
"""The kind of an event in which compute stands still for a broadcast."""


@dataclass(frozen=True)
class Machine:
    """The device of a rank, and what joins the ranks.

    The defaults are round numbers near half of what is published for the two dies of an Ascend
    910C (about 780 TFLOP/s in bf16, 3,200 GB/s of memory and 400 GB/s of links); the latency is an
    assumption. They are peaks: give what was measured where it matters.

    Attributes:
        tflops: 10^12 floating-point operations a second, for every dtype.
        memory_gbps: 10^9 bytes a second to and from memory.
        link_gbps: 10^9 bytes a second that a rank receives from others.
        latency_us: Microseconds until the first byte of an exchange arrives.

    Raises:
        RolemeshError: RM018 for a rate that is not above zero, or a latency below it.
    """

    tflops: float = 400.0
    memory_gbps: float = 1600.0
    link_gbps: float = 200.0
    latency_us: float = 10.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            latency = field.name == "latency_us"
            if not math.isfinite(value) or value < 0 or (value == 0 and not latency):
                raise RolemeshError(
                    "RM018",
                    what=f"{field.name} is {value:g}",
                    where="the machine of a simulated timeline",
                    why="a rate is above zero" if not latency else "a latency is zero or more",
                    fix=f"leave it out for {field.default:g}",
                )

    def compute_us(self, flops: float, touched: float) -> float:
        """Microseconds of an op.

        Args:
            flops: Its floating-point operations.
            touched: Bytes it reads and writes.
        """
        return max(flops / (self.tflops * 1e6), touched / (self.memory_gbps * 1e3))

    def collective_us(self, received: float, exchanges: int = 1) -> float:
        """Microseconds of a collective.

        Args:
            received: Bytes a rank receives.
            exchanges: Exchanges that it is made of, one per mesh axis.
        """
        return exchanges * self.latency_us + received / (self.link_gbps * 1e3)


@dataclass(frozen=True)
class Event:
    """What one stream of one rank does for a while.

    Attributes:
        rank: The rank.
        stream: `compute` or `communication`.
        name: The node's name.
        start: Microseconds since the rank's program started.
        duration: Microseconds.
        kind: `compute`, `wait` (compute stands still for a collective that has started, maybe for
            no time at all), or the collective: `all_gather`, `reduce_scatter`, `all_reduce`,
            `all_to_all`, `broadcast`.
        module: Module path; empty if unknown.
        received: Bytes the rank receives; 0 for an op, and for the owner in a broadcast.
    """

    rank: int
    stream: str
    name: str
    start: float
    duration: float
    kind: str
    module: str
    received: int = 0

    @property
    def end(self) -> float:
        """When it is over."""
        return self.start + self.duration


def timeline(stage: Stage, machine: Machine | None = None) -> list[Event]:
    """The simulated timeline of a stage; see the module docstring.

    Args:
        stage: A partitioned stage. Symbols of sizes have the values they were captured with.
        machine: The machine; the default one if None.

    Returns:
        All events, by rank, then by start.

    Raises:
        RolemeshError: RM018 if the stage is not partitioned.
    """
    return _Simulation(stage, machine or Machine()).run()


_FREE = frozenset(
    """
    _unsafe_view alias as_strided detach diagonal empty empty_like expand lift_fresh narrow
    new_empty permute reshape select slice split split_with_sizes squeeze t transpose unbind
    unfold unsqueeze view view_as_complex view_as_real
    """.split()  # noqa: SIM905 - reads better than a string a line
)
"""Ops of aten that move no data: views, and memory that nothing is written to. A reshape that must
copy is rare in captured models, and the graph does not say which."""

_FREE_HERE = frozenset({"getitem", "input", "mesh.shard", "mesh.part"})
"""The same of other ops: a rank's chunk of a whole value is a view of it."""

_LOOKUPS = frozenset(
    {"aten.embedding", "aten.gather", "aten.index", "aten.index_select", "mesh.take"}
)
"""Ops that read of their first operand only what they return."""


class _Simulation:
    """One run: the clocks of both streams, which all ranks share."""

    def __init__(self, stage: Stage, machine: Machine) -> None:
        if "partition" not in stage.head["history"]:
            raise RolemeshError(
                "RM018",
                what=f"stage {stage.name!r} has no timeline",
                where=stage.program,
                why="what a rank runs is known from the stage partition on",
                fix="name partition or a later stage, such as last",
            )
        self.stage = stage
        self.machine = machine
        self.mesh = Mesh(stage.mesh)
        self.size = sizes_of(stage)
        self.touched: dict[str, int] = {}
        self.clock = {COMPUTE: 0.0, COMMUNICATION: 0.0}
        self.arrived: dict[str, float] = {}
        self.events: list[Event] = []

    def run(self) -> list[Event]:
        for node in self.stage.nodes.values():
            self.touched[node.name] = self._held(node)
            if node.collective is not None:
                self._collective(node, node.collective)
            elif node.op == "mesh.wait":
                self._wait(node)
            elif not is_free(node):
                self._add(node, COMPUTE, COMPUTE, self._compute_us(node))
        return sorted(self.events, key=lambda event: (event.rank, event.start, event.end))

    def _compute_us(self, node: Node) -> float:
        result = self.touched[node.name]
        read = sum(self.touched[name] for name in dict.fromkeys(node.operands))
        if _packet(node) in _LOOKUPS and node.operands:
            table = self.touched[node.operands[0]]
            read += min(table, result) - table
        return self.machine.compute_us(self.size(node.data.get("flops", 0)), read + result)

    def _collective(self, node: Node, moved: Mapping[str, Any]) -> None:
        self.clock[COMMUNICATION] = max(self.clock.values())
        duration = self.machine.collective_us(moved["bytes"], len(moved["axes"]))
        self._add(node, COMMUNICATION, moved["op"], duration)
        if node.op.endswith("_start"):
            self.arrived[node.name] = self.clock[COMMUNICATION]
        else:
            self.clock[COMPUTE] = self.clock[COMMUNICATION]

    def _wait(self, node: Node) -> None:
        arrived = self.arrived[node.operands[0]]
        self._add(node, COMPUTE, WAIT, max(0.0, arrived - self.clock[COMPUTE]))

    def _add(self, node: Node, stream: str, kind: str, duration: float) -> None:
        """Run something on one stream of every rank."""
        start = self.clock[stream]
        for rank in range(self.mesh.size):
            received = 0 if node.collective is None else received_by(node, self.mesh, rank)
            self.events.append(
                Event(rank, stream, node.name, start, duration, kind, node.module, received)
            )
        self.clock[stream] = start + duration

    def _held(self, node: Node) -> int:
        """Bytes behind a node's results on one rank; what is expanded is not counted again."""
        if _packet(node) == "aten.expand":
            return self.touched[node.operands[0]]
        total = 0
        for value, shape in zip(node.data["types"], node.data["local"], strict=True):
            total += math.prod(map(self.size, shape)) * itemsize(value["dtype"])
        return total


def is_free(node: Node) -> bool:
    """Whether a node moves no data, so that it has no event."""
    namespace, _, rest = node.op.partition(".")
    return node.op in _FREE_HERE or (namespace == "aten" and rest.partition(".")[0] in _FREE)


def received_by(node: Node, mesh: Mesh, rank: int) -> int:
    """Bytes that a rank receives in a collective: none in a broadcast of what it owns."""
    assert node.collective is not None
    owner = node.data.get("kwargs", {}).get("owner")
    if owner is not None:
        (axis,) = node.collective["axes"]
        if mesh.coordinate(rank)[mesh.index(axis)] == owner:
            return 0
    return int(node.collective["bytes"])


def _packet(node: Node) -> str:
    """The op without its overload: `aten.mm`."""
    return ".".join(node.op.split(".")[:2])
