"""Rows that a mask picks and `masked_scatter` takes become all rows, those of the mask in front."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.compiler.capture.forms import f, refuse
from torch import Tensor, nn

from rolemesh.compiler.annotate import P
from rolemesh.compiler.api import lockstep, shard
from rolemesh.compiler.capture.entry import reference_executor
from rolemesh.compiler.capture.tracing import trace

aten = torch.ops.aten

SEQUENCES, IMAGES, PATCHES, WIDTH, TOKENS = 2, 3, 5, 16, 23


class Tower(nn.Module):
    """Images that are not zero take the places of the tokens that stand for their patches.

    Patches attend to each other, and each has a position, which depends on what the image holds.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, dtype=dtype)
        self.positions = nn.Embedding(PATCHES, WIDTH, dtype=dtype)
        self.requires_grad_(False)

    def forward(self, x: Tensor, images: Tensor, taking: Tensor) -> tuple[Tensor, ...]:
        images = images.flatten(0, 1)
        real = (images != 0).flatten(1).any(1)
        rows = images[real]
        kept = (images > -1)[real].any(-1) & torch.ones(rows.shape[:2], dtype=torch.bool)
        numbers, patches = torch.arange(rows.shape[0]), torch.arange(PATCHES)
        mask = kept[numbers[:, None, None], patches]
        limits = torch.linspace(-1, 1, PATCHES - 1)
        rows = rows + self.positions(torch.bucketize(rows.mean(-1).float(), limits))
        rows = self.linear(rows)
        rows = nn.functional.scaled_dot_product_attention(rows, rows, rows, attn_mask=mask)
        counts = real.view(SEQUENCES, IMAGES).sum(1).tolist()
        pieces = [piece.reshape(-1, WIDTH) for piece in rows.split(counts)]
        y = x.masked_scatter(taking[..., None], torch.cat(pieces))
        return y.relu(), rows, *pieces


def example(
    real: list[list[int]], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    images = f(SEQUENCES, IMAGES, PATCHES, WIDTH, dtype=dtype)
    images = images * torch.tensor(real, dtype=dtype)[..., None, None]
    taking = torch.zeros(SEQUENCES, TOKENS, dtype=torch.bool)
    for row, flags in zip(taking, real, strict=True):
        row[3 : 3 + PATCHES * sum(flags)] = True
    return f(SEQUENCES, TOKENS, WIDTH, dtype=dtype), images, taking


REAL = [
    [[1, 0, 1], [0, 1, 0]],
    [[1, 1, 1], [1, 1, 1]],
    [[0, 0, 1], [1, 1, 1]],
    [[0, 0, 0], [0, 1, 1]],
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_in_front(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Tower(dtype)
    traced = trace(model, *example(REAL[0], dtype))
    reads = [node for node in traced.program.ops if node.target is aten.index_select.default]
    assert [node.meta["type"].shape[0] for node in reads] == [SEQUENCES * IMAGES] * 2
    sharded = shard(traced, {"tp": 4}, annotations={"images": P(None, None, None, "tp")})
    near = {"atol": 1e-5, "rtol": 1e-4} if dtype is torch.float32 else {"atol": 0.05, "rtol": 0.05}
    for real in REAL:
        args = example(real, dtype)
        expected = model(*args)
        assert expected[1].shape[0] == sum(map(sum, real))
        found = traced.entry.call(reference_executor, *args)
        torch.testing.assert_close(found, expected, **near)
        found = lockstep(sharded, *args, poison=True)
        torch.testing.assert_close(found, expected, **near)


def test_any_number_of_images() -> None:
    def write(x: Tensor, images: Tensor, taking: Tensor) -> Tensor:
        real = (images != 0).any(1)
        return x.masked_scatter(taking[:, None], images[real].sigmoid() * 2)

    def example(count: int) -> tuple[Tensor, Tensor, Tensor]:
        images = f(count, WIDTH) * (torch.arange(count) % 3 != 1)[:, None]
        return f(TOKENS, WIDTH), images, torch.arange(TOKENS) < count - (count + 1) // 3

    args = example(7)
    torch._dynamo.mark_dynamic(args[1], 0)
    traced = trace(write, *args)
    for count in (7, 4, 11):
        given = example(count)
        found = traced.entry.call(reference_executor, *given)
        torch.testing.assert_close(found, write(*given))


@pytest.mark.parametrize(
    "mixing",
    [
        lambda rows: rows - rows.mean(0),
        lambda rows: rows + torch.arange(rows.shape[0])[:, None],
        lambda rows: rows + torch.full((rows.shape[0], 1), rows.shape[0]),
        lambda rows: rows[torch.arange(rows.shape[0]).flip(0)],
        lambda rows: rows.t().reshape(-1, WIDTH),
        lambda rows: rows[(rows > 0).any(1)],
    ],
)
def test_rows_that_are_mixed_are_refused(mixing: Callable[[Tensor], Tensor]) -> None:
    def write(x: Tensor, images: Tensor, taking: Tensor) -> Tensor:
        rows = images[(images > 1).any(1)]
        return x.masked_scatter(taking[:, None], mixing(rows))

    refuse(write, f(TOKENS, WIDTH), f(7, WIDTH), torch.arange(TOKENS) < 2)


@pytest.mark.parametrize(
    "joined",
    [
        lambda pieces: torch.cat([pieces[1], pieces[0]]),
        lambda pieces: torch.cat([pieces[0], pieces[1] * 2]),
        lambda pieces: torch.cat([pieces[0], pieces[0], pieces[1]]),
        lambda pieces: pieces[1],
        lambda pieces: torch.cat([piece.cumsum(0) for piece in pieces]),
    ],
)
def test_pieces_that_are_not_put_together_again_are_refused(
    joined: Callable[[tuple[Tensor, ...]], Tensor],
) -> None:
    def write(x: Tensor, images: Tensor, taking: Tensor) -> Tensor:
        real = (images != 0).any(1)
        counts = [real[:4].sum().item(), real[4:].sum().item()]
        return x.masked_scatter(taking[:, None], joined(images[real].split(counts)))

    refuse(write, f(TOKENS, WIDTH), f(7, WIDTH), torch.arange(TOKENS) < 2)
