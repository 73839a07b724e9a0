"""Rules of matrix products, all but the rank-dependent ones written as specs.

Products with a bias keep the summed dim whole: were it sharded, every rank would add the bias.
Canonicalisation splits them into a product and an addition, which may then shard it.
"""

from __future__ import annotations

from collections.abc import Mapping

from rolemesh.compiler.ir.rule import OpCall, Rule
from rolemesh.passes.rules.einsum import parse
from rolemesh.passes.rules.registry import LocalFunction, RuleFunction

__all__ = ["LOCAL", "RULES"]

# (bias, x, y): a sum of a product and a bias is linear in the bias and either factor together.
_BIASED = ((True, True, False), (True, False, True))


def _biased(name: str, product: str, result: str) -> RuleFunction:
    """`result`-shaped sum of a broadcast bias and a product; one spec for each rank of the bias."""
    dims = result.split()
    by_rank = [
        parse(f"{' '.join(dims[len(dims) - rank :])}, {product} -> {result}", name, linear=_BIASED)
        for rank in range(len(dims) + 1)
    ]
    return lambda call: by_rank[call.operands[0].ndim](call)


_MATMUL = {
    (False, False): parse("k, k ->", "aten::matmul"),
    (False, True): parse("k, ... k n -> ... n", "aten::matmul"),
    (True, False): parse("... m k, k -> ... m", "aten::matmul"),
    (True, True): parse("... m k, ... k n -> ... m n", "aten::matmul"),
}


def matmul(call: OpCall) -> Rule:
    """`aten.matmul(x, y)`: vectors lose their dim, leading dims broadcast."""
    x, y = call.operands
    return _MATMUL[x.ndim > 1, y.ndim > 1](call)


_LINEAR = (
    parse("... k, n k -> ... n", "aten::linear"),
    parse(
        "... k!, n k!, n -> ... n",
        "aten::linear",
        linear=((True, False, True), (False, True, True)),
    ),
)


def linear(call: OpCall) -> Rule:
    """`aten.linear(x, weight, bias=None)`."""
    return _LINEAR[len(call.operands) - 2](call)


_TRIANGULAR = "aten::linalg_solve_triangular"
_SOLVED: Mapping[object, RuleFunction] = {
    True: parse("... m! n!, ... n! k -> ... n! k", _TRIANGULAR, linear=((False, True),)),
    False: parse("... m! n!, ... k n! -> ... k n!", _TRIANGULAR, linear=((False, True),)),
}


def solve_triangular(call: OpCall) -> Rule:
    """`aten.linalg_solve_triangular(a, b, *, upper, left=True, unitriangular=False)`.

    Each column of b has a solution of its own, or each row where a is on the right.
    """
    return _SOLVED[call.kwargs.get("left", True)](call)


RULES: dict[str, RuleFunction] = {
    "aten::mm": parse("m k, k n -> m n", "aten::mm"),
    "aten::bmm": parse("b m k, b k n -> b m n", "aten::bmm"),
    "aten::mv": parse("m k, k -> m", "aten::mv"),
    "aten::dot": parse("k, k ->", "aten::dot"),
    "aten::vdot": parse("k, k ->", "aten::vdot"),
    "aten::outer": parse("m, n -> m n", "aten::outer", linear=((True, False), (False, True))),
    # Summands of an int8 value need not fit int8.
    "aten::_int_mm": parse("m k, k n -> m n", "aten::_int_mm", linear=()),
    "aten::addmm": _biased("aten::addmm", "m k!, k! n", "m n"),
    "aten::addmv": _biased("aten::addmv", "m k!, k!", "m"),
    "aten::addbmm": _biased("aten::addbmm", "b! m k!, b! k! n", "m n"),
    "aten::baddbmm": _biased("aten::baddbmm", "b m k!, b k! n", "b m n"),
    # An activation follows the sum, so nothing partial may enter.
    "aten::_addmm_activation": parse("n, m k!, k! n -> m n", "aten::_addmm_activation", linear=()),
    "aten::matmul": matmul,
    "aten::linear": linear,
    _TRIANGULAR: solve_triangular,
}
LOCAL: dict[str, LocalFunction] = {}
