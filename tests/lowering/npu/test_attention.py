"""Fused attention against scaled dot product attention, sequence by sequence."""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.lowering.npu.runs import DTYPES, checked, f, near
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.lowering.npu.define import define_npu_ops

define_npu_ops()
ops = torch.ops.npu
FIA = ops.npu_fused_infer_attention_score
TRIANGLE = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
N, M, D, E = 6, 3, 8, 5
HEADS = {"num_heads": N, "num_key_value_heads": M, "scale": 0.3}


def plain(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
    """Attention of one sequence `[N, S, D]` in float64; zeros for rows that see nothing."""
    q, k, v = (x.double()[None] for x in (q, k, v))
    found = scaled_dot_product_attention(q, k, v, seen, scale=0.3, enable_gqa=True)[0]
    return (
        found.nan_to_num()
        if seen is None
        else found.nan_to_num().masked_fill(~seen.any(-1)[..., None], 0)
    )


def lse(q: Tensor, k: Tensor, seen: Tensor | None = None) -> Tensor:
    scores = q.double() @ k.double().repeat_interleave(q.shape[0] // k.shape[0], 0).mT * 0.3
    return (scores if seen is None else scores.masked_fill(~seen, -torch.inf)).logsumexp(-1)


def to_layout(x: Tensor, layout: str) -> Tensor:
    """From BNSD."""
    if layout == "BSH":
        return x.transpose(1, 2).flatten(2).contiguous()
    return x.permute(["BNSD".index(dim) for dim in layout]).contiguous()


def from_layout(x: Tensor, layout: str) -> Tensor:
    """To BNSD."""
    if layout == "BSH":
        return x.unflatten(-1, (N, -1)).transpose(1, 2)
    return x.permute([layout.index(dim) for dim in "BNSD"])


LAYOUTS = ["BSH", "BSND", "BNSD", "BNSD_BSND", "BSH_BNSD", "BSND_BNSD", "BSH_NBSD", "BSND_NBSD",
           "BNSD_NBSD"]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    given, _, wanted = layout.partition("_")
    q, k, v = f(2, N, 4, D, dtype=dtype), f(2, M, 7, D, dtype=dtype), f(2, M, 7, E, dtype=dtype)
    operands = [to_layout(x, given) for x in (q, k, v)]
    out, sums = checked(FIA, *operands, **HEADS, input_layout=layout, softmax_lse_flag=True)
    for b in range(2):
        near(from_layout(out, wanted or given)[b], plain(q[b], k[b], v[b]))
        near(sums[b, ..., 0], lse(q[b], k[b]))


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 1), (4, 0), (1, 1)])
def test_numbers_of_heads(heads: int, key_heads: int) -> None:
    keys = key_heads or heads
    q, k, v = f(2, heads, 4, D), f(2, keys, 7, D), f(2, keys, 7, D)
    out, none = checked(
        FIA, q, k, v, num_heads=heads, num_key_value_heads=key_heads, scale=0.3, input_layout="BNSD"
    )
    near(out[1], plain(q[1], k[1], v[1]))
    assert none.shape == (0,)


def test_one_sequence_without_a_batch() -> None:
    q, k, v = f(N, 4, D), f(M, 7, D), f(M, 7, E)
    out, sums = checked(FIA, q, k, v, **HEADS, input_layout="NSD", softmax_lse_flag=True)
    near(out, plain(q, k, v))
    near(sums[0, ..., 0], lse(q, k))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", ["TND", "NTD", "TND_NTD", "NTD_TND"])
def test_packed_sequences(layout: str, masked: bool) -> None:
    q, k, v = f(N, 9, D), f(M, 14, D), f(M, 14, E)
    ends, key_ends = [4, 4, 7], [5, 8, 12]
    given, _, wanted = layout.partition("_")
    operands = [x if given == "NTD" else x.transpose(0, 1).contiguous() for x in (q, k, v)]
    kwargs = {"sparse_mode": 3, "atten_mask": TRIANGLE} if masked else {}
    out, sums = checked(
        FIA,
        *operands,
        **HEADS,
        **kwargs,
        input_layout=layout,
        actual_seq_lengths=ends,
        actual_seq_lengths_kv=key_ends,
        softmax_lse_flag=True,
    )
    found = out if (wanted or given) == "NTD" else out.transpose(0, 1)
    parts = zip(itertools.pairwise([0, *ends]), itertools.pairwise([0, *key_ends]), strict=True)
    for (start, end), (key_start, key_end) in parts:
        one = q[:, start:end], k[:, key_start:key_end], v[:, key_start:key_end]
        rows, columns = end - start, key_end - key_start
        seen = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows) if masked else None
        near(found[:, start:end], plain(*one, seen))
        near(sums[start:end, :, 0].T, lse(one[0], one[1], seen))
    assert not found[:, 7:].any()


@pytest.mark.parametrize("lengths", [[5, 2], [3], [5, 2, 99]])
def test_lengths_of_rows(lengths: list[int]) -> None:
    q, k, v = f(2, N, 5, D), f(2, M, 7, D), f(2, M, 7, E)
    kwargs = {"actual_seq_lengths": lengths, "actual_seq_lengths_kv": [4, 7]}
    out, _ = checked(FIA, q, k, v, **HEADS, **kwargs, input_layout="BNSD")
    for b, (rows, keys) in enumerate(zip((lengths * 2)[:2], (4, 7), strict=True)):
        near(out[b, :, :rows], plain(q[b, :, :rows], k[b, :, :keys], v[b, :, :keys]))
        assert not out[b, :, rows:].any()


def seen_by(mode: int, rows: int, columns: int, before: int, after: int) -> Tensor:
    """What each query sees, one pair at a time."""
    found = torch.zeros(rows, columns, dtype=torch.bool)
    for i, j in itertools.product(range(rows), range(columns)):
        diagonal = i + (columns - rows if mode in (3, 4) else 0)
        if mode in (0, 4):
            found[i, j] = diagonal - before <= j <= diagonal + after
        else:
            found[i, j] = mode == 1 or j <= diagonal
    return found


@pytest.mark.parametrize("mode", [0, 1, 2, 3, 4])
@pytest.mark.parametrize(("rows", "columns"), [(5, 7), (5, 5), (6, 4)])
def test_sparse_modes(mode: int, rows: int, columns: int) -> None:
    q, k, v = f(2, N, rows, D), f(2, M, columns, D), f(2, M, columns, E)
    seen = seen_by(mode, rows, columns, before=2, after=1)
    mask = TRIANGLE
    if mode < 2:
        mask = f(2, 1, rows, columns) > 0.8
    out, sums = checked(
        FIA,
        q,
        k,
        v,
        **HEADS,
        input_layout="BNSD",
        atten_mask=mask,
        sparse_mode=mode,
        pre_tokens=2,
        next_tokens=1,
        softmax_lse_flag=True,
    )
    for b in range(2):
        visible = seen if mode >= 2 else seen & ~mask[b, 0]
        near(out[b], plain(q[b], k[b], v[b], visible))
        expected = lse(q[b], k[b], visible)
        near(sums[b, ..., 0], torch.where(expected == -torch.inf, torch.inf, expected))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.uint8])
@pytest.mark.parametrize("shape", [(5, 7), (1, 5, 7), (2, 1, 5, 7), (1, 1, 5, 7), (1, 1, 8, 16)])
def test_shapes_of_masks(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    q, k, v = f(2, N, 5, D), f(2, M, 7, D), f(2, M, 7, E)
    mask = f(*shape) > 0.5
    out, _ = checked(FIA, q, k, v, **HEADS, input_layout="BNSD", atten_mask=mask.to(dtype))
    for b, full in enumerate(mask.expand(2, 1, *shape[-2:]) if len(shape) < 4 else
                             mask.expand(2, *shape[1:])):  # fmt: skip
        near(out[b], plain(q[b], k[b], v[b], ~full[0, :5, :7]))


def test_one_query_takes_a_mask_of_its_keys() -> None:
    q, k, v = f(2, N, 1, D), f(2, M, 7, D), f(2, M, 7, E)
    mask = f(2, 7) > 0.5
    kwargs = {"pre_tokens": 0, "next_tokens": 0, "actual_seq_lengths": [0]}
    out, _ = checked(FIA, q, k, v, **HEADS, **kwargs, input_layout="BNSD", atten_mask=mask)
    for b in range(2):
        near(out[b], plain(q[b], k[b], v[b], ~mask[b][None]))


def test_without_a_mask_limits_do_not_apply() -> None:
    q, k, v = f(2, N, 5, D), f(2, M, 7, D), f(2, M, 7, E)
    out, _ = FIA(q, k, v, **HEADS, input_layout="BNSD", pre_tokens=0, next_tokens=0)
    near(out[0], plain(q[0], k[0], v[0]))


@pytest.mark.parametrize("batch", [1, 2])
def test_position_bias(batch: int) -> None:
    q, k, v = f(2, N, 5, D), f(2, M, 7, D), f(2, M, 7, E)
    bias = f(batch, N, 5, 16)
    out, _ = checked(FIA, q, k, v, **HEADS, input_layout="BNSD", pse_shift=bias)
    for b in range(2):
        wanted = bias[b % batch, :, :, :7]
        expected = scaled_dot_product_attention(q[b], k[b].repeat_interleave(2, 0),
                                                v[b].repeat_interleave(2, 0), wanted,
                                                scale=0.3)  # fmt: skip
        near(out[b], expected)


@pytest.mark.parametrize("layout", ["BSH", "BNSD", "TND"])
def test_split_rotary_dims_are_more_dims_of_a_head(layout: str) -> None:
    q, k, v = f(2, N, 5, D + 2), f(2, M, 7, D + 2), f(2, M, 7, E)
    if layout == "TND":
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        lengths = {"actual_seq_lengths": [5, 10], "actual_seq_lengths_kv": [7, 14]}
        whole, parts = [q, k, v], [x.split([D, 2], -1) for x in (q, k)]
    else:
        lengths = {}
        whole = [to_layout(x, layout) for x in (q, k, v)]
        parts = [[to_layout(y, layout) for y in x.split([D, 2], -1)] for x in (q, k)]
    (query, query_rope), (key, key_rope) = parts
    kwargs = {**HEADS, **lengths, "input_layout": layout}
    found = checked(FIA, query, key, whole[2], query_rope=query_rope, key_rope=key_rope, **kwargs)
    near(found[0], FIA(*whole, **kwargs)[0])


FORMS = ["hidden", "heads", "fractal"]


def page(x: Tensor, table: Tensor, blocks: int, size: int, form: str) -> Tensor:
    """Sequences `[M, tokens, D]` in a paged cache, NaN where no token lies."""
    cache = torch.full((blocks, size, x.shape[1], x.shape[3]), torch.nan)
    for b, tokens in enumerate(x):
        for t in range(tokens.shape[1]):
            cache[table[b, t // size], t % size] = tokens[:, t]
    if form == "hidden":
        return cache.flatten(2)
    cache = cache.transpose(1, 2)
    if form == "heads":
        return cache.contiguous()
    return cache.unflatten(-1, (-1, 2)).transpose(2, 3).contiguous()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", ["BNSD", "TND"])
def test_pages(layout: str, form: str) -> None:
    size, lengths = 4, [7, 5]
    table = torch.tensor([[5, 2, 0], [1, 4, 3]], dtype=torch.int32)
    q, k, v, rope = f(2, N, 3, D), f(2, M, 7, D), f(2, M, 7, 4), f(2, M, 7, 2)
    q_rope = f(2, N, 3, 2)
    caches = []
    for x in (k, v, rope):
        kept = [page(x[b : b + 1, :, :n], table[b : b + 1], 6, size, form)
                for b, n in enumerate(lengths)]  # fmt: skip
        caches.append(torch.where(kept[0].isnan(), kept[1], kept[0]))
    key, value, key_rope = caches
    query, query_rope, kwargs = q, q_rope, {}
    if layout == "TND":
        query, query_rope = (x.transpose(1, 2).flatten(0, 1) for x in (q, q_rope))
        kwargs = {"actual_seq_lengths": [3, 6]}
    out, _ = checked(
        FIA,
        query,
        key,
        value,
        **HEADS,
        **kwargs,
        query_rope=query_rope,
        key_rope=key_rope,
        input_layout=layout,
        block_table=table,
        block_size=size,
        actual_seq_lengths_kv=lengths,
        sparse_mode=3,
        atten_mask=TRIANGLE,
    )
    found = out if layout == "BNSD" else out.unflatten(0, (2, 3)).transpose(1, 2)
    for b, n in enumerate(lengths):
        seen = torch.ones(3, n, dtype=torch.bool).tril(n - 3)
        queries, keys = torch.cat([q, q_rope], -1)[b], torch.cat([k, rope], -1)[b, :, :n]
        near(found[b], plain(queries, keys, v[b, :, :n], seen))


def test_one_length_stands_for_all_sequences_in_pages() -> None:
    table = torch.tensor([[2, 0], [1, 3]], dtype=torch.int32)
    q, k, v = f(2, N, 3, D), f(2, M, 5, D), f(2, M, 5, 4)
    caches = [page(x, table, 4, 4, "heads").nan_to_num() for x in (k, v)]
    kwargs = {"block_table": table, "block_size": 4, "actual_seq_lengths_kv": [5]}
    out, _ = checked(FIA, q, *caches, **HEADS, **kwargs, input_layout="BNSD")
    for b in range(2):
        near(out[b], plain(q[b], k[b], v[b]))


def test_no_keys_give_zeros() -> None:
    q, k, v = f(2, N, 3, D), f(2, M, 0, D), f(2, M, 0, E)
    out, sums = checked(FIA, q, k, v, **HEADS, input_layout="BNSD", softmax_lse_flag=True)
    assert not out.any()
    assert (sums == torch.inf).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_second_version_with_a_sink(dtype: torch.dtype) -> None:
    q, k, v = f(2, N, 4, D, dtype=dtype), f(2, M, 7, D, dtype=dtype), f(2, M, 7, E, dtype=dtype)
    sink = f(N, dtype=dtype)
    out, sums = checked(
        ops.npu_fused_infer_attention_score_v2,
        q,
        k,
        v,
        learnable_sink=sink,
        num_query_heads=N,
        num_key_value_heads=M,
        softmax_scale=0.3,
        input_layout="BNSD",
        return_softmax_lse=True,
    )
    for b in range(2):
        # One more key whose score is the sink, and whose value is zero.
        total = torch.logaddexp(lse(q[b], k[b]), sink.double()[:, None])
        near(out[b], plain(q[b], k[b], v[b]) * (lse(q[b], k[b]) - total).exp()[..., None])
        near(sums[b, ..., 0], total)


ONE = f(2, N, 1, D)
QKV = (f(2, N, 5, D), f(2, M, 7, D), f(2, M, 7, E))
PACKED = (f(9, N, D), f(9, M, D), f(9, M, D))
REFUSED = [
    (QKV, {"quant_scale1": f(1)}, "quant_scale1=a tensor"),
    (QKV, {"kv_padding_size": f(1)}, "kv_padding_size=a tensor"),
    (QKV, {"key_shared_prefix": f(1)}, "key_shared_prefix=a tensor"),
    (QKV, {"antiquant_mode": 1}, "antiquant_mode=1"),
    (QKV, {"inner_precise": 4}, "inner_precise=4"),
    (QKV, {"sparse_mode": 9}, "sparse_mode=9"),
    (QKV, {"input_layout": "SBH"}, "input_layout='SBH'"),
    ((ONE, *QKV[1:]), {"sparse_mode": 2, "atten_mask": TRIANGLE},
     "sparse_mode=2 for one query: the device ignores it"),
    (PACKED, {"input_layout": "TND", "atten_mask": TRIANGLE},
     "atten_mask=a tensor with input_layout TND"),
]  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("args", "kwargs", "message"), REFUSED)
def test_refused(
    args: tuple[Tensor, ...], kwargs: dict[str, object], message: str, device: str
) -> None:
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    with pytest.raises(RolemeshError) as caught:
        FIA(*(x.to(device) for x in args), **{**HEADS, "input_layout": "BNSD", **moved})
    assert caught.value.code == "RM028"
    named = f"npu_fused_infer_attention_score has no reference semantics for {message}"
    assert named in str(caught.value)


WRONG = [
    (QKV, {"num_heads": 4}, "6 heads, not num_heads=4"),
    (QKV, {"num_key_value_heads": 4}, "4 key heads do not divide 6 query heads"),
    (QKV, {"sparse_mode": 3}, "sparse_mode 3 needs atten_mask of 2048 by 2048"),
    (QKV, {"sparse_mode": 1}, "sparse_mode 1 needs atten_mask"),
    (QKV, {"sparse_mode": 3, "atten_mask": TRIANGLE.T}, "takes the strictly upper triangle"),
    (QKV, {"query_rope": f(2, N, 5, 2)}, "query_rope and key_rope come together"),
    (QKV, {"actual_seq_lengths_kv": [8, 7]}, r"sequences that end at \[0, 8\] of 7 tokens"),
    (QKV, {"actual_seq_lengths": [1, 2], "actual_seq_lengths_kv": []}, "0 lengths for 2 sequences"),
    (PACKED, {"input_layout": "TND"}, "layout TND needs the ends of sequences"),
    (PACKED, {"input_layout": "TND", "actual_seq_lengths": [5, 4],
              "actual_seq_lengths_kv": [4, 9]}, r"sequences that end at \[0, 5, 4\]"),
    ((QKV[0], QKV[1].to(torch.int8), QKV[2]), {}, "quantized operands need their scales"),
    ((QKV[0], QKV[1][0], QKV[2][0]), {}, r"key \[3, 7, 8\] is not BNSD"),
]  # fmt: skip


@pytest.mark.parametrize(("args", "kwargs", "message"), WRONG)
def test_calls_that_no_device_takes(
    args: tuple[Tensor, ...], kwargs: dict[str, object], message: str
) -> None:
    with pytest.raises((RuntimeError, ValueError), match=message):
        FIA(*args, **{**HEADS, "input_layout": "BNSD", **kwargs})


def test_pages_of_another_size() -> None:
    table = torch.zeros(2, 2, dtype=torch.int32)
    kwargs = {**HEADS, "input_layout": "BNSD", "block_table": table}
    cache = f(3, 4, M * D)
    with pytest.raises((RuntimeError, ValueError), match="block_size=8 for a cache of"):
        FIA(QKV[0], cache, cache, block_size=8, actual_seq_lengths_kv=[4, 4], **kwargs)
    with pytest.raises((RuntimeError, ValueError), match="9 tokens are in 3 blocks"):
        FIA(QKV[0], cache, cache, block_size=4, actual_seq_lengths_kv=[9, 4], **kwargs)
    with pytest.raises((RuntimeError, ValueError), match="block_table needs the lengths of keys"):
        FIA(QKV[0], cache, cache, block_size=4, **kwargs)
