"""Definitions of the fused ops: as torch wants them, functionalized, and never over torch_npu's."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from tests.lowering.npu.runs import f
from torch import Tensor
from torch._functorch.aot_autograd import aot_function
from torch.library import opcheck
from torch.utils import _pytree as pytree

from rolemesh.lowering.npu.define import define_npu_ops, npu_ops

define_npu_ops()
ops = torch.ops.npu


def i(*values: object, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


TOKENS = (f(4, 2, 8), f(4, 2, 6), f(3, 4, 2, 8), f(3, 4, 2, 6), i(1, 5, -1, 11))
KV = (f(2, 1, 3, 12), f(8), f(2, 1, 3, 4), f(2, 1, 3, 4), i(1, 5, -1, 11, 0, 3),
      f(4, 4, 1, 4), f(4, 4, 1, 8))  # fmt: skip
PAGED = {"cache_mode": "PA", "is_output_kv": True}
ROPES = {"query_rope": f(2, 3, 4, 2), "key_rope": f(2, 5, 1, 2), "attention_mode": 2}
CALLS: list[tuple[str, tuple[object, ...], dict[str, object]]] = [
    ("npu_rms_norm", (f(3, 5, 8), f(8)), {}),
    ("npu_add_rms_norm", (f(3, 8), f(3, 8, seed=1), f(8)), {}),
    ("npu_add_rms_norm_v2", (f(3, 8), f(3, 8, seed=1), f(8)), {}),
    ("npu_add_rms_norm_v2_functional", (f(3, 8), f(3, 8, seed=1), f(8)), {}),
    ("npu_rotary_mul", (f(2, 3, 5, 8), f(1, 1, 5, 8), f(1, 1, 5, 8)), {}),
    ("npu_apply_rotary_pos_emb", (f(7, 6, 8), f(7, 3, 8), f(7, 1, 8), f(7, 1, 8), "TND"), {}),
    ("npu_interleave_rope", (f(2, 3, 5, 8), f(2, 1, 5, 8), f(2, 1, 5, 8)), {}),
    ("npu_swiglu", (f(3, 10),), {}),
    ("npu_fused_infer_attention_score", (f(2, 6, 5, 8), f(2, 3, 7, 8), f(2, 3, 7, 8)),
     {"num_heads": 6, "num_key_value_heads": 3, "input_layout": "BNSD", "softmax_lse_flag": True}),
    ("npu_fused_infer_attention_score_v2", (f(2, 5, 48), f(2, 7, 24), f(2, 7, 24)),
     {"num_query_heads": 6, "num_key_value_heads": 3}),
    ("npu_lightning_indexer", (f(2, 3, 4, 8), f(2, 5, 1, 8), f(2, 3, 4)),
     {"sparse_count": 3, "return_value": True}),
    ("npu_sparse_flash_attention",
     (f(2, 3, 4, 8), f(2, 5, 1, 8), None, i(3, 1, -1, 0, 2, 4).view(2, 3, 1, 1), 0.3), ROPES),
    ("npu_scatter_nd_update", (f(6, 3), i([4], [1]), f(2, 3)), {}),
    ("npu_scatter_nd_update_", (f(6, 3), i([4], [1]), f(2, 3)), {}),
    ("npu_scatter_pa_kv_cache", TOKENS, {"cache_mode": "Norm"}),
    ("npu_scatter_pa_kv_cache_functional", TOKENS, {"cache_mode": "Norm"}),
    ("npu_kv_rmsnorm_rope_cache_v2", KV, PAGED),
    ("npu_kv_rmsnorm_rope_cache_v2_functional", KV, PAGED),
]  # fmt: skip


@pytest.mark.parametrize(("name", "args", "kwargs"), CALLS, ids=[name for name, *_ in CALLS])
def test_op_is_a_good_citizen_of_torch(
    name: str, args: tuple[object, ...], kwargs: dict[str, object]
) -> None:
    opcheck(getattr(ops, name).default, args, kwargs)


def test_a_second_call_does_nothing() -> None:
    before = ops.npu_rms_norm.default
    define_npu_ops()
    assert ops.npu_rms_norm.default is before


def test_every_op_is_defined_by_its_schema() -> None:
    for name, op in npu_ops().items():
        base, _, overload = name.partition(".")
        found = getattr(getattr(ops, base), overload or "default")._schema
        assert str(found) == str(torch._C.parse_schema(f"npu::{op.schema}"))


def test_definitions_that_exist_are_kept() -> None:
    """As if torch_npu had been imported: checked in a process of its own."""
    script = """
import torch
library = torch.library.Library("npu", "FRAGMENT")
library.define("npu_swiglu(Tensor input, int dim=-1) -> Tensor")
library.impl("npu_swiglu", lambda x, dim=-1: x + 40, "CPU")
from rolemesh.lowering.npu.define import define_npu_ops
assert not hasattr(torch.ops.npu, "npu_rms_norm"), "an import has defined ops"
define_npu_ops()
assert torch.ops.npu.npu_swiglu(torch.full((2,), 2.0)).tolist() == [42, 42]
assert torch.ops.npu.npu_rms_norm(torch.ones(2), torch.ones(2))[0].shape == (2,)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def captured(
    call: Callable[..., object], *args: Tensor
) -> tuple[list[str], list[object], list[Tensor]]:
    """The ops that a call is captured as, its results, and its arguments afterwards."""
    graphs: list[torch.fx.GraphModule] = []

    def compiler(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    clones = [x.clone() for x in args]
    with torch.no_grad():
        found = aot_function(call, compiler, keep_inference_input_mutations=True)(*clones)
    targets = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    return targets, pytree.tree_leaves(found), clones


WRITES: list[tuple[Callable[..., object], tuple[Tensor, ...], str, int]] = [
    (ops.npu_add_rms_norm_v2, (f(3, 8), f(3, 8, seed=1), f(8)),
     "npu_add_rms_norm_v2_functional", 2),
    (ops.npu_scatter_nd_update_, (f(6, 3), i([4], [1]), f(2, 3)), "npu_scatter_nd_update", 1),
    (lambda *a: ops.npu_scatter_nd_update_(*a) * 2, (f(6, 3), i([4], [1]), f(2, 3)),
     "npu_scatter_nd_update", 1),
    (lambda *a: ops.npu_scatter_pa_kv_cache(*a, cache_mode="Norm"), TOKENS,
     "npu_scatter_pa_kv_cache_functional", 2),
    (lambda *a: ops.npu_kv_rmsnorm_rope_cache_v2(*a, **PAGED), KV,
     "npu_kv_rmsnorm_rope_cache_v2_functional", 2),
    (lambda *a: ops.npu_kv_rmsnorm_rope_cache(*a, **PAGED), KV,
     "npu_kv_rmsnorm_rope_cache_v2_functional", 2),
    (lambda *a: ops.npu_kv_rmsnorm_rope_cache(*a, **PAGED)[0] + 1, KV,
     "npu_kv_rmsnorm_rope_cache_v2_functional", 2),
]  # fmt: skip


@pytest.mark.parametrize(("call", "args", "variant", "writes"), WRITES)
def test_writes_are_captured_as_the_functional_variant_and_copies(
    call: Callable[..., object], args: tuple[Tensor, ...], variant: str, writes: int
) -> None:
    eager = [x.clone() for x in args]
    expected = call(*eager)
    targets, found, after = captured(call, *args)
    assert [target for target in targets if "npu." in target] == [f"npu.{variant}.default"]
    assert targets.count("aten.copy_.default") == writes
    wanted = [leaf for leaf in pytree.tree_leaves(expected) if leaf is not None]
    found = [leaf for leaf in found if leaf is not None]
    for a, b in zip((*found, *after), (*wanted, *eager), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_writes_to_a_view() -> None:
    def call(cache: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
        ops.npu_scatter_nd_update_(cache[1], indices, updates)
        return cache.sum()

    cache, indices, updates = f(3, 6, 4), i([4], [1]), f(2, 4)
    eager = cache.clone()
    expected = call(eager, indices, updates)
    targets, found, after = captured(call, cache, indices, updates)
    assert "npu.npu_scatter_nd_update.default" in targets
    torch.testing.assert_close(found[0], expected)
    assert torch.equal(after[0], eager)
