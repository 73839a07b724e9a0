"""Modules with what they do and move; layers are folded if, and only if, they are alike."""

from __future__ import annotations

import pytest
from tests.compiler.debug.stages import collective, node, stage_of

from rolemesh.compiler.debug.show.collapse import ModuleRow, module_rows
from rolemesh.compiler.dump.reader import Stage


def layered(kinds: list[str], moved: list[int]) -> Stage:
    """A layer per kind: a weight that is multiplied and, if that moves anything, a reduction."""
    nodes = [node(f"w{i}", "input", kinds=[kind]) for i, kind in enumerate(kinds)]
    last = "w0"
    for i, (kind, size) in enumerate(zip(kinds, moved, strict=True)):
        module = f"model.layers.{i}.mlp"
        nodes.append(node(f"mm{i}", "aten.mm.default", last, f"w{i}", module=module, kinds=[kind]))
        nodes.append(
            node(
                f"sum{i}", "mesh.all_reduce", f"mm{i}", module=module,
                kinds=["f32[9, 5]"], collective=collective("all_reduce", size),
            )
        )  # fmt: skip
        last = f"sum{i}"
    inputs = [(f"w{i}", f"model.layers.{i}.mlp.weight", "parameter") for i in range(len(kinds))]
    return stage_of(nodes, inputs, outputs=[last])


def rows_of(stage: Stage, depth: int | None = None) -> list[ModuleRow]:
    return module_rows(stage, list(stage.nodes.values()), depth)


def test_layers_that_are_alike_share_a_row() -> None:
    stage = layered(["f32[7, 5@tp]"] * 3, [40] * 3)
    (row,) = rows_of(stage)
    assert row == ModuleRow(
        "model.layers.0-2.mlp", 3, 1, 2, {"all_reduce tp": 1}, 40, "f32[9, 5]"
    )  # fmt: skip


def test_which_rank_owns_a_tensor_tells_no_layers_apart() -> None:
    kinds = [f"f32[7, 5] owner({i})@tp" for i in range(3)]
    assert [row.path for row in rows_of(layered(kinds, [40] * 3))] == ["model.layers.0-2.mlp"]


def test_a_layout_tells_layers_apart() -> None:
    kinds = ["f32[7, 5@tp]", "f32[7@tp, 5]", "f32[7, 5@tp]", "f32[7, 5@tp]"]
    found = [(row.path, row.alike) for row in rows_of(layered(kinds, [40] * 4))]
    assert found == [("model.layers.0,2-3.mlp", 3), ("model.layers.1.mlp", 1)]


def test_totals_do_not_depend_on_depth() -> None:
    stage = layered(["f32[7, 5@tp]", "f32[7@tp, 5]"] * 2, [40, 30, 40, 30])
    for depth in (1, 2, 3, 4, None):
        rows = rows_of(stage, depth)
        assert sum(row.alike * row.ops for row in rows) == 8
        assert sum(row.alike * row.bytes for row in rows) == 140
        assert sum(row.alike * row.inputs for row in rows) == 4
    assert [row.path for row in rows_of(stage, 1)] == ["model"]
    assert rows_of(stage, 1)[0].collectives == {"all_reduce tp": 4}


def test_without_folding_every_module_has_a_row() -> None:
    stage = layered(["f32[7, 5@tp]"] * 3, [40] * 3)
    rows = module_rows(stage, list(stage.nodes.values()), 3, fold=False)
    assert [row.path for row in rows] == [f"model.layers.{i}" for i in range(3)]


def test_numbers_in_two_places() -> None:
    nodes = [
        node(f"n{i}{e}", "aten.relu.default", module=f"layers.{i}.experts.{e}.act")
        for i in range(2)
        for e in range(3)
    ]
    (row,) = rows_of(stage_of(nodes))
    assert (row.path, row.alike) == ("layers.0-1.experts.0-2.act", 6)


def test_modules_follow_the_module_they_are_in_by_their_first_op() -> None:
    nodes = [
        node("wb", "input"),
        node("x", "input"),
        node("a1", "aten.relu.default", "x", module="m.a"),
        node("m1", "aten.relu.default", "a1", module="m"),
        node("b1", "aten.mm.default", "m1", "wb", module="m.b"),
        node("a2", "aten.relu.default", "b1", module="m.a.inner"),
    ]
    stage = stage_of(nodes, [("wb", "m.b.weight", "parameter"), ("x", "x", "user")])
    paths = [row.path for row in rows_of(stage)]
    assert paths == ["(root)", "m", "m.a", "m.a.inner", "m.b"]


@pytest.mark.parametrize(("outputs", "gives"), [([], ""), (["a"], "f32[3@tp]")])
def test_what_a_module_gives(outputs: list[str], gives: str) -> None:
    nodes = [
        node("a", "aten.relu.default", module="m", kinds=["f32[3@tp]"]),
        node("b", "aten.relu.default", "a", module="m"),
    ]
    (row,) = rows_of(stage_of(nodes, outputs=outputs))
    assert row.gives == gives
