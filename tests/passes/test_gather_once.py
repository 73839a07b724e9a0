"""Gather once: collectives go whose value is another form of what ranks hold whole."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tests.conftest import Golden
from tests.passes.programs import Builder, check_values, traffic
from torch import fx

from rolemesh.compiler.ir.dialect import ALL_GATHER, ALL_REDUCE, MeshOp
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.placement import Partial, Placement, Shard
from rolemesh.compiler.ir.program import Program
from rolemesh.compiler.ir.spec import P
from rolemesh.passes.gather_once import GatherOnce
from rolemesh.passes.verify import Verify
from rolemesh.runtime.lockstep import run_lockstep

aten = torch.ops.aten


def forms(b: Builder) -> Program:
    """One value in several forms, each needed whole: as it is, cast, scaled, and turned."""
    b.module = "layers.0"
    x = b.input("x", (6, 5, 4), P("tp"))
    outs = [b.op(aten.cumsum.default, x, 0)]
    flat = b.op(aten.reshape.default, x, [30, 4])
    outs.append(b.op(aten.flip.default, flat, [0, 1]))
    scaled = b.op(aten.mul.Tensor, b.op(aten._to_copy.default, x, dtype=torch.float64), 3)
    outs.append(b.op(aten.flip.default, scaled, [0, 1]))
    return b.program(*outs, name="forms")


def test_text(golden: Golden) -> None:
    before, after = (check_values(forms(Builder(tp=2)), *p) for p in ((), (GatherOnce(),)))
    golden("gather_once", f"{before}\n{after}")


def needed_whole(b: Builder, *values: object) -> Program:
    return b.program(*(b.op(aten.flip.default, value, [0, 1]) for value in values))


def test_chunks_that_do_not_divide() -> None:
    b = Builder(tp=3)
    x = b.input("x", (7, 4), P("tp"))
    program = needed_whole(b, x, b.op(aten.exp.default, x))
    assert traffic(check_values(program, GatherOnce())) == {"all_gather": 1}


def test_what_is_computed_row_by_row_of_whole_values() -> None:
    b = Builder(tp=2)
    x = b.input("x", (7, 16), P("tp"))
    square = b.op(aten.mean.dim, b.op(aten.mul.Tensor, x, x), [-1], True)
    normed = b.op(aten.mul.Tensor, x, b.op(aten.rsqrt.default, b.op(aten.add.Tensor, square, 1)))
    program = needed_whole(b, x, normed)
    assert traffic(check_values(program, GatherOnce())) == {"all_gather": 1}


def test_what_writes_more_than_is_received_is_gathered() -> None:
    b = Builder(tp=2)
    x = b.input("x", (7, 16), P("tp"))
    program = needed_whole(b, x, b.op(aten.exp.default, x))
    assert traffic(check_values(program, GatherOnce(ratio=1.0))) == {"all_gather": 2}


def test_a_product_is_no_form_of_its_operands() -> None:
    b = Builder(tp=2)
    x = b.input("x", (7, 16), P("tp"))
    program = needed_whole(b, x, b.op(aten.mm.default, x, b.weight("w", (16, 3))))
    assert traffic(check_values(program, GatherOnce())) == {"all_gather": 2}


def made(
    target: MeshOp,
    layout: Placement,
    forms: Callable[[Builder, fx.Node], list[fx.Node]],
    **kwargs: object,
) -> Program:
    """A Program with one collective of each form of a value.

    Written out, for `propagate` moves forms behind the collective where it can.
    """
    b = Builder(tp=2)
    x = b.op(aten.neg.default, b.input("x", (6, 5, 4), layout))
    outs = [b.op(aten.alias.default, form) for form in forms(b, x)]
    program = b.program(*outs)
    layouts = {node: (Layout((layout,)),) for node in program.graph.nodes}
    for out in outs:
        out.target, out.kwargs = target, {**kwargs, "axes": ("tp",)}
        layouts[out] = (Layout.replicated(b.mesh),)
    return program.after("made", layouts=layouts)


def check_made(program: Program) -> Program:
    after = Verify().apply(GatherOnce().apply(Verify().apply(program)))
    ranks = [
        [
            torch.randn(program.layout(n).local_shape(n.meta["type"].shape, program.the_mesh))
            for _ in range(2)
        ]
        for n in program.placeholders
    ]
    runs = (run_lockstep(each, ranks, check=True) for each in (program, after))
    for want, got in zip(*runs, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(want, got, strict=True))  # type: ignore[arg-type]
    return after


def test_a_value_gathered_in_another_shape_first() -> None:
    def forms(b: Builder, x: fx.Node) -> list[fx.Node]:
        flat = b.op(aten.unsqueeze.default, x, 1)
        return [flat, x, b.op(aten.transpose.int, x, 1, 2)]

    program = made(ALL_GATHER, Shard(0, 1, 6), forms, shard=Shard(0, 1, 6))
    assert traffic(check_made(program)) == {"all_gather": 1}


def test_sums_only_through_views() -> None:
    def forms(b: Builder, x: fx.Node) -> list[fx.Node]:
        return [x, b.op(aten.transpose.int, x, 1, 2), b.op(aten.mul.Tensor, x, 0.3)]

    program = made(ALL_REDUCE, Partial(), forms, op="sum")
    assert traffic(check_made(program)) == {"all_reduce": 2}


def test_nothing_to_do_leaves_the_graph() -> None:
    b = Builder(tp=2)
    program = check_values(needed_whole(b, b.input("x", (7, 16), P("tp"))))
    assert GatherOnce().apply(program).graph is program.graph
