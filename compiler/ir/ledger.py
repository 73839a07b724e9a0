"""What each collective of a Program moves, derived from the graph.

Bytes are those a rank receives, by the convention of `compiler.ir.traffic`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import fx

from rolemesh.compiler.ir.dialect import PLAIN, MeshOp, is_bundle, moved
from rolemesh.compiler.ir.placement import Segmented, Shard
from rolemesh.compiler.ir.program import Program, origin, tensor_type, tensor_types
from rolemesh.compiler.ir.traffic import expected_share, received_bytes

__all__ = ["Collective", "collective", "collectives", "expected_part"]


@dataclass(frozen=True)
class Collective:
    """One collective of a partitioned Program.

    Attributes:
        node: Name of the node.
        op: `all_gather`, `reduce_scatter`, `all_reduce`, `all_to_all`, `broadcast`, `dispatch` or
            `combine`.
        axes: Mesh axes it runs over.
        dim: Dim it gathers, scatters or splits; None for all_reduce and broadcast, and where it
            moves several values that differ in it.
        shape: Local shape of what each rank puts in; of several values together, their number of
            elements.
        dtype: Element type.
        bytes_received: Bytes a rank receives (a non-owner, for broadcast), pads included; for rows
            that move by their routes, those expected if all experts are equally likely.
        bytes_most: Bytes that it receives at most: another number only where a call's routes say
            how many.
        module: Module path it belongs to.
        cause: Why it is there.
    """

    node: str
    op: str
    axes: tuple[str, ...]
    dim: int | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes_received: int
    bytes_most: int
    module: str
    cause: str

    @property
    def is_expected(self) -> bool:
        """Whether the bytes of a call depend on its routes."""
        return self.bytes_received != self.bytes_most


def expected_part(program: Program, node: fx.Node) -> Fraction:
    """What of a collective's bytes is expected to move: 1, but for rows that move by routes."""
    if node.target not in PLAIN:
        return Fraction(1)
    (_, ids), axes, size = node.args, node.kwargs["axes"], node.kwargs["size"]
    assert isinstance(ids, fx.Node)
    assert isinstance(axes, tuple)
    assert isinstance(size, int)
    ranks = math.prod(program.the_mesh.axis_size(str(axis)) for axis in axes)
    return expected_share(tensor_type(ids).shape[1], size, ranks)


def collective(program: Program, node: fx.Node) -> Collective:
    """The record of one communicating mesh op."""
    mesh = program.the_mesh
    op = node.target
    assert isinstance(op, MeshOp)
    assert op.communicates, f"mesh.{op.name} moves nothing"
    name = op.name.removesuffix("_start")
    plain = PLAIN.get(op, op).name.removesuffix("_start")
    axes = node.kwargs["axes"]
    assert isinstance(axes, tuple)
    names = tuple(str(axis) for axis in axes)
    ranks = math.prod(mesh.axis_size(name) for name in names)
    sent, dims = 0, set()
    shape: tuple[int, ...] = ()
    dtype = tensor_types(node)[0].dtype
    for (source, kwargs), after in zip(moved(node), program.layouts[node], strict=True):
        value = tensor_type(source)
        shape = program.layout(source).local_shape(value.shape, mesh)
        shard = kwargs.get("shard", kwargs.get("split"))
        put = math.prod(shape)
        if isinstance(shard, Shard) and plain in ("reduce_scatter", "all_to_all"):
            cut = after.local_shape(value.shape, mesh)[shard.dim]
            put = put // shape[shard.dim] * cut * ranks  # chunks go out padded
        sent += put
        dims.add(shard.dim if isinstance(shard, Shard | Segmented) else None)
    received = received_bytes(plain, sent * dtype.itemsize, ranks)
    where = origin(node)
    return Collective(
        node.name,
        name,
        names,
        dims.pop() if len(dims) == 1 else None,
        (sent,) if is_bundle(node) else shape,
        dtype,
        int(received * expected_part(program, node)),
        int(received),
        where.module,
        where.reason,
    )


def collectives(program: Program) -> tuple[Collective, ...]:
    """Every collective, in the order every rank issues it."""
    return tuple(
        collective(program, node)
        for node in program.ops
        if isinstance(node.target, MeshOp) and node.target.communicates
    )
