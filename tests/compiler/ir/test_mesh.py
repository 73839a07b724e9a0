"""Meshes: numbering of ranks, groups, text and errors."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.mesh import Mesh

NAMES = ("pp", "dp", "cp", "tp")
meshes = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(
    lambda sizes: Mesh(dict(zip(NAMES, sizes, strict=False)))
)


def test_a_mesh_is_plain_data() -> None:
    mesh = Mesh({"dp": 2, "tp": 4})
    assert (mesh.names, mesh.sizes, mesh.size) == (("dp", "tp"), (2, 4), 8)
    assert mesh.index("tp") == 1
    assert mesh.axis_size("tp") == 4
    assert str(mesh) == "dp=2,tp=4"
    assert mesh == Mesh({"dp": 2, "tp": 4})
    assert mesh != Mesh({"tp": 4, "dp": 2})
    assert len({mesh, Mesh({"dp": 2, "tp": 4})}) == 1


def test_ranks_are_numbered_row_major() -> None:
    mesh = Mesh({"dp": 2, "tp": 3})
    assert [mesh.coordinate(rank) for rank in range(6)] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (1, 0),
        (1, 1),
        (1, 2),
    ]
    assert mesh.group("dp", 4) == (1, 4)
    assert mesh.group("tp", 4) == (3, 4, 5)


@given(meshes)
def test_rank_is_the_inverse_of_coordinate(mesh: Mesh) -> None:
    for rank in range(mesh.size):
        assert mesh.rank(mesh.coordinate(rank)) == rank


@given(meshes, st.data())
def test_groups_of_an_axis_partition_the_ranks(mesh: Mesh, data: st.DataObject) -> None:
    axis = data.draw(st.sampled_from(mesh.names))
    groups = {mesh.group(axis, rank) for rank in range(mesh.size)}
    assert sorted(rank for group in groups for rank in group) == list(range(mesh.size))
    assert {len(group) for group in groups} == {mesh.axis_size(axis)}
    for group in groups:
        positions = [mesh.coordinate(rank)[mesh.index(axis)] for rank in group]
        assert positions == list(range(mesh.axis_size(axis)))


@given(meshes)
def test_parse_reads_what_str_writes(mesh: Mesh) -> None:
    assert Mesh.parse(str(mesh)) == mesh


def test_parse_allows_spaces() -> None:
    assert Mesh.parse(" dp = 2, tp=4 ") == Mesh({"dp": 2, "tp": 4})


@pytest.mark.parametrize("text", ["", "tp", "tp=", "tp=x", "tp=-1", "tp=2,tp=4", "tp=2,", "=2"])
def test_unreadable_text(text: str) -> None:
    with pytest.raises(RolemeshError) as caught:
        Mesh.parse(text)
    assert caught.value.code == "RM015"


def test_the_error_of_unreadable_text() -> None:
    with pytest.raises(RolemeshError) as caught:
        Mesh.parse("dp=2,tp:4")
    assert str(caught.value) == (
        "[RM015] cannot read the mesh 'dp=2,tp:4'\n"
        "  where: part 'tp:4'\n"
        "  why: a mesh is a comma-separated list of NAME=SIZE, each name once\n"
        "  fix: write for example dp=2,tp=4"
    )


@pytest.mark.parametrize(
    "axes", [{"2p": 2}, {"": 2}, {"tp": 0}, {"tp": -2}, {"tp": 2.0}, {"tp": True}, {"tp": "2"}]
)
def test_an_axis_needs_a_name_and_a_size(axes: dict[str, int]) -> None:
    with pytest.raises(RolemeshError) as caught:
        Mesh(axes)
    (name, size) = next(iter(axes.items()))
    assert str(caught.value).startswith(
        f"[RM015] mesh axis {name!r} with size {size!r} is not valid\n  where: mesh {axes}"
    )


def test_a_mesh_needs_an_axis() -> None:
    with pytest.raises(RolemeshError, match=r"\[RM015\] the mesh has no axis"):
        Mesh({})


def test_an_unknown_axis_names_the_closest_one() -> None:
    with pytest.raises(RolemeshError) as caught:
        Mesh({"data": 2, "model": 4}).index("modle")
    assert str(caught.value) == (
        "[RM002] unknown mesh axis 'modle'\n"
        "  where: mesh data=2,model=4\n"
        "  why: the mesh has the axes data, model\n"
        "  fix: did you mean 'model'?"
    )


def test_an_unknown_axis_without_a_close_one() -> None:
    with pytest.raises(RolemeshError, match="fix: use one of these axes"):
        Mesh({"dp": 2}).group("expert", 0)
