"""Writes of rows into mutated inputs: the same values through ScatterNdUpdate, or untouched."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, fx

from rolemesh.lowering.flatten import as_fake, flatten
from rolemesh.lowering.ge.in_place import write_rows_in_place

SCATTER = "npu.npu_scatter_nd_update.default"


def index_copy_last_but_one(cache: Tensor, index: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    new = torch.ops.aten.index_copy.default(cache, -2, index, rows)
    return new, new.sum(-1)


def index_copy_first(cache: Tensor, index: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    new = torch.ops.aten.index_copy.default(cache, 0, index, rows)
    return new, new * 2


def index_put_hole(cache: Tensor, index: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    new = torch.ops.aten.index_put.default(cache, [None, index], rows)
    return new, new * 2


def index_put_pair(cache: Tensor, index: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    new = torch.ops.aten.index_put.default(cache, [index, index - 1], rows)
    return new, new * 2


def slice_end(cache: Tensor, index: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    new = torch.ops.aten.slice_scatter.default(cache, rows, 1, -3, 2**31)
    return new, new * 2


def slice_steps(cache: Tensor, index: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    new = torch.ops.aten.slice_scatter.default(cache, rows, 1, 1, 7, 2)
    return new, new * 2


def written_twice(cache: Tensor, index: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    first = torch.ops.aten.index_copy.default(cache, 0, index, rows)
    return torch.ops.aten.index_copy.default(first, 0, index + 1, rows * 2), first.sum()


CASES: Sequence[tuple[Callable[..., object], tuple[int, ...], list[int], tuple[int, ...], int]] = [
    (index_copy_last_but_one, (2, 3, 7, 5), [4, 0, 6], (2, 3, 3, 5), 1),
    (index_copy_first, (7, 5), [6, 0], (2, 5), 1),
    (index_put_hole, (3, 7, 5), [1, -1], (3, 2, 5), 1),
    (index_put_hole, (3, 7, 5), [1, 6], (5,), 1),
    (index_put_pair, (4, 7, 5), [1, 3, 2], (3, 5), 1),
    (slice_end, (2, 7, 5), [0], (2, 3, 5), 1),
    (slice_steps, (2, 7, 5), [0], (2, 3, 5), 1),
    (written_twice, (7, 5), [0, 3], (2, 5), 2),
]


def lowered(
    function: Callable[..., object], examples: Sequence[Tensor]
) -> tuple[fx.GraphModule, fx.GraphModule]:
    graph = fx.Graph()
    inputs = [graph.placeholder(name) for name in ("cache", "index", "rows")]
    call = graph.call_function(function, tuple(inputs))
    graph.output(tuple(graph.call_function(lambda pair, i=i: pair[i], (call,)) for i in range(2)))
    module = fx.GraphModule(torch.nn.Module(), graph)
    fakes = as_fake(examples)
    plain, rewritten = flatten(module, fakes), flatten(module, fakes)
    write_rows_in_place(rewritten.graph, {0: 0})
    rewritten.graph.lint()
    rewritten.recompile()
    return plain, rewritten


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("function", "shape", "index", "rows", "writes"), CASES)
def test_rows_are_written_by_one_op_each(
    function: Callable[..., object],
    shape: tuple[int, ...],
    index: list[int],
    rows: tuple[int, ...],
    writes: int,
    dtype: torch.dtype,
) -> None:
    examples = (torch.randn(shape).to(dtype), torch.tensor(index), torch.randn(rows).to(dtype))
    plain, rewritten = lowered(function, examples)
    for want, got in zip(plain(*examples), rewritten(*examples), strict=True):
        assert torch.equal(want, got)
    assert [str(n.target) for n in rewritten.graph.nodes].count(SCATTER) == writes


def test_what_is_no_plain_write_of_rows_stays() -> None:
    def added(cache: Tensor, index: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        new = torch.ops.aten.index_put.default(cache, [index], rows, True)
        return new, new * 2

    def masked(cache: Tensor, index: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        new = torch.ops.aten.index_put.default(cache, [cache > 0], rows.sum())
        return new, new * 2

    examples = (torch.randn(7, 5), torch.tensor([1, 2]), torch.randn(2, 5))
    for function in (added, masked):
        _, rewritten = lowered(function, examples)
        assert SCATTER not in [str(n.target) for n in rewritten.graph.nodes]


def test_equal_indices_are_computed_once() -> None:
    def two(cache: Tensor, index: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        copy = torch.ops.aten.index_copy.default
        return copy(cache, 1, index, rows), copy(cache, 1, index, rows * 2)

    graph = fx.Graph()
    inputs = [graph.placeholder(name) for name in ("cache", "index", "rows")]
    call = graph.call_function(two, tuple(inputs))
    graph.output(tuple(graph.call_function(lambda pair, i=i: pair[i], (call,)) for i in range(2)))
    examples = as_fake([torch.randn(2, 7, 5), torch.tensor([1, 2]), torch.randn(2, 2, 5)])
    flat = flatten(fx.GraphModule(torch.nn.Module(), graph), examples)
    write_rows_in_place(flat.graph, {0: 0, 1: 0})
    targets = [str(n.target) for n in flat.graph.nodes]
    assert targets.count(SCATTER) == 2
    assert targets.count("aten.arange.default") == 1
