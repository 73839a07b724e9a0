"""Resharding: the steps between two layouts give exactly the target, at the price that is paid."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.layouts import MESHES, Choose, pad_masks, random_layout
from torch import fx

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.ledger import collectives
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.placement import (
    REPLICATE,
    Owner,
    Partial,
    Placement,
    Routed,
    Segment,
    Segmented,
    Shard,
)
from rolemesh.compiler.ir.program import Input, InputKind, Output, Program
from rolemesh.compiler.ir.tensor import TensorType
from rolemesh.lowering import chunks
from rolemesh.passes.cost import CostTable, reshard_cost
from rolemesh.passes.partition import Partition
from rolemesh.passes.reshard import steps
from rolemesh.passes.verify import Verify
from rolemesh.runtime.lockstep import run_lockstep

GRID = Mesh({"dp": 2, "tp": 4})
LINE = Mesh({"tp": 4})
TABLE = 5
"""Entries of the table whose rows a routed value holds."""

PAIRS = Segmented(0, (Segment(8, 1, 2, 2),))
"""Two chunks on four ranks: each lies on two."""

SEGMENTS = Segmented(0, (Segment(4, 1, 4), Segment(4, 1, 0)))
"""A run that is cut and one that is not."""

ALONE = (REPLICATE, REPLICATE)

Shape = tuple[int, ...]


def program_between(source: Layout, target: Layout, shape: Shape, mesh: Mesh) -> Program:
    """An input in one layout that is the output in another one."""
    graph = fx.Graph()
    ids, x = graph.placeholder("ids"), graph.placeholder("x")
    ids.meta["type"] = TensorType((shape[0] if shape else 1,), torch.int64)
    x.meta["type"] = TensorType(shape, torch.float64)
    graph.output((x,))
    program = Program(
        "reshard",
        graph,
        (Input("ids", InputKind.USER), Input("x", InputKind.USER)),
        (Output(),),
        mesh=mesh,
        layouts={ids: (Layout.replicated(mesh),), x: (source,)},
        pinned={0: target},
    )
    return Verify().apply(Partition().apply(program))


def locals_of(x: torch.Tensor, ids: torch.Tensor, layout: Layout, mesh: Mesh) -> list[torch.Tensor]:
    """Local tensors that x has in a layout: random summands, NaN where nothing may be read."""
    held = [REPLICATE if isinstance(p, Partial | Routed) else p for p in layout.placements]
    values = dict.fromkeys(range(mesh.size), x)
    for axis, placement in enumerate(layout.placements):
        ranks = mesh.sizes[axis]
        for first in range(mesh.size):
            if mesh.coordinate(first)[axis] or not isinstance(placement, Partial | Routed):
                continue
            group = mesh.group(mesh.names[axis], first)
            pieces = (
                summands(values[first], placement.op, ranks)
                if isinstance(placement, Partial)
                else routed(values[first], ids, placement, ranks)
            )
            values.update(zip(group, pieces, strict=True))
    found = []
    for rank in range(mesh.size):
        layout_held = Layout(tuple(held))
        local = chunks.scatter_one(values[rank], layout_held, mesh, rank)
        ones = chunks.scatter(torch.ones_like(x), layout_held, mesh)
        pads = chunks.poison_pads(ones, layout_held, mesh)[rank].isnan()
        coordinate = mesh.coordinate(rank)
        if any(
            isinstance(p, Owner) and p.rank != coordinate[axis]
            for axis, p in enumerate(layout.placements)
        ):
            pads = torch.ones_like(pads)
        found.append(local.masked_fill(pads, math.nan))
    return found


def summands(x: torch.Tensor, op: str, ranks: int) -> list[torch.Tensor]:
    if op in ("sum", "avg"):
        pieces = [torch.randint(-4, 5, x.shape).double() for _ in range(ranks - 1)]
        total = x * ranks if op == "avg" else x
        return [*pieces, total - sum(pieces, torch.zeros_like(x))]
    sign = -1 if op == "max" else 1
    pieces = [x + sign * torch.randint(0, 5, x.shape) for _ in range(ranks)]
    pieces[torch.randint(ranks, ()).item()] = x  # type: ignore[call-overload]
    return pieces


def routed(x: torch.Tensor, ids: torch.Tensor, by: Routed, ranks: int) -> list[torch.Tensor]:
    owner = ids // -(-TABLE // ranks)
    shape = [by.size if dim == by.dim else 1 for dim in range(x.ndim)]
    return [
        x.masked_fill((owner != rank).reshape(shape).expand_as(x), math.nan)
        for rank in range(ranks)
    ]


def check(source: Layout, target: Layout, shape: Shape, mesh: Mesh) -> Program:
    """Every rank ends with the target's local tensor of the same whole value."""
    program = program_between(source, target, shape, mesh)
    torch.manual_seed(0)
    x = torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape) - 3
    ids = torch.randint(0, TABLE, (shape[0] if shape else 1,))
    inputs = [[ids] * mesh.size, locals_of(x, ids, source, mesh)]
    (found,) = run_lockstep(program, inputs, poison=True, check=True)
    wants, masks = chunks.scatter(x, target, mesh), pad_masks(shape, target, mesh)
    for want, mask, have in zip(wants, masks, found, strict=True):
        assert have is not None
        assert have.shape == want.shape
        torch.testing.assert_close(have[mask], want[mask], rtol=0, atol=1e-12)  # thirds of averages
    return program


EXTENTS = (1, 2, 3, 4, 5, 6, 8, 12)


def source_layout(choose: Choose, shape: Shape, mesh: Mesh) -> Layout:
    layout = random_layout(choose, shape, mesh, owner=True)
    op = choose(("sum", "sum", "max", "min", "avg"))
    for axis in range(len(mesh.names)):
        kind = choose(("keep", "keep", "keep", "partial", "routed"))
        if kind == "partial":
            layout = layout.replace(axis, Partial(op))
        elif kind == "routed" and not any(
            (isinstance(p, Shard) and p.dim == 0) or isinstance(p, Routed | Partial)
            for p in layout.placements
        ):
            key = f"ids:ids:{TABLE}"
            layout = layout.replace(axis, Routed(key, 0, 1, shape[0]))
    return layout


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Layout, Layout, Shape, Mesh]:
    def choose(options: object) -> object:
        return draw(st.sampled_from(options))  # type: ignore[arg-type, call-overload]

    mesh = draw(st.sampled_from(MESHES))
    shape = tuple(draw(st.lists(st.sampled_from(EXTENTS), min_size=1, max_size=3)))
    source = source_layout(choose, shape, mesh)
    target = random_layout(choose, shape, mesh)
    return source, target, shape, mesh


def mixes_reductions(layout: Layout) -> bool:
    """A sum of rows and a maximum do not commute: no op makes such a value."""
    kinds = {p.op for p in layout.placements if isinstance(p, Partial)}
    kinds |= {"sum" for p in layout.placements if isinstance(p, Routed)}
    return len(kinds) > 1


@given(pairs())
@settings(max_examples=500)
def test_steps_give_the_target(case: tuple[Layout, Layout, Shape, Mesh]) -> None:
    source, target, shape, mesh = case
    assume(not mixes_reductions(source))
    check(source, target, shape, mesh)


@given(pairs())
def test_no_step_where_nothing_moves(case: tuple[Layout, Layout, Shape, Mesh]) -> None:
    _, target, shape, mesh = case
    assert steps(target, target, shape, mesh) == ()
    assert steps(target, target.canonical(mesh), shape, mesh) == ()
    assert steps(target.canonical(mesh), target, shape, mesh) == ()


def test_no_step_between_two_spellings() -> None:
    first, second = Layout((Shard(0, 1, 16),)), Layout((Shard(0, 1, 4),))
    assert steps(first, second, (16,), LINE) == ()
    joint = Layout((Shard(0, 1, 16), Shard(0, 1, 16)))
    digits = Layout((Shard(0, 1, 2), Shard(0, 2, 8)))
    assert steps(joint, digits, (16,), GRID) == ()


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (REPLICATE, Partial()),
        (Shard(0, 1, 8), Partial()),
        (Owner(0), Partial()),
        (Partial(), Partial("max")),
    ],
)
def test_nothing_becomes_a_pending_reduction(source: Placement, target: Placement) -> None:
    with pytest.raises(RolemeshError) as caught:
        steps(Layout((source,)), Layout((target,)), (8,), LINE)
    assert str(caught.value) == (
        f"[RM016] no collectives lead from ({source!r},) to ({target!r},)\n"
        "  where: a value of shape [8] on mesh tp=4\n"
        "  why: a value that every rank holds whole cannot become a pending sum\n"
        "  fix: report this: propagation must not ask for it"
    )


@pytest.mark.parametrize(
    ("source", "target", "ops"),
    [
        (REPLICATE, Shard(0, 1, 8), "shard"),
        (Shard(0, 1, 8), REPLICATE, "all_gather"),
        (Shard(0, 1, 8), Shard(1, 1, 8), "all_to_all"),
        (Shard(0, 1, 8), Shard(0, 4, 2), "all_gather shard"),
        (Partial(), REPLICATE, "all_reduce"),
        (Partial(), Shard(1, 1, 8), "reduce_scatter"),
        (Owner(3), REPLICATE, "broadcast"),
        (Owner(3), Shard(0, 1, 8), "broadcast shard"),
        (Owner(3), Owner(1), "broadcast"),
        (Routed("k", 0, 1, 8), REPLICATE, "mask_rows all_reduce"),
        (Routed("k", 0, 1, 8), Shard(1, 1, 8), "mask_rows reduce_scatter"),
        (Routed("k", 0, 1, 8), Partial(), "mask_rows"),
        (REPLICATE, PAIRS, "shard"),
        (PAIRS, REPLICATE, "all_gather"),
        (PAIRS, Shard(0, 1, 8), "part"),
        (PAIRS, Shard(1, 1, 8), "all_gather shard"),
        # One chunk for two groups is padded, so that no rank's chunk lies within its group's.
        (Segmented(0, (Segment(8, 1, 1, 2),)), Shard(0, 1, 8), "all_gather shard"),
        (Shard(0, 1, 8), PAIRS, "all_gather shard"),
        (Partial(), PAIRS, "all_reduce shard"),
    ],
)
def test_steps_of_one_axis(source: Placement, target: Placement, ops: str) -> None:
    found = steps(Layout((source,)), Layout((target,)), (8, 8), LINE)
    assert " ".join(step.op.name for step in found if step.op is not None) == ops
    assert found[-1].layout == Layout((target,))


@pytest.mark.parametrize(
    ("source", "target", "ops"),
    [
        # Cutting comes first, and reducing into the shard before the other axis gathers.
        ((REPLICATE, Partial()), (Shard(0, 1, 8), REPLICATE), "shard all_reduce"),
        ((Shard(0, 1, 8), Partial()), (REPLICATE, Shard(1, 1, 8)), "reduce_scatter all_gather"),
        # A joint uneven shard moves as one.
        ((Shard(0, 1, 6), Shard(0, 1, 6)), (REPLICATE, REPLICATE), "all_gather"),
        ((REPLICATE, REPLICATE), (Shard(0, 1, 6), Shard(0, 1, 6)), "shard"),
        # Even joint shards are digits, so one axis moves alone.
        ((Shard(0, 1, 8), Shard(0, 1, 8)), (Shard(0, 1, 8), REPLICATE), "all_gather"),
        ((Shard(0, 1, 8), Shard(0, 1, 8)), (Shard(0, 1, 8), Shard(1, 1, 8)), "all_to_all"),
        # Segments need not follow the rows that are routed.
        ((SEGMENTS, Routed(f"ids:ids:{TABLE}", 0, 1, 8)), ALONE, "all_gather mask_rows all_reduce"),
        # Digits in each other's way.
        ((Shard(0, 1, 8), REPLICATE), (REPLICATE, Shard(0, 1, 8)), "all_gather shard"),
    ],
)
def test_steps_of_two_axes(
    source: tuple[Placement, ...], target: tuple[Placement, ...], ops: str
) -> None:
    shape = (source[0].size, 8) if isinstance(source[0], Shard) else (8, 8)
    if any(isinstance(p, Shard) and p.size == 6 for p in target):
        shape = (6, 8)
    found = steps(Layout(source), Layout(target), shape, GRID)
    assert " ".join(step.op.name for step in found if step.op is not None) == ops
    check(Layout(source), Layout(target), shape, GRID)


PLACEMENTS: tuple[Placement, ...] = (
    REPLICATE,
    Partial(),
    Partial("max"),
    Owner(1),
    Shard(0, 1, 12),
    Shard(0, 4, 3),
    Shard(0, 1, 4),
    Shard(1, 1, 24),
    Shard(1, 2, 12),
    Routed(f"ids:ids:{TABLE}", 0, 1, 12),
)


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("target", PLACEMENTS, ids=str)
@pytest.mark.parametrize("source", PLACEMENTS, ids=str)
def test_the_price_is_the_bytes_that_steps_move(
    source: Placement, target: Placement, ranks: int
) -> None:
    mesh, shape = Mesh({"tp": ranks}), (12, 24)
    value = TensorType(shape, torch.float64)
    price = reshard_cost(source, target, value.nbytes, ranks, CostTable())
    if isinstance(target, Routed) and source != target:
        return  # nothing is ever brought to a routed layout
    if math.isinf(price):
        with pytest.raises(RolemeshError, match="RM016"):
            steps(Layout((source,)), Layout((target,)), shape, mesh)
        return
    even = all(p.size % ranks == 0 for p in (source, target) if isinstance(p, Shard))
    program = (
        program_between(Layout((source,)), Layout((target,)), shape, mesh)
        if not isinstance(target, Partial | Routed)
        else None
    )
    if program is None:
        found = steps(Layout((source,)), Layout((target,)), shape, mesh)
        assert (price == 0) == (not any(step.op and step.op.communicates for step in found))
        return
    paid = sum(entry.bytes_received for entry in collectives(program))
    if even:
        assert price == paid
    else:
        assert price <= paid  # pads travel too


@pytest.mark.parametrize("name", ["all_gather", "reduce_scatter", "all_to_all", "all_reduce"])
def test_a_table_prices_each_collective(name: str) -> None:
    ends = {
        "all_gather": (Shard(0, 1, 8), REPLICATE),
        "reduce_scatter": (Partial(), Shard(0, 1, 8)),
        "all_to_all": (Shard(0, 1, 8), Shard(1, 1, 8)),
        "all_reduce": (Partial(), REPLICATE),
    }
    for other, (source, target) in ends.items():
        plain = reshard_cost(source, target, 640, 4, CostTable())
        dear = reshard_cost(source, target, 640, 4, CostTable(**{name: 3.0}))  # type: ignore[arg-type]
        assert dear == (3 * plain if other == name else plain)
        assert reshard_cost(source, target, 640, 4, CostTable(call=7)) == plain + 7


def test_what_is_not_read_costs_nothing() -> None:
    assert reshard_cost(Shard(0, 1, 8), None, 640, 4, CostTable()) == 0
