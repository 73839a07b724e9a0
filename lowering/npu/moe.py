"""Gating, sorting tokens by expert, and putting them together again.

Sizes: T tokens of H features, E experts, k of them for each token, so T * k routes. Routes are
numbered `token * k + choice` (row-major). `npu_moe_init_routing_v2` gathers one row for each route
whose expert is active, sorted by expert and, within one expert, by route; `expanded_row_idx` says
where the row of a route lies. `npu_moe_finalize_routing` takes that map in one of two orders, by
`drop_pad_mode`: 0 and 1 number routes `choice * T + token`, as the older `npu_moe_init_routing`
does, 2 and 3 as above; with 1 and 3 rows stand in fixed slots of each expert, and -1 is a route
without one.

What a device leaves unwritten is NaN here, or -1 for an index, so that nobody comes to rely on it.
Ties go to the smaller index. A reference first runs its shape function on its own arguments, which
`locals()` are at that point: it refuses what neither of them knows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rolemesh.lowering.npu.table import NpuOpTable, refuse

__all__ = [
    "OPS",
    "moe_finalize_routing",
    "moe_gating_top_k",
    "moe_gating_top_k_softmax",
    "moe_init_routing_v2",
]

OPS = NpuOpTable()

_SOFTMAX, _SIGMOID = 0, 1
_CUMSUM, _COUNT, _KEY_VALUE = 0, 1, 2
_NAN = float("nan")


def _one_of(op: str, name: str, value: int, known: Sequence[int]) -> None:
    torch._check(value in known, lambda: f"{op}: {name} is {value}, not one of {list(known)}")


def _gating_shape(
    x: Tensor,
    k: int,
    bias: Tensor | None = None,
    input_ids: Tensor | None = None,
    tid2eid: Tensor | None = None,
    k_group: int = 1,
    group_count: int = 1,
    group_select_mode: int = 0,
    renorm: int = 0,
    norm_type: int = 0,
    out_flag: bool = False,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
) -> tuple[Tensor, Tensor, Tensor]:
    op = "npu_moe_gating_top_k"
    refuse(op, input_ids=input_ids, tid2eid=tid2eid)
    _one_of(op, "norm_type", norm_type, (_SOFTMAX, _SIGMOID))
    _one_of(op, "renorm", renorm, (0, 1))
    _one_of(op, "group_select_mode", group_select_mode, (0, 1))
    torch._check(x.dim() == 2, lambda: f"{op}: x has {x.dim()} dims, not 2")
    tokens, experts = x.shape
    if bias is not None:
        torch._check(
            bias.shape == x.shape[1:] and bias.dtype == x.dtype,
            lambda: f"{op}: bias is {bias.dtype}{list(bias.shape)} for {x.dtype}{list(x.shape)}",
        )
    torch._check(
        group_count >= 1 and experts % group_count == 0,
        lambda: f"{op}: {experts} experts do not make {group_count} groups",
    )
    torch._check(
        group_select_mode == 0 or experts >= 2 * group_count,
        lambda: f"{op}: groups of {experts // group_count} have no best two experts",
    )
    torch._check(
        1 <= k_group <= group_count and 1 <= k <= experts // group_count * k_group,
        lambda: f"{op}: cannot pick {k} experts in {k_group} of {group_count} groups of {experts}",
    )
    return (
        x.new_empty((tokens, k)),
        x.new_empty((tokens, k), dtype=torch.int32),
        x.new_empty((tokens, experts), dtype=torch.float32),
    )


@OPS.op(
    "npu_moe_gating_top_k(Tensor x, int k, *, Tensor? bias=None, Tensor? input_ids=None,"
    " Tensor? tid2eid=None, int k_group=1, int group_count=1, int group_select_mode=0,"
    " int renorm=0, int norm_type=0, bool out_flag=False, float routed_scaling_factor=1.0,"
    " float eps=1e-20) -> (Tensor, Tensor, Tensor)",
    ge="MoeGatingTopK",
    shape=_gating_shape,
)
def moe_gating_top_k(
    x: Tensor,
    k: int,
    bias: Tensor | None = None,
    input_ids: Tensor | None = None,
    tid2eid: Tensor | None = None,
    k_group: int = 1,
    group_count: int = 1,
    group_select_mode: int = 0,
    renorm: int = 0,
    norm_type: int = 0,
    out_flag: bool = False,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gate of DeepSeek-V3, and its softmax form.

    Scores are the sigmoid or softmax of `x [T, E]`. Experts are chosen by score plus bias, from the
    `k_group` groups whose best expert (mode 0) or best two experts (mode 1) score highest. Sigmoid
    scores of the chosen are always divided by their sum, softmax scores with `renorm`.

    Returns:
        Weights `[T, k]` in descending order of what they were chosen by, int32 experts `[T, k]`,
        and all scores in fp32 `[T, E]` if `out_flag`.
    """
    _gating_shape(**locals())
    tokens, experts = x.shape
    scores = x.float().sigmoid() if norm_type == _SIGMOID else x.float().softmax(-1)
    choose_by = scores if bias is None else scores + bias.float()
    if group_count > 1:
        groups = choose_by.view(tokens, group_count, -1)
        best = groups.topk(1 + group_select_mode).values.sum(-1)
        picked = best.sort(descending=True, stable=True).indices[:, :k_group]
        dropped = torch.ones_like(best, dtype=torch.bool).scatter(1, picked, False)
        choose_by = groups.masked_fill(dropped[..., None], -torch.inf).view(tokens, experts)
    chosen = choose_by.sort(descending=True, stable=True).indices[:, :k]
    weights = scores.gather(1, chosen)
    if norm_type == _SIGMOID or renorm == 1:
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
    weights = weights * routed_scaling_factor
    all_scores = scores if out_flag else torch.full_like(scores, _NAN)
    return weights.to(x.dtype), chosen.int(), all_scores


def _gating_softmax_shape(
    x: Tensor, finished: Tensor | None = None, k: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    op = "npu_moe_gating_top_k_softmax"
    torch._check(x.dim() in (2, 3), lambda: f"{op}: x has {x.dim()} dims, not 2 or 3")
    torch._check(1 <= k <= x.shape[-1], lambda: f"{op}: cannot pick {k} of {x.shape[-1]} experts")
    if finished is not None:
        torch._check(
            finished.shape == x.shape[:-1] and finished.dtype == torch.bool,
            lambda: f"{op}: finished is {finished.dtype}{list(finished.shape)}",
        )
    shape = (*x.shape[:-1], k)
    indices = x.new_empty(shape, dtype=torch.int32)
    return x.new_empty(shape), indices, torch.empty_like(indices)


@OPS.op(
    "npu_moe_gating_top_k_softmax(Tensor x, Tensor? finished=None, int k=1)"
    " -> (Tensor, Tensor, Tensor)",
    ge="MoeGatingTopKSoftmax",
    shape=_gating_softmax_shape,
)
def moe_gating_top_k_softmax(
    x: Tensor, finished: Tensor | None = None, k: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax over experts, and the k largest.

    Returns:
        Weights `[..., k]`, int32 experts, which are E for finished tokens, and for each route its
        number, int32: `choice * T + token`.
    """
    _gating_softmax_shape(x, finished, k)
    weights, chosen = x.float().softmax(-1).sort(descending=True, stable=True)
    weights, chosen = weights[..., :k].contiguous(), chosen[..., :k]
    if finished is not None:
        chosen = chosen.masked_fill(finished[..., None], x.shape[-1])
    tokens = chosen.numel() // k
    numbers = torch.arange(tokens * k, dtype=torch.int32).view(k, tokens).t().contiguous()
    return weights.to(x.dtype), chosen.int(), numbers.view(chosen.shape)


def _init_routing_shape(
    x: Tensor,
    expert_idx: Tensor,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    active_num: int = -1,
    expert_capacity: int = -1,
    expert_num: int = -1,
    drop_pad_mode: int = 0,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    quant_mode: int = -1,
    active_expert_range: Sequence[int] = (),
    row_idx_type: int = 0,
    x_dtype: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    op = "npu_moe_init_routing_v2"
    refuse(
        op,
        offset=offset,
        drop_pad_mode=drop_pad_mode or None,
        quant_mode=None if quant_mode == -1 else quant_mode,
        x_dtype=x_dtype,
    )
    _one_of(op, "expert_tokens_num_type", expert_tokens_num_type, (_CUMSUM, _COUNT, _KEY_VALUE))
    _one_of(op, "row_idx_type", row_idx_type, (0, 1))
    torch._check(
        x.dim() == expert_idx.dim() == 2 and x.shape[0] == expert_idx.shape[0],
        lambda: f"{op}: x is {list(x.shape)} and expert_idx {list(expert_idx.shape)}",
    )
    torch._check(expert_idx.dtype == torch.int32, lambda: f"{op}: expert_idx is {expert_idx.dtype}")
    first, end = _active_experts(expert_num, active_expert_range)
    if scale is not None:
        torch._check(
            scale.shape == x.shape[:1] and scale.dtype == torch.float32,
            lambda: f"{op}: scale is {scale.dtype}{list(scale.shape)} for {x.shape[0]} tokens",
        )
    routes = expert_idx.shape[0] * expert_idx.shape[1]
    rows = torch.sym_min(active_num, routes) if active_num > 0 else routes
    counts = (expert_num, 2) if expert_tokens_num_type == _KEY_VALUE else (end - first,)
    return (
        x.new_empty((rows, x.shape[1])),
        x.new_empty((routes,), dtype=torch.int32),
        x.new_empty(counts if expert_tokens_num_flag else (), dtype=torch.int64),
        x.new_empty((rows,), dtype=torch.float32),
    )


def _active_experts(expert_num: int, active_expert_range: Sequence[int]) -> tuple[int, int]:
    first, end = active_expert_range or (0, expert_num)
    torch._check(
        0 <= first < end <= expert_num,
        lambda: f"npu_moe_init_routing_v2: [{first}, {end}) is no range of {expert_num} experts",
    )
    return first, end


@OPS.op(
    "npu_moe_init_routing_v2(Tensor x, Tensor expert_idx, *, Tensor? scale=None,"
    " Tensor? offset=None, int active_num=-1, int expert_capacity=-1, int expert_num=-1,"
    " int drop_pad_mode=0, int expert_tokens_num_type=0, bool expert_tokens_num_flag=False,"
    " int quant_mode=-1, int[2] active_expert_range=[], int row_idx_type=0, int? x_dtype=None)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    ge="MoeInitRoutingV3",
    shape=_init_routing_shape,
)
def moe_init_routing_v2(
    x: Tensor,
    expert_idx: Tensor,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    active_num: int = -1,
    expert_capacity: int = -1,
    expert_num: int = -1,
    drop_pad_mode: int = 0,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    quant_mode: int = -1,
    active_expert_range: Sequence[int] = (),
    row_idx_type: int = 0,
    x_dtype: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows sorted by expert, for experts in `[active_expert_range)`; all experts if it is empty.

    With `active_num` above 0 only so many rows are gathered; the other results do not change.

    Returns:
        Rows `[T * k, H]`; for each route its row, -1 for inactive experts (type 0), or for each row
        its route (type 1); tokens of each active expert, int64: ends, counts, or pairs of expert
        and count of those with tokens, closed by (0, 0); and each row's element of `scale [T]`.
    """
    rows = _init_routing_shape(**locals())[0].shape[0]
    first, end = _active_experts(expert_num, active_expert_range)
    experts = expert_idx.reshape(-1).long()
    active = (experts >= first) & (experts < end)
    # Routes of inactive experts go last.
    routes = experts.masked_fill(~active, end).sort(stable=True).indices[: int(active.sum())]
    tokens = routes[:rows] // expert_idx.shape[1]

    expanded = x.new_full((rows, x.shape[1]), _NAN if x.is_floating_point() else 0)
    expanded[: tokens.numel()] = x[tokens]
    scales = torch.full((rows,), _NAN)
    if scale is not None:
        scales[: tokens.numel()] = scale[tokens]
    row_idx = torch.full((experts.numel(),), -1, dtype=torch.int32)
    if row_idx_type == 0:
        row_idx[routes] = torch.arange(routes.numel(), dtype=torch.int32)
    else:
        row_idx[: routes.numel()] = routes.int()
    counts = torch.bincount(experts[active] - first, minlength=end - first)
    if not expert_tokens_num_flag:
        counts = counts.new_zeros(())
    elif expert_tokens_num_type == _CUMSUM:
        counts = counts.cumsum(0)
    elif expert_tokens_num_type == _KEY_VALUE:
        used = counts.nonzero()[:, 0]
        pairs = counts.new_zeros((expert_num, 2))
        pairs[: used.numel()] = torch.stack((used + first, counts[used]), 1)
        counts = pairs
    return expanded, row_idx, counts, scales


def _finalize_shape(
    expanded_permuted_rows: Tensor,
    skip1: Tensor | None,
    skip2: Tensor | None,
    bias: Tensor | None,
    scales: Tensor | None,
    expanded_src_to_dst_row: Tensor,
    export_for_source_row: Tensor | None,
    drop_pad_mode: int | None = 0,
    k: int | None = 1,
) -> Tensor:
    op = "npu_moe_finalize_routing"
    mode = drop_pad_mode or 0
    _one_of(op, "drop_pad_mode", mode, (0, 1, 2, 3))
    rows = expanded_permuted_rows
    torch._check(
        rows.dim() == 2 + mode % 2,
        lambda: f"{op}: rows have {rows.dim()} dims in drop_pad_mode {mode}",
    )
    torch._check(skip2 is None or skip1 is not None, lambda: f"{op}: skip2 without skip1")
    torch._check(
        bias is None or export_for_source_row is not None,
        lambda: f"{op}: a bias needs export_for_source_row",
    )
    routes = expanded_src_to_dst_row.shape[0]
    each = scales.shape[1] if scales is not None else k
    torch._check(
        each is not None and each > 0 and routes % each == 0,
        lambda: f"{op}: {routes} routes are not {each} for each token",
    )
    assert each is not None
    result = rows.new_empty((routes // each, rows.shape[-1]))
    for name, value in (("skip1", skip1), ("skip2", skip2)):
        torch._check(
            value is None or (value.dtype == rows.dtype and value.shape == result.shape),
            lambda name=name: f"{op}: {name} is not {rows.dtype}{list(result.shape)}",
        )
    torch._check(
        bias is None or (bias.dtype == rows.dtype and bias.shape[-1] == rows.shape[-1]),
        lambda: f"{op}: bias is not {rows.dtype}[E, {rows.shape[-1]}]",
    )
    return result


@OPS.op(
    "npu_moe_finalize_routing(Tensor expanded_permuted_rows, Tensor? skip1, Tensor? skip2,"
    " Tensor? bias, Tensor? scales, Tensor expanded_src_to_dst_row, Tensor? export_for_source_row,"
    " int? drop_pad_mode=0, int? k=1) -> Tensor",
    ge="MoeFinalizeRoutingV2",
    shape=_finalize_shape,
)
def moe_finalize_routing(
    expanded_permuted_rows: Tensor,
    skip1: Tensor | None,
    skip2: Tensor | None,
    bias: Tensor | None,
    scales: Tensor | None,
    expanded_src_to_dst_row: Tensor,
    export_for_source_row: Tensor | None,
    drop_pad_mode: int | None = 0,
    k: int | None = 1,
) -> Tensor:
    """Weighted sum over a token's routes: `skip1 + skip2 + sum(scales * (row + bias[expert]))`.

    Without `scales [T, k]` rows count once, and `k` says how many there are for each token.

    Raises:
        RuntimeError: If a route has no row in `drop_pad_mode` 0 or 2.
    """
    result = _finalize_shape(**locals())
    mode = drop_pad_mode or 0
    tokens, width = result.shape
    index = expanded_src_to_dst_row.long()
    index = index.view(tokens, -1) if mode >= 2 else index.view(-1, tokens).t()
    absent = index < 0
    torch._check(
        mode % 2 == 1 or not absent.any(),
        lambda: f"npu_moe_finalize_routing: a route has row -1 in drop_pad_mode {mode}",
    )
    rows = expanded_permuted_rows.reshape(-1, width).float()[index.clamp(min=0)]
    if bias is not None and export_for_source_row is not None:
        rows = rows + bias.float()[export_for_source_row.long()]
    if scales is not None:
        rows = rows * scales.float()[..., None]
    total = rows.masked_fill(absent[..., None], 0).sum(1)
    for skip in (skip1, skip2):
        total = total if skip is None else total + skip.float()
    return total.to(result.dtype)
