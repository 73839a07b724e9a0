"""Rows that a mask picks become all rows, if every op treats rows apart."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from tests.compiler.capture.forms import f, refuse, targets
from torch import Tensor, nn

from rolemesh.compiler.annotate import P
from rolemesh.compiler.api import lockstep, shard
from rolemesh.compiler.capture.entry import reference_executor
from rolemesh.compiler.capture.tracing import trace

aten = torch.ops.aten

ROWS, WIDTH, INNER = 7, 16, 24


class Adapters(nn.Module):
    """Rows whose id is e go through adapter e, the others stay."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.ModuleList([nn.Linear(WIDTH, INNER) for _ in range(2)])
        self.down = nn.ModuleList([nn.Linear(INNER, WIDTH, bias=False) for _ in range(2)])
        self.requires_grad_(False)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        result = x.clone()
        for number, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            mask = ids == number
            rows = x[mask]
            result[mask] = down(nn.functional.silu(up(self.norm(rows)))) * rows.sigmoid()
        return result


@pytest.mark.parametrize("dims", [(3,), (3, 5)])
def test_rows_of_a_mask(dims: tuple[int, ...]) -> None:
    """The mask covers the first dims: sequences, or tokens of sequences."""
    torch.manual_seed(0)
    model, x = Adapters(), f(3, 5, WIDTH)
    ids = torch.arange(math.prod(dims)).remainder(3).view(dims)
    traced = trace(model, x, ids)
    assert not targets(traced) & {aten.index.Tensor, aten.index_put.default}
    sharded = shard(traced, {"tp": 2}, annotations={"x": P("tp"), "ids": P("tp")})
    for given in (ids, torch.zeros_like(ids), torch.full_like(ids, 2), ids.flip(0)):
        expected = model(x, given)
        found = traced.entry.call(reference_executor, x, given)
        torch.testing.assert_close(found, expected)
        found = lockstep(sharded, x, given, poison=True, check=True)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "mixing",
    [
        lambda rows: rows - rows.mean(0),
        lambda rows: rows.cumsum(0),
        lambda rows: rows.tril(),
        lambda rows: rows + torch.arange(rows.shape[0])[:, None],
        lambda rows: rows / rows.shape[0],
    ],
)
def test_rows_that_are_mixed_are_refused(mixing: Callable[[Tensor], Tensor]) -> None:
    def write(x: Tensor, ids: Tensor) -> Tensor:
        result, mask = x.clone(), ids > 1
        result[mask] = mixing(x[mask])
        return result

    refuse(write, f(ROWS, WIDTH), torch.arange(ROWS) % 3)


def test_rows_that_are_indices_are_refused() -> None:
    table = f(4, WIDTH)

    def looked_up(x: Tensor, ids: Tensor) -> Tensor:
        result, mask = x.clone(), ids < 4
        result[mask] = nn.functional.embedding(ids[mask], table)
        return result

    ids = torch.tensor([0, 9, 2, 2, 9, 1, 3])
    refuse(looked_up, f(ROWS, WIDTH), ids)
