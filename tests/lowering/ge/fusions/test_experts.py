"""Experts as one op: routing, grouped products and the sum over routes, converted by torchair."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from tests.lowering.ge.fusions.forms import both_forms, f, graph_text, hits, near
from tests.lowering.ge.lowered import dynamic_examples, module_of, signature_of
from torch import Tensor

from rolemesh.lowering.composite.define import define_composite_ops
from rolemesh.lowering.composite.gate import SWIGLU
from rolemesh.lowering.ge.engine import running_on
from rolemesh.lowering.ge.options import GeOptions
from rolemesh.lowering.ge.target import lower_ge
from rolemesh.runtime.ge.engine import ReferenceEngine

BF16, F32 = torch.bfloat16, torch.float32
PAIRS = "mul(add(clamp(odd, -1.0, 1.0), 1), sigmoid(even))"
IDS = torch.tensor([[0, 3], [6, -1], [7, 2], [2, 0], [5, 5]])  # of 7 experts; two ids of none


@pytest.fixture(scope="module", autouse=True)
def _defined() -> None:
    define_composite_ops()


def experts(activation: str = SWIGLU, *, transposed: bool = False) -> Callable[..., Tensor]:
    op = torch.ops.rolemesh.experts.default

    def function(*given: Tensor) -> Tensor:
        biases: Sequence[Tensor | None] = given[5:] or (None, None)
        return op(*given[:5], *biases, activation, transposed)

    return function


def operands(dtype: torch.dtype = BF16, *, bias: bool = False) -> tuple[Tensor, ...]:
    tables = (f(7, 24, 10, dtype=dtype), f(7, 9, 12, dtype=dtype))
    biases = (f(7, 24, dtype=dtype), f(7, 9, dtype=dtype)) if bias else ()
    return (f(5, 10, dtype=dtype), IDS, f(5, 2, dtype=dtype), *tables, *biases)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_gates(dtype: torch.dtype) -> None:
    found = hits(experts(), *operands(dtype))
    assert found == {"moe_finalize_routing": 1, "swiglu": 1}
    found = hits(experts(PAIRS), *operands(dtype, bias=True))
    assert found == {"moe_finalize_routing": 1}


def test_transposed_tables_and_weights_of_another_dtype() -> None:
    hidden, ids, weights, up, down = operands()
    given = (hidden, ids.int(), weights.float(), up.mT.contiguous(), down.mT.contiguous())
    found = hits(experts(transposed=True), *given)
    assert found == {"moe_finalize_routing": 1, "swiglu": 1}


def test_other_dtypes_and_sizes_stay() -> None:
    assert not any(both_forms(experts(), *operands(torch.float64)).made.values())
    wide = torch.zeros(1, 2, 65544, dtype=BF16)
    given = (wide[0], IDS[:2] * 0, f(2, 2), wide, torch.zeros(1, 8, 1, dtype=BF16))
    assert not any(both_forms(experts(), *given).made.values())
    made = both_forms(experts(), *given, within_limits=False).made
    assert made["npu_moe_finalize_routing"] == 1


@pytest.mark.parametrize(
    ("dtype", "bias", "fused"), [(F32, False, True), (BF16, True, True), (F32, True, False)]
)
def test_converted_by_torchair_for_any_number_of_tokens(
    dtype: torch.dtype, bias: bool, fused: bool
) -> None:
    given = operands(dtype, bias=bias)
    examples = dynamic_examples(given, {0: [0], 1: [0], 2: [0]})
    module = module_of(lambda *args: (experts(PAIRS)(*args),), len(given), 1)
    options = GeOptions(fuse=fused, frozen_parameters=False)
    run = lower_ge(module, examples, signature_of(len(given), 1), options)
    for tokens in (5, 3):
        cut = [x[:tokens] if place < 3 else x for place, x in enumerate(given)]
        with running_on(ReferenceEngine()):
            (found,) = run(*cut)
        assert found is not None
        near(experts(PAIRS)(*cut), found)


def test_products_of_groups_convert_without_cann() -> None:
    """In bf16, with rows behind the last group, whose contents are unspecified."""
    given = (f(11, 16, dtype=BF16), f(4, 16, 24, dtype=BF16), torch.tensor([3, 3, 5, 7]).int())
    module = module_of(lambda *args: (torch.ops.aten._grouped_mm.default(*args),), 3, 1)
    options = GeOptions(frozen_parameters=False)
    run = lower_ge(module, dynamic_examples(given, {}), signature_of(3, 1), options)
    with running_on(ReferenceEngine()):
        (found,) = run(*given)
    assert found is not None
    near(torch.ops.aten._grouped_mm.default(*given)[:7], found[:7])


def test_text(golden: Callable[[str, str], None]) -> None:
    forms = both_forms(experts(PAIRS), *operands(bias=True))
    golden("experts", graph_text(forms.after.graph))
