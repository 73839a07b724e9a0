"""A stage and a run as text."""

from __future__ import annotations

from tests.compiler.debug.stages import collective, node, stage_of

from rolemesh.compiler.debug.paint import Painter
from rolemesh.compiler.debug.show.collapse import module_rows
from rolemesh.compiler.debug.show.show import argument_text, modules_text, nodes_text
from rolemesh.compiler.debug.show.summary import ProgramSummary, StageSummary, summary_text

STAGE = stage_of(
    [
        node("x", "input", kinds=["f32[6@tp, 5]"], seed="follows the tokens"),
        node("w", "input", kinds=["f32[5, 7]"]),
        node(
            "all_gather", "mesh.all_gather", "x", kinds=["f32[6, 5]"], module="m.up",
            kwargs={"shard": {"shard": [0, 1, 6]}, "axes": ["tp"]}, source="model.py:4",
            reason="mm(w) needs all of it", collective=collective("all_gather", 1234),
        ),
        node("mm", "aten.mm.default", "all_gather", "w", kinds=["f32[6, 7]"], module="m.up",
             source="linear.py:9"),
    ],
    inputs=[("x", "x", "user"), ("w", "m.up.weight", "parameter")],
    outputs=["mm"],
)  # fmt: skip


def test_nodes() -> None:
    text = nodes_text(STAGE, list(STAGE.nodes.values()), Painter(STAGE.mesh, on=False))
    gathered = "mesh.all_gather(%x, shard=[0, 1, 6], axes=[tp])"
    assert text.splitlines() == [
        "decode/decode  005_partition  tp=4",
        "  (root)",
        "                 %x           f32[6@tp, 5]  input x",
        "                   lies so because follows the tokens",
        "  m.up   model.py",
        "                 %w           f32[5, 7]     input m.up.weight",
        f"              4  %all_gather  f32[6, 5]     {gathered}",
        "                   1,234 B; because mm(w) needs all of it",
        "    linear.py:9  %mm          f32[6, 7]     aten.mm.default(%all_gather, %w)",
        "4 of 4 nodes",
    ]


def test_modules() -> None:
    rows = module_rows(STAGE, list(STAGE.nodes.values()))
    text = modules_text(STAGE, rows, Painter(STAGE.mesh, on=False))
    assert text.splitlines() == [
        "decode/decode  005_partition  tp=4",
        "  module  alike  inputs  ops  collectives      bytes  gives",
        "  (root)              1",
        "  m.up                1    2  1 all_gather tp  1,234  f32[6, 7]",
        "  total               2    2  1                1,234",
    ]


def test_colour_changes_no_width() -> None:
    painter = Painter(STAGE.mesh, on=True)
    painted = nodes_text(STAGE, list(STAGE.nodes.values()), painter)
    for code in ("\x1b[36m", "\x1b[1m", "\x1b[2m", "\x1b[0m"):
        assert code in painted
        painted = painted.replace(code, "")
    assert painted == nodes_text(STAGE, list(STAGE.nodes.values()), Painter(STAGE.mesh, on=False))


def test_arguments_in_short() -> None:
    value = [{"node": "mm"}, [{"dim": "2*T"}, 3], None, {"dtype": "float32"}, True]
    assert argument_text(value) == "[%mm, [2*T, 3], None, float32, True]"


def test_summary() -> None:
    stages = [
        StageSummary(0, "capture", 1200, 0, 0, {}),
        StageSummary(1, "partition", 1198, 3, 5678, dict.fromkeys("abcdef", -2) | {"a": 12}),
    ]
    program = ProgramSummary("decode/decode", {"tp": 4}, stages)
    text = summary_text([program], {program.id: Painter(["tp"], on=False)})
    assert text.splitlines() == [
        "decode/decode  tp=4",
        "  stage            ops  collectives  bytes  change",
        "  000_capture    1,200            0      0",
        "  001_partition  1,198            3  5,678  +12 a, -2 b, -2 c, -2 d, 2 more",
    ]
