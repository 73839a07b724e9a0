"""The store keeps one shard per tensor, frees full storage, and refuses what it cannot serve."""

from __future__ import annotations

import gc

import pytest
import torch

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.placement import REPLICATE, Owner, Shard
from rolemesh.runtime.store import Store

MESH = Mesh({"tp": 4})
ROWS = Layout((Shard(0, 1, 10),))


def test_shard_is_cut_once_and_keeps_its_pointer() -> None:
    store, weight = Store(), torch.arange(30.0).reshape(10, 3)
    first = store.local(weight, "w", ROWS, MESH, rank=1)
    assert torch.equal(first, torch.arange(30.0).reshape(10, 3)[3:6])
    store.release([weight])
    assert weight.untyped_storage().nbytes() == 0
    assert weight.shape == (10, 3)
    again = store.local(weight, "w", ROWS, MESH, rank=1)
    assert again.data_ptr() == first.data_ptr()


def test_writing_to_a_ghost_raises() -> None:
    store, cache = Store(), torch.randn(10, 3)
    store.local(cache, "cache", ROWS, MESH, rank=1)
    store.release([cache])
    with pytest.raises(RuntimeError, match="Cannot access data pointer"):
        cache.zero_()
    cache.copy_(cache)  # the epilogue of a compiled call does this


def test_replicated_tensor_is_stored_too() -> None:
    store, weight = Store(), torch.randn(5, 3)
    expected = weight.clone()
    local = store.local(weight, "w", Layout((REPLICATE,)), MESH, rank=2)
    store.release([weight])
    assert torch.equal(local, expected)


def test_rank_that_does_not_own_a_weight_holds_no_bytes() -> None:
    store, weight = Store(), torch.randn(5, 3)
    assert store.local(weight, "w", Layout((Owner(0),)), MESH, rank=1).numel() == 0


def test_same_distribution_spelled_otherwise_is_the_same_shard() -> None:
    store, weight = Store(), torch.randn(8, 3)
    first = store.local(weight, "w", Layout((Shard(0, 1, 8),)), MESH, rank=0)
    assert store.local(weight, "w", Layout((Shard(0, 1, 4),)), MESH, rank=0) is first


def test_another_layout_is_refused() -> None:
    store, weight = Store(), torch.randn(10, 3)
    store.local(weight, "layers.0.o_proj.weight", ROWS, MESH, rank=0)
    with pytest.raises(RolemeshError) as caught:
        store.local(weight, "layers.0.o_proj.weight", Layout((Shard(1, 1, 3),)), MESH, rank=0)
    assert caught.value.code == "RM024"
    assert "layers.0.o_proj.weight is stored in another layout" in str(caught.value)
    assert "same role, mesh and annotations" in str(caught.value)


def test_freed_storage_of_an_unknown_tensor_is_refused() -> None:
    store, weight = Store(), torch.randn(10, 3)
    view = weight.view(10, 3)
    store.local(weight, "w", ROWS, MESH, rank=0)
    store.release([weight])
    with pytest.raises(RolemeshError) as caught:
        store.local(view, "view", ROWS, MESH, rank=0)
    assert caught.value.code == "RM024"
    assert "the full storage of view was freed" in str(caught.value)


def test_a_shard_is_put_for_a_tensor_without_bytes() -> None:
    store, weight, shard = Store(), torch.empty(10, 3, device="meta"), torch.randn(3, 3)
    store.put(weight, "w", ROWS, MESH, shard)
    assert store.local(weight, "w", ROWS, MESH, rank=1) is shard
    with pytest.raises(RolemeshError) as caught:
        store.local(weight, "w", Layout((REPLICATE,)), MESH, rank=1)
    assert "w is stored in another layout" in str(caught.value)


def test_a_shard_that_programs_may_hold_is_not_replaced() -> None:
    store, weight = Store(), torch.randn(10, 3)
    first = store.local(weight, "w", ROWS, MESH, rank=1)
    with pytest.raises(RolemeshError) as caught:
        store.put(weight, "w", ROWS, MESH, torch.zeros(3, 3))
    assert caught.value.code == "RM024"
    assert "w is stored already" in str(caught.value)
    assert "load a checkpoint before the model runs, and once" in str(caught.value)
    assert store.local(weight, "w", ROWS, MESH, rank=1) is first


def test_shard_goes_with_its_tensor() -> None:
    store, weight = Store(), torch.randn(10, 3)
    store.local(weight, "w", ROWS, MESH, rank=0)
    assert len(store.stored()) == 1
    del weight
    gc.collect()
    assert store.stored() == []


def test_tensors_that_are_stored_alike_are_of_one_kind() -> None:
    store = Store()
    first, second, whole, plain = (torch.randn(10, 3) for _ in range(4))
    for tensor in (first, second):
        store.local(tensor, "w", ROWS, MESH, rank=1)
    store.local(whole, "w", Layout((REPLICATE,)), MESH, rank=1)
    stored = store.kinds([first, second, whole, plain])
    store.release([first, second, whole, plain])
    freed = store.kinds([first, second, whole, plain])
    assert stored[0] == stored[1] != stored[2]
    assert freed[0] == freed[1] != freed[2]
    assert stored[3] is freed[3] is None
    assert not set(stored[:3]) & set(freed[:3])
    locals_ = store.locals([first, plain])
    assert locals_[0].shape == (3, 3)
    assert locals_[1] is plain
