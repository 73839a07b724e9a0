"""Cross entropy: the canonical form gives what ATen gives, and shards by rows and by vocabulary."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tests.passes.programs import check_values, traffic
from tests.passes.test_canonicalise import canonical, targets
from torch import Tensor

from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.program import Program
from rolemesh.compiler.ir.spec import P

aten = torch.ops.aten
ROWS, VOCABULARY = 7, 11


def loss_and_gradient(
    x: Tensor, target: Tensor, grad: Tensor, reduction: int, ignored: int
) -> tuple[Tensor, ...]:
    """What AOTAutograd makes of `cross_entropy` and its backward pass."""
    logp = aten._log_softmax.default(x, 1, False)
    found, count = aten.nll_loss_forward.default(logp, target, None, reduction, ignored)
    against = aten.nll_loss_backward.default(grad, logp, target, None, reduction, ignored, count)
    return found, aten._log_softmax_backward_data.default(against, logp, 1, x.dtype)


def traced(reduction: int, ignored: int = -100, dtype: torch.dtype = torch.float32) -> Program:
    torch.manual_seed(0)
    x = (3 * torch.randn(ROWS, VOCABULARY)).to(dtype)
    target = torch.randint(0, VOCABULARY, (ROWS,))
    target[2] = target[5] = ignored
    grad = torch.rand(ROWS) if reduction == 0 else torch.rand(())

    def f(x: Tensor, target: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        return loss_and_gradient(x, target, grad, reduction, ignored)

    return canonical(f, x, target, grad.to(dtype))


@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize("ignored", [-100, 3])
def test_it_computes_the_same(reduction: int, ignored: int) -> None:
    found = targets(traced(reduction, ignored))
    assert not [name for name in found if "softmax" in name or "nll" in name]


@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize(
    ("axes", "logits", "target"),
    [
        ({"tp": 4}, P(None, "tp"), P(None)),
        ({"dp": 4}, P("dp", None), P("dp")),
        ({"dp": 2, "tp": 3}, P("dp", "tp"), P("dp")),
    ],
)
def test_shards_give_the_same(axes: dict[str, int], logits: P, target: P, reduction: int) -> None:
    # Targets are 0 and 1: one class, and rows that do not count.
    program = traced(reduction, ignored=1)
    mesh = Mesh(axes)
    specs = [logits, target, target if reduction == 0 else P()]
    layouts = {
        node: (spec.layout(node.meta["type"].shape, mesh),)
        for node, spec in zip(program.placeholders, specs, strict=True)
    }
    pinned = {1: layouts[program.placeholders[0]][0]}
    if reduction == 0:
        pinned[0] = layouts[program.placeholders[1]][0]
    program = dataclasses.replace(program, mesh=mesh, layouts=layouts, pinned=pinned)
    partitioned = check_values(program)
    rows = {"tp": 3, "dp": 0}  # the maximum, the sum and the logit of the target of each row
    scalars = {"tp": 0, "dp": {0: 0, 1: 2, 2: 1}[reduction]}
    found = traffic(partitioned)
    assert set(found) <= {"all_reduce"}
    assert found.total() == sum(rows[axis] + scalars[axis] for axis in axes)
