"""Attention as one op: what Ascend's fused ops take, and what they do not."""

from __future__ import annotations

import math

import pytest
import torch
from tests.lowering.ge.fusions.forms import both_forms, f, flat, fused, hits, same_values
from tests.lowering.ge.lowered import dynamic_examples
from torch import Tensor

from rolemesh.lowering.composite.define import define_composite_ops

define_composite_ops()
BF16, F32 = torch.bfloat16, torch.float32
DENSE = torch.ops.rolemesh.attention
SPARSE = torch.ops.rolemesh.sparse_attention
FUSED = {"fused_infer_attention_score": 1}
SPARSELY = {"sparse_flash_attention": 1}


def operands(rows: int = 3, keys: int = 7, dtype: torch.dtype = BF16) -> list[Tensor]:
    key, value = (f(2, 3, keys, 16, dtype=dtype, seed=n) for n in (1, 2))
    return [f(2, 6, rows, 16, dtype=dtype), key, value]


def seen(batch: int, rows: int, keys: int) -> Tensor:
    """A mask whose first query sees nothing."""
    mask = f(batch, 1, rows, keys, seed=3) > 0
    mask[..., 0] = True
    mask[0, :, 0] = rows == 1
    return mask


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_dense(rows: int, masked: bool) -> None:
    if masked:
        mask = seen(2, rows, 7)
        assert hits(lambda q, k, v, m: DENSE(q, k, v, m, 0.3), *operands(rows), mask) == FUSED
    else:
        assert hits(lambda q, k, v: DENSE(q, k, v, None, 0.3), *operands(rows)) == FUSED


def test_additive_mask_that_only_excludes() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        zero, low = (torch.scalar_tensor(x, dtype=BF16) for x in (0.0, -math.inf))
        return DENSE(q, k, v, torch.where(m, zero, low), 0.3)

    assert hits(attend, *operands(), seen(1, 3, 7)) == FUSED


def test_dense_that_the_fused_op_does_not_compute() -> None:
    q, k, v = operands()
    sinks, bias = f(6), f(2, 1, 3, 7)
    assert hits(lambda q, k, v: DENSE(q, k, v, None, 0.3), *operands(dtype=F32)) == {}
    assert hits(lambda q, k, v, s: DENSE(q, k, v, None, 0.3, s), q, k, v, sinks) == {}
    assert hits(lambda q, k, v: DENSE(q, k, v, None, 0.3, None, 2.0), q, k, v) == {}
    assert hits(lambda q, k, v: DENSE(q, k, v[..., :8], None, 0.3), q, k, v) == {}
    assert hits(lambda q, k, v, b: DENSE(q, k, v, b, 0.3), q, k, v, bias) == {}
    assert hits(lambda q, k, v: DENSE(q, k, v, None, 0.3, None, 0.0, q, k), q, k, v) == {}


def latents(rows: int = 5, keys: int = 9) -> list[Tensor]:
    """Queries and cached latents, with tails; named keys, some of which are none."""
    indices = f(2, rows, keys, seed=4).argsort(-1)[..., :4].int()
    indices[0, -1, 2], indices[1, 0, 0] = -1, keys
    queries = [f(2, 6, rows, n, dtype=BF16, seed=n) for n in (12, 4)]
    return [*queries, *(f(2, keys, n, dtype=BF16, seed=n) for n in (12, 4)), indices]


def over_latents(
    q: Tensor, q_tail: Tensor, latent: Tensor, tail: Tensor, i: Tensor, m: Tensor | None
) -> Tensor:
    key, value = latent.unsqueeze(1), latent.unsqueeze(1)
    return SPARSE(q, key, value, i, m, 0.3, None, q_tail, tail.unsqueeze(1))


def unmasked(q: Tensor, q_tail: Tensor, latent: Tensor, tail: Tensor, i: Tensor) -> Tensor:
    return over_latents(q, q_tail, latent, tail, i, None)


@pytest.mark.parametrize("rows", [1, 5])
def test_sparse(rows: int) -> None:
    options = {"within_limits": False}
    assert hits(over_latents, *latents(rows), seen(2, rows, 9), **options) == SPARSELY
    assert hits(unmasked, *latents(rows), **options) == SPARSELY


def test_sparse_that_the_fused_op_does_not_compute() -> None:
    q, q_tail, latent, tail, i = latents()
    assert hits(unmasked, q, q_tail, latent, tail, i) == {}  # small sizes
    key, key_tail, value = latent[:, None], tail[:, None], f(2, 1, 9, 12, dtype=BF16)

    def attend(q: Tensor, k: Tensor, v: Tensor, i: Tensor, qt: Tensor, kt: Tensor) -> Tensor:
        return SPARSE(q, k, v, i, None, 0.3, None, qt, kt)

    options = {"within_limits": False}
    assert hits(attend, q, key, value, i, q_tail, key_tail, **options) == {}
    assert hits(lambda q, k, i: SPARSE(q, k, k, i, None, 0.3), q, key, i, **options) == {}
    args = (q, key.expand(-1, 2, -1, -1), i, q_tail, key_tail.expand(-1, 2, -1, -1))
    assert hits(lambda q, k, i, *t: SPARSE(q, k, k, i, None, 0.3, None, *t), *args, **options) == {}


def test_sizes_of_the_documentation() -> None:
    queries = [f(1, 4, 2, n, dtype=BF16, seed=n) for n in (512, 64)]
    i = torch.tensor([[[0, 2], [1, 0]]], dtype=torch.int32)
    cached = [f(1, 3, n, dtype=BF16, seed=n) for n in (512, 64)]
    assert hits(unmasked, *queries, *cached, i) == SPARSELY
    three = [x[:, :3].contiguous() for x in queries]
    assert hits(unmasked, *three, *cached, i) == {}


def test_symbolic_sizes() -> None:
    args = [*latents(), seen(2, 5, 9)]
    examples = dynamic_examples(args, {0: [2], 1: [2], 2: [1], 3: [1], 4: [1], 5: [2, 3]})
    forms = fused(flat(over_latents, examples), within_limits=False)
    assert forms.made["npu_sparse_flash_attention"] == 1
    other = [*latents(4, 11), seen(2, 4, 11)]
    same_values(forms.before(*other), forms.after(*other))


def test_nothing_else_in_place_of_the_op() -> None:
    forms = both_forms(lambda q, k, v: DENSE(q, k, v, None, 0.3), *operands())
    assert not any("rolemesh" in str(node.target) for node in forms.after.graph.nodes)
