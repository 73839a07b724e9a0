"""Rules of grouped matrix products: rows sorted by expert, and one weight for each expert.

`offs[e]` is where the rows of expert e end, counted over all rows. So the rows do not shard, but
the experts do: a rank with experts e0 to e1 gets `offs[e0:e1]` as they are. The op then gives all
rows before `offs[e0]` to its first expert and leaves those after its last offset undefined, so that
exactly the rows of its own experts are right, which is what `Routed` says of the result. Pads
repeat the last offset and stand for experts without rows. Where rows are summed for each expert, as
in the gradients of weights, those of other ranks are zero first (`lowering/grouped.py`).

`aten::_grouped_mm` wants strides that are multiples of 16 bytes. A shard keeps them so if it cuts
between units of 16 bytes only; those are what shards.
"""

from __future__ import annotations

from rolemesh.compiler.ir.dialect import GROUPED_BACKWARD, GROUPED_SUMS
from rolemesh.compiler.ir.rule import Kind, OpCall, Rule, RuleBuilder, Select
from rolemesh.compiler.ir.tensor import TensorType
from rolemesh.passes.rules.arguments import argument
from rolemesh.passes.rules.indexing import table_axes
from rolemesh.passes.rules.registry import (
    LocalCall,
    LocalForm,
    LocalFunction,
    RuleFunction,
    replicated_rule,
)

__all__ = ["LOCAL", "RULES"]

_ALIGNMENT = 16
"""Bytes that strides of `aten::_grouped_mm` are multiples of."""


def _aligned(
    builder: RuleBuilder, extent: int, value: TensorType, kind: Kind = Kind.PASS
) -> tuple[int, ...]:
    """Factors of a dim: units of 16 bytes, and the elements of one.

    A dim that does not divide is not the contiguous one, and shards as it likes.
    """
    unit = _ALIGNMENT // value.dtype.itemsize
    if extent % unit:
        return builder.factor(extent, kind)
    return builder.factor(extent // unit, kind) + builder.factor(unit, Kind.REPLICATE)


def _product_patterns(operands: int) -> tuple[tuple[bool, ...], ...]:
    rest = (False,) * (operands - 2)
    return ((True, False, *rest), (False, True, *rest))


def grouped_mm(call: OpCall) -> Rule:
    """`aten._grouped_mm(x, w, offs=None, bias=None, out_dtype=None)`, by the dims of x and w.

    Rows `[R, K]` by `[E, K, N]` give `[R, N]`; a batch `[E, M, K]` by `[E, K, N]` needs no offs.
    The other two are what its backward uses: columns of w, and a sum over the rows of each expert.
    """
    x, w, *rest = call.operands
    has_bias = isinstance(argument(call, 3, "bias"), TensorType)
    ragged = isinstance(argument(call, 2, "offs"), TensorType)
    if has_bias or ragged is (x.ndim == w.ndim == 3) or len(rest) > 1:
        return replicated_rule(call)
    if x.ndim == 2 and w.ndim == 3:
        return _rows(call, aligned=True)
    builder = RuleBuilder()
    linear = _product_patterns(len(call.operands))
    if x.ndim == 3 and w.ndim == 3:
        e = builder.factor(x.shape[0])
        m = _aligned(builder, x.shape[1], x)
        k = _aligned(builder, x.shape[2], x, Kind.REDUCE)
        n = _aligned(builder, w.shape[2], w)
        return builder.build([[e, m, k], [e, k, n]], [[e, m, n]], linear=linear)
    m = _aligned(builder, x.shape[-2], x)
    if x.ndim == 3:  # [E, M, K] by [K, R]: columns sorted by expert
        e = builder.factor(x.shape[0], Kind.REDUCE)
        k = _aligned(builder, x.shape[2], x, Kind.REDUCE)
        r = builder.factor(w.shape[1], Kind.REPLICATE)
        return builder.build(
            [[e, m, k], [k, r], [e]],
            [[m, r]],
            linear=linear,
            select=Select(e[0], operand=2, by="offsets", dim=1),
        )
    # [M, R] by [R, N]: one product for each expert's part of R
    e, r = builder.factor(rest[0].shape[0], Kind.REDUCE), builder.factor(w.shape[0], Kind.REPLICATE)
    n = _aligned(builder, w.shape[1], w)
    ends = builder.factor(rest[0].shape[0], Kind.REPLICATE)
    select = Select(e[0], operand=2, by="offsets", follows=(0, 1), rows=r[0])
    return builder.build([[m, r], [r, n], [ends]], [[e, m, n]], linear=linear, select=select)


def grouped_mm_fallback(call: OpCall) -> Rule:
    """`transformers::grouped_mm_fallback(x, w, offs)`: as `_grouped_mm`, any strides."""
    return _rows(call, aligned=False)


def fallback_backward(call: OpCall) -> Rule:
    """`grouped_mm_fallback_backward(x, w, offs, grad)` gives the gradients of x and of w.

    That of w has a sum over each expert's rows, that of x one over the features of the gradient.
    """
    x, w = call.operands[:2]
    builder = RuleBuilder()
    r = builder.factor(x.shape[0], Kind.REPLICATE)
    e, ends = builder.factor(w.shape[0], Kind.REDUCE), builder.factor(w.shape[0], Kind.REPLICATE)
    k, n = builder.factor(w.shape[1]), builder.factor(w.shape[2], Kind.REDUCE)
    return builder.build(
        [[r, k], [e, k, n], [ends], [r, n]],
        [[r, k], [e, k, n]],
        select=Select(e[0], operand=2, by="offsets", dim=0, follows=(0, 3), rows=r[0]),
    )


def fallback_backward_local(local: LocalCall) -> LocalForm:
    """`mesh.grouped_backward` where the experts are sharded, and the op as it stands elsewhere."""
    axes = table_axes(local, local.operand_layouts[1])
    if not axes:
        return local.call.target, local.args, local.kwargs
    return GROUPED_BACKWARD, local.args, {"size": local.call.operands[1].shape[0], "axes": axes}


def grouped_mm_local(local: LocalCall) -> LocalForm:
    """`mesh.grouped_sums` for sums over rows where the experts are sharded, else the op."""
    result = local.call.results[0]
    sums = result.ndim == 3 and local.call.operands[0].ndim == 2
    axes = table_axes(local, local.result_layouts[0]) if sums else ()
    if not axes:
        return local.call.target, local.args, local.kwargs
    offs = local.args[2] if len(local.args) > 2 else local.kwargs["offs"]
    return GROUPED_SUMS, (*local.args[:2], offs), {"size": result.shape[0], "axes": axes}


def _rows(call: OpCall, *, aligned: bool) -> Rule:
    """Rows `[R, K]` by `[E, K, N]`, with offs `[E]`."""
    x, w = call.operands[:2]
    builder = RuleBuilder()
    r = builder.factor(x.shape[0], Kind.REPLICATE)
    e = builder.factor(w.shape[0], Kind.REDUCE)
    if aligned:
        k = _aligned(builder, w.shape[1], w, Kind.REDUCE)
        n = _aligned(builder, w.shape[2], w)
    else:
        k, n = builder.factor(w.shape[1], Kind.REDUCE), builder.factor(w.shape[2])
    return builder.build(
        [[r, k], [e, k, n], [e]],
        [[r, n]],
        linear=_product_patterns(3),
        select=Select(e[0], operand=2, by="offsets", dim=0, follows=(0,)),
    )


_FALLBACK = "transformers::grouped_mm_fallback"
RULES: dict[str, RuleFunction] = {
    "aten::_grouped_mm": grouped_mm,
    _FALLBACK: grouped_mm_fallback,
    f"{_FALLBACK}_backward": fallback_backward,
}
LOCAL: dict[str, LocalFunction] = {
    "aten::_grouped_mm": grouped_mm_local,
    f"{_FALLBACK}_backward": fallback_backward_local,
}
