"""Averages and coalesced collectives, on a line of three ranks of which one is real."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from tests.lowering.ge.lowered import dynamic_examples, module_of, signature_of
from torch import Tensor

from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.lowering.ge.engine import running_on
from rolemesh.lowering.ge.options import GeOptions
from rolemesh.lowering.ge.target import lower_ge
from rolemesh.runtime.ge.communicator import Request
from rolemesh.runtime.ge.engine import ReferenceEngine
from rolemesh.runtime.groups import stand_in_groups

c10d = torch.ops._c10d_functional

RANKS = 3


class Line:
    """Stands for ranks 0 to 2; rank r puts in what rank 0 does, plus r."""

    def __init__(self) -> None:
        self.kinds: list[str] = []

    def exchange(self, request: Request, wire: Tensor) -> Tensor:
        self.kinds.append(f"{request.kind} {request.reduction}".strip())
        wires = [wire + rank for rank in range(RANKS)]
        if request.kind == "all_gather":
            return torch.cat(wires)
        total = torch.stack(wires).sum(0)
        return total.chunk(RANKS)[0] if request.kind == "reduce_scatter" else total


@pytest.fixture
def group() -> Iterator[str]:
    with stand_in_groups(Mesh.parse(f"tp={RANKS}"), 0) as groups:
        yield groups.names["tp"]


def run(function: Callable[..., Sequence[Tensor]], *inputs: Tensor) -> tuple[list[Tensor], Line]:
    line = Line()
    outputs = len(inputs)
    lowered = lower_ge(
        module_of(function, len(inputs), outputs),
        dynamic_examples(inputs, {}),
        signature_of(len(inputs), outputs),
        GeOptions(fuse=False, frozen_parameters=False),
    )
    with running_on(ReferenceEngine(line)):
        return [x for x in lowered(*inputs) if x is not None], line


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torchair")

X = torch.arange(15.0).reshape(3, 5)
Y = torch.arange(6.0).reshape(6, 1)


def waited(values: Sequence[Tensor]) -> list[Tensor]:
    return [c10d.wait_tensor(value) for value in values]


def test_averages(group: str) -> None:
    found, line = run(lambda x: waited([c10d.all_reduce(x, "avg", group)]), X)
    assert torch.equal(found[0], X + 1)
    assert line.kinds == ["all_reduce sum"]
    found, line = run(lambda x: waited([c10d.reduce_scatter_tensor(x, "avg", RANKS, group)]), X)
    assert torch.equal(found[0], X[:1] + 1)
    assert line.kinds == ["reduce_scatter sum"]


def test_sums_are_left_alone(group: str) -> None:
    found, line = run(lambda x: waited([c10d.all_reduce(x, "sum", group)]), X)
    assert torch.equal(found[0], 3 * X + 3)
    assert line.kinds == ["all_reduce sum"]


def test_coalesced_collectives_are_single_ones_in_order(group: str) -> None:
    found, line = run(lambda x, y: waited(c10d.all_reduce_coalesced([x, y], "avg", group)), X, Y)
    assert torch.equal(found[0], X + 1)
    assert torch.equal(found[1], Y + 1)
    assert line.kinds == ["all_reduce sum"] * 2
    found, line = run(
        lambda x, y: waited(c10d.reduce_scatter_tensor_coalesced([x, y], "sum", RANKS, group)), X, Y
    )
    assert torch.equal(found[1], 3 * Y[:2] + 3)
    assert line.kinds == ["reduce_scatter sum"] * 2
    found, line = run(
        lambda x, y: waited(c10d.all_gather_into_tensor_coalesced([x, y], RANKS, group)), X, Y
    )
    assert torch.equal(found[0], torch.cat([X, X + 1, X + 2]))
    assert line.kinds == ["all_gather"] * 2
