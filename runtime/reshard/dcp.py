"""Manifests from the metadata of torch.distributed.checkpoint, and back.

A checkpoint's tensors are cut in chunks: boxes that lie in files. Its manifest has a rank for each
file, and each chunk is a local tensor of its own. The other way, each element of a tensor is in one
chunk, however many ranks hold it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from rolemesh.compiler.ir.boxes import Distribution, Grid, Run, distribute
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.manifest import Manifest, StoredTensor, bad_manifest
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.runtime.reshard.moves import Places, UncoveredError, moves_between

__all__ = ["FILES", "chunks_of", "files_of", "from_checkpoint", "to_checkpoint"]

FILES = "file"
"""The axis of the mesh of a checkpoint's manifest: a rank for each of its files."""


def files_of(metadata: Metadata) -> tuple[str, ...]:
    """The files of a checkpoint, sorted: the ranks of its manifest."""
    storage: Mapping[MetadataIndex, object] = metadata.storage_data or {}
    return tuple(sorted({_file(info) for info in storage.values()}))


def from_checkpoint(metadata: Metadata, *, role: str = "", generation: int = 0) -> Manifest:
    """The manifest of a checkpoint; its entries that are no tensors are left out.

    Args:
        metadata: What `FileSystemReader(path).read_metadata()` gives.
        role: The role that it is for.
        generation: The generation of the weights.

    Raises:
        RolemeshError: RM038 if a chunk lies in no file or outside of its tensor, or if chunks do
            not make up their tensor.
    """
    files = {file: rank for rank, file in enumerate(files_of(metadata))}
    storage: Mapping[MetadataIndex, object] = metadata.storage_data or {}
    mesh = Mesh({FILES: max(1, len(files))})
    tensors = {}
    known: dict[Distribution, Distribution] = {}  # plans share what tensors of one object need
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            continue
        held: list[list[Grid]] = [[] for _ in range(mesh.size)]
        for chunk in entry.chunks:
            info = storage.get(MetadataIndex(name, chunk.offsets))
            if info is None:
                raise bad_manifest(
                    f"a chunk of {name} is in no file",
                    where=f"{name}, chunk at {list(chunk.offsets)}",
                    why="the checkpoint's metadata does not say where it is stored",
                    fix="give the metadata that the checkpoint's reader returns",
                )
            held[files[_file(info)]] += _grids(name, entry.size, chunk)
        found = Distribution(tuple(entry.size), None, tuple(tuple(grids) for grids in held))
        if found not in known:
            chunks_of(name, found)
        tensors[name] = StoredTensor(entry.properties.dtype, known.setdefault(found, found))
    return Manifest(mesh, tensors, role, generation)


def to_checkpoint(manifest: Manifest) -> dict[str, TensorStorageMetadata]:
    """The metadata of a checkpoint of the tensors, cut as ranks hold them.

    Of boxes that several ranks hold, the first one's are taken, so that no element is stored twice.

    Raises:
        RolemeshError: RM038 if no rank holds some box of a tensor.
    """
    chunks: dict[int, list[ChunkStorageMetadata]] = {}
    for name, tensor in manifest.tensors.items():
        found = tensor.distribution
        if id(found) not in chunks:
            chunks[id(found)] = [chunk for _, chunk in chunks_of(name, found)]
    return {
        name: TensorStorageMetadata(
            TensorProperties(dtype=tensor.dtype),
            torch.Size(tensor.distribution.shape),
            list(chunks[id(tensor.distribution)]),
        )
        for name, tensor in manifest.tensors.items()
    }


def chunks_of(name: str, found: Distribution) -> list[tuple[int, ChunkStorageMetadata]]:
    """Chunks that make up a tensor, each with the rank in whose local tensor it lies.

    Raises:
        RolemeshError: RM038 if no rank holds some box of the tensor.
    """
    alone = Mesh({"rank": 1})
    everything = distribute(Layout.replicated(alone), found.shape, alone)
    places = Places(tuple(range(len(found.held))), (0,), len(found.held))
    try:
        moves = moves_between(found, everything, places)
    except UncoveredError as error:
        raise bad_manifest(
            f"no rank holds all of {name}",
            where=f"{name} of shape {list(found.shape)}",
            why=f"nobody has the box {[list(pair) for pair in error.box]} (first index, extent)",
            fix="give all files of the checkpoint",
        ) from error
    return [
        (rank, ChunkStorageMetadata(torch.Size(start), torch.Size(size)))
        for rank, start, size in zip(
            moves.source.tolist(), moves.start.tolist(), moves.size.tolist(), strict=True
        )
    ]


def _grids(name: str, shape: torch.Size, chunk: ChunkStorageMetadata) -> list[Grid]:
    """A chunk as a local tensor; none if it has no elements."""
    box = list(zip(chunk.offsets, chunk.sizes, strict=True))
    if len(box) != len(shape) or any(
        start < 0 or size < 0 or start + size > extent
        for (start, size), extent in zip(box, shape, strict=False)
    ):
        raise bad_manifest(
            f"a chunk of {name} lies outside of the tensor",
            where=f"chunk at {list(chunk.offsets)} of {list(chunk.sizes)}, tensor {list(shape)}",
            why="chunks are boxes of their tensor",
            fix="write the checkpoint again",
        )
    if not all(size for _, size in box):
        return []
    return [Grid(tuple(chunk.sizes), tuple((Run(start, size, 0),) for start, size in box))]


def _file(info: object) -> str:
    """The file that an entry of a checkpoint's storage data names."""
    path = getattr(info, "relative_path", None)
    if not isinstance(path, str):
        raise bad_manifest(
            "the checkpoint does not say which files it has",
            where=repr(info),
            why="chunks are found by the relative_path that torch's file writers store",
            fix="give the metadata of a checkpoint in files",
        )
    return path
