"""An artefact that was made for something else is refused, with the fields that differ."""

from __future__ import annotations

import importlib
import json
import sys
import types
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from tests.compiler.artefact.small import Model, call, lowered, saved
from torch import nn

import rolemesh
from rolemesh.compiler.artefact import folder, key
from rolemesh.compiler.artefact.load import open_artefact
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.spec import P
from rolemesh.passes.cost import CostTable


def refused(load: Callable[[], object]) -> str:
    """The fields that an artefact is refused for."""
    with pytest.raises(RolemeshError) as caught:
        load()
    assert caught.value.code == "RM043"
    assert "was made for something else" in str(caught.value)
    return caught.value.where


OPTIONS = {
    "mesh": ({"tp": 3}, "options.mesh: [['tp', 2]] in the artefact, [['tp', 3]] here"),
    "role": ("decode", "options.role: None in the artefact, decode here"),
    "axis": ("tp", "options.axis: None in the artefact, tp here"),
    "annotations": (
        {"up.weight": P("tp")},
        "options.annotations.down.weight: {'entries': [None, 'tp'], 'parts': [], 'units': []}",
    ),
    "costs": (CostTable(call=7.0), "options.costs.call: 0.0 in the artefact, 7.0 here"),
    "prefetch": (3, "options.prefetch: None in the artefact, 3 here"),
    "optimise": (False, "options.optimise: True in the artefact, False here"),
    "target": ("inductor", "target: eager in the artefact, inductor here"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_other_options(name, tmp_path):
    path = saved(tmp_path)
    value, text = OPTIONS[name]
    assert text in refused(lambda: rolemesh.load(path, Model(), **{name: value}))


def test_other_options_of_the_target(tmp_path):
    sharded = lowered().sharded
    gears = {"x": {0: [4, 8]}}
    rolemesh.save(rolemesh.lower(sharded, "ge", {"dim_gears": gears}), tmp_path / "artefact")
    (program,) = open_artefact(tmp_path / "artefact", Model())
    assert program.options.dim_gears == gears
    where = refused(
        lambda: rolemesh.load(tmp_path / "artefact", Model(), options={"device": "cpu"})
    )
    assert "target_options.device: auto in the artefact, cpu here" in where
    assert "target_options.dim_gears" in where


def npu(version: str, cann: str, soc: str) -> dict[str, types.ModuleType]:
    """Modules of a torch_npu of some version."""
    found = {name: types.ModuleType(name) for name in ("torch_npu", "torch_npu.npu")}
    utils = types.ModuleType("torch_npu.npu.utils")
    utils.get_cann_version = lambda: cann
    found["torch_npu"].__version__ = version
    found["torch_npu"].npu = found["torch_npu.npu"]
    found["torch_npu.npu"].utils = utils
    found["torch_npu.npu"].is_available = lambda: True
    found["torch_npu.npu"].get_device_name = lambda: soc
    return found | {"torch_npu.npu.utils": utils}


VERSIONS = {
    "rolemesh": "0.0.1",
    "torch": "9.9",
    "torch_npu": "2.1",
    "cann": "8.5",
    "soc": "Ascend310P",
    "torchair": "3.3",
    "rolemesh.passes": "other",
    "rolemesh.lowering": "other",
    "rolemesh.runtime": "other",
    "rolemesh.compiler": "other",
}


@pytest.mark.parametrize("name", VERSIONS)
def test_other_versions(name, tmp_path, monkeypatch):
    monkeypatch.setenv("ASCEND_TOOLKIT_HOME", str(tmp_path))
    before = {"torch_npu": "1.0", "cann": "8.0", "soc": "Ascend910B1"}
    for module, content in npu(*before.values()).items():
        monkeypatch.setitem(sys.modules, module, content)
    path = tmp_path / "artefact"
    target = "ge" if name == "torchair" else "eager"
    rolemesh.save(rolemesh.lower(lowered().sharded, target), path)
    other = VERSIONS[name]
    if name in before:
        for module, content in npu(*({**before, name: other}).values()).items():
            monkeypatch.setitem(sys.modules, module, content)
    elif name == "rolemesh":
        monkeypatch.setattr(key, "__version__", other)
    elif name == "torch":
        monkeypatch.setattr(torch, "__version__", other)
    elif name == "torchair":
        monkeypatch.setattr(key, "diagnose", lambda: SimpleNamespace(version=other))
    else:
        changed = {**key.package_digests(), name.removeprefix("rolemesh."): other}
        monkeypatch.setattr(key, "package_digests", lambda: changed)
    where = refused(lambda: open_artefact(path, Model()))
    assert where.startswith(f"versions.{name}: ")
    assert f"{other}" in where
    assert "\n" not in where


def test_a_key_of_another_version_may_have_other_fields(tmp_path):
    path = saved(tmp_path)
    files = folder.read_folder(path)
    index = json.loads(json.dumps(files.index))
    index["key"]["versions"]["rolemesh"] = "0.0.1"
    del index["key"]["options"]["memory_budget"]
    folder.write(path, {"key": index["key"], "programs": index["programs"]}, files.files)
    where = refused(lambda: open_artefact(path, Model()))
    assert where == f"versions.rolemesh: 0.0.1 in the artefact, {rolemesh.__version__} here"


@pytest.mark.parametrize(
    ("setter", "value", "text"),
    [
        (torch.set_default_dtype, torch.float64, "settings.default_dtype.dtype: float32"),
        (torch.use_deterministic_algorithms, True, "settings.deterministic_algorithms: False"),
        (
            torch.set_float32_matmul_precision,
            "medium",
            "settings.float32_matmul_precision: h",
        ),
    ],
)
def test_other_settings_of_torch(setter, value, text, tmp_path):
    path = saved(tmp_path)
    before = (
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
    )
    setter(value)
    try:
        where = refused(lambda: open_artefact(path, Model()))
    finally:
        torch.set_default_dtype(before[0])
        torch.use_deterministic_algorithms(before[1])
        torch.set_float32_matmul_precision(before[2])
    assert text in where


class Other(Model):
    """Another class."""


def changed(case: str) -> nn.Module:
    """A model that is not the traced one."""
    model: nn.Module = Other() if case == "class" else Model(7 if case == "shape" else 6)
    match case:
        case "number":
            model.scaled.factor = 0.25
        case "mode":
            model.scaled.eval()
        case "hook":
            model.scaled.register_forward_hook(lambda *_: None)
        case "tied":
            model.down.weight = model.up.weight
        case "module":
            model.scaled = nn.Identity()
        case "dtype":
            model.up.double()
        case "missing":
            del model.up.weight
        case "device":
            model.up.to("meta")
    return model


@pytest.mark.parametrize(
    ("case", "text"),
    {
        "class": "model.class: tests.compiler.artefact.small.Model in the artefact, tests",
        "number": "scaled.factor: 0.5 in the artefact, 0.25 here",
        "mode": "scaled.training: True in the artefact, False here",
        "hook": "scaled.hooks: absent in the artefact, 1 here",
        "tied": "(tied).up.weight: absent in the artefact, ['down.weight'] here",
        "module": "scaled.class: tests.compiler.artefact.small.Scaled in the artefact, torch.nn",
        "shape": "up.in_features: 6 in the artefact, 7 here",
        "dtype": "up.weight: float32 [14, 6] in the artefact, float64 [14, 6] here",
        "missing": "up.weight: float32 [14, 6] in the artefact, absent here",
        "device": "up.weight.device: cpu in the artefact, meta here",
    }.items(),
)
def test_another_model(case, text, tmp_path):
    path = saved(tmp_path)
    assert text in refused(lambda: open_artefact(path, changed(case)))


def test_changed_source(tmp_path, monkeypatch):
    code = """
import torch

class Sum(torch.nn.Module):
    def forward(self, x):
        return x + {}
"""
    file = tmp_path / "summing.py"
    file.write_text(code.format(1))
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("summing")
    monkeypatch.delitem(sys.modules, "summing")
    sys.modules["summing"] = module
    sharded = rolemesh.shard(rolemesh.trace(module.Sum(), torch.ones(3)), {"tp": 2})
    rolemesh.save(rolemesh.lower(sharded), tmp_path / "artefact")
    open_artefact(tmp_path / "artefact", module.Sum())
    file.write_text(code.format(2))
    for imported in (True, False):  # also where nothing has imported it yet
        if not imported:
            monkeypatch.delitem(sys.modules, "summing")
        where = refused(lambda: open_artefact(tmp_path / "artefact", module.Sum()))
        assert where.startswith("source of summing: ")


def test_many_differences_are_counted(tmp_path):
    layers = [nn.Linear(2, 2) for _ in range(9)]
    where = refused(lambda: open_artefact(saved(tmp_path), nn.Sequential(*layers)))
    assert len(where.splitlines()) == 9
    assert where.splitlines()[-1].endswith("more")


def test_options_are_read_back(tmp_path):
    sharded = rolemesh.shard(
        lowered().sharded.traced,
        {"dp": 1, "tp": 2},
        axis="tp",
        annotations={"up.weight": P(("dp", "tp"), units={0: 2}), "x": P("dp", parts={0: 1})},
        costs=CostTable(call=2.0),
        prefetch=2,
        optimise=False,
        memory_budget=0.5,
    )
    rolemesh.save(rolemesh.lower(sharded), tmp_path / "artefact")
    (program,) = open_artefact(tmp_path / "artefact", Model())
    assert program.sharded.options == sharded.options
    assert program.sharded.cost_analysis() == sharded.cost_analysis()
    assert call().x.shape == (5, 6)
