"""Norms and rotations as one op: rules checked on all choices."""

from __future__ import annotations

import pytest
import torch
from tests.passes.rules.harness import check_op

from rolemesh.lowering.composite.define import define_composite_ops
from rolemesh.passes.rules import composite_norms
from rolemesh.passes.rules.registry import Rules

RULES = Rules((composite_norms.RULES,), (composite_norms.LOCAL,))


@pytest.fixture(scope="module", autouse=True)
def _defined() -> None:
    define_composite_ops()


def f(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_rms_norm() -> None:
    check_op(
        RULES,
        torch.ops.rolemesh.rms_norm.default,
        (f(3, 5, 6), f(6), 1e-3, True),
        expect="a b c!, c! -> a b c!",
    )


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary(interleaved: bool) -> None:
    check_op(
        RULES,
        torch.ops.rolemesh.rotary.default,
        (f(2, 6, 5, 8), f(2, 1, 5, 8), f(1, 1, 5, 8), interleaved),
        expect="a b c d!, a 1 c e!, 1 1 c f! -> a b c d! | linear 100",
    )


def test_rotary_by_angles_of_fewer_dims() -> None:
    check_op(
        RULES,
        torch.ops.rolemesh.rotary.default,
        (f(2, 6, 5, 8), f(5, 4), f(5, 4), False),
        expect="a b c d!, c e!, c f! -> a b c d! | linear 100",
    )
