"""Products of ragged pieces become one grouped product; other uses of the pieces are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.compiler.capture.forms import f, refuse, targets
from torch import Tensor, nn

from rolemesh.compiler.annotate import P
from rolemesh.compiler.api import lockstep, shard
from rolemesh.compiler.capture.entry import reference_executor
from rolemesh.compiler.capture.tracing import Traced, trace

aten = torch.ops.aten

EXPERTS, ROWS, WIDTH, INNER = 5, 7, 16, 24
FP32, BF16 = torch.float32, torch.bfloat16


def run(traced: Traced, *args: object) -> object:
    """What the captured Program computes on one device."""
    return traced.entry.call(reference_executor, *args)


class Experts(nn.Module):
    """Rows of expert e, times its weight, by slices whose sizes are read from a tensor.

    `counts` are the sizes, so the rows are sorted by expert already.
    """

    def __init__(self, dtype: torch.dtype, transposed: bool) -> None:
        super().__init__()
        up, down = (EXPERTS, WIDTH, INNER), (EXPERTS, INNER, WIDTH)
        self.transposed = transposed
        self.up = nn.Parameter(f(*(down if transposed else up), dtype=dtype), False)
        self.down = nn.Parameter(f(*(up if transposed else down), dtype=dtype), False)

    def product(self, x: Tensor, weight: Tensor, sizes: list[int]) -> Tensor:
        pieces = x.split(sizes)
        if self.transposed:
            parts = [nn.functional.linear(pieces[e], weight[e]) for e in range(EXPERTS)]
        else:
            parts = [pieces[e] @ weight[e] for e in range(EXPERTS)]
        return torch.cat(parts)

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        sizes = counts.tolist()
        hidden = self.product(x, self.up, sizes)
        # Between the products, sizes are sums of those of the pieces.
        gate, value = hidden.chunk(2, dim=-1)
        hidden = torch.cat([value, gate.tanh()], dim=-1)
        return self.product(hidden.view(hidden.shape[0], 2, -1).flatten(1), self.down, sizes)


COUNTS = [(2, 0, 1, 4, 0), (0, 0, 0, 0, 7), (7, 0, 0, 0, 0), (1, 2, 1, 2, 1)]


@pytest.mark.parametrize(("dtype", "transposed"), [(FP32, True), (FP32, False), (BF16, True)])
def test_products_of_ragged_pieces(dtype: torch.dtype, transposed: bool) -> None:
    model, x = Experts(dtype, transposed), f(ROWS, WIDTH, dtype=dtype)
    traced = trace(model, x, torch.tensor(COUNTS[0]))
    assert (aten._grouped_mm.default in targets(traced)) == (dtype is BF16)
    assert targets(traced) & {aten.mm.default, aten.split_with_sizes.default} == set()
    experts = {"up": P("tp", None, None), "down": P("tp", None, None)}
    sharded = shard(traced, {"tp": 3}, annotations=experts)
    for counts in COUNTS:
        sizes = torch.tensor(counts)
        expected = model(x, sizes)
        torch.testing.assert_close(run(traced, x, sizes), expected, atol=1e-4, rtol=2e-2)
        found = lockstep(sharded, x, sizes, poison=dtype is FP32, check=True)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=2e-2)


def test_strides_that_a_grouped_product_does_not_take() -> None:
    model = Experts(BF16, True)
    model.up = nn.Parameter(f(EXPERTS, INNER, 12, dtype=BF16), False)
    x, counts = f(ROWS, 12, dtype=BF16), torch.tensor(COUNTS[0])
    traced = trace(model, x, counts)
    assert {aten._grouped_mm.default, aten.bmm.default} <= targets(traced)
    torch.testing.assert_close(run(traced, x, counts), model(x, counts), atol=1e-4, rtol=2e-2)


def test_a_symbolic_number_of_rows() -> None:
    model, counts = Experts(FP32, True), torch.tensor(COUNTS[0])
    x = f(ROWS, WIDTH)
    torch._dynamo.mark_dynamic(x, 0)
    traced = trace(model, x, counts)
    torch.testing.assert_close(run(traced, x, counts), model(x, counts))
    longer, more = f(11, WIDTH), torch.tensor([3, 1, 4, 0, 3])
    torch.testing.assert_close(run(traced, longer, more), model(longer, more))


@pytest.mark.parametrize(
    "use",
    [
        lambda x, w, n: [x.split(n)[e] @ w[EXPERTS - 1 - e] for e in range(EXPERTS)],
        lambda x, w, n: [x.split(n)[e] @ w[e] for e in range(EXPERTS - 1)],
        lambda x, w, n: [x.split(n[::-1])[e] @ w[e] for e in range(EXPERTS)],
        lambda x, w, n: [x.split(n)[e] @ w[:, e] for e in range(EXPERTS)],
        lambda x, w, n: [x.split(n)[e] @ (w[e] if e else w[e].t().t()) for e in range(EXPERTS)],
    ],
)
def test_other_products_are_refused(
    use: Callable[[Tensor, Tensor, list[int]], list[Tensor]],
) -> None:
    weight = f(EXPERTS + 1, EXPERTS + 1, INNER)
    weight = weight[:EXPERTS, :EXPERTS]

    def products(x: Tensor, counts: Tensor) -> Tensor:
        return torch.cat(use(x, weight, counts.tolist()))

    refuse(products, f(ROWS, EXPERTS), torch.tensor(COUNTS[0]))
