"""`P`: what it means on a mesh, its text, and its errors."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.layouts import MESHES

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.placement import REPLICATE, Shard
from rolemesh.compiler.ir.spec import P
from rolemesh.passes.constraints import parse_spec, spec_text

MESH = Mesh({"dp": 2, "tp": 4})


@pytest.mark.parametrize(
    ("spec", "placements"),
    [
        (P(), (REPLICATE, REPLICATE)),
        (P("tp", None), (REPLICATE, Shard(0, 1, 16))),
        (P(None, "tp"), (REPLICATE, Shard(1, 1, 24))),
        (P("dp", "tp"), (Shard(0, 1, 16), Shard(1, 1, 24))),
        (P(("tp",)), (REPLICATE, Shard(0, 1, 16))),
        (P(("dp", "tp")), (Shard(0, 1, 16), Shard(0, 1, 16))),  # jointly, in mesh order
        (P(("tp", "dp")), (Shard(0, 4, 4), Shard(0, 1, 16))),  # another order: digits
        (P(None, "tp", units={1: 6}), (REPLICATE, Shard(1, 1, 6))),
        (P(None, ("tp", "dp"), units={1: 8}), (Shard(1, 4, 2), Shard(1, 1, 8))),
        (P(None, "tp", parts={1: 3}), (REPLICATE, Shard(1, 3, 8))),
        (P(None, "tp", units={1: 4}, parts={1: 3}), (REPLICATE, Shard(1, 3, 4))),
        (P(None, ("tp", "dp"), parts={1: 3}), (Shard(1, 12, 2), Shard(1, 3, 8))),
    ],
)
def test_layout(spec: P, placements: tuple[object, ...]) -> None:
    assert spec.layout((16, 24), MESH) == Layout(placements)  # type: ignore[arg-type]


def test_uneven_dims_are_fine() -> None:
    assert P("tp").layout((10,), MESH).local_shape((10,), MESH) == (3,)
    assert P(("dp", "tp")).layout((10,), MESH).local_shape((10,), MESH) == (2,)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (P(), "P()"),
        (P("tp", None), "P('tp', None)"),
        (P(("dp", "tp")), "P(('dp', 'tp'))"),
        (P(None, "tp", units={1: 8}), "P(None, 'tp', units={1: 8})"),
        (P("tp", units={0: 2}, parts={0: 3}), "P('tp', units={0: 2}, parts={0: 3})"),
    ],
)
def test_text(spec: P, text: str) -> None:
    assert str(spec) == repr(spec) == text
    assert parse_spec(text) == spec


@st.composite
def specs(draw: st.DrawFn) -> tuple[P, tuple[int, ...], Mesh]:
    mesh = draw(st.sampled_from(MESHES))
    shape = tuple(draw(st.lists(st.sampled_from((1, 2, 3, 4, 6, 8)), min_size=1, max_size=3)))
    axes = list(draw(st.permutations(mesh.names)))
    entries: list[str | tuple[str, ...] | None] = []
    for _ in shape:
        count = draw(st.integers(0, len(axes)))
        taken = [axes.pop() for _ in range(count)]
        entries.append(taken[0] if count == 1 else tuple(sorted(taken, key=mesh.index)) or None)
    return P(*entries), shape, mesh


@given(specs())
def test_a_layout_has_each_axis_where_the_spec_says(case: tuple[P, tuple[int, ...], Mesh]) -> None:
    spec, shape, mesh = case
    layout = spec.layout(shape, mesh)
    layout.check(shape, mesh)
    for index, name in enumerate(mesh.names):
        placement = layout.placements[index]
        dims = [
            dim
            for dim, entry in enumerate(spec.entries)
            if entry is not None and name in ((entry,) if isinstance(entry, str) else entry)
        ]
        assert dims == ([placement.dim] if isinstance(placement, Shard) else [])
    assert parse_spec(spec_text(spec)) == spec


def message(spec: P, shape: tuple[int, ...], name: str = "value") -> str:
    with pytest.raises(RolemeshError) as caught:
        spec.layout(shape, MESH, name)
    return str(caught.value)


def test_more_entries_than_dims() -> None:
    assert message(P("tp", None), (8,), "norm.weight") == (
        "[RM014] 2 entries for a tensor with 1 dims\n"
        "  where: P('tp', None) on norm.weight of shape [8]\n"
        "  why: a P has at most one entry per dim\n"
        "  fix: drop the extra entries"
    )


@pytest.mark.parametrize("spec", [P("tp", "tp"), P(("tp", "tp")), P(("dp", "tp"), "dp")])
def test_an_axis_used_twice(spec: P) -> None:
    text = message(spec, (8, 8))
    assert text.startswith("[RM014] axis ")
    assert "is used twice" in text
    assert "fix: name each axis once" in text


def test_an_unknown_axis() -> None:
    text = message(P("tpp"), (8,))
    assert text.startswith("[RM002] unknown mesh axis 'tpp'")
    assert "fix: did you mean 'tp'?" in text


@pytest.mark.parametrize("units", [{0: 3}, {0: 0}, {0: -2}, {0: 16}])
def test_units_must_divide_the_dim(units: dict[int, int]) -> None:
    text = message(P("tp", units=units), (8,), "q_proj.weight")
    assert text == (
        f"[RM009] dim 0 of extent 8 does not divide into {units[0]} units\n"
        f"  where: P('tp', units={units}) on q_proj.weight of shape [8]\n"
        "  why: a chunk holds whole units\n"
        "  fix: give a number of units that divides the dim"
    )


@pytest.mark.parametrize("parts", [3, 0, -2, 16])
def test_parts_must_divide_the_dim(parts: int) -> None:
    assert message(P("tp", parts={0: parts}), (8,), "qkv.weight") == (
        f"[RM009] dim 0 of extent 8 does not divide into {parts} parts\n"
        f"  where: P('tp', parts={{0: {parts}}}) on qkv.weight of shape [8]\n"
        "  why: packed parts have one length\n"
        "  fix: give a number of parts that divides the dim"
    )


def test_units_must_divide_each_part() -> None:
    text = message(P("tp", units={0: 4}, parts={0: 2}), (12,))
    assert text.startswith("[RM009] dim 0 of extent 12 does not divide into 4 units")


@pytest.mark.parametrize("dim", [1, 2, -1])
def test_units_and_parts_of_a_dim_without_an_entry(dim: int) -> None:
    text = message(P("tp", units={dim: 2}), (8, 8))
    assert text.startswith(f"[RM014] units for dim {dim}, which has no entry")
    text = message(P("tp", parts={dim: 2}), (8, 8))
    assert text.startswith(f"[RM014] parts for dim {dim}, which has no entry")


def test_axes_in_another_order_need_even_chunks() -> None:
    text = message(P(("tp", "dp")), (10,))
    assert text.startswith("[RM009] 10 units do not divide over axis 'tp'")
    assert "fix: list the axes in mesh order (dp, tp)" in text


@pytest.mark.parametrize("entry", [0, 1, ["tp"], ("tp", None), ("tp", 1)])
def test_an_entry_is_none_a_name_or_names(entry: object) -> None:
    with pytest.raises(RolemeshError) as caught:
        P(None, entry)  # type: ignore[arg-type]
    assert str(caught.value).startswith(f"[RM014] {entry!r} is no entry of a P\n  where: P(None, ")
