"""Views of sequences: writing to them writes to the tensor."""

from __future__ import annotations

import pytest
import torch
from tests.lowering.npu.runs import f

from rolemesh.lowering.npu.sequences import (
    lengths_of,
    pages,
    sequence_from_pages,
    sequences,
    split_heads,
)

EXTENT = {"B": 2, "S": 5, "N": 3, "D": 4, "T": 9}


@pytest.mark.parametrize("layout", ["BSND", "BNSD", "NBSD"])
@pytest.mark.parametrize("lengths", [None, [5, 2], [3]])
def test_rows(layout: str, lengths: list[int] | None) -> None:
    x = f(*(EXTENT[dim] for dim in layout))
    plain = torch.einsum(f"{layout.lower()}->bnsd", x)
    views = sequences(x, layout, lengths)
    wanted = [5, 5] if lengths is None else (lengths * 2)[:2]
    assert [view.shape for view in views] == [(3, length, 4) for length in wanted]
    for view, row, length in zip(views, plain, wanted, strict=True):
        assert torch.equal(view, row[:, :length])
        view.fill_(7)
    assert (x == 7).sum() == sum(wanted) * 12


@pytest.mark.parametrize("layout", ["TND", "NTD"])
def test_packed(layout: str) -> None:
    x = f(*(EXTENT[dim] for dim in layout))
    tokens = x if layout == "NTD" else x.transpose(0, 1)
    first, none, last = sequences(x, layout, [4, 4, 6])
    assert torch.equal(first, tokens[:, :4])
    assert none.shape == (3, 0, 4)
    assert torch.equal(last, tokens[:, 4:6])


def test_one_sequence_and_hidden_dims() -> None:
    x = f(2, 5, 12)
    view, layout = split_heads(x, "BSH", 3)
    assert (view.shape, layout) == ((2, 5, 3, 4), "BSND")
    assert split_heads(x, "TND", 5) == (x, "TND")
    (one,) = sequences(f(3, 5, 4), "NSD", [2])
    assert one.shape == (3, 2, 4)


def test_pages_in_any_form() -> None:
    cache = f(6, 5, 3, 4)
    assert pages(cache, 3, tokens_first=True) is cache
    assert torch.equal(pages(cache.flatten(2), 3), cache)
    assert torch.equal(pages(cache.transpose(1, 2), 3), cache)
    fractal = cache.transpose(1, 2).unflatten(-1, (2, 2)).transpose(2, 3)
    assert torch.equal(pages(fractal, 3), cache)
    found = sequence_from_pages(cache, torch.tensor([4, 0, 2]), 8)
    assert torch.equal(found, torch.cat([cache[4], cache[0, :3]]).transpose(0, 1))
    assert sequence_from_pages(cache, torch.tensor([4]), 0).shape == (3, 0, 4)


def test_lengths() -> None:
    assert lengths_of(torch.tensor([2, 3], dtype=torch.int32)) == [2, 3]
    assert lengths_of([2, 3]) == [2, 3]
    assert lengths_of(None) is None


@pytest.mark.parametrize(
    ("layout", "lengths", "message"),
    [
        ("TND", None, "layout TND needs the ends"),
        ("TND", [4, 3], r"end at \[0, 4, 3\] of 9"),
        ("TND", [4, 10], r"end at \[0, 4, 10\] of 9"),
        ("BSND", [5, 6], r"end at \[0, 6\] of 5"),
        ("BSND", [5, -1], r"end at \[0, -1\] of 5"),
        ("BSND", [], "0 lengths for 2 sequences"),
    ],
)
def test_lengths_that_do_not_fit(layout: str, lengths: list[int] | None, message: str) -> None:
    x = f(*(EXTENT[dim] for dim in layout))
    with pytest.raises((RuntimeError, ValueError), match=message):
        sequences(x, layout, lengths)
