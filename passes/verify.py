"""Verify: check the invariants that every partitioned Program must hold.

- every value has a layout that its logical shape can take;
- an op's sizes (`reshape`, `expand`, `full`, ...) are the local shape of its result;
- mesh ops name axes of the mesh, and change a layout on exactly these the way their op does;
- a value that differs between ranks never counts as replicated, and one that does not never counts
  as cut or pending; a pending reduction passes an op only as a pending reduction; a value that one
  rank owns passes none, and rows that one rank has valid stay such rows: only mesh ops may take
  them elsewhere;
- no output is partial, routed, or in another layout than it must be in;
- a collective that is started is waited for once, those of a group in the order of their starts;
- a pooled buffer is not received into while its earlier tenant is still to be read, and is used for
  one type only;
- collectives do not depend on the rank: one Program text serves all ranks, so their order is the
  same on every rank by construction, which is checked by there being no control flow.

Nothing is run: that an op gives the local shapes of its layout is checked in lock-step
(`runtime.lockstep`, `check=True`).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType, UnionType
from typing import NoReturn

import torch
from torch import fx

from rolemesh.compiler.ir import dialect
from rolemesh.compiler.ir.dialect import MeshOp, Move, moved
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.placement import (
    Owner,
    Partial,
    Placement,
    Replicate,
    Routed,
    Segmented,
    Shard,
    ceil_div,
    same_placement,
)
from rolemesh.compiler.ir.program import Program, origin, tensor_type, tensor_types
from rolemesh.compiler.ir.tensor import TensorType
from rolemesh.passes.prefetch import last_read

__all__ = ["Verify"]

aten = torch.ops.aten

_MOVES: Mapping[object, tuple[type | UnionType, type | UnionType]] = MappingProxyType(
    {
        dialect.ALL_GATHER: (Shard | Segmented, Replicate),
        dialect.REDUCE_SCATTER: (Partial, Shard),
        dialect.ALL_REDUCE: (Partial, Replicate),
        dialect.ALL_TO_ALL: (Shard, Shard),
    }
)
_TRANSITIONS: Mapping[object, tuple[type | UnionType, type | UnionType]] = MappingProxyType(
    {
        **_MOVES,
        **{start: _MOVES[op] for op, start in dialect.STARTS.items()},
        dialect.BROADCAST: (Owner, Replicate),
        dialect.BROADCAST_START: (Owner, Replicate),
        dialect.SHARD: (Replicate, Shard | Segmented),
        dialect.PART: (Segmented, Shard),
        dialect.MASK_ROWS: (Routed, Partial),
    }
)
"""Placements that a mesh op takes its axes from and to; other mesh ops make a new value."""

_SIZES: Mapping[object, int] = MappingProxyType(
    {
        aten.view.default: 1,
        aten._unsafe_view.default: 1,
        aten.reshape.default: 1,
        aten.expand.default: 1,
        aten.zeros.default: 0,
        aten.ones.default: 0,
        aten.full.default: 0,
        aten.empty.memory_format: 0,
        aten.new_zeros.default: 1,
        aten.new_ones.default: 1,
        aten.new_full.default: 1,
        aten.new_empty.default: 1,
    }
)
"""Which argument of an op is the shape of its result."""

_PIECES = frozenset({aten.slice.Tensor, aten.split_with_sizes.default})
"""Ops that may give one segment of a packed dim."""

_CUTS = frozenset({*_SIZES, aten.repeat.default})
"""Ops that may make a chunk of a whole value: their arguments say how much of it."""


@dataclass(frozen=True)
class Verify:
    """The pass; it returns the program unchanged."""

    name = "verify"
    requires = "a partitioned graph"
    ensures = "the invariants of the module docstring"

    def apply(self, program: Program) -> Program:
        """The program itself.

        Raises:
            RolemeshError: RM016 naming the node and the invariant it breaks; RM002, RM009 or RM021
                for a layout or mesh op that does not fit the mesh.
        """
        checked: set[object] = set()  # layers repeat: what was checked of equal values and ops
        for node in program.graph.nodes:
            if node.op == "output":
                continue
            layouts = program.layouts.get(node, ())
            kind = (node.meta.get("type"), id(layouts))
            if kind not in checked:
                _check_value(program, node)
                checked.add(kind)
            if node.op == "call_function":
                if isinstance(node.target, MeshOp):
                    _check_mesh_op(program, node)
                elif node.target is operator.getitem:
                    _check_getitem(program, node)
                else:
                    operands = node.all_input_nodes
                    lie = tuple([id(program.layouts[operand]) for operand in operands])
                    typed = bool(operands) and node.args[:1] == (operands[0],)
                    flow = (id(node.target), id(layouts), lie, typed)
                    if flow not in checked:
                        _check_flow(program, node)
                        _check_sources(program, node)
                        checked.add(flow)
                    _check_sizes(program, node)
            elif node.op != "placeholder":
                _fail(program, node, f"has op {node.op}", "Programs hold no attributes or modules")
        _check_outputs(program)
        _check_slots(program)
        _check_waits(program)
        return program.after(self.name)


def _check_value(program: Program, node: fx.Node) -> None:
    layouts = program.layouts.get(node, ())
    types = tensor_types(node)
    if len(layouts) != len(types):
        _fail(program, node, "has no layout", "every value has one layout per result")
    mesh = program.the_mesh
    whole = Layout.replicated(mesh)
    for value, layout in zip(types, layouts, strict=True):
        if layout == whole:
            continue
        if len(layout.placements) != len(mesh.names):
            _fail(program, node, f"has layout {layout}", "a layout has one placement per mesh axis")
        layout.check(value.shape, mesh)


def _check_getitem(program: Program, node: fx.Node) -> None:
    source, position = node.args
    assert isinstance(source, fx.Node)
    assert isinstance(position, int)
    if program.layouts[node][0] != program.layouts[source][position]:
        _fail(program, node, "has another layout than the result it is", "it is the same value")


def _check_sizes(program: Program, node: fx.Node) -> None:
    index = _SIZES.get(node.target)
    if index is None or len(node.args) <= index:
        return
    sizes = node.args[index]
    assert isinstance(sizes, list | tuple)
    layout, value = program.layouts[node][0], tensor_type(node)
    want = layout.local_shape(value.shape, program.the_mesh)
    if len(sizes) != len(want) or any(
        size not in (extent, -1) for size, extent in zip(sizes, want, strict=True)
    ):
        _fail(
            program,
            node,
            f"makes {list(sizes)}, not {list(want)}",
            f"its layout is {layout.text(value, program.the_mesh)}",
        )


def _check_mesh_op(program: Program, node: fx.Node) -> None:
    mesh = program.the_mesh
    axes = node.kwargs.get("axes", ())
    assert isinstance(axes, tuple)
    indices = {mesh.index(str(axis)) for axis in axes}
    assert isinstance(node.target, MeshOp)
    if node.target is dialect.WAIT:
        return  # it gives what was started, which is checked with the order
    if node.target not in _TRANSITIONS:
        _check_flow(program, node, indices)
        _check_local(program, node, indices, program.layout(node).canonical(mesh))
        if node.target is dialect.KEEP:
            _check_keep(program, node, indices)
        return
    if len({tensor_type(move.source).dtype for move in moved(node)}) > 1:
        _fail(program, node, "moves values of several dtypes as one", "a wire has one dtype")
    for move, result, layout in zip(
        moved(node), tensor_types(node), program.layouts[node], strict=True
    ):
        _check_move(program, node, move, result, layout.canonical(mesh), indices)


def _check_move(
    program: Program,
    node: fx.Node,
    move: Move,
    result: TensorType,
    after: Layout,
    indices: set[int],
) -> None:
    mesh, axes = program.the_mesh, node.kwargs.get("axes", ())
    assert isinstance(axes, tuple)
    transition = _TRANSITIONS[node.target]
    before, shape = program.layout(move.source).canonical(mesh), result.shape
    if tensor_type(move.source) != result:
        _fail(program, node, "changes the logical type", "a mesh op only moves data")
    if node.target is dialect.MASK_ROWS:  # its axes are those of its mask
        indices = {i for i, p in enumerate(before.placements) if isinstance(p, Routed)} - {
            i for i, p in enumerate(after.placements) if isinstance(p, Routed)
        }
    for index, (a, b) in enumerate(zip(before.placements, after.placements, strict=True)):
        if index in indices:
            allowed = isinstance(a, transition[0]) and isinstance(b, transition[1])
        else:
            allowed = same_placement(a, b, shape, mesh.sizes[index])
        if not allowed:
            _fail(
                program,
                node,
                f"takes axis {mesh.names[index]} from {a} to {b}",
                f"{node.target} takes {', '.join(map(str, axes)) or 'its axes'} from "
                f"{_kind(transition[0])} to {_kind(transition[1])}, and no other axis",
            )
    for index in indices:
        _check_arguments(program, node, move, index, before, after)


_CUT_OPERAND: Mapping[object, int] = MappingProxyType(
    {dialect.EXPERTS: 3, dialect.EXPERTS_BACKWARD: 4, dialect.GROUPED_BACKWARD: 1}
)
"""Which operand of a mesh op without traffic is cut, where it is not the first."""

_MAKE_CHUNKS = (dialect.ADD_ROWS, dialect.GROUPED_SUMS, dialect.OWNED_ROWS)
"""Mesh ops without traffic whose operands are whole."""


def _check_local(program: Program, node: fx.Node, indices: set[int], after: Layout) -> None:
    """A mesh op without traffic works on chunks, and gives what differs between its ranks."""
    source, mesh = node.args[_CUT_OPERAND.get(node.target, 0)], program.the_mesh
    assert isinstance(source, fx.Node)
    before = program.layout(source).canonical(mesh)
    for index in indices:
        cut = node.target in _MAKE_CHUNKS or isinstance(before.placements[index], Shard)
        if not cut or isinstance(after.placements[index], Replicate):
            _fail(
                program,
                node,
                f"takes {mesh.names[index]} from {before.placements[index]} to "
                f"{after.placements[index]}",
                f"{node.target} works on chunks and differs between ranks",
            )


def _check_keep(program: Program, node: fx.Node, indices: set[int]) -> None:
    """Positions are kept of a dim that is cut in one piece a rank, and are a pending sum."""
    (source,), kwargs = node.all_input_nodes, node.kwargs
    dim, start, length, size = (kwargs[name] for name in ("dim", "start", "length", "size"))
    assert isinstance(dim, int)
    assert isinstance(start, int)
    assert isinstance(length, int)
    value, mesh = tensor_type(source), program.the_mesh
    extent, ranks = value.shape[dim], math.prod(mesh.sizes[index] for index in indices)
    held = program.layout(source).local_shape(value.shape, mesh)[dim]
    if size != extent or held != ceil_div(extent, ranks) or start < 0 or start + length > extent:
        _fail(
            program,
            node,
            f"keeps {start} to {start + length} of {size}",
            f"dim {dim} has {extent} positions, {held} on a rank",
        )
    shape = (*value.shape[:dim], length, *value.shape[dim + 1 :])
    sums = all(program.layout(node).placements[index] == Partial() for index in indices)
    if tensor_type(node) != TensorType(shape, value.dtype) or not sums:
        _fail(program, node, "is not what it keeps", "each position is valid on one rank")


def _check_arguments(
    program: Program, node: fx.Node, move: Move, index: int, before: Layout, after: Layout
) -> None:
    """The op, owner and shards that a mesh op names are those of the layouts."""
    have, want = before.placements[index], after.placements[index]
    if isinstance(have, Partial) and node.kwargs.get("op") != have.op:
        _fail(
            program, node, f"reduces {have} by {node.kwargs.get('op')}", "the reduction is pending"
        )
    if isinstance(have, Owner) and node.kwargs.get("owner") != have.rank:
        _fail(program, node, f"sends from rank {node.kwargs.get('owner')}", f"it lies at {have}")
    cuts = [
        (want, after, before, move.kwargs.get("split", move.kwargs.get("shard"))),
        (have, before, after, move.kwargs.get("concat", move.kwargs.get("shard"))),
    ]
    mesh, shape = program.the_mesh, tensor_type(move.source).shape
    for placement, cut, whole, shard in cuts:
        if isinstance(placement, Segmented) and shard != placement and have is not placement:
            _fail(program, node, f"names {shard!r}", f"the layout has {placement!r}")
        if not isinstance(placement, Shard):
            continue
        extent = whole.local_shape(shape, mesh)[placement.dim]
        part = cut.local_shape(shape, mesh)[placement.dim]
        parts = math.prod(mesh.sizes[axis] for axis in cut.joint_axes(index))
        if (
            not isinstance(shard, Shard)
            or shard.dim != placement.dim
            or shard.outer != cut.local_outer(placement.dim, placement.outer, mesh)
            or extent % (shard.outer * shard.size)
            or part != extent // shard.size * ceil_div(shard.size, parts)
        ):
            _fail(
                program,
                node,
                f"names {shard!r}",
                f"axis {mesh.names[index]} cuts {extent} of dim {placement.dim} to {part}",
            )


def _check_flow(
    program: Program, node: fx.Node, skipped: frozenset[int] | set[int] = frozenset()
) -> None:
    """What differs between ranks on an axis still does after an op, in a way that the op allows."""
    whole, sizes = Layout.replicated(program.the_mesh), program.the_mesh.sizes
    for operand in node.all_input_nodes:
        for layout in program.layouts[operand]:
            if layout == whole:
                continue
            for axis, placement in enumerate(layout.placements):
                if isinstance(placement, Replicate) or axis in skipped or sizes[axis] == 1:
                    continue
                found = [result.placements[axis] for result in program.layouts[node]]
                cuts = node.target in _PIECES
                if not _flows(placement, found, cuts) and not _type_only(node, operand):
                    _fail(
                        program,
                        node,
                        f"reads %{operand.name}, {placement} on {program.the_mesh.names[axis]}, "
                        f"and gives {' and '.join(map(str, found))}",
                        "a value that differs between ranks must pass a mesh op first",
                    )


def _check_sources(program: Program, node: fx.Node) -> None:
    """What differs between ranks comes from an operand that does, or is made in the local size."""
    whole, mesh = Layout.replicated(program.the_mesh), program.the_mesh
    for result in program.layouts[node]:
        if result == whole or node.target in _CUTS:
            continue
        for axis, placement in enumerate(result.placements):
            if isinstance(placement, Replicate) or mesh.sizes[axis] == 1:
                continue
            if all(
                isinstance(layout.placements[axis], Replicate)
                for operand in node.all_input_nodes
                for layout in program.layouts[operand]
            ):
                _fail(
                    program,
                    node,
                    f"gives {placement} on {mesh.names[axis]} of values that all its ranks hold",
                    "only mesh ops cut values",
                )


def _flows(placement: Placement, results: list[Placement], cuts: bool) -> bool:
    if isinstance(placement, Shard):
        return not all(isinstance(result, Replicate) for result in results)
    if isinstance(placement, Segmented):  # a piece of it may be a segment that all ranks hold
        return cuts or not any(isinstance(result, Replicate) for result in results)
    if isinstance(placement, Partial):
        return all(result == placement for result in results)
    if isinstance(placement, Routed):
        return all(isinstance(result, Routed) and result.key == placement.key for result in results)
    return False


def _type_only(node: fx.Node, operand: fx.Node) -> bool:
    """Whether an op reads only the type of an operand (`new_zeros`, `empty_like`)."""
    name = str(node.target)
    return operand is node.args[0] and (".new_" in name or "_like." in name)


def _check_outputs(program: Program) -> None:
    for index, value in enumerate(program.results):
        if not isinstance(value, fx.Node):
            continue
        want = program.output_layout(index)
        have = program.layout(value)
        for axis, (a, b) in enumerate(zip(have.placements, want.placements, strict=True)):
            if isinstance(a, Replicate) and isinstance(b, Owner):  # the owner has it too
                want = want.replace(axis, a)
        if not have.same(want, tensor_type(value).shape, program.the_mesh):
            _fail(
                program,
                value,
                f"is output {index} in layout {_show(have)}",
                f"that output must be in layout {_show(want)}",
            )


def _check_slots(program: Program) -> None:
    position = {node: index for index, node in enumerate(program.graph.nodes)}
    tenants: dict[object, fx.Node] = {}
    for node in program.ops:
        if node.target is not dialect.BROADCAST_START:
            continue
        slot = node.kwargs["slot"]
        earlier = tenants.get(slot)
        tenants[slot] = node
        if earlier is None:
            continue
        if tensor_type(earlier) != tensor_type(node):
            _fail(program, node, f"reuses buffer {slot} for another type", "a buffer has one type")
        if last_read(earlier, position) >= position[node]:
            _fail(
                program,
                node,
                f"receives into buffer {slot} before %{earlier.name} was read for the last time",
                "the earlier weight would be overwritten while it is in use",
            )


def _check_waits(program: Program) -> None:
    """What is started is waited for once, and nothing else reads it.

    Ranks issue the collectives of a group in the order of the starts, which one text gives to all;
    waiting in another order would be waiting for the later one of two.
    """
    number: dict[tuple[str, ...], int] = {}
    waited: dict[tuple[str, ...], tuple[int, fx.Node]] = {}
    starts: dict[fx.Node, tuple[tuple[str, ...], int]] = {}
    for node in program.ops:
        if dialect.is_start(node):
            names = node.kwargs["axes"]
            assert isinstance(names, tuple)
            axes = tuple(map(str, names))
            number[axes] = number.get(axes, 0) + 1
            starts[node] = axes, number[axes]
            readers = list(node.users)
            if len(readers) != 1 or readers[0].target is not dialect.WAIT:
                _fail(
                    program,
                    node,
                    f"is read by {', '.join(f'%{reader.name}' for reader in readers) or 'nothing'}",
                    "its result is there once one wait has ended it",
                )
        elif node.target is dialect.WAIT:
            (start,) = node.all_input_nodes
            if program.layouts[node] != program.layouts[start]:
                _fail(program, node, "has another layout than what it waits for", "it is the same")
            if start.target is dialect.BROADCAST_START:
                continue  # weights that come ahead are waited for where they are used
            axes, position = starts[start]
            later, other = waited.get(axes, (0, node))
            if later > position:
                _fail(
                    program,
                    node,
                    f"waits for %{start.name} after %{other.name}, which was started later",
                    "a group runs its collectives in the order they are started in",
                )
            waited[axes] = position, node


def _kind(kind: type | UnionType) -> str:
    kinds = kind.__args__ if isinstance(kind, UnionType) else (kind,)
    return " or ".join(each.__name__ for each in kinds)


def _show(layout: Layout) -> str:
    return " ".join(str(placement) for placement in layout.placements)


def _fail(program: Program, node: fx.Node, what: str, why: str) -> NoReturn:
    where = origin(node)
    raise RolemeshError(
        "RM016",
        what=f"%{node.name} {what}",
        where=f"program {program.name} after {' '.join(program.history)}; "
        f"module {where.module or '?'} at {where.source or '?'}",
        why=why,
        fix="this is a defect of the pass that made the node: report it with the program's text",
    )
