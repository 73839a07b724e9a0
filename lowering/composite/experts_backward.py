"""`rolemesh::experts_backward`: the gradients of `rolemesh::experts`.

Rows are sorted by expert as in the forward pass, and what stands between the projections is
computed anew; the gate is differentiated by PyTorch. With g the gradient of a token's result and w
the weight of a route:

    of a weight  g . expert(hidden)         of what an expert gives   w g
    of hidden    the sum over its routes    of tables and biases      the sum over their rows

Results are in the order of hidden, weights, up, down, up_bias and down_bias, in their shapes and
dtypes; without elements for biases that were not given. Ids that no table entry has cost no work
and have no gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from rolemesh.lowering.composite.experts import (
    is_aligned,
    own_ids,
    products,
    sorted_routes,
)
from rolemesh.lowering.composite.gate import apply_gate
from rolemesh.lowering.composite.op import CompositeOp

__all__ = ["OP", "experts_backward_of_rank"]

_Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _shape(
    grad: Tensor,
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    transposed: bool,
) -> _Gradients:
    given = (hidden, weights, up, down, up_bias, down_bias)
    h, w, u, d, a, b = (hidden.new_empty(0) if x is None else x.new_empty(x.shape) for x in given)
    return h, w, u, d, a, b


def _kernel(
    grad: Tensor,
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    transposed: bool,
) -> _Gradients:
    """Products over the rows of each expert, and none for experts without rows."""
    chosen, order, ends = sorted_routes(ids, up.shape[0])
    tokens = order // ids.shape[1]
    rows = hidden.index_select(0, tokens)
    inner = products(rows, up, up_bias, chosen, ends, transposed)
    gated, pull = _gate(activation, inner)
    outer = products(gated, down, down_bias, chosen, ends, transposed)
    wide = torch.float64 if hidden.dtype is torch.float64 else torch.float32
    g = grad.index_select(0, tokens).to(wide)
    of_route = (g * outer.to(wide)).sum(1)
    of_weights = torch.zeros(ids.numel(), dtype=wide).index_copy_(0, order, of_route)
    of_outer = (g * weights.reshape(-1, 1).index_select(0, order).to(wide)).to(hidden.dtype)
    of_gated = products(of_outer, down, None, chosen, ends, not transposed)
    of_inner = pull(of_gated)
    of_rows = products(of_inner, up, None, chosen, ends, not transposed)
    of_hidden = torch.zeros(hidden.shape, dtype=wide).index_add_(0, tokens, of_rows.to(wide))
    if transposed:
        of_up, of_down = _sums(rows, of_inner, ends), _sums(gated, of_outer, ends)
    else:
        of_up, of_down = _sums(of_inner, rows, ends), _sums(of_outer, gated, ends)
    return (
        of_hidden.to(hidden.dtype),
        of_weights.reshape(weights.shape).to(weights.dtype),
        of_up,
        of_down,
        _by_expert(of_inner, up_bias, chosen),
        _by_expert(of_outer, down_bias, chosen),
    )


def _gate(activation: str, inner: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """What the gate gives, and what takes its gradient back to before it.

    `torch.func` differentiates below autograd too, where kernels run, and when it is traced.
    """
    gated, pull = torch.func.vjp(functools.partial(apply_gate, activation), inner)  # type: ignore[misc]
    return gated, lambda grad: pull(grad)[0]


def _sums(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """`[E, A, B]`: for each expert the product of its rows of `[R, A]`, turned, and `[R, B]`."""
    if is_aligned(left.mT) and is_aligned(right):
        return torch._grouped_mm(left.mT, right, ends)
    result = left.new_zeros(ends.shape[0], left.shape[1], right.shape[1])
    sizes = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
    parts = zip(left.split(sizes), right.split(sizes), strict=True)
    for expert, (a, b) in enumerate(parts):
        if a.shape[0]:
            torch.mm(a.mT, b, out=result[expert])
    return result


def _by_expert(rows: Tensor, bias: Tensor | None, chosen: Tensor) -> Tensor:
    """The sum of each expert's rows, where there is a bias to learn from it."""
    if bias is None:
        return rows.new_empty(0)
    wide = torch.promote_types(rows.dtype, torch.float32)
    total = torch.zeros(bias.shape, dtype=wide).index_add_(0, chosen, rows.to(wide))
    return total.to(bias.dtype)


def _decomposition(
    grad: Tensor,
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    transposed: bool,
) -> _Gradients:
    """Every token through every expert, as in the decomposition of the forward pass."""
    ups, downs = (up, down) if transposed else (up.mT, down.mT)
    wide = torch.float64 if hidden.dtype is torch.float64 else torch.float32
    of_hidden = hidden.new_zeros(hidden.shape, dtype=wide)
    of_weights = weights.new_zeros(weights.shape, dtype=wide)
    tables: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for expert in range(up.shape[0]):
        inner = hidden @ ups[expert]
        inner = inner if up_bias is None else inner + up_bias[expert]
        gated, pull = _gate(activation, inner)
        outer = gated @ downs[expert]
        outer = outer if down_bias is None else outer + down_bias[expert]
        chosen = ids == expert
        used = chosen.any(1, keepdim=True)
        of_route = (grad.to(wide) * outer.to(wide)).sum(1, keepdim=True)
        of_weights = of_weights + torch.where(chosen, of_route, 0)
        weight = torch.where(chosen, weights, 0).to(wide).sum(1, keepdim=True)
        of_outer = (grad.to(wide) * weight).to(hidden.dtype)
        of_inner = torch.where(used, pull(of_outer @ downs[expert].mT), 0)
        of_hidden = of_hidden + (of_inner @ ups[expert].mT).to(wide)
        gated = torch.where(used, gated, 0)
        tables.append((hidden.mT @ of_inner, gated.mT @ of_outer, of_inner.sum(0), of_outer.sum(0)))
    of_up, of_down, of_up_bias, of_down_bias = (torch.stack(x) for x in zip(*tables, strict=True))
    nothing = hidden.new_empty(0)
    return (
        of_hidden.to(hidden.dtype),
        of_weights.to(weights.dtype),
        of_up if transposed else of_up.mT.contiguous(),
        of_down if transposed else of_down.mT.contiguous(),
        nothing if up_bias is None else of_up_bias,
        nothing if down_bias is None else of_down_bias,
    )


def experts_backward_of_rank(
    grad: Tensor,
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    transposed: bool,
    *,
    size: int,
    parts: int,
    index: int,
) -> _Gradients:
    """Gradients by one rank's experts, as `experts_of_rank` has them.

    Returns:
        Summands of the gradients of hidden and weights, and those of the rank's tables and biases.
    """
    own = own_ids(ids, size, parts, index)
    found: _Gradients = torch.ops.rolemesh.experts_backward(
        grad, hidden, own, weights, up, down, up_bias, down_bias, activation, transposed
    )
    return found


OP = CompositeOp(
    "experts_backward(Tensor grad, Tensor hidden, Tensor ids, Tensor weights, Tensor up,"
    " Tensor down, Tensor? up_bias, Tensor? down_bias, str activation, bool transposed)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    shape=_shape,
    kernel=_kernel,
    decomposition=_decomposition,
    inlined=None,
)
