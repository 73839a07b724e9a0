"""Layouts: local shapes, distributions, equality and text."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tests.layouts import MESHES, factors, pad_masks, random_layout

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.layout import Layout
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
from rolemesh.compiler.ir.tensor import TensorType
from rolemesh.lowering import chunks

GRID = Mesh({"dp": 2, "tp": 4})
LINE = Mesh({"tp": 4})
EXTENTS = (1, 2, 3, 4, 5, 6, 8, 12)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Mesh, tuple[int, ...], Layout]:
    mesh = draw(st.sampled_from(MESHES))
    shape = tuple(draw(st.lists(st.sampled_from(EXTENTS), min_size=1, max_size=3)))
    return mesh, shape, random_layout(lambda options: draw(st.sampled_from(options)), shape, mesh)


def numbered(shape: tuple[int, ...]) -> torch.Tensor:
    count = torch.Size(shape).numel()
    return torch.arange(count, dtype=torch.float64).reshape(shape)


def distribution(layout: Layout, shape: tuple[int, ...], mesh: Mesh) -> list[torch.Tensor]:
    """What every rank holds, NaN in the pads."""
    return chunks.poison_pads(chunks.scatter(numbered(shape), layout, mesh), layout, mesh)


def equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(
        a.shape == b.shape and torch.equal(a.nan_to_num(-1.0), b.nan_to_num(-1.0))
        for a, b in zip(left, right, strict=True)
    )


@given(cases())
def test_scatter_then_assemble_is_the_identity(case: tuple[Mesh, tuple[int, ...], Layout]) -> None:
    mesh, shape, layout = case
    for x in (numbered(shape), numbered(shape).long()):
        locals_ = chunks.poison_pads(chunks.scatter(x, layout, mesh), layout, mesh)
        assert torch.equal(chunks.assemble(locals_, layout, shape, mesh), x)


@given(cases())
def test_local_shape_is_that_of_the_scattered_tensor(
    case: tuple[Mesh, tuple[int, ...], Layout],
) -> None:
    mesh, shape, layout = case
    found = {tuple(local.shape) for local in chunks.scatter(numbered(shape), layout, mesh)}
    assert found == {layout.local_shape(shape, mesh)}


@given(cases())
def test_every_element_is_real_on_as_many_ranks_as_replicate_it(
    case: tuple[Mesh, tuple[int, ...], Layout],
) -> None:
    mesh, shape, layout = case
    seen = torch.zeros(torch.Size(shape).numel(), dtype=torch.long)
    masks = pad_masks(shape, layout, mesh)
    for local, mask in zip(chunks.scatter(numbered(shape), layout, mesh), masks, strict=True):
        seen += torch.bincount(local[mask].long(), minlength=len(seen))
    copies = torch.ones(shape, dtype=torch.long)
    for placement, ranks in zip(layout.placements, mesh.sizes, strict=True):
        if isinstance(placement, Segmented):
            each = [s.copies if s.size else ranks for s in placement.segments]
            along = torch.tensor(each).repeat_interleave(torch.tensor(placement.lengths))
            copies *= along.reshape(-1, *[1] * (len(shape) - placement.dim - 1))
        else:
            copies *= 1 if isinstance(placement, Shard) else ranks
    assert torch.equal(seen, copies.flatten())


@given(cases())
def test_integer_pads_repeat_an_element_of_the_same_line(
    case: tuple[Mesh, tuple[int, ...], Layout],
) -> None:
    mesh, shape, layout = case
    for dim in range(len(shape)):
        # Each element names its coordinates in all other dims: those of a pad must agree.
        x = numbered(shape).long()
        x = x.select(dim, 0).unsqueeze(dim).expand(shape)
        shards = {p.dim for p in layout.placements if isinstance(p, Shard | Segmented)}
        if shards == {dim}:
            for local in chunks.scatter(x, layout, mesh):
                assert torch.equal(local, local.select(dim, 0).unsqueeze(dim).expand_as(local))
                assert torch.equal(local.select(dim, 0), x.select(dim, 0))


@given(cases())
def test_canonical_keeps_the_distribution(case: tuple[Mesh, tuple[int, ...], Layout]) -> None:
    mesh, shape, layout = case
    canonical = layout.canonical(mesh)
    assert equal(distribution(layout, shape, mesh), distribution(canonical, shape, mesh))
    assert canonical.canonical(mesh) == canonical
    assert canonical.same(layout, shape, mesh)
    for index, placement in enumerate(canonical.placements):
        if isinstance(placement, Shard) and len(axes := canonical.joint_axes(index)) > 1:
            ranks = [mesh.sizes[axis] for axis in axes]
            assert placement.size % torch.Size(ranks).numel()


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Mesh, tuple[int, ...], Layout, Layout]:
    mesh, shape, first = draw(cases())
    if draw(st.booleans()):  # near the first: the same dim and outer part, another size
        index = draw(st.integers(0, len(mesh.names) - 1))
        placement = first.placements[index]
        assume(isinstance(placement, Shard))
        assert isinstance(placement, Shard)
        sizes = [n for outer, n in factors(shape[placement.dim]) if outer == placement.outer]
        second = first.replace(index, placement._replace(size=draw(st.sampled_from(sizes))))
        try:
            second.check(shape, mesh)
        except RolemeshError:
            assume(False)
    else:
        second = random_layout(lambda options: draw(st.sampled_from(options)), shape, mesh)
    return mesh, shape, first, second


def many_spellings(layout: Layout) -> bool:
    """One unit is no split: many triples say that position 0 has everything. Segments may join."""
    return any(
        isinstance(p, Segmented) or (isinstance(p, Shard) and p.size == 1)
        for p in layout.placements
    )


@given(pairs())
@settings(max_examples=400)
@example((LINE, (6,), Layout((Shard(0, 1, 6),)), Layout((Shard(0, 1, 3),))))
@example((LINE, (8,), Layout((Shard(0, 1, 8),)), Layout((Shard(0, 1, 4),))))
def test_same_says_whether_every_rank_holds_the_same(
    case: tuple[Mesh, tuple[int, ...], Layout, Layout],
) -> None:
    mesh, shape, first, second = case
    found = first.same(second, shape, mesh)
    assert found == second.same(first, shape, mesh)
    if found:
        assert equal(distribution(first, shape, mesh), distribution(second, shape, mesh))
    elif len(mesh.names) == 1 and not (many_spellings(first) or many_spellings(second)):
        assert not equal(distribution(first, shape, mesh), distribution(second, shape, mesh))


@given(cases())
def test_local_shard_cuts_what_the_other_axes_left(
    case: tuple[Mesh, tuple[int, ...], Layout],
) -> None:
    mesh, shape, layout = case
    layout = layout.canonical(mesh)
    expected = distribution(layout, shape, mesh)
    for index in range(len(mesh.names)):
        if not isinstance(layout.placements[index], Shard) or len(layout.joint_axes(index)) > 1:
            continue
        without = layout.replace(index, REPLICATE)
        shard = layout.local_shard(index, mesh)
        for rank, whole in enumerate(distribution(without, shape, mesh)):
            position = mesh.coordinate(rank)[index]
            piece = chunks.cut(whole, shard, mesh.sizes[index])[position]
            real = ~expected[rank].isnan()
            assert torch.equal(piece[real], expected[rank][real])


def test_local_shard_of_an_axis_that_is_not_sharded() -> None:
    with pytest.raises(TypeError, match="axis 0"):
        Layout((REPLICATE,)).local_shard(0, LINE)


@pytest.mark.parametrize(
    ("shape", "placements", "local"),
    [
        ((10, 4), (REPLICATE, Shard(0, 1, 10)), (3, 4)),  # uneven: padded to 12
        ((2, 4), (REPLICATE, Shard(0, 1, 2)), (1, 4)),  # fewer rows than ranks
        ((1, 4), (Shard(0, 1, 1), Shard(0, 1, 1)), (1, 4)),  # a batch of one
        ((10, 4), (Shard(0, 1, 10), Shard(0, 1, 10)), (2, 4)),  # jointly over 8 ranks, uneven
        ((16, 4), (Shard(0, 1, 16), Shard(0, 1, 16)), (2, 4)),
        ((640,), (REPLICATE, Shard(0, 1, 10)), (192,)),  # 10 heads of 64: 3 heads a rank
        ((26,), (REPLICATE, Shard(0, 2, 13)), (8,)),  # [2, 13@tp]
        ((24,), (Shard(0, 1, 2), Shard(0, 2, 4)), (3,)),  # [2@dp, 4@tp, 3]
        ((6, 6), (Shard(0, 1, 6), Shard(1, 1, 6)), (3, 2)),
        ((4,), (Partial(), Owner(1)), (4,)),
        ((12,), (REPLICATE, Segmented(0, (Segment(8, 1, 8), Segment(4, 1, 2, 2)))), (4,)),
        ((13,), (REPLICATE, Segmented(0, (Segment(10, 2, 5), Segment(3, 1, 0)))), (7,)),
    ],
)
def test_local_shapes(
    shape: tuple[int, ...], placements: tuple[Placement, ...], local: tuple[int, ...]
) -> None:
    layout = Layout(placements)
    layout.check(shape, GRID)
    assert layout.local_shape(shape, GRID) == local


@pytest.mark.parametrize(
    ("shape", "placements", "text"),
    [
        ((16, 64), (REPLICATE, Shard(0, 1, 16)), "f32[16@tp, 64]"),
        ((16, 64), (Partial(), Shard(0, 1, 16)), "f32[16@tp, 64] +sum(dp)"),
        ((16, 64), (Partial("max"), Partial("max")), "f32[16, 64] +max(dp) +max(tp)"),
        ((16, 64), (Owner(1), REPLICATE), "f32[16, 64] owner(1)@dp"),
        ((16, 64), (Shard(0, 1, 16), Shard(0, 1, 16)), "f32[16@dp/tp, 64]"),
        ((16, 64), (Shard(0, 4, 2), Shard(0, 1, 4)), "f32[(4@tp x 2@dp x 2), 64]"),
        ((26,), (REPLICATE, Shard(0, 2, 13)), "f32[(2 x 13@tp)]"),
        ((640,), (REPLICATE, Shard(0, 1, 10)), "f32[(10@tp x 64)]"),
        ((4, 8), (Routed("ids:i:8", 0, 1, 4), REPLICATE), "f32[4, 8] routed(0 by %ids:i:8)@dp"),
        ((), (REPLICATE, REPLICATE), "f32[]"),
        (
            (15, 2),
            (REPLICATE, Segmented(0, (Segment(8, 1, 4), Segment(4, 1, 2, 2), Segment(3, 1, 0)))),
            "f32[(4@tp x 2) + (2@tp/2 x 2) + 3, 2]",
        ),
    ],
)
def test_text(shape: tuple[int, ...], placements: tuple[Placement, ...], text: str) -> None:
    layout = Layout(placements)
    assert layout.text(TensorType(shape, torch.float32), GRID) == text


def message(layout: Layout, shape: tuple[int, ...], mesh: Mesh) -> str:
    with pytest.raises(RolemeshError) as caught:
        layout.check(shape, mesh)
    return str(caught.value)


def test_a_factor_must_divide_the_dim() -> None:
    text = message(Layout((Shard(0, 1, 3),)), (8, 2), LINE)
    assert text.startswith("[RM009] extent 8 does not split into 1 x 3 x n\n  where: dim 0 of a")
    assert "why: a shard cuts a factor of the dim into chunks" in text
    assert "fix: choose units that divide the dim" in text


@pytest.mark.parametrize("shard", [Shard(0, 0, 8), Shard(0, 1, 0), Shard(0, 3, 1)])
def test_parts_of_a_factor_are_positive_divisors(shard: Shard) -> None:
    assert message(Layout((shard,)), (8,), LINE).startswith("[RM009]")


@pytest.mark.parametrize("dim", [2, -1])
def test_a_shard_names_a_dim_that_exists(dim: int) -> None:
    text = message(Layout((Shard(dim, 1, 8),)), (8, 8), LINE)
    assert text.startswith(f"[RM009] a value with 2 dims has no dim {dim}")


@pytest.mark.parametrize(
    ("shape", "first", "second"),
    [
        ((16,), Shard(0, 1, 16), Shard(0, 1, 8)),  # both want the first digit
        ((12,), Shard(0, 1, 3), Shard(0, 1, 12)),  # uneven: its units are taken whole
        ((12,), Shard(0, 1, 3), Shard(0, 2, 3)),
        ((16,), Shard(0, 2, 8), Shard(0, 1, 16)),
    ],
)
def test_two_axes_may_not_overlap(shape: tuple[int, ...], first: Shard, second: Shard) -> None:
    text = message(Layout((first, second)), shape, GRID)
    assert text.startswith("[RM021] two mesh axes ask for overlapping factors of one dim")
    assert "fix: put the axes on different dims, or on the same factor in mesh order" in text


def test_replace_and_replicated() -> None:
    layout = Layout.replicated(GRID)
    assert layout.is_replicated
    changed = layout.replace(1, Partial())
    assert changed.placements == (REPLICATE, Partial())
    assert not changed.is_replicated
    assert changed.replace(1, REPLICATE) == layout


def test_shards_of_a_dim_are_outermost_first() -> None:
    layout = Layout((Shard(0, 4, 2), Shard(0, 1, 4)))
    assert layout.shards_of(0) == ((Shard(0, 1, 4), (1,)), (Shard(0, 4, 2), (0,)))
    assert layout.shards_of(1) == ()
