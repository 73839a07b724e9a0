"""`rolemesh::experts`: each token through the experts that it is routed to, weighted and summed.

    result[n] = sum over j of weights[n, j] * expert(ids[n, j])(hidden[n])
    expert(e)(x) = down[e] gate(up[e] x + up_bias[e]) + down_bias[e]

An id that no table entry has (below zero, or E and above) stands for no expert and costs no work;
so a rank that holds a run of the experts counts the ids from its first.

Shapes: hidden `[N, H]`, ids and weights `[N, k]`; up `[E, F, H]` and down `[E, O, I]`, or, if
`transposed`, `[E, H, F]` and `[E, I, O]`; up_bias `[E, F]`, down_bias `[E, O]`; result `[N, O]` in
the dtype of hidden. `activation` is a text of `rolemesh.lowering.composite.gate`; F is I without a
gate and 2 I with one. Weighted rows are summed in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rolemesh.lowering.chunks import chunk_units
from rolemesh.lowering.composite.gate import apply_gate
from rolemesh.lowering.composite.op import CompositeOp, Gradient

__all__ = ["OP", "experts_of_rank", "is_aligned", "own_ids", "products", "sorted_routes"]


def _shape(
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    transposed: bool,
) -> Tensor:
    return hidden.new_empty(hidden.shape[0], down.shape[2 if transposed else 1])


def _kernel(
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    transposed: bool,
) -> Tensor:
    """Rows sorted by expert: one product for each expert that has any, over its rows alone."""
    chosen, order, ends = sorted_routes(ids, up.shape[0])
    tokens = order // ids.shape[1]
    inner = products(hidden.index_select(0, tokens), up, up_bias, chosen, ends, transposed)
    gated = apply_gate(activation, inner)
    outer = products(gated, down, down_bias, chosen, ends, transposed)
    wide = torch.float64 if hidden.dtype is torch.float64 else torch.float32
    weighted = outer.to(wide).mul_(weights.reshape(-1, 1).index_select(0, order).to(wide))
    total = torch.zeros(hidden.shape[0], outer.shape[1], dtype=wide)
    return total.index_add_(0, tokens, weighted).to(hidden.dtype)


def sorted_routes(ids: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Routes by expert, without those to none of the `count` experts.

    Args:
        ids: `[N, k]`.
        count: Number of experts.

    Returns:
        For each route its expert, and its place in `ids`; for each expert the end of its routes.
    """
    chosen, order = ids.reshape(-1).sort(stable=True)
    bounds = torch.searchsorted(chosen, torch.arange(count + 1, dtype=ids.dtype))
    here = slice(int(bounds[0]), int(bounds[-1]))
    return chosen[here], order[here], (bounds[1:] - here.start).to(torch.int32)


def products(
    rows: Tensor,
    table: Tensor,
    bias: Tensor | None,
    chosen: Tensor,
    ends: Tensor,
    transposed: bool,
) -> Tensor:
    """Each row times the matrix of its expert, plus its bias.

    Args:
        rows: Those of one expert in a row.
        table: Matrices by expert.
        bias: Vectors by expert.
        chosen: The expert of each row.
        ends: For each expert the end of its rows.
        transposed: Whether matrices are `[in, out]`.
    """
    matrices = table if transposed else table.mT
    if is_aligned(rows) and is_aligned(matrices):  # the same loop in C++
        result = torch._grouped_mm(rows, matrices, ends)
    else:
        result = rows.new_empty(rows.shape[0], matrices.shape[2])
        sizes = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
        parts = zip(rows.split(sizes), result.split(sizes), strict=True)
        for expert, (part, out) in enumerate(parts):
            if part.shape[0]:
                torch.mm(part, matrices[expert], out=out)
    return result if bias is None else result.add_(bias.index_select(0, chosen))


def is_aligned(x: Tensor) -> bool:
    """Whether torch takes an operand of a grouped product: one dim dense, steps of 16 bytes."""
    steps = sorted(x.stride()[-2:])
    fits = steps[0] == 1 and steps[1] * x.itemsize % 16 == 0
    return fits and x.dtype in (torch.float32, torch.bfloat16, torch.float16) and x.numel() > 0


def _decomposition(
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    transposed: bool,
) -> Tensor:
    """Every token through every expert: which tokens one has is known only when a graph runs."""
    ups, downs = (up, down) if transposed else (up.mT, down.mT)
    wide = torch.float64 if hidden.dtype is torch.float64 else torch.float32
    total = hidden.new_zeros((hidden.shape[0], downs.shape[2]), dtype=wide)
    for expert in range(up.shape[0]):
        inner = hidden @ ups[expert]
        inner = inner if up_bias is None else inner + up_bias[expert]
        outer = apply_gate(activation, inner) @ downs[expert]
        outer = outer if down_bias is None else outer + down_bias[expert]
        chosen = ids == expert
        weight = torch.where(chosen, weights, 0).to(wide).sum(1, keepdim=True)
        total = total + torch.where(chosen.any(1, keepdim=True), outer.to(wide) * weight, 0)
    return total.to(hidden.dtype)


def own_ids(ids: Tensor, size: int, parts: int, index: int) -> Tensor:
    """Ids of `size` experts, counted from the first that the rank at `index` of `parts` holds."""
    units = chunk_units(size, parts)
    own = ids - index * units
    if (index + 1) * units > size:  # an id for no expert must not fall on a pad
        own = torch.where(ids < size, own, -1)
    return own


def experts_of_rank(
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
) -> Tensor:
    """One rank's experts: the tables have its chunk of them, pads included.

    Args:
        hidden: As for the op.
        ids: Likewise, of all `size` experts.
        weights: Likewise.
        up: Likewise, the rank's chunk along its first dim.
        down: Likewise.
        up_bias: Likewise.
        down_bias: Likewise.
        activation: Likewise.
        transposed: Likewise.
        size: Number of experts.
        parts: Ranks that they are split over.
        index: The rank's position among them.

    Returns:
        The sum over the experts of this rank.
    """
    own = own_ids(ids, size, parts, index)
    found: Tensor = torch.ops.rolemesh.experts(
        hidden, own, weights, up, down, up_bias, down_bias, activation, transposed
    )
    return found


def _gradient(
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
) -> list[Tensor | None]:
    found = torch.ops.rolemesh.experts_backward(
        grad, hidden, ids, weights, up, down, up_bias, down_bias, activation, transposed
    )
    given = (hidden, weights, up, down, up_bias, down_bias)
    return [None if x is None else of_x for x, of_x in zip(given, found, strict=True)]


OP = CompositeOp(
    "experts(Tensor hidden, Tensor ids, Tensor weights, Tensor up, Tensor down, Tensor? up_bias,"
    " Tensor? down_bias, str activation, bool transposed) -> Tensor",
    shape=_shape,
    kernel=_kernel,
    decomposition=_decomposition,
    inlined=None,
    gradient=Gradient(("hidden", "weights", "up", "down", "up_bias", "down_bias"), _gradient),
)
