"""Random valid layouts, drawn through a function, so that hypothesis and plain seeds can both draw.

Beyond plain shards they contain what goes wrong first: units of a dim (heads), factors between an
outer and an inner part, several axes on one dim, jointly or as separate digits, sizes that do not
divide, fewer rows than ranks, dims of extent one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.layout import REPLICATE, Layout, Owner, Placement, Shard
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.lowering import chunks

__all__ = ["MESHES", "Choose", "factors", "pad_masks", "random_layout"]

Choose = Callable[[Sequence[Any]], Any]
"""Picks one of several options: `random.Random.choice`, or a draw of hypothesis."""

MESHES = (
    Mesh({"tp": 2}),
    Mesh({"tp": 3}),
    Mesh({"tp": 4}),
    Mesh({"dp": 2, "tp": 2}),
    Mesh({"dp": 2, "tp": 4}),
    Mesh({"dp": 2, "tp": 3}),
    Mesh({"pp": 3, "dp": 2, "tp": 2}),
    Mesh({"dp": 1, "tp": 2}),
)


def factors(extent: int) -> list[tuple[int, int]]:
    """All `(outer, size)` that a dim of `extent` may be sharded by."""
    divisors = [n for n in range(1, extent + 1) if extent % n == 0]
    return [(a, b) for a in divisors for b in divisors if extent % (a * b) == 0]


def random_layout(
    choose: Choose, shape: Sequence[int], mesh: Mesh, *, owner: bool = False
) -> Layout:
    """A valid layout of a tensor of `shape`: replicated, sharded and, if asked for, owned axes."""
    layout = Layout.replicated(mesh)
    for index, ranks in enumerate(mesh.sizes):
        candidate = layout.replace(index, _placement(choose, shape, layout, ranks, owner))
        try:
            candidate.check(shape, mesh)
        except RolemeshError:
            continue
        layout = candidate
    return layout


def _placement(
    choose: Choose, shape: Sequence[int], layout: Layout, ranks: int, owner: bool
) -> Placement:
    kinds = ["replicated", "dim", "dim", "factor"] if shape else ["replicated"]
    taken = [p for p in layout.placements if isinstance(p, Shard)]
    if taken:
        kinds += ["joint", "digit"]
    if owner:
        kinds.append("owner")
    kind = choose(kinds)
    if kind == "owner":
        return Owner(choose(range(ranks)))
    if kind == "joint":
        return choose(taken)
    if kind == "dim":
        dim = choose(range(len(shape)))
        return Shard(dim, 1, shape[dim]) if shape[dim] else REPLICATE
    if kind in ("factor", "digit"):
        dim = taken[0].dim if kind == "digit" else choose(range(len(shape)))
        found = factors(shape[dim])
        return Shard(dim, *choose(found)) if found else REPLICATE
    return REPLICATE


def pad_masks(shape: Sequence[int], layout: Layout, mesh: Mesh) -> list[torch.Tensor]:
    """For each rank, which elements of its local tensor are real; none on a rank that owns none."""
    ones = torch.ones(tuple(shape))
    locals_ = chunks.poison_pads(chunks.scatter(ones, layout, mesh), layout, mesh)
    masks = []
    for rank, local in enumerate(locals_):
        coordinate = mesh.coordinate(rank)
        owns = all(
            not isinstance(placement, Owner) or placement.rank == coordinate[index]
            for index, placement in enumerate(layout.placements)
        )
        masks.append(~local.isnan() & owns)
    return masks
