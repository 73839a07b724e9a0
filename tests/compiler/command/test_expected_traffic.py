"""What the process groups are expected to move, where a call's routes say how much."""

from __future__ import annotations

import pytest
from tests.passes.programs import Builder, partition
from tests.passes.test_dispatch import FREE, model

from rolemesh.compiler.command.check_ranks import expected_traffic


@pytest.mark.parametrize(
    ("target", "moves"),
    [
        ("eager", {("dispatch", 0): 1, ("combine", 0): 1}),
        ("inductor", {("dispatch", 0): 1, ("combine", 0): 1}),
        ("ge", {("all_gather", 384): 1, ("reduce_scatter", 384): 1}),
    ],
)
def test_routed_rows_have_no_known_bytes(target: str, moves: dict[tuple[str, int], int]) -> None:
    """A target that moves all rows has the bytes at most: 3 chunks of 4 x 8 elements."""
    program = FREE.apply(partition(model(Builder(tp=4))))
    found = expected_traffic(program, 0, target)
    gathered = "all_to_all" if target == "inductor" else "all_gather"
    assert found == {**moves, (gathered, 192): 1, (gathered, 96): 1}
