"""A manifest as canonical JSON, and back. docs/manifests.md has the schema.

Canonical: keys sorted, no blanks, ASCII, integers only, one newline at the end. Distributions are
listed once each, in the order in which tensors, sorted by name, first need them. So equal manifests
are equal bytes, and the digest is the SHA-256 of those bytes without the member `digest`.

What is read is checked against the schema, its digest, and, for boxes, the layout they claim to be
derived from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from itertools import pairwise
from typing import NoReturn

import torch

from rolemesh.compiler.ir.boxes import Distribution, Grid, Run, distribute
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.manifest import Manifest, Part, StoredTensor, bad_manifest
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.serial_values import Json, decode_placement, encode_placement

__all__ = ["SCHEMA", "decode_manifest", "digest", "encode_manifest"]

SCHEMA = 1
"""Version of the schema. Readers refuse others."""


def encode_manifest(manifest: Manifest) -> bytes:
    """The canonical JSON of a manifest, with its digest."""
    body = _body(manifest)
    body["digest"] = _sha256(body)
    return _canonical(body)


def digest(manifest: Manifest) -> str:
    """The SHA-256 of a manifest's canonical JSON, in hexadecimal."""
    return _sha256(_body(manifest))


def decode_manifest(data: bytes, where: str = "a layout manifest") -> Manifest:
    """The manifest that was written.

    Args:
        data: What `encode_manifest` gave, perhaps laid out anew.
        where: Where the data is from, for messages.

    Raises:
        RolemeshError: RM038 if the data is damaged, of another schema, or has boxes that are not
            those of its layouts.
    """
    try:
        text = data.decode("utf-8")
        body = json.loads(
            text, parse_float=_no_float, parse_constant=_no_float, object_pairs_hook=_unique
        )
        members = _object(body, "the file", None)
        schema = members.get("schema")
        if schema != SCHEMA or isinstance(schema, bool):
            raise ValueError(f"its schema is {schema!r}; this version reads {SCHEMA}")
        claimed = members.pop("digest", None)
        actual = _sha256(members)
        if claimed != actual:
            raise ValueError(f"its digest is {claimed}, that of its contents is {actual}")
        return _manifest(members)
    except RolemeshError as error:
        raise bad_manifest("the manifest is invalid", where=where, why=str(error)) from error
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors are ValueErrors
        raise bad_manifest("the manifest cannot be read", where=where, why=str(error)) from error


# ------------------------------------------------------------------------------------- writing


def _body(manifest: Manifest) -> dict[str, Json]:
    numbers: dict[int, int] = {}
    kept: dict[Distribution, int] = {}
    distributions: list[Json] = []
    tensors: dict[str, Json] = {}
    for name in sorted(manifest.tensors):
        tensor = manifest.tensors[name]
        found = tensor.distribution
        number = numbers.get(id(found))  # most tensors share the object, and hashing takes time
        if number is None:
            number = kept.setdefault(found, len(kept))
            if number == len(distributions):
                distributions.append(_distribution(found))
            numbers[id(found)] = number
        tensors[name] = {
            "aliases": list[Json](sorted(tensor.aliases)),
            "distribution": number,
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "parts": [list(part) for part in tensor.parts],
        }
    mesh = manifest.mesh
    return {
        "schema": SCHEMA,
        "mesh": [[name, size] for name, size in zip(mesh.names, mesh.sizes, strict=True)],
        "role": manifest.role,
        "generation": manifest.generation,
        "distributions": distributions,
        "tensors": tensors,
    }


def _distribution(found: Distribution) -> Json:
    layout = found.layout
    return {
        "shape": list(found.shape),
        "layout": None if layout is None else [encode_placement(p) for p in layout.placements],
        "held": [[_grid(grid) for grid in grids] for grids in found.held],
    }


def _grid(grid: Grid) -> Json:
    return {"shape": list(grid.shape), "runs": [[list(run) for run in runs] for runs in grid.runs]}


def _canonical(body: Mapping[str, Json]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode("ascii") + b"\n"


def _sha256(body: Mapping[str, Json]) -> str:
    return hashlib.sha256(_canonical(body)).hexdigest()


# ------------------------------------------------------------------------------------- reading


def _manifest(body: Json) -> Manifest:
    keys = ("schema", "mesh", "role", "generation", "distributions", "tensors")
    members = _object(body, "the manifest", keys)
    axes = [_array(axis, "a mesh axis", 2) for axis in _array(members["mesh"], "mesh")]
    names = [_text(axis[0], "a mesh axis") for axis in axes]
    if len(set(names)) < len(names):
        raise ValueError(f"the mesh has an axis twice: {names}")
    mesh = Mesh(dict(zip(names, (_integer(axis[1], "a mesh size") for axis in axes), strict=True)))
    distributions = [
        _read_distribution(entry, mesh, f"distribution {number}")
        for number, entry in enumerate(_array(members["distributions"], "distributions"))
    ]
    entries = _object(members["tensors"], "tensors", None)
    tensors = {name: _read_tensor(name, entry, distributions) for name, entry in entries.items()}
    role, generation = members["role"], members["generation"]
    return Manifest(mesh, tensors, _text(role, "role"), _integer(generation, "generation"))


def _read_tensor(name: str, data: Json, distributions: list[Distribution]) -> StoredTensor:
    members = _object(data, name, ("aliases", "distribution", "dtype", "parts"))
    number = _integer(members["distribution"], f"distribution of {name}")
    if number >= len(distributions):
        raise ValueError(f"{name} has distribution {number} of {len(distributions)}")
    dtype = getattr(torch, _text(members["dtype"], f"dtype of {name}"), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"torch has no dtype {members['dtype']!r}, which {name} has")
    parts = []
    for entry in _array(members["parts"], f"parts of {name}"):
        part, *numbers = _array(entry, f"a part of {name}", 4)
        dim, start, length = (_integer(n, f"a part of {name}") for n in numbers)
        parts.append(Part(_text(part, f"a part of {name}"), dim, start, length))
    aliases = [_text(a, f"an alias of {name}") for a in _array(members["aliases"], "aliases")]
    return StoredTensor(dtype, distributions[number], tuple(aliases), tuple(parts))


def _read_distribution(data: Json, mesh: Mesh, what: str) -> Distribution:
    members = _object(data, what, ("shape", "layout", "held"))
    shape = _integers(members["shape"], f"shape of {what}")
    ranks = _array(members["held"], f"boxes of {what}", mesh.size)
    held = tuple(
        tuple(
            _read_grid(grid, shape, f"{what} on rank {rank}")
            for grid in _array(grids, "local tensors")
        )
        for rank, grids in enumerate(ranks)
    )
    if members["layout"] is None:
        return Distribution(shape, None, held)
    entries = _array(members["layout"], f"layout of {what}", len(mesh.names))
    layout = Layout(tuple(decode_placement(entry, None) for entry in entries))
    found = distribute(layout, shape, mesh)
    for rank, (mine, theirs) in enumerate(zip(held, found.held, strict=True)):
        if mine != theirs:
            raise ValueError(
                f"{what}, shape {list(shape)}: the boxes of rank {rank} are {mine}, those of its "
                f"layout {theirs}"
            )
    return found


def _read_grid(data: Json, shape: tuple[int, ...], what: str) -> Grid:
    members = _object(data, what, ("shape", "runs"))
    local = _integers(members["shape"], f"local shape of {what}")
    dims = _array(members["runs"], f"runs of {what}", len(shape))
    if len(local) != len(shape):
        raise ValueError(f"{what}: a local tensor of shape {list(local)} of one of {list(shape)}")
    runs = tuple(
        tuple(
            Run(*_integers(run, f"a run of {what}", 3)) for run in _array(entry, f"runs of {what}")
        )
        for entry in dims
    )
    for dim, along in enumerate(runs):
        at, seen = 0, 0
        for run in along:
            if not run.length or run.local < at or run.start + run.length > shape[dim]:
                break
            at = run.local + run.length
            seen += 1
        ordered = sorted(along)
        apart = all(a.start + a.length <= b.start for a, b in pairwise(ordered))
        if not along or seen < len(along) or at > local[dim] or not apart:
            raise ValueError(
                f"{what}: runs {[list(run) for run in along]} of dim {dim} lie outside the tensor "
                f"of shape {list(shape)}, outside the local one of shape {list(local)}, or overlap"
            )
    return Grid(local, runs)


def _object(data: Json, what: str, keys: tuple[str, ...] | None) -> dict[str, Json]:
    if not isinstance(data, dict) or (keys is not None and set(data) != set(keys)):
        expected = "" if keys is None else f" with the members {', '.join(sorted(keys))}"
        raise ValueError(f"{what} is no object{expected}")
    return data


def _array(data: Json, what: str, length: int | None = None) -> list[Json]:
    if not isinstance(data, list) or length not in (None, len(data)):
        raise ValueError(f"{what}: no array{'' if length is None else f' of {length}'}")
    return data


def _integers(data: Json, what: str, length: int | None = None) -> tuple[int, ...]:
    return tuple(_integer(n, what) for n in _array(data, what, length))


def _integer(data: Json, what: str) -> int:
    if isinstance(data, bool) or not isinstance(data, int) or data < 0:
        raise ValueError(f"{what}: {data!r} is no number from 0")
    return data


def _text(data: Json, what: str) -> str:
    if not isinstance(data, str):
        raise ValueError(f"{what}: {data!r} is no text")
    return data


def _no_float(text: str) -> NoReturn:
    raise ValueError(f"{text} is no integer")


def _unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"an object has a member twice, among {sorted(found)[:5]}")
    return found
