"""Keys of sharded programs: another one for everything that decides them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import sympy
import torch

from rolemesh.compiler.cache.folder import CacheFolder, CacheWarning
from rolemesh.compiler.cache.sharded import Kept
from rolemesh.compiler.capture.tracing import trace
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.placement import REPLICATE, Shard
from rolemesh.compiler.ir.program import Program
from rolemesh.compiler.ir.spec import P
from rolemesh.compiler.pipeline import ShardOptions, shard_program
from rolemesh.lowering.targets import target
from rolemesh.passes.cost import CostTable
from rolemesh.runtime.groups import MeshGroups

MESH = Mesh({"tp": 2})
OPTIONS = ShardOptions(MESH, annotations={"weight": P("tp", None)})


def program(rows: int = 3) -> Program:
    """A linear layer on `rows` rows."""
    model = torch.nn.Linear(5, 4, bias=False).requires_grad_(False)
    with torch.no_grad():
        return trace(model, torch.ones(rows, 5)).program


def test_everything_that_decides_a_program_is_in_its_key(tmp_path: Path) -> None:
    folder, captured = CacheFolder(tmp_path), program()
    changed = [
        dataclasses.replace(OPTIONS, **change)  # type: ignore[arg-type]
        for change in (
            {"mesh": Mesh({"tp": 4})},
            {"mesh": Mesh({"dp": 2})},
            {"mesh": Mesh({"tp": 2, "dp": 2})},
            {"mesh": Mesh({"tp": 2, "dp": 2}), "axis": "dp"},
            {"role": "prefill"},
            {"role": "pd_mixed"},
            {"annotations": {}},
            {"annotations": {"weight": P(None, "tp")}},
            {"annotations": {"other": P("tp", None)}},
            {"costs": CostTable(call=1.0)},
            {"prefetch": 2},
            {"optimise": False},
            {"memory_budget": 0.5},
        )
    ]
    fields = {field.name for field in dataclasses.fields(ShardOptions)}
    known = {"mesh", "role", "axis", "annotations", "costs", "prefetch", "optimise"}
    assert fields == known | {"memory_budget"}, "a new option: change it above"
    split, whole = Layout((Shard(0, 1, 4),)), Layout((REPLICATE,))
    keys = [
        Kept.of(folder, "graph", OPTIONS, None, {}, captured).key,
        Kept.of(folder, "other", OPTIONS, None, {}, captured).key,
        Kept.of(folder, "graph", OPTIONS, "decode", {}, captured).key,
        Kept.of(folder, "graph", OPTIONS, "prefill", {}, captured).key,
        Kept.of(folder, "graph", OPTIONS, None, {0: split}, captured).key,
        Kept.of(folder, "graph", OPTIONS, None, {0: whole}, captured).key,
        Kept.of(folder, "graph", OPTIONS, None, {1: split}, captured).key,
        Kept.of(folder, "graph", OPTIONS, None, {}, program(4)).key,  # at plain sizes
        *(Kept.of(folder, "graph", options, None, {}, captured).key for options in changed),
    ]
    assert len(set(keys)) == len(keys)
    assert Kept.of(folder, "graph", OPTIONS, None, {}, program()).key == keys[0]


def test_what_a_target_compiled_is_each_ranks_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Kept(CacheFolder(tmp_path), "program")
    inductor = target("inductor")
    n = sympy.Symbol("n")

    def key(rank: int = 0, name: str = "0", values: dict[sympy.Symbol, int] | None = None) -> str:
        groups = MeshGroups(MESH, rank, {"tp": name})
        found = kept.lowered(inductor, inductor.parse(None), groups, values or {})
        assert found is not None
        return found.key

    keys = [key(), key(rank=1), key(name="1"), key(values={n: 3}), key(values={n: 4})]
    keys.append(
        dataclasses.replace(kept, key="other")
        .lowered(inductor, inductor.parse(None), MeshGroups(MESH, 0, {"tp": "0"}), {})
        .key
    )  # type: ignore[union-attr]
    monkeypatch.setattr(torch._inductor.config, "max_autotune", True)
    keys.append(key())
    assert len(set(keys)) == len(keys)
    monkeypatch.setattr(torch._inductor.config, "post_grad_custom_post_pass", lambda graph: None)
    assert kept.lowered(inductor, None, MeshGroups(MESH, 0, {"tp": "0"}), {}) is None
    eager = kept.lowered(target("eager"), None, MeshGroups(MESH, 0, {"tp": "0"}), {})
    assert eager is None  # it compiles nothing


def test_a_sharded_program_is_read_back(tmp_path: Path) -> None:
    partitioned = shard_program(program(), OPTIONS).partitioned
    kept = Kept(CacheFolder(tmp_path), "ab" * 32)
    assert kept.load() is None
    kept.save(partitioned)
    found = kept.load()
    assert str(found) == str(partitioned)
    (path,) = tmp_path.glob("sharded/*/*")
    path.write_bytes(path.read_bytes().replace(b"mesh.all_gather", b"mesh.all_father"))
    with pytest.warns(CacheWarning):
        assert kept.load() is None


def test_an_entry_that_names_an_op_that_is_not_there_is_refused(tmp_path: Path) -> None:
    folder = CacheFolder(tmp_path)
    kept = Kept(folder, "ab" * 32)
    kept.save(program())
    content = folder.read("sharded", kept.key)
    assert content is not None
    folder.write("sharded", kept.key, content.replace(b"aten.mm", b"aten.mn"))
    with pytest.warns(CacheWarning, match="there is no op"):
        assert kept.load() is None
