"""Caches that a user's annotation splits where slots need them whole are refused."""

from __future__ import annotations

import pytest
import torch
from tests.compiler.engine.serving import model_of

from rolemesh import P, RolemeshError
from rolemesh.compiler.api import shard
from rolemesh.compiler.capture.tracing import trace
from rolemesh.compiler.engine.cache import Batch
from rolemesh.compiler.engine.rows import CacheRows
from rolemesh.compiler.engine.serving import ServingModel
from rolemesh.compiler.engine.view import plan_cache
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.runtime.groups import MeshGroups
from rolemesh.runtime.store import default_store

pytestmark = pytest.mark.xdist_group("engine")


def test_a_cache_split_by_tokens_is_refused_and_one_by_heads_gets_its_shard() -> None:
    model = model_of("llama", 1)
    plan = plan_cache(model, 3, 8)
    rows = CacheRows(plan, torch.device("cpu"), MeshGroups(Mesh({"tp": 2}), 1, {}), "tp")
    batch = Batch(*(torch.zeros(2, 1, dtype=torch.long) for _ in range(4)), torch.tensor([0, 1]))
    with torch.no_grad():
        traced = trace(ServingModel(model, 8), *batch, rows.tables, True, False)
    inputs = [
        rows.tables.get(entry.name.removeprefix("tables['").removesuffix("']"), torch.zeros(0))
        for entry in traced.program.inputs
    ]
    for dim, spec in ((0, P("tp")), (2, P(None, None, "tp"))):
        program = shard(traced, {"tp": 2}, "decode", annotations={"tables*keys*": spec}).program
        with pytest.raises(RolemeshError) as raised:
            rows.place(program, inputs)
        assert raised.value.code == "RM018"
        assert raised.value.what == f"cache tensor 0.keys is split along dim {dim}"
    rows.place(shard(traced, {"tp": 2}, "decode").program, inputs)
    for table in rows.tables.values():
        stored = default_store().find(table)
        assert stored is not None
        assert stored.local.shape == (4, 2, 8, 12)
        assert not stored.local.any()
