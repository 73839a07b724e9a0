"""The files of a checkpoint that is to be written, byte by byte but for the tensors.

| format | what is written |
|---|---|
| `rank` | a safetensors file for each rank, its local tensors with their pads, and a manifest |
| `safetensors` | whole tensors in files of a size, with an index if there are several |
| `dcp` | a folder of torch.distributed.checkpoint; a file for each rank, every element once |

A safetensors file is 8 bytes with the length of the header, little-endian, the header, and the
tensors' bytes (https://github.com/huggingface/safetensors). Its writer takes whole tensors, so what
precedes them is made here.

Invariants:

* Tensors lie in the order in which the source is read, those of larger elements first: each file is
  then written from its beginning to its end, and every tensor is aligned.
* Every byte of a file that is neither here nor of a tensor is zero.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from rolemesh.compiler.ir.boxes import Distribution, Grid, Run
from rolemesh.compiler.ir.manifest import Manifest, StoredTensor
from rolemesh.compiler.ir.manifest_json import encode_manifest
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.tensor import TensorType
from rolemesh.runtime.checkpoint.files import DTYPES, INDEX, SINGLE
from rolemesh.runtime.reshard.checksums import bad_checkpoint
from rolemesh.runtime.reshard.dcp import FILES, chunks_of, to_checkpoint
from rolemesh.runtime.reshard.dcp_files import METADATA, archive, encode_metadata
from rolemesh.runtime.reshard.sources import MANIFEST, Place, in_file, local_names, rank_file

__all__ = ["SHARD_BYTES", "Sink", "SinkFile", "make_sink"]

SHARD_BYTES = 5 * 10**9
"""Bytes of tensors in one file of whole tensors."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SinkFile(NamedTuple):
    """A file with tensors.

    Attributes:
        name: Its name.
        size: Its bytes; without any it is not written.
        parts: What is in it besides tensors: places and bytes.
    """

    name: str
    size: int
    parts: tuple[tuple[int, bytes], ...]


@dataclass(frozen=True)
class Sink:
    """A checkpoint that is to be written.

    Attributes:
        kind: `rank`, `safetensors` or `dcp`.
        manifest: Where its tensors are: a rank for each file with tensors.
        files: The files with tensors, by rank.
        at: Where the bytes of each local tensor begin in its rank's file.
        others: The files without, whole.
    """

    kind: str
    manifest: Manifest
    files: tuple[SinkFile, ...]
    at: Mapping[Place, int] = field(repr=False)
    others: Mapping[str, bytes] = field(repr=False)


def make_sink(
    kind: str, target: Manifest, order: Sequence[str], shard_bytes: int = SHARD_BYTES
) -> Sink:
    """Lay out the files of a checkpoint.

    Args:
        kind: `rank`, `safetensors` or `dcp`.
        target: The tensors, and, but for `safetensors`, what each rank holds of them.
        order: Their names in the order in which they are written.
        shard_bytes: For `safetensors`: bytes of tensors in a file, unless one has more.

    Raises:
        RolemeshError: RM032 if safetensors has no such dtype or name.
    """
    order = sorted(order, key=lambda name: -target.tensors[name].dtype.itemsize)
    target = Manifest(
        target.mesh,
        {name: target.tensors[name] for name in order},
        target.role,
        target.generation,
    )
    if kind == "dcp":
        return _checkpoint(target)
    if kind == "safetensors":
        return _whole(target, shard_bytes)
    files: list[SinkFile] = []
    at: dict[Place, int] = {}
    for rank in range(target.mesh.size):
        entries = []
        places: list[Place] = []
        for name, piece, own in local_names(target, rank):
            tensor = target.tensors[name]
            grid = tensor.distribution.held[rank][piece]
            entries.append((own, TensorType(grid.shape, tensor.dtype)))
            places.append((name, rank, piece))
        file, offsets = _safetensors(rank_file(rank, target.mesh.size), entries)
        files.append(file)
        at.update(zip(places, offsets, strict=True))
    return Sink(kind, target, tuple(files), at, {MANIFEST: encode_manifest(target)})


def _safetensors(
    name: str, entries: Sequence[tuple[str, TensorType]]
) -> tuple[SinkFile, list[int]]:
    """A safetensors file, and where each tensor begins in it."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins, at = [], 0
    for own, kind in entries:
        if kind.dtype not in _NAMES or own == "__metadata__":
            raise bad_checkpoint(
                f"{own} cannot be written to a safetensors file",
                where=f"{name}: {own}, {kind}",
                why="the format has no such dtype, or keeps the name for itself",
                fix="write another format, or rename or cast the tensor",
            )
        offsets = [at, at + kind.nbytes]
        entry = {"dtype": _NAMES[kind.dtype], "shape": list(kind.shape), "data_offsets": offsets}
        header[own] = entry
        begins.append(at)
        at += kind.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    data = 8 + len(text)
    head = len(text).to_bytes(8, "little") + text
    return SinkFile(name, data + at, ((0, head),)), [data + begin for begin in begins]


def _whole(target: Manifest, shard_bytes: int) -> Sink:
    shards: list[list[str]] = [[]]
    held = 0
    for name, tensor in target.tensors.items():
        if shards[-1] and held + tensor.type.nbytes > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += tensor.type.nbytes
    count = len(shards)
    mesh = Mesh({FILES: count})
    known: dict[tuple[tuple[int, ...], int], Distribution] = {}
    tensors, files, at = {}, [], {}
    weights: dict[str, str] = {}
    for rank, names in enumerate(shards):
        file = SINGLE if count == 1 else f"model-{rank + 1:05d}-of-{count:05d}.safetensors"
        kinds = [(name, target.tensors[name].type) for name in names]
        made, offsets = _safetensors(file, kinds)
        files.append(made)
        for (name, kind), begin in zip(kinds, offsets, strict=True):
            key = kind.shape, rank
            if key not in known:
                known[key] = in_file(kind.shape, rank, count)
            old = target.tensors[name]
            tensors[name] = StoredTensor(old.dtype, known[key], old.aliases, old.parts)
            at[name, rank, 0] = begin
            weights[name] = file
    others = {}
    if count > 1:
        total = sum(tensor.type.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weights}
        others[INDEX] = (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
    manifest = Manifest(mesh, tensors, target.role, target.generation)
    return Sink("safetensors", manifest, tuple(files), at, others)


def _checkpoint(target: Manifest) -> Sink:
    ranks = target.mesh.size
    sizes, at = [0] * ranks, {}
    parts: list[list[tuple[int, bytes]]] = [[] for _ in range(ranks)]
    places: dict[MetadataIndex, _StorageInfo] = {}
    names = [f"__{rank}_0.distcp" for rank in range(ranks)]
    known: dict[int, list[tuple[int, ChunkStorageMetadata]]] = {}
    cuts: dict[int, Distribution] = {}
    tensors = {}
    for name, tensor in target.tensors.items():
        found = tensor.distribution
        if id(found) not in known:
            known[id(found)] = chunks_of(name, found)
        held: list[list[Grid]] = [[] for _ in range(ranks)]
        for rank, chunk in known[id(found)]:
            start, size = tuple(chunk.offsets), tuple(chunk.sizes)
            room = archive(size, tensor.dtype)
            begin = sizes[rank]
            at[name, rank, len(held[rank])] = begin + room.data
            runs = tuple((Run(a, n, 0),) for a, n in zip(start, size, strict=True))
            held[rank].append(Grid(size, runs))
            parts[rank] += [(begin + place, data) for place, data in room.parts]
            index = MetadataIndex(name, chunk.offsets)
            places[index] = _StorageInfo(names[rank], begin, room.nbytes)
            sizes[rank] = begin + room.nbytes
        cut = Distribution(found.shape, None, tuple(tuple(grids) for grids in held))
        cut = cuts.setdefault(id(found), cut)
        tensors[name] = StoredTensor(tensor.dtype, cut, tensor.aliases, tensor.parts)
    files = tuple(
        SinkFile(name, size, tuple(inside))
        for name, size, inside in zip(names, sizes, parts, strict=True)
    )
    others = {METADATA: encode_metadata(to_checkpoint(target), places)}
    manifest = Manifest(target.mesh, tensors, target.role, target.generation)
    return Sink("dcp", manifest, files, at, others)
