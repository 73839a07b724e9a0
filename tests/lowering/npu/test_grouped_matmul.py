"""Grouped products: each form against a loop over experts, shapes, refusals."""

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


def bias_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.bfloat16 else dtype


def on_meta(value: object) -> object:
    if isinstance(value, Tensor):
        return value.to("meta")
    return [on_meta(item) for item in value] if isinstance(value, list) else value


def run(*args: object, **kwargs: object) -> list[Tensor]:
    """Run on real tensors, and compare with the run on tensors without data."""
    found = npu.npu_grouped_matmul(*args, **kwargs)
    without = npu.npu_grouped_matmul(
        *[on_meta(a) for a in args], **{k: on_meta(v) for k, v in kwargs.items()}
    )
    assert [(t.shape, t.dtype) for t in without] == [(t.shape, t.dtype) for t in found]
    assert isinstance(found, list)
    return found


def by_expert(
    x: Tensor, weights: list[Tensor], biases: list[Tensor] | None, counts: list[int]
) -> Tensor:
    """Rows of each expert in turn, in fp64."""
    rows, done = [], 0
    for expert, count in enumerate(counts):
        part = x[done : done + count].double() @ weights[expert].double()
        rows.append(part if biases is None else part + biases[expert].double())
        done += count
    return torch.cat(rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", [(3, 0, 5, 2), (0, 0, 0, 10), (10, 0, 0, 0), (0, 3, 4, 1)])
@pytest.mark.parametrize(
    ("group_list_type", "with_bias", "single", "transposed"),
    list(itertools.product((0, 1), (False, True), (False, True), (False, True))),
)
def test_groups_of_rows(
    dtype: torch.dtype,
    counts: tuple[int, ...],
    group_list_type: int,
    with_bias: bool,
    single: bool,
    transposed: bool,
) -> None:
    """Rows after the last group are of no expert, and not written."""
    x = f(10, 6, dtype=dtype)
    weight = f(4, 7, 6, dtype=dtype).mT if transposed else f(4, 6, 7, dtype=dtype)
    bias = f(4, 7, dtype=bias_dtype(dtype), seed=1) if with_bias else None
    group_list = torch.tensor(counts)
    (y,) = run(
        [x],
        [weight] if single else list(weight),
        bias=None if bias is None else [bias] if single else list(bias),
        group_list=group_list if group_list_type else group_list.cumsum(0),
        group_list_type=group_list_type,
        split_item=2 + single,
        group_type=0,
        output_dtype=dtype if single else None,
        tuning_config=[4] if single else None,
    )
    expected = by_expert(x, list(weight), None if bias is None else list(bias), list(counts))
    torch.testing.assert_close(y[: sum(counts)], expected.to(dtype))
    assert y[sum(counts) :].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_lists(dtype: torch.dtype, with_bias: bool) -> None:
    x = [f(3, 6, dtype=dtype), f(2, 4, 5, dtype=dtype)]
    weight = [f(6, 7, dtype=dtype), f(5, 8, dtype=dtype)]
    bias = [f(7, dtype=bias_dtype(dtype)), f(8, dtype=bias_dtype(dtype))] if with_bias else None
    found = run(x, weight, bias=bias, group_type=-1)
    for index, y in enumerate(found):
        expected = x[index].double() @ weight[index].double()
        expected += bias[index].double() if bias is not None else 0
        torch.testing.assert_close(y, expected.to(dtype))


@pytest.mark.parametrize("given", [None, 0, 1, "ends"])
def test_lists_joined(given: object) -> None:
    """The group list says what the lists say too."""
    x, weight = [f(3, 6), f(0, 6), f(4, 6)], list(f(3, 6, 7))
    expected = by_expert(torch.cat(x), weight, None, [3, 0, 4]).float()
    if given is None:
        (y,) = run(x, weight, split_item=3, group_type=-1)
    elif given == "ends":
        (y,) = run(x, weight, split_item=3, group_list=[3, 3, 7])
    else:
        groups = torch.tensor([3, 0, 4] if given else [3, 3, 7])
        (y,) = run(x, weight, split_item=3, group_type=0, group_list=groups, group_list_type=given)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ends_known_while_tracing(dtype: torch.dtype) -> None:
    x, weight = f(9, 6, dtype=dtype), f(3, 6, 7, dtype=dtype)
    (y,) = run([x], list(weight), group_list=[2, 2, 9], split_item=2, output_dtype=dtype)
    torch.testing.assert_close(y, by_expert(x, list(weight), None, [2, 0, 7]).to(dtype))


GROUPED = {"split_item": 2, "group_type": 0, "group_list": torch.tensor([2, 5])}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": [f(7)]}, "scale="),
        ({"offset": [f(7)]}, "offset="),
        ({"antiquant_scale": [f(7)]}, "antiquant_scale="),
        ({"antiquant_offset": [f(7)]}, "antiquant_offset="),
        ({"per_token_scale": [f(5)]}, "per_token_scale="),
        ({"activation_input": [f(5)]}, "activation_input="),
        ({"activation_quant_scale": [f(5)]}, "activation_quant_scale="),
        ({"activation_quant_offset": [f(5)]}, "activation_quant_offset="),
        ({"act_type": 5}, "act_type=5"),
        ({"group_type": 2}, "group_type=2"),
        ({"group_list_type": 2}, "group_list_type=2"),
        ({"split_item": 1}, "split_item=1"),
        ({"x_dtype": 290}, "x_dtype=290"),
        ({"weight_dtype": 290}, "weight_dtype=290"),
        ({"scale_dtype": 293}, "scale_dtype=293"),
        ({"per_token_scale_dtype": 293}, "per_token_scale_dtype=293"),
    ],
)
def test_refused(options: dict[str, object], message: str) -> None:
    for device in ("cpu", "meta"):
        x, weight = [f(5, 6).to(device)], [f(2, 6, 7).to(device)]
        with pytest.raises(RolemeshError, match=message) as error:
            npu.npu_grouped_matmul(x, weight, **{**GROUPED, **options})
        assert error.value.code == "RM028"


def test_quantised_weights_are_refused() -> None:
    with pytest.raises(RolemeshError, match=r"npu_grouped_matmul has no .* dtype=torch.int8"):
        npu.npu_grouped_matmul([f(5, 6)], [f(2, 6, 7).to(torch.int8)], **GROUPED)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"group_type": None}, "group_type is None"),
        ({"group_type": -1}, "group_type -1 takes no group_list"),
        ({"group_list": None}, "one x needs a group_list"),
        ({"group_list": torch.tensor([5])}, "1 groups for 2 experts"),
        ({"group_list": torch.tensor([2, 5], dtype=torch.int32)}, "group_list is torch.int32"),
        ({"group_list": torch.tensor([2, 6])}, r"rows \[5\] do not make the groups \[2, 4\]"),
        ({"group_list": torch.tensor([3, 2])}, r"do not make the groups \[3, -1\]"),
        ({"output_dtype": torch.float16}, "output_dtype torch.float16"),
        ({"output_dtype": torch.int8}, "output_dtype 1"),
        ({"bias": [f(2, 7), f(2, 7)]}, "2 biases for 1 weights"),
        ({"bias": [f(2, 7, dtype=torch.float16)]}, "a bias for torch.float32 must be"),
        ({"x": [f(5, 5)]}, r"x is \[5, 5\]"),
        ({"x": [f(5, 6, dtype=torch.float16)]}, "differ in dtype"),
        ({"x": []}, "no x or no weight"),
        ({"split_item": 0, "group_type": -1}, "takes no group_list"),
        ({"x": [f(2, 6), f(3, 6)]}, "2 of x and 1 weights"),
        ({"x": [f(2, 6), f(3, 6)], "weight": [f(6, 7), f(6, 8)]}, "different widths"),
        ({"x": [f(2, 6), f(3, 6)], "weight": [f(6, 7), f(5, 7)]}, "its weight"),
        ({"x": [f(3, 6), f(2, 6)], "weight": [f(6, 7), f(6, 7)]}, r"groups \[2, 3\]"),
    ],
)
def test_operands_must_belong_together(changed: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"x": [f(5, 6)], "weight": [f(2, 6, 7)], **GROUPED, **changed}
    with pytest.raises(RuntimeError, match=message):
        npu.npu_grouped_matmul.default(**arguments)


def test_ints_take_no_group_types() -> None:
    for options in ({"group_type": 0}, {"group_list_type": 1}):
        with pytest.raises(RuntimeError, match="a group_list of ints takes neither"):
            npu.npu_grouped_matmul([f(5, 6)], list(f(2, 6, 7)), group_list=[2, 5], **options)


@pytest.mark.parametrize(
    ("overload", "args", "kwargs"),
    [
        ("default", ([f(5, 6)], [f(2, 6, 7)]), GROUPED),
        ("default", ([f(5, 6), f(2, 3)], [f(6, 7), f(3, 4)]), {"group_type": -1}),
        ("List", ([f(5, 6)], list(f(2, 6, 7))), {"group_list": [2, 5], "split_item": 2}),
    ],
)
def test_opcheck(overload: str, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    op = getattr(npu.npu_grouped_matmul, overload)
    torch.library.opcheck(op, args, kwargs, test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(op, args, kwargs, test_utils="test_aot_dispatch_dynamic")
