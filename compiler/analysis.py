"""Cost and memory analysis of a sharded Program, in closed form.

FLOPs are those of contractions (two per multiply-add), per rank, pads included. Bytes are those a
rank receives, by the convention of `compiler.ir.traffic`; formulas are in B (batch), T (tokens per
request) and the mesh axes' names, and give the numbers exactly when evaluated.
"""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import sympy
from torch import fx

from rolemesh.compiler.ir import dialect
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.ledger import Collective, collective
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.placement import Owner, Segmented, Shard
from rolemesh.compiler.ir.program import Program, operand_nodes, tensor_type, tensor_types
from rolemesh.compiler.ir.traffic import received_bytes
from rolemesh.compiler.memory import MemoryAnalysis
from rolemesh.passes.calls import flops
from rolemesh.passes.stops import is_grouped
from rolemesh.passes.symbols import BATCH, TOKENS, Symbols, follow_symbols
from rolemesh.passes.tokens import token_inputs
from rolemesh.passes.work import flops_of

__all__ = [
    "CostAnalysis",
    "CostedCollective",
    "cost_analysis",
    "local_flops",
    "memory_analysis",
]


@dataclass(frozen=True)
class CostedCollective:
    """A collective with its bytes as a formula."""

    record: Collective
    formula: sympy.Expr


@dataclass(frozen=True)
class CostAnalysis:
    """What one run of a Program costs one rank.

    Attributes:
        flops: Floating-point operations of contractions.
        collectives: Every collective, in order.
        sizes: Values of the symbols in the formulas.
    """

    flops: int
    collectives: tuple[CostedCollective, ...]
    sizes: dict[sympy.Symbol, int]

    @property
    def bytes_received(self) -> int:
        """Bytes a rank receives in all collectives."""
        return sum(entry.record.bytes_received for entry in self.collectives)

    @property
    def formula(self) -> sympy.Expr:
        """The same as an expression in B, T and the mesh axes."""
        return sympy.Add(*(entry.formula for entry in self.collectives))


def cost_analysis(decided: Program, partitioned: Program) -> CostAnalysis:
    """Cost of one run.

    Args:
        decided: The Program after propagation, which has the rules that symbols follow.
        partitioned: The Program that runs.
    """
    symbols = follow_symbols(decided)
    by_name = {node.name: node for node in decided.graph.nodes}
    costed = []
    total = 0
    for node in partitioned.ops:
        if isinstance(node.target, dialect.MeshOp):
            total += local_flops(partitioned, node)
            if node.target.communicates:
                expr = sympy.Add(
                    *(
                        _formula(partitioned, node, move, after, symbols[value][0])
                        for move, after, value in _moves(partitioned, node, by_name)
                    )
                )
                costed.append(CostedCollective(collective(partitioned, node), expr))
        else:
            total += local_flops(partitioned, node)
    mesh = partitioned.the_mesh
    sizes = {_axis(name): size for name, size in zip(mesh.names, mesh.sizes, strict=True)}
    for node in token_inputs(decided):
        batch, tokens = tensor_type(node).shape[:2]
        sizes |= {BATCH: batch, TOKENS: tokens}
    return CostAnalysis(total, tuple(costed), sizes)


def _moves(
    program: Program, node: fx.Node, by_name: dict[str, fx.Node]
) -> Iterator[tuple[dialect.Move, Layout, fx.Node]]:
    """What a collective moves, how it lies then, and the value of the captured graph it is."""
    for move, after in zip(dialect.moved(node), program.layouts[node], strict=True):
        yield move, after, _origin_value(move.source, by_name)


def _origin_value(node: fx.Node, by_name: dict[str, fx.Node]) -> fx.Node:
    """The value of the captured graph that a value is another form of."""
    while node.name not in by_name:
        source, position = node.args[0], 0
        if node.target is operator.getitem:
            assert isinstance(source, fx.Node)
            position = int(str(node.args[1]))
            node = source
            if node.target is dialect.WAIT:
                (node,) = node.all_input_nodes
        node = dialect.moved(node)[position].source
    return by_name[node.name]


def _axis(name: str) -> sympy.Symbol:
    return sympy.Symbol(name, positive=True, integer=True)


def _formula(
    program: Program, node: fx.Node, move: dialect.Move, after: Layout, symbols: Symbols
) -> sympy.Expr:
    mesh = program.the_mesh
    value = tensor_type(move.source)
    axes = node.kwargs["axes"]
    assert isinstance(axes, tuple)
    ranks = math.prod(_axis(str(axis)) for axis in axes)
    op = node.target
    assert isinstance(op, dialect.MeshOp)
    name = op.name.removesuffix("_start")
    layout = program.layout(move.source).canonical(mesh)
    after = after.canonical(mesh)
    elements = sympy.Integer(1)
    for dim, extent in enumerate(value.shape):
        held = _segments_held(layout, dim, mesh)
        if held is not None:
            elements *= held
            continue
        whole = sympy.Integer(extent)
        for shard, symbol in symbols.items():
            if shard.dim == dim:
                whole = whole / shard.size * symbol
        before = _cuts(layout, dim, mesh)
        padded = name in ("reduce_scatter", "all_to_all")
        for shard, parts in (before | _cuts(after, dim, mesh) if padded else before).items():
            size = symbols.get(shard, sympy.Integer(shard.size))
            whole = whole / size * sympy.ceiling(size / parts)
            if shard not in before:
                whole = whole * parts  # goes out whole, in padded chunks
        elements *= whole
    return sympy.sympify(received_bytes(name, elements * value.dtype.itemsize, ranks))


def _segments_held(layout: Layout, dim: int, mesh: Mesh) -> sympy.Expr | None:
    """Extent of a rank's chunks of a dim in segments; None for another dim."""
    for placement, name in zip(layout.placements, mesh.names, strict=True):
        if isinstance(placement, Segmented) and placement.dim == dim:
            ranks = _axis(name)
            return sympy.Add(
                *(
                    s.length // s.size * sympy.ceiling(s.size * s.copies / ranks)
                    if s.size
                    else sympy.Integer(s.length)
                    for s in placement.segments
                )
            )
    return None


def _cuts(layout: Layout, dim: int, mesh: Mesh) -> dict[Shard, sympy.Expr]:
    """Shards of one dim, each with the number of ranks it is cut over."""
    return {
        shard: math.prod(_axis(mesh.names[i]) for i in axes)
        for shard, axes in layout.shards_of(dim)
    }


def local_flops(program: Program, node: fx.Node) -> int:
    """Floating-point operations of a contraction of a partitioned Program on one rank; else 0.

    Of experts that are split over ranks, each is taken to get as many tokens as any other.
    """
    if not flops(node):
        return 0
    shapes = [
        program.layout(operand).local_shape(tensor_type(operand).shape, program.the_mesh)
        for operand in operand_nodes(node)
    ]
    total = flops_of(node.target, shapes)
    if node.target in (dialect.EXPERTS, dialect.EXPERTS_BACKWARD):
        up = 3 if node.target is dialect.EXPERTS else 4  # behind the gradient of the result
        held, size = shapes[up][0], int(str(node.kwargs["size"]))
        return total * held // size
    if node.target in (dialect.GROUPED_BACKWARD, dialect.GROUPED_SUMS):
        axes = node.kwargs["axes"]
        assert isinstance(axes, tuple)
        return total // math.prod(program.the_mesh.axis_size(str(axis)) for axis in axes)
    if is_grouped(node) and len(shapes[1]) == 3:
        return total * shapes[1][0] // tensor_type(operand_nodes(node)[1]).shape[0]
    return total


def memory_analysis(program: Program) -> MemoryAnalysis:
    """Bytes one rank holds while a partitioned Program runs."""
    weights = caches = 0
    owned: dict[int, int] = defaultdict(int)
    for node, entry in zip(program.placeholders, program.inputs, strict=True):
        size = _local_bytes(program, node)
        owners = [p.rank for p in program.layout(node).placements if isinstance(p, Owner)]
        if owners:
            owned[owners[0]] += size
        elif entry.mutated:
            caches += size
        elif entry.is_state or entry.kind.value == "constant":
            weights += size
    slots = {
        str(node.kwargs["slot"]): _local_bytes(program, node)
        for node in program.ops
        if node.target is dialect.BROADCAST_START
    }
    return MemoryAnalysis(
        weights + max(owned.values(), default=0), caches, sum(slots.values()), _peak(program)
    )


def _local_bytes(program: Program, node: fx.Node) -> int:
    total = 0
    for value, layout in zip(tensor_types(node), program.layouts[node], strict=True):
        shape = layout.local_shape(value.shape, program.the_mesh)
        total += math.prod(shape) * value.dtype.itemsize
    return total


def _pooled(node: fx.Node) -> bool:
    """Whether a node's result lies in a buffer of the pool."""
    if node.target is dialect.WAIT:
        (node,) = node.all_input_nodes
    return node.target is dialect.BROADCAST_START


def _peak(program: Program) -> int:
    """Peak of intermediate bytes; views count as new memory, so this is an upper bound."""
    last = {}
    for node in program.graph.nodes:
        for operand in node.all_input_nodes:
            last[operand] = node
    dying: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node, user in last.items():
        dying[user].append(node)
    alive = peak = 0
    for node in program.ops:
        if not _pooled(node):
            alive += _local_bytes(program, node)
        peak = max(peak, alive)
        for dead in dying[node]:
            if dead.op == "call_function" and not _pooled(dead):
                alive -= _local_bytes(program, dead)
    return peak
