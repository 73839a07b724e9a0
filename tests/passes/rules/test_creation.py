"""Ops that make tensors: constants shard for free, ranges stay whole, triangles know their rows."""

from __future__ import annotations

import pytest
import torch
from tests.passes.rules.harness import check_choice, check_op, make_call

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.placement import REPLICATE, Shard
from rolemesh.compiler.ir.rule import Split
from rolemesh.passes.rules import creation
from rolemesh.passes.rules.creation import row_axes
from rolemesh.passes.rules.registry import Rules

aten = torch.ops.aten
RULES = Rules((creation.RULES,), (creation.LOCAL,))


def f(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


X = f(4, 3)
HALF = {"dtype": torch.bfloat16}
CASES = [
    (aten.zeros.default, ([5, 3],), {}, "-> a b"),
    (aten.zeros.default, ([],), {}, "-> ."),
    (aten.ones.default, ([5, 3],), {"dtype": torch.bool}, "-> a b"),
    (aten.full.default, ([5, 3], 2.5), HALF, "-> a b"),
    (aten.scalar_tensor.default, (2.5,), {}, "-> ."),
    (aten.new_zeros.default, (X, [5, 7]), {}, "_ -> a b"),
    (aten.new_ones.default, (X, [5, 7]), HALF, "_ -> a b"),
    (aten.new_full.default, (X, [5], 3), {"dtype": torch.int64}, "_ -> a"),
    (aten.zeros_like.default, (X,), {}, "_ -> a b"),
    (aten.ones_like.default, (X,), HALF, "_ -> a b"),
    (aten.full_like.default, (X, 7), {"dtype": torch.int64}, "_ -> a b"),
    (aten.full_like.default, (X, 7), {"memory_format": torch.preserve_format}, "_ -> a b"),
    (aten.fill.Scalar, (X, 7), {}, "_ -> a b"),
    (aten.zero.default, (X,), {}, "_ -> a b"),
    (aten.arange.default, (7,), {}, "-> a!"),
    (aten.arange.start, (2, 7), {}, "-> a!"),
    (aten.arange.start_step, (2, 17, 3), {}, "-> a!"),
    (aten.linspace.default, (0, 1, 5), {}, "-> a!"),
    (aten.eye.default, (5,), {}, "-> a! b!"),
    (aten.tril_indices.default, (5, 4), {}, "-> a! b!"),
    (aten.triu_indices.default, (5, 4), {}, "-> a! b!"),
    (aten.tril.default, (f(7, 5),), {}, "a b! -> a b! | linear 1"),
    (aten.tril.default, (f(12, 12), -2), {}, "a b! -> a b! | linear 1"),
    (aten.triu.default, (f(2, 8, 5), 1), {}, "a b c! -> a b c! | linear 1"),
    (aten.triu.default, (torch.ones(6, 6, dtype=torch.bool), 1), {}, "a b! -> a b! | linear 1"),
]


@pytest.mark.parametrize(("target", "args", "kwargs", "text"), CASES, ids=lambda v: str(v)[:40])
def test_rule(
    target: torch._ops.OpOverload, args: tuple[object, ...], kwargs: dict[str, object], text: str
) -> None:
    assert check_op(RULES, target, args, kwargs, expect=text, ranks=(2, 3, 4), limit=24) > 0


@pytest.mark.parametrize(
    ("target", "args"),
    [
        (aten.empty.memory_format, ([5, 3],)),
        (aten.empty_strided.default, ([5, 3], [1, 5])),
        (aten.empty_permuted.default, ([5, 3], [1, 0])),
        (aten.new_empty.default, (X, [5, 7])),
        (aten.new_empty_strided.default, (X, [5, 7], [7, 1])),
        (aten.empty_like.default, (X,)),
    ],
    ids=str,
)
def test_uninitialised(
    target: torch._ops.OpOverload, args: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only shapes and types can be compared."""
    monkeypatch.setattr("torch.testing.assert_close", lambda *args, **kwargs: None)
    assert check_op(RULES, target, args) > 0


def test_rows_split_over_adjacent_digits_are_one_joint_factor() -> None:
    # Rows over (2, 2): the same factor jointly, or its two even digits one after the other.
    mesh = Mesh({"dp": 2, "tp": 2})
    for choices in ([Split(0, 1, 12)] * 2, [Split(0, 1, 12), Split(0, 2, 6)]):
        check_choice(RULES, aten.tril.default, (f(12, 12),), None, choices, mesh)
    assert row_axes(Layout((Shard(0, 2, 6), Shard(0, 1, 2))), 0, mesh, "tril") == (
        Shard(0, 1, 4),
        ("tp", "dp"),
    )
    assert row_axes(Layout((Shard(1, 1, 4), REPLICATE)), 0, mesh, "tril") is None


def test_rows_split_over_digits_apart_are_refused() -> None:
    layout = Layout((Shard(0, 1, 2), Shard(0, 4, 3)))
    with pytest.raises(RolemeshError, match="axes that do not count as one"):
        row_axes(layout, 0, Mesh({"dp": 2, "tp": 2}), "aten.tril.default")


def test_random_ops_have_no_rule() -> None:
    call, _ = make_call(aten.rand_like.default, (X,))
    assert not RULES.covers(call.target)
    assert not RULES.covers(aten.bernoulli.p)
