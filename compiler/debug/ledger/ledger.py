"""The ledger of a recorded stage: every collective, what it moves, why, and what can hide it.

Bytes are those a rank receives, by the convention of `compiler.ir.traffic`; in a broadcast, a rank
that is not the owner. The formulas are those of `compiler.analysis.cost_analysis`.

Two figures say how far a collective could run behind other work. Its `window` is what the program
runs between its start and the first use of its result, in the order that ranks issue ops. What is
`independent` of it neither leads to it nor follows from it: more than that no order can hide it
behind. Both count ops of one rank, and the FLOPs of their contractions, pads included.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from rolemesh.compiler.debug.layers import folded, layer_of
from rolemesh.compiler.debug.ledger.formulas import evaluate, total
from rolemesh.compiler.debug.sizes import sizes_of
from rolemesh.compiler.dump.reader import Node, Stage
from rolemesh.compiler.ir.errors import RolemeshError

__all__ = ["Entry", "Ledger", "Total", "Work", "ledger_of", "totals"]

_NO_WORK = frozenset({"input", "getitem", "mesh.wait"})


@dataclass(frozen=True)
class Work:
    """What a rank computes.

    Attributes:
        ops: Number of ops that are no collectives.
        flops: Floating-point operations of their contractions.
        layers: Number of layers they belong to.
    """

    ops: int
    flops: int
    layers: int


@dataclass(frozen=True)
class Entry:
    """One collective.

    Attributes:
        node: Name of its node.
        op: `all_gather`, `reduce_scatter`, `all_reduce`, `all_to_all` or `broadcast`.
        axes: Mesh axes it runs over.
        dim: Dim it gathers, scatters or splits; None for all_reduce and broadcast, and for a bundle
            of several dims.
        shape: Local shape of what each rank puts in; symbolic sizes as text.
        dtype: Element type.
        kind: The same, short: `f32`.
        received: Bytes a rank receives at the ledger's sizes.
        formula: The same in B, T and the mesh axes.
        module: Module path it belongs to.
        source: `file.py:line`.
        cause: Why it is there.
        value: The value it moves, by the name it has before partitioning.
        user: The op it is moved for, likewise.
        window: What runs between its start and the first use of its result.
        independent: What neither leads to it nor follows from it.
        reduction: `sum`, `max` or `min`; empty for what reduces nothing.
        owner: Position on the axis that a broadcast is from; None for the others.
        most: Bytes received at most, where a call's routes say how many and `received` is expected;
            None where it is exact.
    """

    node: str
    op: str
    axes: tuple[str, ...]
    dim: int | None
    shape: tuple[int | str, ...]
    dtype: str
    kind: str
    received: int
    formula: str
    module: str
    source: str
    cause: str
    value: str
    user: str
    window: Work
    independent: Work
    reduction: str
    owner: int | None
    most: int | None

    @property
    def layer(self) -> int | None:
        """The layer it is in; None outside of all layers."""
        return layer_of(self.module)

    @property
    def text(self) -> str:
        """Op, axes and dim: `all_gather tp dim 1`."""
        dim = "" if self.dim is None else f" dim {self.dim}"
        return f"{self.op} {','.join(self.axes)}{dim}"

    @property
    def sent(self) -> str:
        """What each rank puts in: `f32[2, 4, 48]`."""
        return f"{self.kind}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Ledger:
    """All collectives of one stage, in the order every rank issues them.

    Attributes:
        program: Id of the program.
        stage: Name of the stage.
        mesh: Axis sizes.
        sizes: The value of every name in the formulas.
        entries: The collectives.
        without: By each of B and T that was given another value, nodes whose formula does not have
            it although they move what is computed from the model's inputs.
    """

    program: str
    stage: str
    mesh: Mapping[str, int]
    sizes: Mapping[str, int]
    entries: tuple[Entry, ...]
    without: Mapping[str, tuple[str, ...]]

    @property
    def received(self) -> int:
        """Bytes a rank receives in all of them."""
        return sum(entry.received for entry in self.entries)


@dataclass(frozen=True)
class Total:
    """Several collectives together.

    Attributes:
        key: What they have in common.
        count: How many.
        received: Bytes a rank receives.
        formula: The same as a formula.
    """

    key: str
    count: int
    received: int
    formula: str


_KEYS: Mapping[str, Callable[[Entry], str]] = {
    "op": lambda entry: f"{entry.op} {','.join(entry.axes)}",
    "axis": lambda entry: ",".join(entry.axes),
    "layer": lambda entry: "no layer" if entry.layer is None else f"layer {entry.layer}",
    "module": lambda entry: folded(entry.module) or "(root)",
}


def totals(entries: Iterable[Entry], by: str) -> list[Total]:
    """Totals of collectives, in the order of each group's first.

    Args:
        entries: The collectives.
        by: `op` (with its axes), `axis`, `layer` or `module` (like layers together).
    """
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(_KEYS[by](entry), []).append(entry)
    return [
        Total(key, len(found), sum(e.received for e in found), total(e.formula for e in found))
        for key, found in groups.items()
    ]


def ledger_of(stage: Stage, *, batch: int | None = None, tokens: int | None = None) -> Ledger:
    """The ledger of a stage.

    Args:
        stage: A partitioned stage.
        batch: Sequences to give the formulas, instead of those the program was traced with.
        tokens: Tokens per sequence, likewise.

    Raises:
        RolemeshError: RM018 if the stage is not partitioned, or sizes are given that its formulas
            do not have.
    """
    if "partition" not in stage.head["history"]:
        raise RolemeshError(
            "RM018",
            what=f"stage {stage.name!r} has no collectives",
            where=stage.program,
            why="the pass partition inserts them",
            fix="name partition or a later stage, such as last",
        )
    recorded: Mapping[str, int] = stage.data.get("sizes", {})
    given = {name: n for name, n in (("B", batch), ("T", tokens)) if n is not None}
    missing = [name for name in given if name not in recorded]
    if missing:
        raise RolemeshError(
            "RM018",
            what=f"the formulas of {stage.program} have no {' and no '.join(missing)}",
            where="options --batch and --tokens",
            why=f"they are in {', '.join(recorded) or 'plain numbers'}: no input has tokens",
            fix="leave the option out",
        )
    sizes = {**recorded, **given}
    graph = _Graph(stage)
    entries = []
    for node in stage.nodes.values():
        moved = node.collective
        if moved is not None:
            received = int(evaluate(moved["formula"], sizes)) if given else int(moved["bytes"])
            most = moved.get("most")
            most = None if most is None else int(evaluate(str(most), sizes))
            entries.append(_entry(node, received, most, graph))
    without = {
        name: tuple(
            entry.node
            for entry in entries
            if name not in re.findall(r"\w+", entry.formula) and graph.reads_inputs(entry.node)
        )
        for name in given
        if given[name] != recorded[name]
    }
    without = {name: nodes for name, nodes in without.items() if nodes}
    return Ledger(stage.program, stage.name, stage.mesh, sizes, tuple(entries), without)


def _entry(node: Node, received: int, most: int | None, graph: _Graph) -> Entry:
    moved = node.collective
    assert moved is not None
    kwargs = node.data.get("kwargs", {})
    return Entry(
        node.name,
        str(moved["op"]),
        tuple(moved["axes"]),
        moved["dim"],
        tuple(moved["shape"]),
        str(moved["dtype"]),
        node.kinds[0].partition("[")[0],
        received,
        str(moved["formula"]),
        node.module,
        node.source,
        node.reason,
        str(node.data.get("value", "")),
        str(node.data.get("user", "")),
        graph.window(node.name),
        graph.independent(node.name),
        str(kwargs.get("op", "")),
        kwargs.get("owner"),
        most,
    )


class _Graph:
    """Which nodes come before and after which, each set as the bits of an integer."""

    def __init__(self, stage: Stage) -> None:
        size = sizes_of(stage)
        self.stage = stage
        self.nodes: Sequence[Node] = tuple(stage.nodes.values())
        self.place = {node.name: index for index, node in enumerate(self.nodes)}
        self.flops = {
            index: size(node.data["flops"])
            for index, node in enumerate(self.nodes)
            if "flops" in node.data
        }
        works = [node.op not in _NO_WORK and node.collective is None for node in self.nodes]
        self.work = sum(1 << index for index, does in enumerate(works) if does)
        self.layers: dict[int, int] = {}
        for index, node in enumerate(self.nodes):
            layer = layer_of(node.module)
            if layer is not None:
                self.layers[layer] = self.layers.get(layer, 0) | 1 << index
        self.before = [0] * len(self.nodes)
        self.after = [0] * len(self.nodes)
        for index, node in enumerate(self.nodes):
            for operand in node.operands:
                other = self.place[operand]
                self.before[index] |= self.before[other] | 1 << other
        for index in reversed(range(len(self.nodes))):
            for operand in self.nodes[index].operands:
                self.after[self.place[operand]] |= self.after[index] | 1 << index

    def reads_inputs(self, name: str) -> bool:
        """Whether a node depends on what a call brings: inputs that are not stored."""
        entries = self.stage.head["inputs"]
        given = [e["node"] for e in entries if e["kind"] == "user" and not e.get("mutated", False)]
        before = self.before[self.place[name]]
        return any(before >> self.place[node] & 1 for node in given)

    def window(self, name: str) -> Work:
        """Work in the program's order, up to the first use of what a node gives."""
        users = [self.place[user] for user in self.stage.users[name]]
        return self._work((1 << min(users, default=len(self.nodes))) - (2 << self.place[name]))

    def independent(self, name: str) -> Work:
        """Work that neither leads to a node nor follows from it."""
        index = self.place[name]
        return self._work(~(self.before[index] | self.after[index] | 1 << index))

    def _work(self, nodes: int) -> Work:
        work = nodes & self.work
        flops = sum(count for index, count in self.flops.items() if work >> index & 1)
        layers = sum(1 for members in self.layers.values() if work & members)
        return Work(work.bit_count(), flops, layers)
