"""Matrix products: their rules as a table, each checked on all its choices."""

from __future__ import annotations

import pytest
import torch
from tests.passes.rules.harness import check_op, make_call

from rolemesh.compiler.ir.rule import Kind
from rolemesh.passes.rules import matmul
from rolemesh.passes.rules.registry import Rules

aten = torch.ops.aten
RULES = Rules((matmul.RULES,), (matmul.LOCAL,))


def f(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def b(*shape: int) -> torch.Tensor:
    return f(*shape, dtype=torch.bfloat16)


CASES = [
    (aten.mm.default, (f(6, 10), f(10, 7)), "a b+, b+ c -> a c | linear 10 01"),
    (aten.mm.default, (b(5, 9), b(9, 8)), "a b+, b+ c -> a c | linear 10 01"),
    (aten.mm.default, (f(1, 4), f(4, 3)), "a b+, b+ c -> a c | linear 10 01"),
    (aten.bmm.default, (f(3, 6, 5), f(3, 5, 7)), "a b c+, a c+ d -> a b d | linear 10 01"),
    (aten.bmm.default, (b(1, 2, 12), b(1, 12, 7)), "a b c+, a c+ d -> a b d | linear 10 01"),
    (aten.mv.default, (f(6, 10), f(10)), "a b+, b+ -> a | linear 10 01"),
    (aten.dot.default, (f(10), f(10)), "a+, a+ -> . | linear 10 01"),
    (aten.vdot.default, (f(9), f(9)), "a+, a+ -> . | linear 10 01"),
    (aten.outer.default, (f(6), f(7)), "a, b -> a b | linear 10 01"),
    (aten.addmm.default, (f(7), f(6, 10), f(10, 7)), "a, b c!, c! a -> b a | linear 110 101"),
    (aten.addmm.default, (f(6, 1), f(6, 9), f(9, 8)), "a 1, a b!, b! c -> a c | linear 110 101"),
    (aten.addmm.default, (b(5, 7), b(5, 9), b(9, 7)), "a b, a c!, c! b -> a b | linear 110 101"),
    (aten.addmm.default, (f(), f(5, 9), f(9, 7)), "., a b!, b! c -> a c | linear 110 101"),
    (aten.addmv.default, (f(6), f(6, 9), f(9)), "a, a b!, b! -> a | linear 110 101"),
    (
        aten.addbmm.default,
        (f(6, 7), f(3, 6, 5), f(3, 5, 7)),
        "a b, c! a d!, c! d! b -> a b | linear 110 101",
    ),
    (
        aten.baddbmm.default,
        (f(3, 1, 7), f(3, 6, 5), f(3, 5, 7)),
        "a 1 b, a c d!, a d! b -> a c b | linear 110 101",
    ),
    (aten._addmm_activation.default, (f(7), f(6, 10), f(10, 7)), "a, b c!, c! a -> b a"),
    (aten.matmul.default, (f(10), f(10)), "a+, a+ -> . | linear 10 01"),
    (aten.matmul.default, (f(10), f(10, 7)), "a+, a+ b -> b | linear 10 01"),
    (aten.matmul.default, (f(6, 10), f(10)), "a b+, b+ -> a | linear 10 01"),
    (aten.matmul.default, (f(10), f(3, 10, 7)), "a+, b a+ c -> b c | linear 10 01"),
    (aten.matmul.default, (f(3, 6, 10), f(10, 7)), "a b c+, c+ d -> a b d | linear 10 01"),
    (
        aten.matmul.default,
        (f(2, 1, 6, 10), f(3, 10, 7)),
        "a 1 b c+, d c+ e -> a d b e | linear 10 01",
    ),
    (aten.linear.default, (f(3, 6, 10), f(7, 10)), "a b c+, d c+ -> a b d | linear 10 01"),
    (
        aten.linear.default,
        (f(3, 6, 10), f(7, 10), f(7)),
        "a b c!, d c!, d -> a b d | linear 101 011",
    ),
]


@pytest.mark.parametrize(("target", "args", "expect"), CASES)
def test_rule(target: torch._ops.OpOverload, args: tuple[object, ...], expect: str) -> None:
    check_op(RULES, target, args, expect=expect)


@pytest.mark.parametrize(
    ("shapes", "left", "expect"),
    [
        (((3, 5, 5), (3, 5, 7)), True, "a b! c!, a c! d -> a c! d | linear 01"),
        (((5, 5), (3, 2, 5, 7)), True, "a! b!, c d b! e -> c d b! e | linear 01"),
        (((3, 1, 5, 5), (2, 7, 5)), False, "a 1 b! c!, d e c! -> a d e c! | linear 01"),
    ],
)
def test_triangular_solution(shapes: tuple[tuple[int, ...], ...], left: bool, expect: str) -> None:
    """Columns are solved apart (rows, where the matrix is on the right), and so are batches."""
    matrix = f(*shapes[0]).tril() + 4 * torch.eye(5)
    check_op(
        RULES,
        aten.linalg_solve_triangular.default,
        (matrix, f(*shapes[1])),
        {"upper": False, "left": left},
        expect=expect,
    )


def test_int8_product() -> None:
    x = torch.arange(32 * 16).reshape(32, 16).to(torch.int8)
    w = torch.arange(16 * 24).reshape(16, 24).to(torch.int8)
    check_op(RULES, aten._int_mm.default, (x, w), expect="a b+, b+ c -> a c")


def test_a_bias_is_never_summed() -> None:
    """No choice shards the summed dim of an op with a bias: it would add the bias on every rank."""
    call, _ = make_call(aten.addmm.default, (f(7), f(6, 10), f(10, 7)))
    assert Kind.REDUCE not in RULES.rule(call).kinds
