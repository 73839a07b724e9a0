"""Several matrix products in one op, one for each expert.

Which operands belong together, by `split_item`:

* 2 or 3, one x `[M, K]`: groups of its rows times one weight `[E, K, N]` or E of `[K, N]`, with
  `group_list [E]`; one result `[M, N]`.
* 2 or 3, E of x `[M_e, K_e]`: each times its weight `[K_e, N]`; one result, joined along the rows.
* 0, E of x `[..., K_e]`: each times its weight `[K_e, N_e]`; E results `[..., N_e]`.

`group_list` has the end of each group (type 0) or its number of rows (type 1). Rows after the last
group are not written: NaN here. A transposed weight is a view, as everywhere in torch.

A reference first runs its shape function on its own arguments, which `locals()` are at that point:
it refuses what neither of them knows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rolemesh.lowering.npu.table import NpuOpTable, refuse

__all__ = ["OPS", "check_options", "grouped_matmul", "grouped_matmul_list", "grouped_products"]

OPS = NpuOpTable()

_OP = "npu_grouped_matmul"
_DTYPES = {5: torch.float16, 6: torch.float32, 15: torch.bfloat16}
"""Dtypes without quantisation, by their `c10::ScalarType` numbers."""

_Tensors = Sequence[Tensor] | None


def _require(condition: bool, text: str) -> None:
    torch._check(condition, lambda: f"{_OP}: {text}")


def check_options(
    *,
    group_type: int | None,
    group_list_type: int | None,
    act_type: int | None,
    **quantisation: object,
) -> None:
    """Refuse what the reference does not compute: activations, gradients, quantisation.

    Args:
        group_type: -1 or None for lists, 0 for groups of rows.
        group_list_type: 0 for ends, 1 for counts.
        act_type: 0 for no activation.
        quantisation: Scales, offsets and the like by name.

    Raises:
        RolemeshError: RM028 that names the option.
    """
    refuse(
        _OP,
        group_type=group_type if group_type not in (None, -1, 0) else None,
        group_list_type=group_list_type if group_list_type not in (None, 0, 1) else None,
        act_type=act_type or None,
        **quantisation,
    )


def _check_dtypes(x: Sequence[Tensor], weight: Sequence[Tensor], bias: _Tensors) -> None:
    _require(len(x) > 0 and len(weight) > 0, "no x or no weight")
    dtype = x[0].dtype
    known = [value.dtype for value in (*x, *weight) if value.dtype not in _DTYPES.values()]
    refuse(_OP, dtype=known[0] if known else None)
    _require(all(v.dtype == dtype for v in (*x, *weight)), "x and weight differ in dtype")
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    _require(all(v.dtype == wide for v in bias or ()), f"a bias for {dtype} must be {wide}")
    count = len(bias or weight)
    _require(count == len(weight), f"{count} biases for {len(weight)} weights")


def _shape(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: _Tensors,
    split_item: int | None,
    groups: int | None,
) -> list[Tensor]:
    """Check which operands belong together, and make the results."""
    split = split_item or 0
    refuse(_OP, split_item=split if split not in (0, 2, 3) else None)
    _check_dtypes(x, weight, bias)
    if split and len(x) == 1:
        return [_rows_shape(x[0], weight, groups)]
    _require(len(x) == len(weight), f"{len(x)} of x and {len(weight)} weights")
    for left, right in zip(x, weight, strict=True):
        fit = right.dim() == 2 and left.shape[-1] == right.shape[0]
        _require(fit, f"an x is {list(left.shape)}, its weight {list(right.shape)}")
    if not split:
        _require(groups is None, "split_item 0 takes no group_list")
        pairs = zip(x, weight, strict=True)
        return [left.new_empty((*left.shape[:-1], right.shape[1])) for left, right in pairs]
    width = weight[0].shape[1]
    fit = all(v.dim() == 2 for v in x) and all(v.shape[1] == width for v in weight)
    _require(fit, "products of different widths do not join")
    _require(groups in (None, len(x)), f"{groups} groups for {len(x)} of x")
    return [x[0].new_empty((sum(v.shape[0] for v in x), width))]


def _rows_shape(x: Tensor, weight: Sequence[Tensor], groups: int | None) -> Tensor:
    single = len(weight) == 1 and weight[0].dim() == 3
    experts = weight[0].shape[0] if single else len(weight)
    _require(groups is not None, "one x needs a group_list")
    _require(groups == experts, f"{groups} groups for {experts} experts")
    _require(x.dim() == 2, f"x has {x.dim()} dims, not 2")
    width = weight[0].shape[-1]
    for value in weight:
        fit = (single or value.dim() == 2) and value.shape[-2:] == (x.shape[1], width)
        _require(fit, f"x is {list(x.shape)}, a weight {list(value.shape)}")
    return x.new_empty((x.shape[0], width))


def grouped_products(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: _Tensors,
    split_item: int | None,
    group_list: Tensor | None,
    group_list_type: int | None,
) -> list[Tensor]:
    """The products; see the module docstring.

    Raises:
        RuntimeError: If the operands do not belong together.
    """
    groups = None if group_list is None else group_list.shape[0]
    results = _shape(x, weight, bias, split_item, groups)
    counts = [value.shape[0] for value in x]
    if group_list is not None:
        ends = group_list.cumsum(0) if group_list_type else group_list
        given = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
        rows = sum(given) <= counts[0] if len(x) == 1 else given == counts
        _require(rows and min(given) >= 0, f"rows {counts} do not make the groups {given}")
        counts = given
    parts = x[0][: sum(counts)].split(counts) if len(x) == 1 and group_list is not None else x
    single = weight[0].dim() == 3
    weights = list(weight[0]) if single else weight
    biases: Sequence[Tensor | None] = [None] * len(weights)
    if bias:
        biases = list(bias[0]) if single else bias
    products = [_product(*terms) for terms in zip(parts, weights, biases, strict=True)]
    if not split_item:
        return products
    joined = torch.cat(products)
    results[0].fill_(float("nan"))[: joined.shape[0]] = joined
    return results


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    found = x.float() @ weight.float()
    return (found if bias is None else found + bias.float()).to(x.dtype)


def _check_tensor_groups(
    x: Sequence[Tensor], group_list: Tensor | None, group_type: int | None, output: object
) -> None:
    _require(group_type is not None, "group_type is None")
    _require(group_type == 0 or group_list is None, "group_type -1 takes no group_list")
    dtype = None if group_list is None else group_list.dtype
    _require(dtype in (None, torch.int64), f"group_list is {dtype}, not int64")
    _check_output(x, output)


def _check_output(x: Sequence[Tensor], output: object) -> None:
    for value in x[:1]:
        _require(output in (None, value.dtype), f"output_dtype {output} for x of {value.dtype}")


def _grouped_matmul_shape(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: _Tensors = None,
    scale: _Tensors = None,
    offset: _Tensors = None,
    antiquant_scale: _Tensors = None,
    antiquant_offset: _Tensors = None,
    per_token_scale: _Tensors = None,
    group_list: Tensor | None = None,
    activation_input: _Tensors = None,
    activation_quant_scale: _Tensors = None,
    activation_quant_offset: _Tensors = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    act_type: int | None = 0,
    tuning_config: Sequence[int] | None = None,
    output_dtype: int | None = None,
    x_dtype: int | None = None,
    weight_dtype: int | None = None,
    scale_dtype: int | None = None,
    per_token_scale_dtype: int | None = None,
) -> list[Tensor]:
    check_options(
        group_type=group_type,
        group_list_type=group_list_type,
        act_type=act_type,
        scale=scale,
        offset=offset,
        antiquant_scale=antiquant_scale,
        antiquant_offset=antiquant_offset,
        per_token_scale=per_token_scale,
        activation_input=activation_input,
        activation_quant_scale=activation_quant_scale,
        activation_quant_offset=activation_quant_offset,
        x_dtype=x_dtype,
        weight_dtype=weight_dtype,
        scale_dtype=scale_dtype,
        per_token_scale_dtype=per_token_scale_dtype,
    )
    output = None if output_dtype is None else _DTYPES.get(output_dtype, output_dtype)
    _check_tensor_groups(x, group_list, group_type, output)
    groups = None if group_list is None else group_list.shape[0]
    return _shape(x, weight, bias, split_item, groups)


@OPS.op(
    "npu_grouped_matmul(Tensor[] x, Tensor[] weight, *, Tensor[]? bias=None, Tensor[]? scale=None,"
    " Tensor[]? offset=None, Tensor[]? antiquant_scale=None, Tensor[]? antiquant_offset=None,"
    " Tensor[]? per_token_scale=None, Tensor? group_list=None, Tensor[]? activation_input=None,"
    " Tensor[]? activation_quant_scale=None, Tensor[]? activation_quant_offset=None,"
    " int? split_item=0, int? group_type=None, int? group_list_type=0, int? act_type=0,"
    " int[]? tuning_config=None, int? output_dtype=None, int? x_dtype=None,"
    " int? weight_dtype=None, int? scale_dtype=None, int? per_token_scale_dtype=None) -> Tensor[]",
    ge="GroupedMatmul",
    shape=_grouped_matmul_shape,
)
def grouped_matmul(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: _Tensors = None,
    scale: _Tensors = None,
    offset: _Tensors = None,
    antiquant_scale: _Tensors = None,
    antiquant_offset: _Tensors = None,
    per_token_scale: _Tensors = None,
    group_list: Tensor | None = None,
    activation_input: _Tensors = None,
    activation_quant_scale: _Tensors = None,
    activation_quant_offset: _Tensors = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    act_type: int | None = 0,
    tuning_config: Sequence[int] | None = None,
    output_dtype: int | None = None,
    x_dtype: int | None = None,
    weight_dtype: int | None = None,
    scale_dtype: int | None = None,
    per_token_scale_dtype: int | None = None,
) -> list[Tensor]:
    """Grouped products, without quantisation.

    `group_list` is an int64 tensor with `group_type` 0, and absent with -1. A bias is `[N]`, or
    `[E, N]` for a weight `[E, K, N]`; it is fp32 for bf16 operands. `tuning_config` tells the
    device what sizes to expect, and changes no value.
    """
    _grouped_matmul_shape(**locals())
    return grouped_products(x, weight, bias, split_item, group_list, group_list_type)


def _grouped_matmul_list_shape(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: _Tensors = None,
    scale: _Tensors = None,
    offset: _Tensors = None,
    antiquant_scale: _Tensors = None,
    antiquant_offset: _Tensors = None,
    per_token_scale: _Tensors = None,
    group_list: Sequence[int] | None = None,
    activation_input: _Tensors = None,
    activation_quant_scale: _Tensors = None,
    activation_quant_offset: _Tensors = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    act_type: int | None = 0,
    output_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    check_options(
        group_type=group_type,
        group_list_type=group_list_type,
        act_type=act_type,
        scale=scale,
        offset=offset,
        antiquant_scale=antiquant_scale,
        antiquant_offset=antiquant_offset,
        per_token_scale=per_token_scale,
        activation_input=activation_input,
        activation_quant_scale=activation_quant_scale,
        activation_quant_offset=activation_quant_offset,
    )
    _check_output(x, output_dtype)
    _require(
        group_type is None and not group_list_type,
        "a group_list of ints takes neither group_type nor group_list_type",
    )
    return _shape(x, weight, bias, split_item, len(group_list) if group_list else None)


@OPS.op(
    "npu_grouped_matmul.List(Tensor[] x, Tensor[] weight, *, Tensor[]? bias=None,"
    " Tensor[]? scale=None, Tensor[]? offset=None, Tensor[]? antiquant_scale=None,"
    " Tensor[]? antiquant_offset=None, Tensor[]? per_token_scale=None, int[]? group_list=None,"
    " Tensor[]? activation_input=None, Tensor[]? activation_quant_scale=None,"
    " Tensor[]? activation_quant_offset=None, int? split_item=0, int? group_type=None,"
    " int? group_list_type=0, int? act_type=0, ScalarType? output_dtype=None) -> Tensor[]",
    ge="GroupedMatmul",
    shape=_grouped_matmul_list_shape,
)
def grouped_matmul_list(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: _Tensors = None,
    scale: _Tensors = None,
    offset: _Tensors = None,
    antiquant_scale: _Tensors = None,
    antiquant_offset: _Tensors = None,
    per_token_scale: _Tensors = None,
    group_list: Sequence[int] | None = None,
    activation_input: _Tensors = None,
    activation_quant_scale: _Tensors = None,
    activation_quant_offset: _Tensors = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    act_type: int | None = 0,
    output_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """The same, for ends of groups that are known while tracing."""
    _grouped_matmul_list_shape(**locals())
    ends = torch.tensor(group_list) if group_list else None
    return grouped_products(x, weight, bias, split_item, ends, None)
