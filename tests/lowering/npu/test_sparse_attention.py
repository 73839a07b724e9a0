"""The indexer and sparse attention against loops over queries and keys."""

from __future__ import annotations

import math

import pytest
import torch
from tests.lowering.npu.runs import DTYPES, TOLERANCE, checked, f, near
from torch import Tensor

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.lowering.npu.define import define_npu_ops

define_npu_ops()
ops = torch.ops.npu
INDEXER = ops.npu_lightning_indexer
SPARSE = ops.npu_sparse_flash_attention


def i(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def visible(row: int, rows: int, columns: int, mode: int) -> range:
    return range(columns if mode == 0 else max(0, columns - rows + row + 1))


def scores(q: Tensor, k: Tensor, weights: Tensor, keys: range) -> list[float]:
    """One query `[N, D]` against keys `[T, D]`."""
    found = []
    for key in keys:
        products = [float(head @ k[key].double()) for head in q.double()]
        found.append(sum(max(p, 0.0) * float(w) for p, w in zip(products, weights, strict=True)))
    return found


def check_row(
    found: Tensor, values: Tensor | None, expected: list[float], count: int, dtype: torch.dtype
) -> None:
    """Indices are those of the largest scores, best first, then -1."""
    ranked = sorted(range(len(expected)), key=lambda key: -expected[key])[:count]
    picked = found.tolist()
    assert picked[len(ranked) :] == [-1] * (count - len(ranked))
    bound = TOLERANCE[dtype]
    for got, wanted in zip(picked, ranked, strict=False):
        assert math.isclose(expected[got], expected[wanted], rel_tol=bound, abs_tol=bound)
    assert len(set(picked[: len(ranked)])) == len(ranked)
    if values is not None:
        wanted = torch.tensor([expected[key] for key in picked if key >= 0], dtype=torch.float64)
        near(values[: len(ranked)], wanted)
        assert (values[len(ranked) :] == -torch.inf).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", [0, 3])
@pytest.mark.parametrize("count", [3, 9])
def test_indexer(count: int, mode: int, dtype: torch.dtype) -> None:
    q, k, w = f(2, 5, 4, 8, dtype=dtype), f(2, 7, 1, 8, dtype=dtype), f(2, 5, 4, dtype=dtype)
    indices, values = checked(
        INDEXER, q, k, w, sparse_count=count, sparse_mode=mode, return_value=True
    )
    for b in range(2):
        for s in range(5):
            expected = scores(q[b, s], k[b, :, 0], w[b, s], visible(s, 5, 7, mode))
            check_row(indices[b, s, 0], values[b, s, 0], expected, count, dtype)


def test_indexer_of_rows_with_lengths() -> None:
    q, k, w = f(3, 5, 4, 8), f(3, 6, 1, 8), f(3, 5, 4)
    rows, columns = [5, 2, 4], [3, 6, 0]
    indices, none = checked(
        INDEXER,
        q,
        k,
        w.half(),
        actual_seq_lengths_query=i(*rows),
        actual_seq_lengths_key=i(*columns),
        sparse_count=4,
    )
    assert none.shape == (0,)
    for b in range(3):
        for s in range(5):
            keys = visible(s, rows[b], columns[b], 3) if s < rows[b] else range(0)
            expected = scores(q[b, s], k[b, :, 0], w.half()[b, s], keys)
            check_row(indices[b, s, 0], None, expected, 4, torch.float32)


@pytest.mark.parametrize("paged", [False, True])
def test_indexer_of_packed_queries(paged: bool) -> None:
    q, k, w = f(6, 4, 8), f(9, 1, 8), f(6, 4)
    ends, lengths = [2, 2, 5], [4, 0, 5]
    key_ends = [4, 4, 9]
    kwargs: dict[str, object] = {"layout_key": "TND", "actual_seq_lengths_key": i(*key_ends)}
    key = k
    if paged:
        table = i([3, 1], [0, 0], [4, 2])
        key = torch.full((5, 3, 1, 8), torch.nan)
        for b, (start, length) in enumerate(zip([0, 4, 4], lengths, strict=True)):
            for t in range(length):
                key[table[b, t // 3], t % 3] = k[start + t]
        kwargs = {"layout_key": "PA_BSND", "actual_seq_lengths_key": i(*lengths),
                  "block_table": table}  # fmt: skip
    indices, _ = checked(
        INDEXER,
        q,
        key,
        w,
        actual_seq_lengths_query=i(*ends),
        layout_query="TND",
        sparse_count=3,
        **kwargs,
    )
    for b, (start, end) in enumerate(zip([0, 2, 2], ends, strict=True)):
        first, last = ([0, *key_ends][b], key_ends[b])
        for t in range(start, end):
            keys = visible(t - start, end - start, last - first, 3)
            check_row(
                indices[t, 0], None, scores(q[t], k[first:last, 0], w[t], keys), 3, torch.float32
            )
    assert (indices[5] == -1).all()


def attention(
    q: Tensor, k: Tensor, v: Tensor, keys: list[int], sink: float = -math.inf
) -> tuple[Tensor, float, float]:
    """One query of one head over the keys listed."""
    logits = [0.3 * float(q.double() @ k[key].double()) for key in keys]
    top = max([*logits, sink])
    if top == -math.inf:
        return torch.zeros_like(v[0], dtype=torch.float64), 0.0, 0.0
    powers = [math.exp(logit - top) for logit in logits]
    total = sum(powers) + math.exp(sink - top)
    out = torch.zeros_like(v[0], dtype=torch.float64)
    for power, key in zip(powers, keys, strict=True):
        out += power / total * v[key].double()
    return out, top, total


def listed(picks: list[int], block: int, keys: range) -> list[int]:
    """The keys that a row of picks names, up to its first -1, and sees."""
    found: list[int] = []
    for pick in picks:
        if pick < 0:
            break
        found += [key for key in range(pick * block, (pick + 1) * block) if key in keys]
    return found


def picks_of(*shape: int, blocks: int, seed: int = 0) -> Tensor:
    """Distinct blocks in random order, each row cut off by -1 somewhere; some rows are empty."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.rand(*shape[:-1], max(blocks, shape[-1]), generator=generator).argsort(-1)
    found = torch.where(found < blocks, found, -1)[..., : shape[-1]]
    ends = torch.randint(0, shape[-1] + 1, shape[:-1], generator=generator)
    return torch.where(torch.arange(shape[-1]) < ends[..., None], found, -1).int()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", [0, 3])
@pytest.mark.parametrize(("block", "key_heads"), [(1, 1), (2, 1), (4, 3)])
def test_sparse_attention(block: int, key_heads: int, mode: int, dtype: torch.dtype) -> None:
    q, qr = f(2, 5, 6, 8, dtype=dtype), f(2, 5, 6, 2, dtype=dtype)
    k, kr = f(2, 7, key_heads, 8, dtype=dtype), f(2, 7, key_heads, 2, dtype=dtype)
    v = f(2, 7, key_heads, 8, dtype=dtype, seed=1)
    picks = picks_of(2, 5, key_heads, 4, blocks=-(-7 // block) if block > 1 else 7)
    out, largest, total = checked(
        SPARSE,
        q,
        k,
        v,
        picks,
        0.3,
        query_rope=qr,
        key_rope=kr,
        sparse_block_size=block,
        sparse_mode=mode,
        attention_mode=2,
        return_softmax_lse=True,
    )
    group = 6 // key_heads
    queries, keys = torch.cat([q, qr], -1), torch.cat([k, kr], -1)
    for b in range(2):
        for s in range(5):
            for n in range(6):
                head = n // group
                seen = listed(picks[b, s, head].tolist(), block, visible(s, 5, 7, mode))
                expected = attention(queries[b, s, n], keys[b, :, head], v[b, :, head], seen)
                near(out[b, s, n], expected[0])
                near(largest[b, head, s, n % group], torch.tensor(expected[1]))
                near(total[b, head, s, n % group], torch.tensor(expected[2]))


def test_sparse_attention_with_lengths_and_sinks() -> None:
    q, qr, k, kr = f(3, 5, 6, 8), f(3, 5, 6, 2), f(3, 7, 1, 8), f(3, 7, 1, 2)
    picks, sinks = picks_of(3, 5, 1, 4, blocks=7), f(6)
    rows, columns = [5, 2, 4], [7, 4, 2]
    out, none, _ = checked(
        SPARSE,
        q,
        k,
        None,
        picks,
        0.3,
        query_rope=qr,
        key_rope=kr,
        attention_mode=2,
        actual_seq_lengths_query=i(*rows),
        actual_seq_lengths_kv=i(*columns),
        sinks=sinks,
    )
    assert none.shape == (0,)
    queries, keys = torch.cat([q, qr], -1), torch.cat([k, kr], -1)
    for b in range(3):
        for s in range(rows[b]):
            seen = listed(picks[b, s, 0].tolist(), 1, visible(s, rows[b], columns[b], 3))
            seen = [key for key in seen if key < columns[b]]
            for n in range(6):
                expected = attention(queries[b, s, n], keys[b, :, 0], k[b, :, 0], seen,
                                     float(sinks[n]))  # fmt: skip
                near(out[b, s, n], expected[0])
        assert not out[b, rows[b] :].any()


def test_sparse_attention_of_packed_queries_over_pages() -> None:
    q, qr = f(5, 6, 8), f(5, 6, 2)
    table, lengths, ends = i([3, 1], [4, 2]), [4, 5], [2, 5]
    k, kr, v = f(2, 6, 1, 8), f(2, 6, 1, 2), f(2, 6, 1, 8, seed=1)
    caches = []
    for x in (k, v, kr):
        cache = torch.full((5, 3, 1, x.shape[-1]), torch.nan)
        for b, length in enumerate(lengths):
            for t in range(length):
                cache[table[b, t // 3], t % 3] = x[b, t]
        caches.append(cache)
    picks = picks_of(5, 1, 3, blocks=4)
    out, _, _ = checked(
        SPARSE,
        q,
        caches[0],
        caches[1],
        picks,
        0.3,
        query_rope=qr,
        key_rope=caches[2],
        block_table=table,
        actual_seq_lengths_query=i(*ends),
        actual_seq_lengths_kv=i(*lengths),
        layout_query="TND",
        layout_kv="PA_BSND",
        attention_mode=2,
    )
    for t in range(5):
        b, start = (0, 0) if t < 2 else (1, 2)
        keys = visible(t - start, ends[b] - start, lengths[b], 3)
        seen = listed(picks[t, 0].tolist(), 1, keys)
        for n in range(6):
            expected = attention(torch.cat([q, qr], -1)[t, n], torch.cat([k, kr], -1)[b, :, 0],
                                 v[b, :, 0], seen)  # fmt: skip
            near(out[t, n], expected[0])


def test_what_the_indexer_picks_covers_dense_attention() -> None:
    """With room for all keys, the two ops together are causal attention."""
    q, qr, k, kr = f(2, 5, 6, 8), f(2, 5, 6, 2), f(2, 7, 1, 8), f(2, 7, 1, 2)
    picks, _ = INDEXER(f(2, 5, 4, 8), f(2, 7, 1, 8), f(2, 5, 4), sparse_count=16)
    out, _, _ = SPARSE(q, k, k, picks, 0.3, query_rope=qr, key_rope=kr, attention_mode=2)
    triangle = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
    expected, _ = ops.npu_fused_infer_attention_score(
        q,
        k,
        k,
        query_rope=qr,
        key_rope=kr,
        num_heads=6,
        num_key_value_heads=1,
        scale=0.3,
        input_layout="BSND",
        sparse_mode=3,
        atten_mask=triangle,
    )
    near(out, expected)


INDEX = (f(2, 5, 4, 8), f(2, 7, 1, 8), f(2, 5, 4))
PICKED = (f(2, 5, 6, 8), f(2, 7, 1, 8), None, picks_of(2, 5, 1, 3, blocks=7), 0.3)
ROPES = {"query_rope": f(2, 5, 6, 2), "key_rope": f(2, 7, 1, 2), "attention_mode": 2}
REFUSED = [
    (INDEXER, INDEX, {"sparse_mode": 4}, "npu_lightning_indexer", "sparse_mode=4"),
    (INDEXER, INDEX, {"layout_query": "BNSD"}, "npu_lightning_indexer", "layout_query='BNSD'"),
    (INDEXER, INDEX, {"layout_key": "TND"}, "npu_lightning_indexer",
     "layout_key='TND' with layout_query BSND"),
    (INDEXER, INDEX, {"next_tokens": 3}, "npu_lightning_indexer", "next_tokens=3"),
    (SPARSE, PICKED, {**ROPES, "attention_mode": 0}, "npu_sparse_flash_attention",
     "attention_mode=0"),
    (SPARSE, PICKED, {**ROPES, "pre_tokens": 3}, "npu_sparse_flash_attention", "pre_tokens=3"),
    (SPARSE, PICKED,
     {**ROPES, "layout_kv": "PA_BSND", "block_table": i([0]), "return_softmax_lse": True},
     "npu_sparse_flash_attention", "return_softmax_lse=True with layout_kv PA_BSND"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "args", "kwargs", "name", "message"), REFUSED)
def test_refused(
    op: torch._ops.OpOverloadPacket,
    args: tuple[object, ...],
    kwargs: dict[str, object],
    name: str,
    message: str,
) -> None:
    with pytest.raises(RolemeshError) as caught:
        op(*args, **kwargs)
    assert caught.value.code == "RM028"
    assert f"{name} has no reference semantics for {message}" in str(caught.value)


WRONG = [
    (INDEXER, (*INDEX[:2], f(2, 5, 3)), {}, r"weights \[2, 5, 3\] for queries"),
    (INDEXER, INDEX, {"block_table": i([0])}, "block_table goes with layout PA_BSND"),
    (INDEXER, (INDEX[0][0], *INDEX[1:]), {}, r"\[5, 4, 8\] is not BSND"),
    (INDEXER, INDEX, {"layout_key": "PA_BSND", "block_table": i([0], [1])},
     "pages of keys need the lengths"),
    (SPARSE, PICKED, {"attention_mode": 2}, "takes query_rope and key_rope"),
    (SPARSE, (*PICKED[:3], PICKED[3][:, :4], 0.3), ROPES, "sparse_indices"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "args", "kwargs", "message"), WRONG)
def test_calls_that_no_device_takes(
    op: torch._ops.OpOverloadPacket,
    args: tuple[object, ...],
    kwargs: dict[str, object],
    message: str,
) -> None:
    with pytest.raises((RuntimeError, ValueError), match=message):
        op(*args, **kwargs)
