"""Globs choose nodes by module, op and name; what fits nothing names what would."""

from __future__ import annotations

import pytest
from tests.compiler.debug.stages import node, stage_of

from rolemesh.compiler.debug.show.select import Filters, modules_of, select
from rolemesh.compiler.ir.errors import RolemeshError

STAGE = stage_of(
    [
        node("ids", "input"),
        node("w", "input"),
        node("take", "mesh.take", "w", "ids", module="model.embed"),
        node("mm", "aten.mm.default", "take", module="model.layers.0.mlp.up"),
        node("mm_1", "aten.mm.default", "mm", module="model.layers.10.mlp.up"),
        node("add", "aten.add.Tensor", "mm_1", module="model.layers.10"),
    ],
    inputs=[("ids", "input_ids", "user"), ("w", "model.embed.weight", "parameter")],
)


def names(modules: str = "", ops: str = "", nodes: str = "") -> list[str]:
    filters = Filters(tuple(modules.split()), tuple(ops.split()), tuple(nodes.split()))
    return [found.name for found in select(STAGE, filters)]


def test_a_weight_belongs_to_the_module_that_holds_it() -> None:
    assert modules_of(STAGE)["w"] == "model.embed"
    assert modules_of(STAGE)["ids"] == ""


@pytest.mark.parametrize(
    ("modules", "ops", "nodes", "chosen"),
    [
        ("", "", "", "ids w take mm mm_1 add"),
        ("model.embed", "", "", "w take"),
        ("model.layers.1", "", "", None),  # no prefix of 10
        ("model.layers.10", "", "", "mm_1 add"),  # what is in a module belongs to it
        ("model.layers.*.mlp", "", "", "mm mm_1"),
        ("(root)", "", "", "ids"),
        ("", "mm", "", "mm mm_1"),
        ("", "aten.add", "", "add"),
        ("", "aten.*.default mesh.*", "", "take mm mm_1"),
        ("", "", "*.weight", "w"),
        ("", "", "mm*", "mm mm_1"),
        ("model.layers.10", "mm", "", "mm_1"),
        ("model.layers.0", "add", "", None),
    ],
)
def test_select(modules: str, ops: str, nodes: str, chosen: str | None) -> None:
    if chosen is None:
        with pytest.raises(RolemeshError) as caught:
            names(modules, ops, nodes)
        assert caught.value.code == "RM018"
    else:
        assert names(modules, ops, nodes) == chosen.split()


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        (Filters(modules=("model.layers.0.mpl.*",)), "did you mean 'model.layers.0.mlp'?"),
        (Filters(ops=("mesh.tak",)), "did you mean 'mesh.take'?"),
        (Filters(names=("ad",)), "did you mean 'add'?"),
        (Filters(names=("zzzzz",)), "see `rolemesh show` without filters"),
        (Filters(ops=("mm",), names=("add",)), "drop one of --module, --op and --name"),
    ],
)
def test_what_fits_nothing(filters: Filters, message: str) -> None:
    with pytest.raises(RolemeshError, match="RM018") as caught:
        select(STAGE, filters)
    assert caught.value.fix.startswith(message)
    assert caught.value.where == "decode/decode, stage partition"
