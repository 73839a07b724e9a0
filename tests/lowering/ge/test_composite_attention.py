"""Attention as one op through torchair: fused where Ascend has an op, plain ops elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.lowering.ge.lowered import dynamic_examples, module_of, signature_of
from torch import Tensor

from rolemesh.lowering.composite.define import define_composite_ops
from rolemesh.lowering.ge.engine import LoadedGraph, running_on
from rolemesh.lowering.ge.target import lower_ge
from rolemesh.runtime.ge.engine import ReferenceEngine
from rolemesh.runtime.ge.executor import Executor

define_composite_ops()
BF16, F32 = torch.bfloat16, torch.float32
DENSE = torch.ops.rolemesh.attention
SPARSE = torch.ops.rolemesh.sparse_attention


class Engine(ReferenceEngine):
    """Keeps the graph."""

    graph: LoadedGraph

    def load(self, graph: LoadedGraph) -> Executor:
        self.graph = graph
        return super().load(graph)

    def has(self, op: str) -> bool:
        return op.encode() in self.graph.model


def f(*shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def seen(rows: int, keys: int) -> Tensor:
    mask = torch.ones(2, 1, rows, keys, dtype=torch.bool).tril(keys - rows)
    mask[0, :, 0] = rows == 1
    return mask


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    return (DENSE(q, k, v, mask, 0.2),)


def with_options(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    return DENSE(q, k, v, mask, 0.2, q[0, :, 0, 0]), DENSE(q, k, v, mask, 0.2, None, 0.9)


def operands(rows: int, dtype: torch.dtype, keys: int = 9) -> list[Tensor]:
    key, value = (f(2, 2, keys, 16, dtype=dtype) * n for n in (1, 2))
    return [f(2, 6, rows, 16, dtype=dtype), key, value, seen(rows, keys)]


def latent(
    q: Tensor, q_tail: Tensor, x: Tensor, tail: Tensor, i: Tensor, mask: Tensor
) -> tuple[Tensor, ...]:
    key = x.unsqueeze(1)
    return (SPARSE(q, key, key, i, mask, 0.04, None, q_tail, tail.unsqueeze(1)),)


def latents(rows: int, dtype: torch.dtype, keys: int = 7, heads: int = 4) -> list[Tensor]:
    indices = f(2, rows, keys, dtype=F32).argsort(-1)[..., :3].int()
    indices[0, -1, 1] = -1
    queries = [f(2, heads, rows, width, dtype=dtype) for width in (512, 64)]
    cached = [f(2, keys, width, dtype=dtype) for width in (512, 64)]
    return [*queries, *cached, indices, seen(rows, keys)]


def check(
    function: Callable[..., tuple[Tensor, ...]], args: list[Tensor], fused: str | None
) -> None:
    outputs = len(function(*args))
    module = module_of(function, len(args), outputs)
    run, engine = lower_ge(module, args, signature_of(len(args), outputs)), Engine()
    equal(run, function, args, engine)
    for op in ("FusedInferAttentionScore", "SparseFlashAttention"):
        assert engine.has(op) == (op == fused)


def equal(
    run: Callable[..., tuple[Tensor | None, ...]],
    function: Callable[..., tuple[Tensor, ...]],
    args: list[Tensor],
    engine: Engine,
) -> None:
    with running_on(engine):
        found = run(*args)
    tolerance = 1e-5 if args[0].dtype is F32 else 3e-2
    for got, want in zip(found, function(*args), strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rows", [1, 5])
def test_dense(rows: int) -> None:
    check(dense, operands(rows, BF16), "FusedInferAttentionScore")
    check(dense, operands(rows, F32), None)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_sinks_and_soft_cap(dtype: torch.dtype) -> None:
    check(with_options, operands(5, dtype), None)


@pytest.mark.parametrize("rows", [1, 5])
def test_sparse(rows: int) -> None:
    check(latent, latents(rows, BF16), "SparseFlashAttention")
    check(latent, latents(rows, F32), None)
    check(latent, latents(rows, BF16, heads=3), None)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_one_graph_for_all_sizes(dtype: torch.dtype) -> None:
    dims = {0: [2], 1: [2], 2: [1], 3: [1], 4: [1], 5: [2, 3]}
    module, signature = module_of(latent, 6, 1), signature_of(6, 1)
    run = lower_ge(module, dynamic_examples(latents(5, dtype), dims), signature)
    for rows, keys in ((5, 7), (3, 11)):
        equal(run, latent, latents(rows, dtype, keys), Engine())
