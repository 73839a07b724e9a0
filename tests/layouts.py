"""Random valid layouts, drawn through a function, so that hypothesis and plain seeds can both draw.

Beyond plain shards they contain what goes wrong first: units of a dim (heads), factors between an
outer and an inner part, several axes on one dim, jointly or as separate digits, sizes that do not
divide, fewer rows than ranks, dims of extent one, dims in segments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch

from rolemesh.compiler.ir.dims import Dim
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.placement import REPLICATE, Owner, Placement, Segment, Shard, segmented
from rolemesh.lowering import chunks

__all__ = ["MESHES", "Choose", "divisors", "factors", "pad_masks", "random_layout"]

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
    found = divisors(extent)
    if isinstance(extent, Dim):
        return [(a, b) for a in found for b in found if a * b in found]
    return [(a, b) for a in found for b in found if extent % (a * b) == 0]


def divisors(extent: int) -> list[int]:
    """Sizes that divide `extent`, whatever the values of symbols."""
    if not isinstance(extent, Dim):
        return [n for n in range(1, extent + 1) if extent % n == 0]
    content, factors_ = sympy.factor_list(extent.formula)
    found: list[int] = [n for n in range(1, int(content) + 1) if int(content) % n == 0]
    for formula, power in factors_:
        size = extent.scope.size(formula)
        if not isinstance(size, Dim) or size.formula.is_positive is not True:
            continue
        for _ in range(power):
            found += [n * size for n in found if n * size not in found]
    return found


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
    kinds = ["replicated", "dim", "dim", "factor", "segments"] if shape else ["replicated"]
    taken = [p for p in layout.placements if isinstance(p, Shard)]
    if taken:
        kinds += ["joint", "digit"]
    if owner:
        kinds.append("owner")
    kind = choose(kinds)
    if kind == "owner":
        return Owner(choose(range(ranks)))
    if kind == "segments":
        return _segments(choose, choose(range(len(shape))), shape, ranks)
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


def _segments(choose: Choose, dim: int, shape: Sequence[int], ranks: int) -> Placement:
    """A dim in one to three segments, whole ones and ones that groups of ranks share among them."""
    segments, rest = [], shape[dim]
    while rest != 0:
        known = isinstance(rest, Dim) or len(segments) == 2
        length = rest if known else choose(range(1, rest + 1))
        outer, size = choose([(1, 0), *factors(length)])
        copies = choose([n for n in range(1, ranks + 1) if ranks % n == 0]) if size else 1
        segments.append(Segment(length, outer, size, copies))
        rest -= length
    return segmented(dim, segments) if segments else REPLICATE


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
