"""Guards on sizes: written in one process, taken in another."""

from __future__ import annotations

import pytest
import sympy
import torch
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._sympy.functions import FloorDiv, Mod

from rolemesh.compiler.cache.guards import encode_guards, take_guards
from rolemesh.compiler.cache.text import NotCacheableError


def sizes(*hints: int) -> list[object]:
    """A tensor, and then symbols of one environment, as Dynamo's inputs are."""
    env = ShapeEnv()
    found: list[object] = [torch.ones(1)]
    for hint in hints:
        source = ConstantSource(f"size{len(found)}")
        symbol = env.create_symbol(hint, source, DimDynamic.DYNAMIC, None, True, True)
        found.append(env.create_symintnode(symbol, hint=hint, source=source))
    return found


def expressions(inputs: list[object]) -> list[sympy.Symbol]:
    return [value.node.expr for value in inputs[1:]]  # type: ignore[attr-defined]


def test_guards_are_taken_where_they_hold() -> None:
    inputs = sizes(12, 7)
    n, m = expressions(inputs)
    guards = [
        sympy.Gt(n, m),
        sympy.Le(2 * n + m, 40),
        sympy.Ne(m, 1),
        sympy.Eq(Mod(n, 4), 0),
        sympy.Lt(FloorDiv(m, 2), n),
    ]
    texts = encode_guards(guards, inputs)
    assert texts[0] == "n1 > n2"

    again = sizes(16, 5)
    assert take_guards(texts, again)
    (env,) = {value.node.shape_env for value in again[1:]}  # type: ignore[attr-defined]
    taken = [guard.expr for guard in env.guards]
    for values, wanted in (((12, 5), True), ((21, 3), False), ((16, 9), False), ((3, 4), False)):
        known = dict(zip(expressions(again), values, strict=True))
        assert all(guard.subs(known) == sympy.true for guard in taken) == wanted

    others = sizes(16, 9)
    assert not take_guards(texts, others)
    (env,) = {value.node.shape_env for value in others[1:]}  # type: ignore[attr-defined]
    assert not env.guards


def test_no_guards_hold_for_all() -> None:
    assert take_guards([], [torch.ones(1)])


def test_a_guard_that_cannot_be_read_back_is_refused() -> None:
    inputs = sizes(12, 7)
    n, m = expressions(inputs)
    with pytest.raises(NotCacheableError, match="tracing guards on"):
        encode_guards([sympy.Or(sympy.Gt(n, m), sympy.Gt(m, 3))], inputs)
    with pytest.raises(NotCacheableError):
        encode_guards([sympy.Gt(sympy.Symbol("unbacked"), 3)], inputs)


def test_text_that_is_no_guard_is_refused_and_not_run() -> None:
    for text in ("__import__('os').abort()", "n1", "n1 +", "Eq(n1)", "n9 > 1"):
        with pytest.raises(ValueError, match=r"is no (formula|relation|guard)"):
            take_guards([text], sizes(12))
