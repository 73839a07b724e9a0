"""Matrix products that start while a collective still runs, or the other way round.

    reduce_scatter(x @ w)  ->  npu_mm_reduce_scatter_base
    all_reduce(x @ w)      ->  npu_mm_all_reduce_base
    all_gather(x) @ w      ->  npu_all_gather_base_mm, which gives the gathered x as well
    all_to_all(x) @ w      ->  npu_all_to_all_matmul, where all_to_all brings rows together

of sums, over one group. Between the two may be reshapes, and packing that moves nothing in the end:
a tensor that is cut into all its leading parts and joined again.

The collective goes away with its wait. All ranks rewrite alike: what decides is the same on all.

Limits are those of the documentation of the ops in torch_npu: fp16 or bf16, the sizes below, no
all_reduce of one token per sequence, and one group for all such ops of a graph.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import torch
from torch import fx

from rolemesh.lowering.ge.fusions.base import Emitter, Found, Fusion, Setting
from rolemesh.lowering.npu.define import define_npu_ops
from rolemesh.passes.patterns import (
    argument,
    dtype_of,
    is_call,
    known_above,
    same,
    shape_of,
    users_of,
)

__all__ = ["all_gather_mm", "all_to_all_mm", "mm_all_reduce", "mm_reduce_scatter"]

aten = torch.ops.aten
c10d = torch.ops._c10d_functional

_DTYPES = (torch.float16, torch.bfloat16)
_RANKS = (2, 4, 8, 16)
_CONTRACTED = (256, 65534)
"""Extents of the contracted dim, for all but all_reduce and all_to_all."""
_CONTRACTED_OF_BLOCKS = 65535
"""Largest contracted dim after an all_to_all."""

_ROW_MAJOR = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.clone.default,
)
"""Ops whose result has the operand's elements in the same row-major order."""
_CUTS = (aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int)


def mm_reduce_scatter() -> Fusion:
    """The fusion of a product and a reduce_scatter."""
    define_npu_ops()
    op = torch.ops.npu.npu_mm_reduce_scatter_base.default
    return Fusion(op, frozenset({c10d.wait_tensor.default}), _find_reduce_scatter)


def mm_all_reduce() -> Fusion:
    """The fusion of a product and an all_reduce."""
    define_npu_ops()
    op = torch.ops.npu.npu_mm_all_reduce_base.default
    return Fusion(op, frozenset({c10d.wait_tensor.default}), _find_all_reduce)


def all_gather_mm() -> Fusion:
    """The fusion of an all_gather and a product."""
    define_npu_ops()
    op = torch.ops.npu.npu_all_gather_base_mm.default
    return Fusion(op, frozenset({aten.mm.default}), _find_all_gather)


def all_to_all_mm() -> Fusion:
    """The fusion of an all_to_all and a product."""
    define_npu_ops()
    op = torch.ops.npu.npu_all_to_all_matmul.default
    return Fusion(op, frozenset({aten.mm.default}), _find_all_to_all)


def _find_reduce_scatter(end: fx.Node, setting: Setting) -> Found | None:
    scatter, sizes = end.args[0], _sizes(end)
    if not is_call(scatter, c10d.reduce_scatter_tensor.default) or sizes is None:
        return None
    assert isinstance(scatter, fx.Node)
    wire, reduction, ranks, group = scatter.args
    product, passed = _source(wire, aten.mm.default)
    if product is None or reduction != "sum" or not _takes(product):
        return None
    x, weight = product.args
    assert isinstance(ranks, int)
    name = setting.group_name(str(group))
    if not same(shape_of(product)[0] % ranks, 0):
        return None
    if setting.within_limits and not _is_documented(product, ranks, name):
        return None

    def emit(new: Emitter) -> Sequence[fx.Node]:
        op = torch.ops.npu.npu_mm_reduce_scatter_base.default
        return [_reshaped(new, new(op, x, weight, name, ranks), sizes)]

    return Found((end,), (scatter, product, *passed), emit)


def _find_all_reduce(end: fx.Node, setting: Setting) -> Found | None:
    reduce, sizes = end.args[0], _sizes(end)
    if not is_call(reduce, c10d.all_reduce.default) or sizes is None:
        return None
    assert isinstance(reduce, fx.Node)
    wire, reduction, group = reduce.args
    product, passed = _source(wire, aten.mm.default)
    if product is None or reduction != "sum" or not _takes(product):
        return None
    x, weight = product.args
    assert isinstance(x, fx.Node)
    name = setting.group_name(str(group))
    if setting.within_limits:
        decodes = any(map(_is_one_token_each, (*x.all_input_nodes, *passed, end, *end.users)))
        if decodes or not _is_only_group(end.graph, name):
            return None

    def emit(new: Emitter) -> Sequence[fx.Node]:
        op = torch.ops.npu.npu_mm_all_reduce_base.default
        return [_reshaped(new, new(op, x, weight, name), sizes)]

    return Found((end,), (reduce, product, *passed), emit)


def _find_all_gather(end: fx.Node, setting: Setting) -> Found | None:
    rows, weight = end.args
    wait, passed = _source(rows, c10d.wait_tensor.default)
    gather = wait.args[0] if wait is not None else None
    if wait is None or not is_call(gather, c10d.all_gather_into_tensor.default) or not _takes(end):
        return None
    assert isinstance(gather, fx.Node)
    assert isinstance(rows, fx.Node)
    assert isinstance(weight, fx.Node)
    x, ranks, group = gather.args
    assert isinstance(x, fx.Node)
    assert isinstance(ranks, int)
    name = setting.group_name(str(group))
    width = shape_of(rows)[1]
    if not same(shape_of(x)[-1], width) or not isinstance(width, int):
        return None
    if setting.within_limits and not _is_documented(end, ranks, name):
        return None
    way = [*passed, wait]
    shares = not _only_within(way, {*way, end})
    # The gathered rows are given to other users as late as all of them still get them.
    top = rows if _only_within(way[1:], set(way)) else wait
    sizes = _sizes(top)
    if shares and (sizes is None or not _comes_before(weight, top)):
        return None

    def emit(new: Emitter) -> Sequence[fx.Node]:
        if not weight < new.anchor:
            new.anchor.prepend(weight)
        op = torch.ops.npu.npu_all_gather_base_mm.default
        given = _reshaped(new, x, [-1, width])
        made = new(op, given, weight, name, ranks, gather_output=shares)
        product = new.part(made, 0)
        return [_reshaped(new, new.part(made, 1), sizes or []), product] if shares else [product]

    if not shares:
        return Found((end,), (gather, *way), emit)
    return Found((top, end), (gather, *(way[1:] if top is rows else ())), emit)


def _find_all_to_all(end: fx.Node, setting: Setting) -> Found | None:
    columns, weight = end.args
    joined, passed = _source(columns, aten.cat.default)
    found = _parts(joined) if joined is not None else None
    if joined is None or found is None or not _takes(end):
        return None
    assert isinstance(columns, fx.Node)
    blocks, dim, taken = found
    wait, unpacked = _source(blocks, c10d.wait_tensor.default)
    exchange = wait.args[0] if wait is not None else None
    if wait is None or not is_call(exchange, c10d.all_to_all_single.default) or dim != 0:
        return None
    assert isinstance(exchange, fx.Node)
    wire, received, sent, group = exchange.args
    assert isinstance(wire, fx.Node)
    assert isinstance(received, list | tuple)
    ranks, name = len(received), setting.group_name(str(group))
    rows, contracted = shape_of(columns)
    axis, piece = _cat_dim(joined), shape_of(joined.args[0][0])  # type: ignore[index, arg-type]
    equal = len(set(received)) == 1 and received == sent and len(joined.args[0]) == ranks  # type: ignore[arg-type]
    if not equal or not isinstance(contracted, int) or not same(math.prod(piece[:axis]), rows):
        return None
    if setting.within_limits:
        fits = ranks in _RANKS and contracted <= _CONTRACTED_OF_BLOCKS
        if not fits or not _is_only_group(end.graph, name):
            return None

    def emit(new: Emitter) -> Sequence[fx.Node]:
        op = torch.ops.npu.npu_all_to_all_matmul.default
        given = _reshaped(new, wire, [-1, contracted // ranks])
        return [new.part(new(op, given, weight, name, ranks, all2all_out_flag=False), 0)]

    inner = (exchange, wait, joined, *passed, *taken, *unpacked)
    return Found((end,), inner, emit)


def _source(value: object, target: object) -> tuple[fx.Node | None, list[fx.Node]]:
    """The call of `target` whose elements a value has, in row-major order, and nodes on the way."""
    passed: list[fx.Node] = []
    while isinstance(value, fx.Node):
        if is_call(value, target):
            return value, passed
        passed.append(value)
        if is_call(value, *_ROW_MAJOR):
            value = value.args[0]
        elif is_call(value, aten.cat.default):
            found = _parts(value)
            if found is None:
                break
            source, dim, taken = found
            first = shape_of(value.args[0][0])  # type: ignore[index, arg-type]
            before = (*shape_of(source)[:dim], *first[: _cat_dim(value)])
            if not all(same(size, 1) for size in before):
                break
            passed += taken
            value = source
        else:
            break
    return None, []


def _parts(joined: fx.Node) -> tuple[fx.Node, int, list[fx.Node]] | None:
    """Of a cat of reshaped parts: the tensor of which they are all the parts, in order.

    Returns:
        The tensor, the dim along which it is cut, and the nodes on the way.
    """
    taken: list[fx.Node] = []
    cuts = []
    parts = joined.args[0]
    assert isinstance(parts, list | tuple)
    for index, part in enumerate(parts):
        found, passed = _source(part, operator.getitem)
        if found is None or found.args[1] != index:
            return None
        taken += [*passed, found]
        cuts.append(found.args[0])
    cut = cuts[0]
    if len(set(cuts)) != 1 or not is_call(cut, *_CUTS):
        return None
    assert isinstance(cut, fx.Node)
    source, dim = cut.args[0], argument(cut, "dim")
    assert isinstance(source, fx.Node)
    assert isinstance(dim, int)
    if len(cut.meta["val"]) != len(parts):
        return None
    return source, dim % len(shape_of(source)), [*taken, cut]


def _cat_dim(joined: fx.Node) -> int:
    dim = argument(joined, "dim")
    assert isinstance(dim, int)
    return dim % len(shape_of(joined))


def _takes(product: fx.Node) -> bool:
    """Whether the fused ops take the operands of a product."""
    left, right = product.args
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    return dtype_of(left) == dtype_of(right) and dtype_of(left) in _DTYPES


def _only_within(nodes: Sequence[fx.Node], within: set[fx.Node]) -> bool:
    """Whether nothing else needs these nodes."""
    return all(within.issuperset(users_of(node)) for node in nodes)


def _comes_before(weight: fx.Node, node: fx.Node) -> bool:
    """Whether a weight is there before a node, or can be: a transposition may move."""
    source = weight.args[0] if is_call(weight, aten.t.default) else weight
    assert isinstance(source, fx.Node)
    return source < node


def _is_documented(product: fx.Node, ranks: int, group: str) -> bool:
    weight = product.args[1]
    assert isinstance(weight, fx.Node)
    contracted = shape_of(weight)[0]
    low, high = _CONTRACTED
    fits = not known_above(contracted, high) and not known_above(low - contracted, 0)
    return ranks in _RANKS and fits and _is_only_group(product.graph, group)


def _is_only_group(graph: fx.Graph, group: str) -> bool:
    """Whether no op like these is over another group already."""
    ops = (
        torch.ops.npu.npu_mm_reduce_scatter_base.default,
        torch.ops.npu.npu_mm_all_reduce_base.default,
        torch.ops.npu.npu_all_gather_base_mm.default,
        torch.ops.npu.npu_all_to_all_matmul.default,
    )
    found = (node for op in ops for node in graph.find_nodes(op="call_function", target=op))
    return all(node.args[2] == group for node in found)


def _is_one_token_each(node: fx.Node) -> bool:
    """Whether a value is `[batch, 1, width]`, as in a decode step."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.ndim == 3 and same(value.shape[1], 1)


def _sizes(node: fx.Node) -> list[int] | None:
    """Arguments of a reshape to a node's shape; None if two sizes depend on symbols."""
    sizes = [size if isinstance(size, int) else -1 for size in shape_of(node)]
    return sizes if sizes.count(-1) < 2 else None


def _reshaped(new: Emitter, node: fx.Node, sizes: list[int]) -> fx.Node:
    shape = shape_of(node)
    fits = len(shape) == len(sizes)
    if fits and all(same(n, m) or m == -1 for n, m in zip(shape, sizes, strict=True)):
        return node
    return new(aten.reshape.default, node, sizes)
