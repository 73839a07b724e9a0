"""Rules of fused attention, sparse attention and its indexer, checked on all choices."""

from __future__ import annotations

import pytest
import torch
from tests.passes.rules.harness import check_op, make_call
from tests.passes.rules.rule_line import rule_line

from rolemesh.compiler.ir.rule import Kind
from rolemesh.lowering.npu.define import define_npu_ops
from rolemesh.passes.rules import default_rules, npu_attention
from rolemesh.passes.rules.registry import Rules

define_npu_ops()
ops = torch.ops.npu
FIA = ops.npu_fused_infer_attention_score.default
FIA2 = ops.npu_fused_infer_attention_score_v2.default
INDEXER = ops.npu_lightning_indexer.default
SPARSE = ops.npu_sparse_flash_attention.default
RULES = Rules((npu_attention.RULES,), (npu_attention.LOCAL,))
TRIANGLE = torch.ones(2048, 2048, dtype=torch.bool).triu(1)


def f(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def hidden(*shape: int) -> torch.Tensor:
    """A mask in which every query sees a key."""
    mask = f(*shape) > 0
    mask[..., 0] = False
    return mask


def i(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def picks(*shape: int, keys: int) -> torch.Tensor:
    """Distinct keys for each query, the last -1."""
    found = torch.rand(*shape[:-1], keys, generator=torch.Generator().manual_seed(1)).argsort(-1)
    found = found[..., : shape[-1]].clone()
    found[..., -1] = -1
    return found.int()


def heads(layout: str, query: int, key: int, **more: object) -> dict[str, object]:
    return {"input_layout": layout, "num_heads": query, "num_key_value_heads": key, **more}


Q, K, V = f(2, 6, 5, 8), f(2, 3, 7, 8), f(2, 3, 7, 4)
MHA = (f(3, 4, 5, 8), f(3, 4, 7, 8), f(3, 4, 7, 8))
BSH = (f(2, 5, 6 * 4), f(2, 7, 3 * 4), f(2, 7, 3 * 2))
ROPES = {"query_rope": f(2, 6, 5, 2), "key_rope": f(2, 3, 7, 2)}
TND = (f(9, 6, 4), f(11, 3, 4), f(11, 3, 4))
ENDS = {"actual_seq_lengths": [4, 9], "actual_seq_lengths_kv": [4, 11]}
TABLE = torch.tensor([[1, 3], [4, 0]], dtype=torch.int32)
PAGED = {"block_table": TABLE, "block_size": 4, "actual_seq_lengths_kv": [8, 5]}
FUSED = [
    (MHA, heads("BNSD", 4, 4, softmax_lse_flag=True),
     "a b c d!, a b e! d!, a b e! f! -> a b c f!, a b c 1"),
    (MHA, heads("BNSD", 4, 0), "a b c d!, a b e! d!, a b e! f! -> a b c f!, g!"),
    ((f(3, 4, 5, 8), f(3, 1, 7, 8), f(3, 1, 7, 8)), heads("BNSD_BSND", 4, 1),
     "a b c d!, a 1 e! d!, a 1 e! f! -> a c b f!, g!"),
    ((Q, K, V), heads("BNSD", 6, 3, softmax_lse_flag=True),
     "a (b c) d e!, a b f! e!, a b f! g! -> a (b c) d g!, a (b c) d 1"),
    ((Q, K, V), heads("BNSD", 6, 3, **ROPES),
     "a (b c) d e!, a b f! e!, a b f! g!, a (b c) d h!, a b f! h! -> a (b c) d g!, i!"),
    ((Q, K, V), heads("BNSD", 6, 3, atten_mask=hidden(2, 1, 5, 7), sparse_mode=1),
     "a (b c) d e!, a b f! e!, a b f! g!, a 1 d f! -> a (b c) d g!, h!"),
    ((Q, K, V), heads("BNSD", 6, 3, atten_mask=hidden(1, 5, 7), pse_shift=f(1, 6, 5, 9)),
     "a (b c) d e!, a b f! e!, a b f! g!, 1 d f!, 1 (b c) d h! -> a (b c) d g!, i!"),
    ((Q, K, V), heads("BNSD", 6, 3, atten_mask=hidden(5, 7)),
     "a (b c) d! e!, a b f! e!, a b f! g!, d! f! -> a (b c) d! g!, h!"),
    ((Q, K, V), heads("BNSD", 6, 3, atten_mask=hidden(1, 1, 8, 8)),
     "a (b c) d! e!, a b f! e!, a b f! g!, 1 1 h! i! -> a (b c) d! g!, j!"),
    ((Q, K, V), heads("BNSD", 6, 3, atten_mask=hidden(1, 5, 7), next_tokens=2),
     "a (b c) d! e!, a b f! e!, a b f! g!, 1 d! f! -> a (b c) d! g!, h!"),
    ((Q, K, V), heads("BNSD", 6, 3, atten_mask=hidden(1, 5, 7), pre_tokens=65535),
     "a (b c) d e!, a b f! e!, a b f! g!, 1 d f! -> a (b c) d g!, h!"),
    ((Q, K, V), heads("BNSD", 6, 3, actual_seq_lengths_kv=[7, 4]),
     "a! (b c) d e!, a! b f! e!, a! b f! g! -> a! (b c) d g!, h!"),
    ((Q, K, V), heads("BNSD", 6, 3, actual_seq_lengths_kv=[4], actual_seq_lengths=[3]),
     "a (b c) d! e!, a b f! e!, a b f! g! -> a (b c) d! g!, h!"),
    (BSH, heads("BSH", 6, 3, softmax_lse_flag=True),
     "a b (c d e!), a f! (c e!), a f! (c g!) -> a b (c d g!), a (c d) b 1"),
    (BSH, heads("BSH_NBSD", 6, 3),
     "a b (c d e!), a f! (c e!), a f! (c g!) -> (c d) a b g!, h!"),
    ((f(2, 5, 24), f(2, 7, 4), f(2, 7, 4)), heads("BSH", 6, 1),
     "a b (c d!), a e! d!, a e! f! -> a b (c f!), g!"),
    (tuple(x.transpose(1, 2) for x in (Q, K, V)), heads("BSND", 6, 3),
     "a b (c d) e!, a f! c e!, a f! c g! -> a b (c d) g!, h!"),
    ((f(6, 5, 8), f(3, 7, 8), f(3, 7, 8)), heads("NSD", 6, 3, softmax_lse_flag=True),
     "(a b) c d!, a e! d!, a e! f! -> (a b) c f!, 1 (a b) c 1"),
    (TND, heads("TND", 6, 3, softmax_lse_flag=True, **ENDS),
     "a! (b c) d!, e! b d!, e! b f! -> a! (b c) f!, a! (b c) 1"),
    ((Q, f(6, 4, 24), f(6, 4, 12)), heads("BNSD", 6, 3, **PAGED),
     "a! (b c) d e!, f! g! (b e!), h! i! (b j!), a! k! -> a! (b c) d j!, l!"),
    ((Q, f(6, 3, 4, 8), f(6, 3, 4, 4)), heads("BNSD", 6, 3, **PAGED),
     "a! (b c) d e!, f! b g! e!, h! b i! j!, a! k! -> a! (b c) d j!, l!"),
    ((f(9, 6, 16), f(6, 3, 2, 4, 8), f(6, 3, 2, 4, 8)),
     heads("TND", 6, 3, actual_seq_lengths=[4, 9], **PAGED),
     "a! (b c) d!, e! b f! g! h!, i! b j! k! l!, m! n! -> a! (b c) o!, p!"),
]  # fmt: skip


@pytest.mark.parametrize(("args", "kwargs", "expect"), FUSED)
def test_fused(args: tuple[object, ...], kwargs: dict[str, object], expect: str) -> None:
    check_op(RULES, FIA, args, kwargs, expect=expect, ranks=(2, 3), limit=4)


CAUSAL = [
    ((Q, K, V), heads("BNSD", 6, 3, atten_mask=TRIANGLE, sparse_mode=3),
     "a (b c) d! e!, a b f! e!, a b f! g!, h! i! -> a (b c) d! g!, j!"),
    (TND, heads("TND_NTD", 6, 3, atten_mask=TRIANGLE, sparse_mode=3, **ENDS),
     "a! (b c) d!, e! b d!, e! b f!, g! h! -> (b c) a! f!, i!"),
]  # fmt: skip


@pytest.mark.parametrize(("args", "kwargs", "expect"), CAUSAL)
def test_causal(args: tuple[object, ...], kwargs: dict[str, object], expect: str) -> None:
    check_op(RULES, FIA, args, kwargs, expect=expect, ranks=(2,), axes2=False)


def test_rows_of_a_causal_mask_of_their_own_extent_stay_whole() -> None:
    args = (f(1, 2, 2048, 4), f(1, 2, 2048, 4), f(1, 2, 2048, 4))
    kwargs = heads("BNSD", 2, 2, atten_mask=TRIANGLE[None, None], sparse_mode=3)
    call, _ = make_call(FIA, args, kwargs)
    expect = "a b c! d!, a b e! d!, a b e! f!, g! h! i! j! -> a b c! f!, k!"
    assert rule_line(RULES.rule(call)) == expect


def test_second_version() -> None:
    kwargs: dict[str, object] = {
        "input_layout": "BNSD",
        "num_query_heads": 6,
        "num_key_value_heads": 3,
        "learnable_sink": f(6),
        "return_softmax_lse": True,
    }
    expect = "a (b c) d e!, a b f! e!, a b f! g!, (b c) -> a (b c) d g!, a (b c) d 1"
    check_op(RULES, FIA2, (Q, K, V), kwargs, expect=expect, ranks=(2, 3), limit=6)


def test_a_single_row_with_a_mask_of_its_sequence() -> None:
    args = (f(2, 6, 1, 8), K, V)
    kwargs = heads("BNSD", 6, 3, atten_mask=hidden(2, 7))
    expect = "a (b c) d! e!, a b f! e!, a b f! g!, a f! -> a (b c) d! g!, h!"
    check_op(RULES, FIA, args, kwargs, expect=expect, ranks=(2, 3), limit=4)


INDEX = (f(3, 5, 4, 8), f(3, 6, 1, 8), f(3, 5, 4))
PICKS = (f(2, 3, 6, 8), f(2, 7, 1, 8), f(2, 7, 1, 8), picks(2, 3, 1, 4, keys=7), 0.3)
MLA = {"query_rope": f(2, 3, 6, 2), "key_rope": f(2, 7, 1, 2), "attention_mode": 2}
LENGTHS = {"actual_seq_lengths_query": i(3, 2), "actual_seq_lengths_kv": i(7, 4)}
OTHERS = [
    (INDEXER, INDEX, {"sparse_count": 4, "sparse_mode": 0, "return_value": True},
     "a b c! d!, a e! 1 d!, a b c! -> a b 1 f!, a b 1 f!"),
    (INDEXER, INDEX, {"sparse_count": 4}, "a b! c! d!, a e! 1 d!, a b! c! -> a b! 1 f!, g!"),
    (INDEXER, INDEX,
     {"sparse_count": 4, "sparse_mode": 0, "actual_seq_lengths_query": i(5, 3, 2),
      "actual_seq_lengths_key": i(6, 6, 1)},
     "a b! c! d!, a e! 1 d!, a b! c!, a, a -> a b! 1 f!, g!"),
    (INDEXER, (f(3, 5, 4, 8), f(4, 4, 1, 8), f(3, 5, 4)),
     {"sparse_count": 4, "layout_key": "PA_BSND", "actual_seq_lengths_key": i(8, 6, 3),
      "block_table": torch.tensor([[1, 3], [2, 0], [0, 0]], dtype=torch.int32)},
     "a b! c! d!, e! f! 1 d!, a b! c!, a, a g! -> a b! 1 h!, i!"),
    (INDEXER, (f(5, 4, 8), f(6, 4, 1, 8), f(5, 4)),
     {"sparse_count": 4, "layout_query": "TND", "layout_key": "PA_BSND",
      "actual_seq_lengths_query": i(2, 5), "actual_seq_lengths_key": i(6, 8),
      "block_table": TABLE},
     "a! b! c!, d! e! 1 c!, a! b!, f!, f!, f! g! -> a! 1 h!, i!"),
    (SPARSE, PICKS, {"sparse_mode": 0, "return_softmax_lse": True, **MLA},
     ("a b c d!, a e! 1 d!, a e! 1 d!, a b 1 f!, a b c g!, a e! 1 h!"
     " -> a b c d!, a 1 b c, a 1 b c")),
    (SPARSE, PICKS, {**MLA, **LENGTHS, "sinks": f(6)},
     ("a b! c d!, a e! 1 d!, a e! 1 d!, a b! 1 f!, a b! c g!, a e! 1 h!, a, a, c"
     " -> a b! c d!, i!, i!")),
    (SPARSE, (f(2, 3, 6, 8), f(2, 7, 3, 8), f(2, 7, 3, 8), picks(2, 3, 3, 4, keys=7), 0.3),
     {"sparse_mode": 0, "return_softmax_lse": True, "query_rope": f(2, 3, 6, 2),
      "key_rope": f(2, 7, 3, 2), "attention_mode": 2},
     ("a b (c d) e!, a f! c e!, a f! c e!, a b c g!, a b (c d) h!, a f! c i!"
     " -> a b (c d) e!, a c b d, a c b d")),
    (SPARSE, (f(5, 6, 8), f(6, 4, 1, 8), None, picks(5, 1, 3, keys=5), 0.3),
     {"layout_query": "TND", "layout_kv": "PA_BSND", "block_table": TABLE, "attention_mode": 2,
      "query_rope": f(5, 6, 2), "key_rope": f(6, 4, 1, 2),
      "actual_seq_lengths_query": i(2, 5), "actual_seq_lengths_kv": i(6, 8)},
     "a! b c!, d! e! 1 c!, a! 1 f!, g! h!, a! b i!, d! e! 1 j!, g!, g! -> a! b c!, k!, k!"),
]  # fmt: skip


@pytest.mark.parametrize(("target", "args", "kwargs", "expect"), OTHERS)
def test_sparse(
    target: torch._ops.OpOverload,
    args: tuple[object, ...],
    kwargs: dict[str, object],
    expect: str,
) -> None:
    check_op(RULES, target, args, kwargs, expect=expect, ranks=(2, 3), limit=4)


def test_options_that_the_rule_does_not_know_stay_whole() -> None:
    call, _ = make_call(FIA, (Q, K, V), heads("BNSD", 6, 3))
    call.kwargs["kv_padding_size"] = call.operands[0]
    call = type(call)(
        call.target, call.args, call.kwargs, (*call.operands, call.operands[0]), call.results
    )
    assert set(RULES.rule(call).kinds) == {Kind.REPLICATE}


def test_half_precision() -> None:
    args = tuple(x.bfloat16() for x in (Q, K, V))
    expect = "a (b c) d e!, a b f! e!, a b f! g! -> a (b c) d g!, h!"
    check_op(RULES, FIA, args, heads("BNSD", 6, 3), expect=expect, ranks=(2,), limit=4)


@pytest.mark.parametrize("name", [*npu_attention.RULES])
def test_op_has_the_rule_by_default(name: str) -> None:
    target = getattr(ops, name.removeprefix("npu::")).default
    assert default_rules().covers(target)
