"""Random manifests, and tensors moved between them by a plan, element by element."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from tests.layouts import MESHES, Choose, random_layout

from rolemesh.compiler.ir.boxes import distribute
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.manifest import Manifest, StoredTensor
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.lowering import chunks
from rolemesh.runtime.reshard.moves import Moves
from rolemesh.runtime.reshard.plan import Plan

__all__ = [
    "ALL_MESHES",
    "carry_out",
    "elements",
    "numbered",
    "one",
    "random_manifest",
    "rows",
    "scattered",
]

ALL_MESHES = (
    *MESHES,
    Mesh({"tp": 1}),
    Mesh({"tp": 16}),
    Mesh({"dp": 4, "tp": 4}),
    Mesh({"dp": 5, "tp": 3}),
    Mesh({"pp": 2, "dp": 2, "tp": 4}),
)

Locals = dict[str, list[torch.Tensor]]


def one(mesh: Mesh, layout: Layout, shape: Sequence[int], name: str = "w") -> Manifest:
    """A manifest of one float32 tensor."""
    found = distribute(layout, tuple(shape), mesh)
    return Manifest(mesh, {name: StoredTensor(torch.float32, found)})


def random_manifest(choose: Choose, shapes: Sequence[tuple[int, ...]]) -> Manifest:
    """Tensors of these shapes, `w0`, `w1`, ..., on some mesh in some layouts."""
    mesh = choose(ALL_MESHES)
    tensors = {}
    for number, shape in enumerate(shapes):
        layout = random_layout(choose, shape, mesh, owner=True)
        dtype = (torch.float64, torch.float32)[number % 2]
        tensors[f"w{number}"] = StoredTensor(dtype, distribute(layout, shape, mesh))
    return Manifest(mesh, tensors, choose(["", "decode"]), choose(range(3)))


def numbered(tensor: StoredTensor) -> torch.Tensor:
    """A tensor whose elements are all different."""
    shape = torch.Size(tensor.distribution.shape)
    return torch.arange(shape.numel(), dtype=tensor.dtype).reshape(shape)


def scattered(manifest: Manifest) -> Locals:
    """Every rank's local tensors as the store cuts them; NaN in pads and where nothing is held."""
    found: Locals = {}
    for name, tensor in manifest.tensors.items():
        layout = tensor.distribution.layout
        assert layout is not None
        parts = chunks.scatter(numbered(tensor), layout, manifest.mesh)
        parts = chunks.poison_pads(parts, layout, manifest.mesh)
        for rank, part in enumerate(parts):
            if not chunks.holds(layout, manifest.mesh, rank):
                part.fill_(torch.nan)
        found[name] = parts
    return found


def elements(local: torch.Tensor) -> set[float]:
    """What a local tensor holds; elements are numbered."""
    return set(local[~local.isnan()].tolist())


def rows(moves: Moves) -> Iterator[tuple[int, int, tuple[slice, ...], tuple[slice, ...]]]:
    """Source rank, target rank and the boxes in both local tensors, of each move."""
    columns = (moves.source, moves.target, moves.source_at, moves.target_at, moves.size)
    for source, target, take, put, size in zip(*(c.tolist() for c in columns), strict=True):
        yield (
            source,
            target,
            tuple(slice(a, a + n) for a, n in zip(take, size, strict=True)),
            tuple(slice(a, a + n) for a, n in zip(put, size, strict=True)),
        )


def carry_out(plan: Plan, source: Manifest, target: Manifest) -> Locals:
    """What a plan makes of numbered tensors, checking it on the way.

    Nothing is written twice, the bytes are those that the plan says, and no process stages more
    than the limit.
    """
    have = scattered(source)
    found = {
        name: [t.new_full(t.shape, torch.nan) for t in ts] for name, ts in scattered(target).items()
    }
    moved = kept = most = 0
    for step in plan.steps:
        staged: dict[int, int] = {}
        for transfer, moves in plan.moves(step):
            for rank, to, take, put in rows(moves):
                value = have[transfer.source][rank][take]
                place = found[transfer.target][to][put]
                assert place.isnan().all(), "written once"
                place.copy_(value)
                nbytes = value.numel() * value.element_size()
                ends = plan.places.sources[rank], plan.places.targets[to]
                if ends[0] == ends[1]:
                    kept += nbytes
                    continue
                moved += nbytes
                for process in ends:
                    staged[process] = staged.get(process, 0) + nbytes
        most = max(most, *staged.values(), 0)
    assert (plan.moved_bytes, plan.kept_bytes) == (moved, kept)
    assert most <= plan.staged_bytes <= plan.limit
    return found
