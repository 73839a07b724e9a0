"""Loading on one rank: what is damaged, or of another model, is made anew; ghosts and inductor."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tests.compiler.artefact.small import ANNOTATIONS, Model, Product, assert_same, call, lowered

import rolemesh
from rolemesh.compiler.api import Lowered
from rolemesh.compiler.artefact.load import ArtefactWarning, open_artefact
from rolemesh.compiler.engine.ghosts import ghost
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.runtime import rank as rank_module
from rolemesh.runtime import store
from rolemesh.runtime.launch import run_processes


def lowered_anew(model: Model) -> Lowered:
    """The program of a model for one rank."""
    traced = call().of(lambda *args, **kwargs: rolemesh.trace(model, *args, **kwargs))
    return rolemesh.lower(rolemesh.shard(traced, {"tp": 1}, annotations=ANNOTATIONS))  # type: ignore[arg-type]


@pytest.mark.usefixtures("one_rank")
def test_a_damaged_file_is_made_anew(tmp_path):
    path, want = tmp_path / "artefact", call().of(Model())
    made = lowered_anew(Model())
    rolemesh.save(made, path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    assert len(files) == 5
    for file in files:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 4
        file.write_bytes(data)
        with pytest.raises(RolemeshError, match="RM042"):
            rolemesh.load(path, Model())
        with pytest.warns(ArtefactWarning, match="the programs are compiled again"):
            program = rolemesh.load(path, Model(), recompile=lambda: made)
        assert_same(call().of(program), want)
        assert_same(call().of(rolemesh.load(path, Model())), want)


@pytest.mark.usefixtures("one_rank")
def test_a_changed_model_is_compiled_anew(tmp_path):
    path, other = tmp_path / "artefact", Model(factor=0.25)
    rolemesh.save(lowered(ranks=1), path)
    made: list[Lowered] = []

    def recompile() -> Lowered:
        made.append(lowered_anew(other))
        return made[-1]

    with pytest.warns(ArtefactWarning, match=r"scaled.factor: 0.5 in the artefact, 0.25 here"):
        program = rolemesh.load(path, other, recompile=recompile)
    want = call().of(Model(factor=0.25))
    assert_same(call().of(program), want)
    assert_same(call().of(rolemesh.load(path, other, recompile=recompile)), want)
    assert len(made) == 1


@pytest.mark.usefixtures("one_rank")
def test_an_artefact_of_a_model_without_bytes(tmp_path):
    real, empty = Model(), Model()
    for linear in (empty.up, empty.down):
        value = ghost(linear.weight.shape, linear.weight.dtype, torch.device("cpu"))
        linear.weight = torch.nn.Parameter(value, requires_grad=False)
    rolemesh.save(lowered_anew(real), tmp_path / "real")
    rolemesh.save(lowered_anew(empty), tmp_path / "empty")
    index = (tmp_path / "empty/index.json").read_bytes()
    assert index == (tmp_path / "real/index.json").read_bytes()
    want = call().of(Model())
    assert_same(call().of(rolemesh.load(tmp_path / "empty", real)), want)
    program = rolemesh.load(tmp_path / "empty", empty)
    with pytest.raises(RolemeshError, match=r"RM024.*the full storage of up.weight was freed"):
        call().of(program)
    sharded, weights = program.programs[0].sharded.program, dict(Model().named_parameters())
    tensors = dict(empty.named_parameters())
    for entry, node in zip(sharded.inputs, sharded.placeholders, strict=True):
        if entry.name in tensors:
            layout, mesh = sharded.layout(node), sharded.the_mesh
            tensor, local = tensors[entry.name], weights[entry.name].detach()
            store.default_store().put(tensor, entry.name, layout, mesh, local)
    assert_same(call().of(program), want)


def test_a_model_on_the_meta_device_is_not_saved(tmp_path):
    with torch.device("meta"):
        model, x = Product(), torch.ones(3, 5)
    sharded = rolemesh.shard(rolemesh.trace(model, x), {"tp": 2})
    with pytest.raises(RolemeshError, match="it was traced on the meta device") as caught:
        rolemesh.save(rolemesh.lower(sharded), tmp_path / "artefact")
    assert caught.value.code == "RM044"
    assert not any(tmp_path.iterdir())


def test_a_training_step_is_not_saved(tmp_path):
    model = Product().requires_grad_()

    def loss(x: torch.Tensor) -> torch.Tensor:
        return model(x).sum()

    sharded = rolemesh.shard(rolemesh.trace_training(loss, torch.ones(3, 5)), {"dp": 1}, "train")
    with pytest.raises(RolemeshError, match="it is a training step") as caught:
        rolemesh.save(rolemesh.lower(sharded), tmp_path / "artefact")
    assert caught.value.code == "RM044"


def calls_inductor(folder: str) -> int:
    """How often a graph is bound, to load the artefact of an inductor program and to call it."""
    bind, bound = rank_module.bind, []
    rank_module.bind = lambda *args, **more: bound.append(args) or bind(*args, **more)  # type: ignore[attr-defined]
    x, model = torch.ones(3, 5), Product()
    program = rolemesh.load(Path(folder, "artefact"), model)
    torch.testing.assert_close(program(x), x @ copy.deepcopy(Product()).weight)
    return len(bound)


@pytest.mark.processes
@pytest.mark.usefixtures("one_rank")
def test_another_process_finds_the_code_of_inductor(tmp_path, monkeypatch):
    monkeypatch.setenv("ROLEMESH_CACHE", "1")
    monkeypatch.setenv("ROLEMESH_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    sharded = rolemesh.shard(rolemesh.trace(Product(), torch.ones(3, 5)), {"tp": 1})
    rolemesh.save(rolemesh.lower(sharded, "inductor").compile(), tmp_path / "artefact")
    assert open_artefact(tmp_path / "artefact", Product())[0].target.name == "inductor"
    assert run_processes(calls_inductor, 1, (str(tmp_path),), timeout=100) == [0]
