"""Gating and routing ops: references against independent formulations, shapes, refusals."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.lowering.npu.define import define_npu_ops

define_npu_ops()
npu = torch.ops.npu
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def f(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def choices(tokens: int, k: int, experts: int, seed: int = 0) -> Tensor:
    """Experts of each token, no expert twice."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tokens, experts, generator=generator).argsort(1)[:, :k].int()


def same_types(found: object, expected: object) -> None:
    """Shapes and dtypes of results without data are those of real results."""
    assert isinstance(found, tuple)
    assert isinstance(expected, tuple)
    kinds = [(t.shape, t.dtype) for t in found]
    assert kinds == [(t.shape, t.dtype) for t in expected]


def checked(op: torch._ops.OpOverload, *args: object, **kwargs: object) -> tuple[Tensor, ...]:
    """Run on real tensors, and compare with the run on tensors without data."""
    found = op(*args, **kwargs)
    results = found if isinstance(found, tuple) else (found,)
    meta = [a.to("meta") if isinstance(a, Tensor) else a for a in args]
    kinds = {k: a.to("meta") if isinstance(a, Tensor) else a for k, a in kwargs.items()}
    without = op(*meta, **kinds)
    same_types(without if isinstance(without, tuple) else (without,), results)
    return results


# --------------------------------------------------------------------------------------------------
# Gates.


@pytest.mark.parametrize("dtype", DTYPES)
def test_sigmoid_gate_is_that_of_deepseek(dtype: torch.dtype) -> None:
    modeling = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    config = modeling.DeepseekV3Config(
        hidden_size=24,
        n_routed_experts=24,
        n_group=6,
        topk_group=2,
        num_experts_per_tok=5,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
    )
    router = modeling.DeepseekV3TopkRouter(config)
    logits, bias = f(7, 24, dtype=dtype), f(24, seed=1).to(dtype)
    with torch.no_grad():
        router.weight.copy_(torch.eye(24))
        router.e_score_correction_bias.copy_(bias)
        _, weights, experts = router(logits)

    y, idx, scores = checked(
        npu.npu_moe_gating_top_k.default,
        logits,
        5,
        bias=bias,
        k_group=2,
        group_count=6,
        group_select_mode=1,
        norm_type=1,
        out_flag=True,
        routed_scaling_factor=2.5,
    )
    # transformers leaves the chosen unsorted.
    order = experts.argsort(1)
    sorted_idx = idx.long().sort(1)
    torch.testing.assert_close(sorted_idx.values, experts.gather(1, order))
    torch.testing.assert_close(y.gather(1, sorted_idx.indices), weights.gather(1, order).to(dtype))
    assert y.dtype == dtype
    assert idx.dtype == torch.int32
    torch.testing.assert_close(scores, logits.float().sigmoid())


def one_token(
    row: list[float], bias: list[float], options: dict[str, int | float]
) -> tuple[list[float], list[int]]:
    """The gate for one token, written with Python's sorting."""
    scores = torch.tensor(row)
    scores = scores.sigmoid() if options["norm_type"] else scores.softmax(0)
    values = scores.tolist()
    by = [value + extra for value, extra in zip(values, bias, strict=True)]
    groups = int(options["group_count"])
    size = len(row) // groups
    best = [
        sum(sorted(by[g * size : (g + 1) * size])[-1 - int(options["group_select_mode"]) :])
        for g in range(groups)
    ]
    kept = sorted(range(groups), key=lambda g: -best[g])[: int(options["k_group"])]
    allowed = [e for e in range(len(row)) if e // size in kept]
    chosen = sorted(allowed, key=lambda e: -by[e])[: int(options["k"])]
    weights = [values[e] for e in chosen]
    if options["norm_type"] or options["renorm"]:
        total = sum(weights) + options["eps"]
        weights = [weight / total for weight in weights]
    return [weight * options["routed_scaling_factor"] for weight in weights], chosen


@pytest.mark.parametrize(
    ("norm_type", "renorm", "mode", "groups"),
    list(itertools.product((0, 1), (0, 1), (0, 1), ((1, 1), (3, 2), (5, 3)))),
)
@pytest.mark.parametrize("with_bias", [True, False])
def test_gate_token_by_token(
    norm_type: int, renorm: int, mode: int, groups: tuple[int, int], with_bias: bool
) -> None:
    x, bias = f(6, 15), f(15, seed=1) / 4
    options = {
        "k": 4,
        "group_count": groups[0],
        "k_group": groups[1],
        "group_select_mode": mode,
        "norm_type": norm_type,
        "renorm": renorm,
        "routed_scaling_factor": 1.75,
        "eps": 0.125,
    }
    y, idx, _ = checked(
        npu.npu_moe_gating_top_k.default, x, bias=bias if with_bias else None, **options
    )
    for token in range(6):
        extra = bias.tolist() if with_bias else [0.0] * 15
        weights, chosen = one_token(x[token].tolist(), extra, options)
        assert idx[token].tolist() == chosen
        torch.testing.assert_close(y[token], torch.tensor(weights))


def test_gate_breaks_ties_by_index() -> None:
    y, idx, _ = npu.npu_moe_gating_top_k(torch.zeros(2, 6), 3, group_count=3, k_group=2)
    assert idx.tolist() == [[0, 1, 2]] * 2
    torch.testing.assert_close(y, torch.full((2, 3), 1 / 6))


def test_scores_not_asked_for_are_nan() -> None:
    assert npu.npu_moe_gating_top_k(f(2, 6), 3)[2].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 9), (2, 3, 9)])
def test_softmax_gate(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = f(*shape, dtype=dtype)
    y, idx, rows = checked(npu.npu_moe_gating_top_k_softmax.default, x, None, 4)
    expected = x.double().softmax(-1)
    torch.testing.assert_close(y, expected.gather(-1, idx.long()).to(dtype))
    torch.testing.assert_close(expected.topk(4).values, expected.gather(-1, idx.long()))
    tokens = x.numel() // 9
    assert rows.view(tokens, 4).tolist() == [
        [i + j * tokens for j in range(4)] for i in range(tokens)
    ]


def test_softmax_gate_gives_finished_tokens_no_expert() -> None:
    finished = torch.tensor([False, True, False])
    y, idx, _ = checked(npu.npu_moe_gating_top_k_softmax.default, f(3, 7), finished, 2)
    assert idx[1].tolist() == [7, 7]
    assert idx[0].max() < 7
    torch.testing.assert_close(y, f(3, 7).softmax(-1).topk(2).values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm_type": 2}, "norm_type is 2"),
        ({"renorm": 2}, "renorm is 2"),
        ({"group_select_mode": 2}, "group_select_mode is 2"),
        ({"group_count": 4}, "do not make 4 groups"),
        ({"group_count": 6, "k_group": 6, "group_select_mode": 1}, "no best two"),
        ({"group_count": 3, "k_group": 1}, "cannot pick 3 experts in 1 of 3 groups"),
        ({"bias": torch.zeros(5)}, "bias is"),
        ({"bias": torch.zeros(6, dtype=torch.float16)}, "bias is"),
    ],
)
def test_gate_checks_its_arguments(options: dict[str, object], message: str) -> None:
    for device in ("cpu", "meta"):
        with pytest.raises(RuntimeError, match=message):
            npu.npu_moe_gating_top_k(torch.zeros(2, 6, device=device), 3, **options)


def test_gate_refuses_hashed_experts() -> None:
    ids, table = torch.zeros(2, dtype=torch.int32), torch.zeros(9, 3, dtype=torch.int32)
    with pytest.raises(RolemeshError, match="input_ids=a tensor") as error:
        npu.npu_moe_gating_top_k(f(2, 6), 3, input_ids=ids, tid2eid=table)
    assert error.value.code == "RM028"


# --------------------------------------------------------------------------------------------------
# Routing.


def sorted_routes(experts: Tensor, first: int, end: int) -> list[tuple[int, int, int]]:
    """(expert, token, choice) of routes to experts in a range, in the order of their rows."""
    return sorted(
        (int(experts[token, choice]), token, choice)
        for token in range(experts.shape[0])
        for choice in range(experts.shape[1])
        if first <= experts[token, choice] < end
    )


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8])
@pytest.mark.parametrize("active", [[], [0, 9], [2, 7], [8, 9]])
@pytest.mark.parametrize("row_idx_type", [0, 1])
@pytest.mark.parametrize("active_num", [-1, 0, 5, 15, 99])
def test_init_routing(
    dtype: torch.dtype, active: list[int], row_idx_type: int, active_num: int
) -> None:
    x, experts, scale = (f(5, 4) * 9).to(dtype), choices(5, 3, 9), f(5)
    rows, row_idx, counts, scales = checked(
        npu.npu_moe_init_routing_v2.default,
        x,
        experts,
        scale=scale,
        active_num=active_num,
        expert_num=9,
        expert_tokens_num_type=1,
        expert_tokens_num_flag=True,
        active_expert_range=active,
        row_idx_type=row_idx_type,
    )
    first, end = active or [0, 9]
    routes = sorted_routes(experts, first, end)
    assert rows.shape[0] == (15 if active_num in (-1, 0) else min(active_num, 15))
    for row, (_, token, _) in enumerate(routes[: rows.shape[0]]):
        assert torch.equal(rows[row], x[token])
        assert scales[row] == scale[token]
    if dtype != torch.int8:
        assert rows[len(routes) :].isnan().all()
    assert scales[len(routes) :].isnan().all()
    expected = [-1] * 15
    for row, (_, token, choice) in enumerate(routes):
        if row_idx_type == 0:
            expected[token * 3 + choice] = row
        else:
            expected[row] = token * 3 + choice
    assert row_idx.tolist() == expected
    assert counts.tolist() == [
        sum(e == expert for e, _, _ in routes) for expert in range(first, end)
    ]


def test_tokens_of_experts() -> None:
    experts = torch.tensor([[4, 1], [1, 6], [4, 0]], dtype=torch.int32)

    def tokens(kind: int, flag: bool = True) -> object:
        return checked(
            npu.npu_moe_init_routing_v2.default,
            f(3, 2),
            experts,
            expert_num=7,
            expert_tokens_num_type=kind,
            expert_tokens_num_flag=flag,
            active_expert_range=[1, 6],
        )[2].tolist()

    assert tokens(0) == [2, 2, 2, 4, 4]
    assert tokens(1) == [2, 0, 0, 2, 0]
    assert tokens(2) == [[1, 2], [4, 2], *[[0, 0]] * 5]
    assert tokens(1, flag=False) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quant_mode": 1}, "quant_mode=1"),
        ({"quant_mode": 0}, "quant_mode=0"),
        ({"drop_pad_mode": 1, "expert_capacity": 2}, "drop_pad_mode=1"),
        ({"offset": torch.zeros(1)}, "offset=a tensor"),
        ({"x_dtype": 290}, "x_dtype=290"),
    ],
)
def test_init_routing_refuses(options: dict[str, object], message: str) -> None:
    for device in ("cpu", "meta"):
        x, experts = f(3, 2).to(device), choices(3, 2, 5).to(device)
        with pytest.raises(RolemeshError, match=message) as error:
            npu.npu_moe_init_routing_v2(x, experts, expert_num=5, **options)
        assert error.value.code == "RM028"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expert_num": 5, "active_expert_range": [3, 6]}, "no range of 5 experts"),
        ({"expert_num": -1}, "no range of -1 experts"),
        ({"expert_num": 5, "row_idx_type": 2}, "row_idx_type is 2"),
        ({"expert_num": 5, "expert_tokens_num_type": 3}, "expert_tokens_num_type is 3"),
        ({"expert_num": 5, "scale": torch.zeros(2)}, "scale is"),
    ],
)
def test_init_routing_checks_its_arguments(options: dict[str, object], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        npu.npu_moe_init_routing_v2(f(3, 2), choices(3, 2, 5), **options)


# --------------------------------------------------------------------------------------------------
# Putting together.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", [0, 1, 2, 3])
@pytest.mark.parametrize("extras", list(itertools.product((0, 1, 2), (0, 1), (0, 1))))
def test_finalize_routing(dtype: torch.dtype, mode: int, extras: tuple[int, int, int]) -> None:
    tokens, k, experts, width = 5, 3, 7, 4
    skips, with_bias, with_scales = extras
    slots = (tokens * k,) if mode in (0, 2) else (experts, 4)
    rows = f(*slots, width, dtype=dtype)
    index = torch.randperm(rows.numel() // width, generator=torch.Generator().manual_seed(3))
    index = index[: tokens * k].int()
    if mode in (1, 3):
        index[[2, 5]] = -1
    skip1 = f(tokens, width, dtype=dtype, seed=1) if skips else None
    skip2 = f(tokens, width, dtype=dtype, seed=2) if skips == 2 else None
    bias = f(experts, width, dtype=dtype, seed=4) if with_bias else None
    scales = f(tokens, k, dtype=dtype, seed=5) if with_scales else None
    chosen = choices(tokens, k, experts)
    args = (rows, skip1, skip2, bias, scales, index, chosen if with_bias else None, mode, k)
    (out,) = checked(npu.npu_moe_finalize_routing.default, *args)

    expected = torch.zeros(tokens, width, dtype=torch.float64)
    for token, choice in itertools.product(range(tokens), range(k)):
        place = choice * tokens + token if mode in (0, 1) else token * k + choice
        if index[place] < 0:
            continue
        row = rows.reshape(-1, width)[index[place]].double()
        if bias is not None:
            row = row + bias[chosen[token, choice]].double()
        expected[token] += row * (scales[token, choice].double() if scales is not None else 1)
    for skip in (skip1, skip2):
        expected += 0 if skip is None else skip.double()
    torch.testing.assert_close(out, expected.to(dtype))
    assert out.dtype == dtype


def test_rows_in_bf16_take_scales_in_fp32() -> None:
    rows, scales = f(6, 4, dtype=torch.bfloat16), f(3, 2)
    (out,) = checked(
        npu.npu_moe_finalize_routing.default,
        *(rows, None, None, None, scales, torch.arange(6).int(), None, 2),
    )
    expected = (rows.float().view(3, 2, 4) * scales[..., None]).sum(1)
    torch.testing.assert_close(out, expected.to(torch.bfloat16))


@pytest.mark.parametrize("mode", [0, 2])
def test_a_route_without_a_row_fails(mode: int) -> None:
    index = torch.tensor([0, 1, -1, 3], dtype=torch.int32)
    with pytest.raises(RuntimeError, match=f"row -1 in drop_pad_mode {mode}"):
        npu.npu_moe_finalize_routing(f(4, 2), None, None, None, f(2, 2), index, None, mode)


def test_finalize_routing_checks_its_arguments() -> None:
    rows, index, scales = f(6, 2), torch.arange(6).int(), f(3, 2)

    def run(**changed: object) -> None:
        arguments: dict[str, object] = {
            "expanded_permuted_rows": rows,
            "skip1": None,
            "skip2": None,
            "bias": None,
            "scales": scales,
            "expanded_src_to_dst_row": index,
            "export_for_source_row": None,
        }
        npu.npu_moe_finalize_routing(**(arguments | changed))

    run()
    for changed, message in (
        ({"drop_pad_mode": 4}, "drop_pad_mode is 4"),
        ({"drop_pad_mode": 1}, "rows have 2 dims"),
        ({"skip2": f(3, 2)}, "skip2 without skip1"),
        ({"skip1": f(3, 3)}, "skip1 is not"),
        ({"skip1": f(3, 2, dtype=torch.float16)}, "skip1 is not"),
        ({"bias": f(4, 2)}, "a bias needs export_for_source_row"),
        ({"scales": None, "k": 4}, "6 routes are not 4 for each token"),
        ({"scales": None, "k": None}, "6 routes are not None for each token"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run(**changed)


# --------------------------------------------------------------------------------------------------
# All together.


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_of_experts(dtype: torch.dtype) -> None:
    """Gate, sort, grouped product, put together: the sum over chosen experts, token by token."""
    x, gate, weights = f(7, 6, dtype=dtype), f(7, 5), f(5, 6, 8, dtype=dtype)
    scores, experts, _ = npu.npu_moe_gating_top_k(gate, 3, renorm=1)
    rows, row_idx, ends, _ = npu.npu_moe_init_routing_v2(
        x, experts, expert_num=5, expert_tokens_num_flag=True, active_expert_range=[0, 5]
    )
    (products,) = npu.npu_grouped_matmul(
        [rows], [weights], group_list=ends, split_item=3, group_type=0
    )
    out = npu.npu_moe_finalize_routing(
        products, None, None, None, scores.to(dtype), row_idx, None, drop_pad_mode=2
    )
    expected = torch.stack(
        [
            sum(
                scores[t, j].to(dtype).double() * (x[t].double() @ weights[experts[t, j]].double())
                for j in range(3)
            )
            for t in range(7)
        ]
    )
    tolerance = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 5e-2}
    torch.testing.assert_close(out, expected.to(dtype), **tolerance)


OPCHECKS = (
    (npu.npu_moe_gating_top_k.default, (f(4, 6), 2), {"bias": f(6), "out_flag": True}),
    (npu.npu_moe_gating_top_k_softmax.default, (f(4, 6), None, 2), {}),
    (
        npu.npu_moe_init_routing_v2.default,
        (f(4, 6), choices(4, 2, 5)),
        {"expert_num": 5, "expert_tokens_num_flag": True, "scale": f(4)},
    ),
    (
        npu.npu_moe_finalize_routing.default,
        (f(8, 6), f(4, 6), None, None, f(4, 2), torch.arange(8).int(), None),
        {},
    ),
)


@pytest.mark.parametrize(("op", "args", "kwargs"), OPCHECKS)
def test_opcheck(
    op: torch._ops.OpOverload, args: tuple[object, ...], kwargs: dict[str, object]
) -> None:
    torch.library.opcheck(op, args, kwargs, test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(op, args, kwargs, test_utils="test_aot_dispatch_dynamic")
