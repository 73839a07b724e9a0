"""GE's expert ops compute what the torch ops do that they are converted from.

Attributes and unfed inputs are as torchair's converters write them.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.lowering.npu import grouped_matmul, moe
from rolemesh.lowering.npu.define import define_npu_ops
from rolemesh.runtime.ge.ops.fused_moe import OPS
from rolemesh.runtime.ge.ops.table import Attributes, Result

define_npu_ops()
npu = torch.ops.npu
DTYPES = (torch.float32, torch.bfloat16)


def f(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def choices(tokens: int, k: int, experts: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(tokens, experts, generator=generator).argsort(1)[:, :k].int()


def ge(kind: str, attributes: dict[str, object], **inputs: object) -> Result:
    op = OPS.ops[kind]
    assert set(op.required) <= set(inputs) <= set(op.inputs), kind
    return op.function(Attributes(attributes, f"{kind} (n)"), **inputs)


def same(found: object, expected: object) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("norm_type", "renorm", "mode", "out_flag"), list(itertools.product((0, 1), repeat=4))
)
def test_gating_top_k(
    dtype: torch.dtype, norm_type: int, renorm: int, mode: int, out_flag: int
) -> None:
    x, bias = f(5, 12, dtype=dtype), f(12, dtype=dtype)
    attributes: dict[str, object] = {
        "k": 3,
        "k_group": 2,
        "group_count": 4,
        "group_select_mode": mode,
        "renorm": renorm,
        "norm_type": norm_type,
        "out_flag": bool(out_flag),
        "routed_scaling_factor": 2.5,
        "eps": 0.25,
    }
    found = ge("MoeGatingTopK", attributes, x=x, bias=bias)
    same(found, npu.npu_moe_gating_top_k(x, bias=bias, **attributes))


def test_gating_top_k_of_defaults() -> None:
    x = f(5, 12)
    same(ge("MoeGatingTopK", {"k": 3}, x=x), npu.npu_moe_gating_top_k(x, 3))


def test_gating_top_k_refuses_hashed_experts() -> None:
    ids, table = torch.zeros(5).int(), torch.zeros(9, 3).int()
    with pytest.raises(RolemeshError, match="input_ids"):
        ge("MoeGatingTopK", {"k": 3}, x=f(5, 12), input_ids=ids, tid2eid=table)


@pytest.mark.parametrize("finished", [None, torch.tensor([True, False, False, True])])
def test_gating_top_k_softmax(finished: Tensor | None) -> None:
    x = f(4, 7)
    found = ge("MoeGatingTopKSoftmax", {"k": 2}, x=x, finished=finished)
    same(found, npu.npu_moe_gating_top_k_softmax(x, finished, 2))


@pytest.mark.parametrize("with_scale", [False, True])
@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize("row_idx_type", [0, 1])
def test_init_routing(with_scale: bool, kind: int, row_idx_type: int) -> None:
    x, experts, scale = f(5, 6), choices(5, 3, 8), f(5) if with_scale else None
    attributes: dict[str, object] = {
        "active_num": 7,
        "expert_capacity": -1,
        "expert_num": 8,
        "drop_pad_mode": 0,
        "expert_tokens_num_type": kind,
        "expert_tokens_num_flag": True,
        "quant_mode": -1,
        "active_expert_range": [2, 7],
        "row_idx_type": row_idx_type,
    }
    found = ge("MoeInitRoutingV3", attributes, x=x, expert_idx=experts, scale=scale)
    same(found, npu.npu_moe_init_routing_v2(x, experts, scale=scale, **attributes))


def test_init_routing_refuses_what_the_torch_op_refuses() -> None:
    inputs = {"x": f(5, 6), "expert_idx": choices(5, 3, 8)}
    for attributes, message in (
        ({"quant_mode": 1}, "quant_mode=1"),
        ({"drop_pad_mode": 1}, "drop"),
    ):
        with pytest.raises(RolemeshError, match=message):
            ge("MoeInitRoutingV3", {"expert_num": 8, **attributes}, **inputs)
    with pytest.raises(RolemeshError, match="offset"):
        ge("MoeInitRoutingV3", {"expert_num": 8}, **inputs, offset=f(1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", [0, 1, 2, 3])
def test_finalize_routing(dtype: torch.dtype, mode: int) -> None:
    rows = f(12, 6, dtype=dtype) if mode in (0, 2) else f(5, 3, 6, dtype=dtype)
    index = torch.randperm(12, generator=torch.Generator().manual_seed(0)).int()
    skips = [f(4, 6, dtype=dtype, seed=seed) for seed in (1, 2)]
    bias, scales, experts = f(5, 6, dtype=dtype), f(4, 3, dtype=dtype), choices(4, 3, 5)
    found = ge(
        "MoeFinalizeRoutingV2",
        {"drop_pad_mode": mode, "k": 1},
        expanded_x=rows,
        expanded_row_idx=index,
        x1=skips[0],
        x2=skips[1],
        bias=bias,
        scales=scales,
        expert_idx=experts,
    )
    same(found, npu.npu_moe_finalize_routing(rows, *skips, bias, scales, index, experts, mode))
    found = ge(
        "MoeFinalizeRoutingV2",
        {"drop_pad_mode": mode, "k": 3},
        expanded_x=rows,
        expanded_row_idx=index,
    )
    expected = npu.npu_moe_finalize_routing(rows, None, None, None, None, index, None, mode, 3)
    same(found, expected)


@pytest.mark.parametrize("with_second", [False, True])
def test_older_finalize_routing(with_second: bool) -> None:
    rows, bias, scales, experts = f(12, 6), f(5, 6), f(4, 3), choices(4, 3, 5)
    index = torch.randperm(12, generator=torch.Generator().manual_seed(0)).int()
    skip1, skip2 = f(4, 6), f(4, 6, seed=2) if with_second else None
    found = ge(
        "MoeFinalizeRouting",
        {},
        expanded_x=rows,
        x1=skip1,
        x2=skip2,
        bias=bias,
        scales=scales,
        expanded_row_idx=index,
        expanded_expert_idx=experts,
    )
    expected = npu.npu_moe_finalize_routing(rows, skip1, skip2, bias, scales, index, experts)
    same(found, expected)


GROUPED = {
    "split_item": 2,
    "dtype": -1,
    "transpose_weight": False,
    "transpose_x": False,
    "group_type": 0,
    "group_list_type": 0,
    "act_type": 0,
    "tuning_config": [0],
}
EMPTY = {
    name: [torch.empty(0)]
    for name in ("bias", "scale", "offset", "antiquant_scale", "antiquant_offset")
}
"""How lists that are not fed arrive."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_list_type", [0, 1])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("single", [False, True])
def test_grouped_matmul(
    dtype: torch.dtype, group_list_type: int, with_bias: bool, single: bool
) -> None:
    x, weight = [f(9, 6, dtype=dtype)], f(3, 6, 7, dtype=dtype)
    weights = [weight] if single else list(weight)
    bias = [f(3, 7)] if single else list(f(3, 7))
    counts = torch.tensor([4, 0, 3])
    groups = counts if group_list_type else counts.cumsum(0)
    options = {"split_item": 3, "group_type": 0, "group_list_type": group_list_type}
    lists = EMPTY | ({"bias": bias} if with_bias else {})
    found = ge("GroupedMatmul", GROUPED | options, x=x, weight=weights, group_list=groups, **lists)
    given = bias if with_bias else None
    expected = npu.npu_grouped_matmul(x, weights, bias=given, group_list=groups, **options)
    same(found, tuple(expected))


def test_grouped_matmul_of_lists() -> None:
    x, weight = [f(3, 6), f(2, 5)], [f(6, 7), f(5, 8)]
    options = {"split_item": 0, "group_type": -1}
    found = ge("GroupedMatmul", GROUPED | options, x=x, weight=weight, **EMPTY)
    same(found, tuple(npu.npu_grouped_matmul(x, weight, **options)))


def test_ends_known_while_tracing_come_without_a_group_type() -> None:
    x, weight = [f(9, 6)], list(f(2, 6, 7))
    options = {"split_item": 2, "group_type": -1}
    ends = torch.tensor([4, 9])
    found = ge("GroupedMatmul", GROUPED | options, x=x, weight=weight, group_list=ends, **EMPTY)
    same(found, tuple(npu.npu_grouped_matmul(x, weight, group_list=[4, 9], split_item=2)))


def test_grouped_matmul_refuses() -> None:
    inputs = {"x": [f(9, 6)], "weight": [f(2, 6, 7)], "group_list": torch.tensor([4, 9])}
    for attributes in ({"act_type": 5}, {"group_type": 2}, {"split_item": 1}):
        with pytest.raises(RolemeshError, match="npu_grouped_matmul has no reference semantics"):
            ge("GroupedMatmul", GROUPED | attributes, **inputs, **EMPTY)
    for name in ("scale", "offset", "antiquant_scale", "antiquant_offset"):
        with pytest.raises(RolemeshError, match=f"{name}="):
            ge("GroupedMatmul", GROUPED, **inputs, **(EMPTY | {name: [f(7)]}))
    with pytest.raises(RolemeshError, match="per_token_scale="):
        ge("GroupedMatmul", GROUPED, **inputs, **EMPTY, per_token_scale=f(9))
    for attributes in ({"dtype": 0}, {"transpose_weight": True}, {"transpose_x": True}):
        with pytest.raises(ValueError, match=r"GroupedMatmul \(n\): no semantics for"):
            ge("GroupedMatmul", GROUPED | attributes, **inputs, **EMPTY)


def test_every_torch_op_has_its_ge_op() -> None:
    made = {op.ge for family in (moe, grouped_matmul) for op in family.OPS.ops.values()}
    assert made <= set(OPS.ops)
