"""Rules of Ascend's expert ops: checked on all choices."""

from __future__ import annotations

import pytest
import torch
from tests.passes.rules.harness import check_choice, check_op, make_call
from tests.passes.rules.rule_line import rule_line

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.rule import OpCall, Split
from rolemesh.compiler.ir.tensor import TensorType
from rolemesh.lowering.npu.define import define_npu_ops
from rolemesh.passes.rules import npu_moe
from rolemesh.passes.rules.registry import Rules

define_npu_ops()
npu = torch.ops.npu
RULES = Rules((npu_moe.RULES,), (npu_moe.LOCAL,))
GATE = npu.npu_moe_gating_top_k.default
INIT = npu.npu_moe_init_routing_v2.default
FINALIZE = npu.npu_moe_finalize_routing.default
GROUPED = npu.npu_grouped_matmul.default
HALF = torch.bfloat16


def f(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def choices(tokens: int, k: int, experts: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(tokens, experts, generator=generator).argsort(1)[:, :k].int()


def routes(count: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(1)).int()


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_gate(dtype: torch.dtype) -> None:
    options = {"bias": f(12, dtype=dtype), "group_count": 3, "k_group": 2, "norm_type": 1}
    check_op(
        RULES,
        GATE,
        (f(7, 12, dtype=dtype), 5),
        {**options, "group_select_mode": 1, "out_flag": True},
        expect="a b!, b! -> a c!, a c!, a b!",
    )


def test_gate_without_a_bias() -> None:
    check_op(RULES, GATE, (f(7, 6), 3), expect="a b! -> a c!, a c!, a b!")


def test_softmax_gate_numbers_all_routes() -> None:
    check_op(
        RULES,
        npu.npu_moe_gating_top_k_softmax.default,
        (f(7, 6), None, 3),
        expect="a! b! -> c! d!, e! f!, g! h!",
    )


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_init_routing(dtype: torch.dtype) -> None:
    options = {"expert_num": 6, "expert_tokens_num_flag": True}
    check_op(
        RULES,
        INIT,
        (f(5, 9, dtype=dtype), choices(5, 2, 6)),
        {**options, "expert_tokens_num_type": 1, "active_expert_range": [1, 5]},
        expect="a! b, a! c! -> d! b, e!, f!, d!",
    )


def test_init_routing_with_scales() -> None:
    """The operands in the order of a call by keywords, and results of other shapes."""
    check_op(
        RULES,
        INIT,
        (f(5, 9), choices(5, 2, 6)),
        {
            "expert_num": 6,
            "active_num": 7,
            "scale": f(5),
            "expert_tokens_num_type": 2,
            "expert_tokens_num_flag": True,
        },
        expect="a! b, a! c!, a! -> d! b, e!, f! g!, d!",
    )
    check_op(
        RULES,
        INIT,
        (f(5, 9), choices(5, 2, 6)),
        {"expert_num": 6},
        expect="a! b, a! c! -> d! b, e!, ., d!",
    )


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(("mode", "row_map"), [(0, "(d! c)"), (2, "(c d!)")])
def test_finalize_routing(dtype: torch.dtype, mode: int, row_map: str) -> None:
    rows, scales = f(21, 10, dtype=dtype), f(7, 3, dtype=dtype)
    check_op(
        RULES,
        FINALIZE,
        (rows, None, None, None, scales, routes(21), None, mode),
        expect=f"a! b, c d!, {row_map} -> c b | linear 100",
    )


@pytest.mark.parametrize("mode", [0, 1, 2, 3])
def test_finalize_routing_with_everything(mode: int) -> None:
    rows, index = f(21, 10) if mode in (0, 2) else f(6, 4, 10), routes(21)
    if mode in (1, 3):
        index[4] = -1
    args = (
        *(rows, f(7, 10, seed=1), f(7, 10, seed=2), f(6, 10, seed=3), f(7, 3)),
        *(index, choices(7, 3, 6), mode),
    )
    row_map = "(f! {})" if mode in (0, 1) else "({} f!)"
    if mode in (0, 2):
        row_map = row_map.format("c")
        expect = f"a! b, c b, c b, d! b, c e!, {row_map.replace('f', 'e')}, c e! -> c b"
    else:
        row_map = row_map.format("d")
        expect = f"a! b! c, d c, d c, e! c, d f!, {row_map}, d f! -> d c"
    check_op(RULES, FINALIZE, args, expect=f"{expect} | linear 1111000", axes2=mode == 3)


def test_finalize_routing_without_scales_by_keywords() -> None:
    check_op(
        RULES,
        FINALIZE,
        (),
        {
            "expanded_src_to_dst_row": routes(21),
            "expanded_permuted_rows": f(21, 10),
            "skip1": f(7, 10),
            "skip2": None,
            "bias": None,
            "scales": None,
            "export_for_source_row": None,
            "drop_pad_mode": 2,
            "k": 3,
        },
        expect="(a b!), c! d, a d -> a d | linear 011",
    )


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("counts", [(4, 0, 5, 2), (0, 3, 1, 0)])
@pytest.mark.parametrize("single", [True, False])
def test_grouped_rows(dtype: torch.dtype, counts: tuple[int, ...], single: bool) -> None:
    weight = f(4, 6, 10, dtype=dtype)
    check_op(
        RULES,
        GROUPED,
        ([f(11, 6, dtype=dtype)], [weight] if single else list(weight)),
        {
            "group_list": torch.tensor(counts).cumsum(0),
            "split_item": 2,
            "group_type": 0,
        },
        expect="a! b+, c! b+ d, c! -> a! d | linear 100 010"
        if single
        else "a! b+, b+ c, b+ c, b+ c, b+ c, d! -> a! c | linear 100000 011110",
    )


@pytest.mark.parametrize("single", [True, False])
def test_grouped_rows_with_a_bias(single: bool) -> None:
    weight, bias = f(3, 6, 10), f(3, 10)
    check_op(
        RULES,
        GROUPED,
        ([f(11, 6)], [weight] if single else list(weight)),
        {
            "bias": [bias] if single else list(bias),
            "group_list": torch.tensor([4, 4, 3]),
            "group_list_type": 1,
            "split_item": 3,
            "group_type": 0,
        },
        expect="a! b!, c! b! d, c! d, c! -> a! d | linear 1010 0110"
        if single
        else "a! b!, b! c, b! c, b! c, c, c, c, d! -> a! c | linear 10001110 01111110",
    )


def test_groups_known_while_tracing() -> None:
    check_op(
        RULES,
        npu.npu_grouped_matmul.List,
        ([f(11, 6)], list(f(2, 6, 10))),
        {"group_list": [4, 11], "split_item": 2},
        expect="a! b+, b+ c, b+ c -> a! c | linear 100 011",
    )


def test_lists_of_a_program_are_tuples() -> None:
    x, w, groups = TensorType((11, 6), HALF), TensorType((4, 6, 10), HALF), TensorType((4,), HALF)
    options = {"group_list": groups, "split_item": 2, "group_type": 0}
    call = OpCall(GROUPED, ((x,), (w,)), options, (x, w, groups), (TensorType((11, 10), HALF),))
    assert rule_line(RULES.rule(call)) == "a! b+, c! b+ d, c! -> a! d | linear 100 010"


@pytest.mark.parametrize("split_item", [0, 3])
def test_lists_stay_whole(split_item: int) -> None:
    """A shard of one K would make every result partial, and the other products whole."""
    args = ([f(3, 6), f(4, 5)], [f(6, 10), f(5, 10)])
    call, _ = make_call(GROUPED, args, {"split_item": split_item, "group_type": -1})
    results = "i! j!, k! l!" if split_item == 0 else "i! j!"
    assert rule_line(RULES.rule(call)) == f"a! b!, c! d!, e! f!, g! h! -> {results}"


def test_two_axes() -> None:
    """Tokens over one axis and features over the other where rows come together."""
    args = (f(21, 10), f(7, 10), None, None, f(7, 3), routes(21), None, 0)
    mesh = Mesh({"dp": 2, "tp": 3})
    check_choice(RULES, FINALIZE, args, None, (Split(0, 1, 7), Split(1, 1, 10)), mesh)
    check_choice(RULES, FINALIZE, args, None, (Split(0, 1, 7), Split(0, 1, 7)), mesh)


@pytest.mark.parametrize(
    "name",
    [
        "npu_mm_reduce_scatter_base",
        "npu_all_gather_base_mm",
        "npu_mm_all_reduce_base",
        "npu_all_to_all_matmul",
    ],
)
def test_fused_collectives_belong_to_lowered_programs(name: str) -> None:
    x, w = TensorType((6, 8), HALF), TensorType((8, 5), HALF)
    call = OpCall(getattr(npu, name).default, (x, w, "group", 2), {}, (x, w), (x,))
    with pytest.raises(RolemeshError) as error:
        RULES.rule(call)
    assert error.value.code == "RM010"
    assert str(error.value) == (
        f"[RM010] npu.{name}.default cannot be sharded\n"
        f"  where: npu.{name}.default with operands bf16[6, 8], bf16[8, 5]\n"
        "  why: it exchanges with ranks of its own choice,"
        " and rolemesh chooses what ranks exchange\n"
        "  fix: write the matrix product alone: it is fused with its collective when it is lowered"
    )
