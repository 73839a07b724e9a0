"""Dense and sparse attention against attention written out, query by query."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from rolemesh.lowering.composite import attention, sparse_attention
from rolemesh.lowering.composite.define import OPS, decompositions, define_composite_ops, inlined
from rolemesh.lowering.composite.op import CompositeOp

define_composite_ops()
DENSE = torch.ops.rolemesh.attention.default
SPARSE = torch.ops.rolemesh.sparse_attention.default
SCALE = 0.31


class Sizes(NamedTuple):
    """Batch, query heads, key heads, queries, keys, and the widths of keys and values."""

    b: int
    h: int
    k: int
    t: int
    s: int
    d: int
    v: int


Tails = dict[str, Tensor]

GROUPED = Sizes(2, 6, 3, 5, 11, 8, 8)
NARROW = Sizes(3, 4, 4, 34, 9, 12, 7)
WIDE = Sizes(1, 4, 2, 35, 13, 6, 10)
ONE = Sizes(2, 6, 2, 1, 14, 8, 5)
LATENT = Sizes(2, 5, 1, 4, 19, 24, 16)
FORMS = [GROUPED, NARROW, WIDE, ONE, LATENT]


def f(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def operands(n: Sizes, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value; none of them contiguous."""
    query = f(n.b, n.t, n.h, n.d, seed=1, dtype=dtype).transpose(1, 2)
    key = f(n.b, n.k, n.s + 2, n.d, seed=2, dtype=dtype)[:, :, :-2]
    value = f(n.b, n.s, n.k, n.v, seed=3, dtype=dtype).transpose(1, 2)
    return query, key, value


def hidden(n: Sizes, *, heads: int = 1) -> Tensor:
    """A mask; the last query of the first sequence sees nothing."""
    mask = f(n.b, heads, n.t, n.s, seed=4) > -0.3
    mask[0, :, -1] = False
    return mask


def picked(n: Sizes, count: int) -> Tensor:
    """Distinct keys for each query; the last is none."""
    found = f(n.b, n.t, n.s, seed=5).argsort(-1)[..., :count]
    found[..., -1] = -1
    found[0, 0, 0] = n.s + 3
    return found.int()


def naive(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
    indices: Tensor | None = None,
) -> Tensor:
    """Attention with a loop over batch, heads and queries, in float64."""
    (b, h, t, _), s = query.shape, key.shape[2]
    out = torch.zeros(b, t, h, value.shape[-1], dtype=torch.float64)
    bias = torch.zeros(b, h, t, s, dtype=torch.float64)
    if mask is not None and mask.dtype is torch.bool:
        bias = torch.where(mask, bias, -math.inf)
    elif mask is not None:
        bias = bias + mask
    for item, head, row in itertools.product(range(b), range(h), range(t)):
        columns = torch.arange(s) if indices is None else indices[item, row].long()
        columns = columns[(columns >= 0) & (columns < s)]
        added = bias[item, head, row, columns]
        columns, added = columns[added > -math.inf], added[added > -math.inf]
        group = head * key.shape[1] // h
        scores = key[item, group, columns].double() @ query[item, head, row].double() * SCALE
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        weights = torch.exp(scores + added)
        total = weights.sum() + (0.0 if sinks is None else math.exp(sinks[head].item()))
        if len(columns):
            out[item, row, head] = weights / total @ value[item, group, columns].double()
    return out


def check(found: Tensor, wanted: Tensor, dtype: torch.dtype = torch.float32) -> None:
    assert found.dtype == dtype
    assert found.is_contiguous()
    bound = 2e-6 if dtype is torch.float32 else 0.02
    torch.testing.assert_close(found.double(), wanted, rtol=bound, atol=bound)


def both(op: torch._ops.OpOverload) -> list[Callable[..., Tensor]]:
    """The kernel, and the decomposition."""
    return [op, decompositions()[op]]  # type: ignore[list-item]


def split(query: Tensor, key: Tensor, value: Tensor) -> tuple[tuple[Tensor, ...], Tails]:
    """The same operands with the last features of queries and keys as tails."""
    width = query.shape[-1] - 3
    tails: Tails = {"query_tail": query[..., width:], "key_tail": key[..., width:].clone()}
    return (query[..., :width], key[..., :width], value), tails


@pytest.mark.parametrize("sizes", FORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_dense(sizes: Sizes, dtype: torch.dtype) -> None:
    args, mask = operands(sizes, dtype), hidden(sizes)
    wanted = naive(*args, mask)
    assert not wanted[0, -1].any()
    parts, tails = split(*args)
    for run in both(DENSE):
        check(run(*args, mask, SCALE), wanted, dtype)
        check(run(*args, None, SCALE), naive(*args, None), dtype)
        check(run(*parts, mask, SCALE, **tails), wanted, dtype)


@pytest.mark.parametrize("sizes", [GROUPED, NARROW, LATENT], ids=str)
@pytest.mark.parametrize("options", [{"sinks": True}, {"softcap": 0.7}], ids=["sinks", "softcap"])
def test_options(sizes: Sizes, options: dict[str, float]) -> None:
    args, mask = operands(sizes), hidden(sizes, heads=sizes.h)
    sinks = f(sizes.h, seed=6) if "sinks" in options else None
    softcap = options.get("softcap", 0.0)
    for given in (mask, mask[:1, :1], torch.where(mask, 0.5, -math.inf), None):
        wanted = naive(*args, given, sinks, softcap)
        parts, tails = split(*args)
        for run in both(DENSE):
            check(run(*args, given, SCALE, sinks, softcap), wanted)
            check(run(*parts, given, SCALE, sinks, softcap, **tails), wanted)


def test_additive_mask_of_another_dtype() -> None:
    args = operands(GROUPED, torch.bfloat16)
    mask = f(GROUPED.t, GROUPED.s, seed=7)
    for run in both(DENSE):
        check(run(*args, mask, SCALE), naive(*args, mask), torch.bfloat16)


def test_dense_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_BLOCK", 2 * GROUPED.b * GROUPED.h * GROUPED.s)
    args, mask = operands(GROUPED), hidden(GROUPED)
    for given in (mask, mask[..., :1, :], None):
        wanted = naive(*args, given, None, 0.7)
        check(DENSE(*args, given, SCALE, None, 0.7), wanted)
        parts, tails = split(*args)
        check(DENSE(*parts, given, SCALE, None, 0.7, **tails), wanted)


@pytest.mark.parametrize("gathered", [0, 10**9], ids=["gathered", "dense"])
@pytest.mark.parametrize("sizes", FORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_sparse(
    monkeypatch: pytest.MonkeyPatch, sizes: Sizes, dtype: torch.dtype, gathered: int
) -> None:
    monkeypatch.setattr(sparse_attention, "_GATHERED", gathered)
    monkeypatch.setattr(sparse_attention, "_SLOWER", 1)
    for name in ("_BLOCK", "_DENSE_BLOCK"):
        monkeypatch.setattr(sparse_attention, name, 500)
    args = operands(sizes, dtype)
    sinks = f(sizes.h, seed=6)
    mask = hidden(sizes)
    parts, tails = split(*args)
    for count, given, sink in [
        (3, mask, None),
        (sizes.s // 2, None, sinks),
        (4, torch.where(hidden(sizes, heads=sizes.h), 0.5, -math.inf), sinks),
        (sizes.s, mask, None),
        (3, mask[0, 0], None),
    ]:
        indices = picked(sizes, count)
        wanted = naive(*args, given, sink, indices=indices)
        check(SPARSE(*args, indices, given, SCALE, sink), wanted, dtype)
        check(SPARSE(*parts, indices, given, SCALE, sink, **tails), wanted, dtype)


@pytest.mark.parametrize("sizes", [GROUPED, LATENT], ids=str)
def test_values_within_keys_are_gathered_once(
    monkeypatch: pytest.MonkeyPatch, sizes: Sizes
) -> None:
    monkeypatch.setattr(sparse_attention, "_GATHERED", 0)
    rows, gathered = sparse_attention._rows, []

    def counted(source: Tensor, where: Tensor, target: Tensor) -> Tensor:
        gathered.append(source)
        return rows(source, where, target)

    monkeypatch.setattr(sparse_attention, "_rows", counted)
    whole = operands(sizes)
    (query, key, _), tails = split(*whole)
    indices = picked(sizes, 3)
    for value, sources in ((key, 2), (key[..., :2], 2), (key.clone(), 3)):
        gathered.clear()
        found = SPARSE(query, key, value, indices, None, SCALE, **tails)
        check(found, naive(*whole[:2], value, None, indices=indices))
        assert len(gathered) == sources * sizes.k


@pytest.mark.parametrize("sizes", [GROUPED, LATENT], ids=str)
def test_sparse_decomposition(sizes: Sizes) -> None:
    args, indices = operands(sizes), picked(sizes, 3)
    run = decompositions()[SPARSE]
    for mask in (hidden(sizes), torch.where(hidden(sizes), 0.5, -math.inf), None):
        found = run(*args, indices, mask, SCALE, None)
        assert isinstance(found, Tensor)
        check(found, naive(*args, mask, indices=indices))
        parts, tails = split(*args)
        check(run(*parts, indices, mask, SCALE, **tails), naive(*args, mask, indices=indices))


@pytest.mark.parametrize(("b", "t", "s", "count"), [(0, 3, 40, 2), (2, 0, 40, 2), (2, 3, 40, 0)])
def test_nothing_to_attend_to(b: int, t: int, s: int, count: int) -> None:
    (query, key, value), tails = split(*operands(LATENT._replace(b=b, t=t, s=s)))
    indices = torch.zeros(b, t, count, dtype=torch.int32)
    found = SPARSE(query, key, value, indices, None, SCALE, **tails)
    assert found.shape == (b, t, LATENT.h, LATENT.v)
    assert not found.any()


def test_tails_come_together() -> None:
    query, key, value = operands(GROUPED)
    with pytest.raises(RuntimeError, match="query_tail and key_tail come together"):
        DENSE(*(x.to("meta") for x in (query, key, value)), None, SCALE, query_tail=query)


def test_sparse_reads_only_named_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_attention, "_GATHERED", 0)
    query, key, value = operands(LATENT)
    indices = torch.arange(3).expand(LATENT.b, LATENT.t, 3)
    wanted = SPARSE(query, key, value, indices, None, SCALE)
    key, value = key.clone(), value.clone()
    key[:, :, 3:], value[:, :, 3:] = math.nan, math.nan
    torch.testing.assert_close(SPARSE(query, key, value, indices, None, SCALE), wanted)


@pytest.mark.parametrize("op", [DENSE, SPARSE], ids=str)
def test_symbolic_sizes_need_no_guard(op: torch._ops.OpOverload) -> None:
    tensors = [x.contiguous() for x in (*operands(GROUPED), picked(GROUPED, 3))]
    for tensor in tensors:
        for dim in range(tensor.dim()):
            torch._dynamo.mark_dynamic(tensor, dim)
    mode = FakeTensorMode(shape_env=ShapeEnv())
    query, key, value, indices = (mode.from_tensor(x) for x in tensors)
    named = [indices] if op is SPARSE else []
    found = op(query, key, value, *named, None, SCALE, query_tail=query, key_tail=key)
    assert mode.shape_env is not None
    assert mode.shape_env.guards == []
    batch, heads, rows, _ = query.shape
    assert found.shape == (batch, rows, heads, value.shape[-1])


def test_inlined_where_a_fused_kernel_computes_it() -> None:
    narrow, wide = operands(NARROW), operands(GROUPED)
    run = inlined()[DENSE]
    assert run(*narrow, None, SCALE) is NotImplemented
    assert run(*wide, None, SCALE, None, 0.7) is NotImplemented
    found = run(*wide, None, SCALE)
    assert isinstance(found, Tensor)
    torch.testing.assert_close(found, DENSE(*wide, None, SCALE))
    parts, tails = split(*wide)
    assert run(*parts, None, SCALE, **tails) is NotImplemented


def test_inlined_where_few_keys_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_attention, "_GATHERED", 0)
    args, indices = operands(LATENT), picked(LATENT, 3)
    parts, tails = split(*args)
    sinks, run = f(LATENT.h, seed=6), inlined()[SPARSE]
    hides = torch.where(hidden(LATENT, heads=LATENT.h), 0.5, -math.inf)
    for mask, sink in ((hidden(LATENT), None), (hidden(LATENT)[0, 0], None), (hides, sinks)):
        for given, options in ((args, {}), (parts, tails)):
            found = run(*given, indices, mask, SCALE, sink, **options)
            assert isinstance(found, Tensor)
            check(found, naive(*args, mask, sink, indices=indices))
    query, key, _ = parts
    found = run(query, key, key, indices, None, SCALE, **tails)
    wanted = SPARSE(query, key, key, indices, None, SCALE, **tails)
    torch.testing.assert_close(found, wanted)

    groups = operands(GROUPED)
    assert run(*groups, picked(GROUPED, 3), None, SCALE) is NotImplemented
    assert run(*args, picked(LATENT, LATENT.s), None, SCALE) is NotImplemented
    monkeypatch.setattr(sparse_attention, "_BLOCK", 4 * LATENT.b * LATENT.t * 3 * 40 - 1)
    assert run(*args, indices, None, SCALE) is NotImplemented
    assert run(args[0], args[1], args[1], indices, None, SCALE) is not NotImplemented


def test_functions_of_an_op_take_its_arguments() -> None:
    op = OPS["attention"]
    with pytest.raises(ValueError, match="does not take the arguments of other"):
        CompositeOp("other(Tensor x) -> Tensor", op.shape, op.kernel, op.decomposition, None)
