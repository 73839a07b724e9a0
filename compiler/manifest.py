"""The layout manifest of a sharded Program's weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from rolemesh.compiler.api import Sharded
from rolemesh.compiler.ir.boxes import distribute
from rolemesh.compiler.ir.manifest import Manifest, Part, StoredTensor, bad_manifest
from rolemesh.compiler.ir.program import InputKind, tensor_type
from rolemesh.passes.canonicalise import Canonicalise
from rolemesh.passes.classify import classify

__all__ = ["manifest"]


def manifest(
    sharded: Sharded,
    model: torch.nn.Module | None = None,
    *,
    parts: Mapping[str, Sequence[str]] | None = None,
    generation: int = 0,
    aliases: Mapping[str, Sequence[str]] | None = None,
) -> Manifest:
    """Where the weights of a sharded Program lie.

    They are the parameters and buffers that it reads and does not write, as the store and
    checkpoints have them. Caches are none of them.

    Args:
        sharded: What `rolemesh.shard` returned.
        model: The traced model. It tells the other names of tied weights, and which buffers are
            part of its state_dict; others are left out then. Without it all buffers are listed, and
            no aliases.
        parts: Names of the parts of packed weights, by weight. By default the parts of `w` are
            `w#0`, `w#1`, ...
        generation: The generation of the weights.
        aliases: What a model that is gone would tell: for each name in its state_dict, the tensor's
            other names.

    Returns:
        The manifest. Weights whose features the model cuts apart (query, key and value; gate and
        up) have the cuts as parts.

    Raises:
        RolemeshError: RM038 if the names of parts are not as many as the parts, or for a weight
            that is not there.
    """
    program = sharded.program
    names = _names(model) if aliases is None else {n: tuple(a) for n, a in aliases.items()}
    packed = _packed(sharded)
    tensors = {}
    for node, entry in zip(program.placeholders, program.inputs, strict=True):
        if entry.kind not in (InputKind.PARAMETER, InputKind.BUFFER) or entry.mutated:
            continue
        if names is not None and entry.name not in names:
            continue
        kind = tensor_type(node)
        found = distribute(program.layout(node), kind.shape, program.the_mesh)
        others = () if names is None else names[entry.name]
        own = _parts(entry.name, packed.get(entry.name), (parts or {}).get(entry.name))
        tensors[entry.name] = StoredTensor(kind.dtype, found, others, own)
    for name in sorted(parts or {}):
        if name not in tensors:
            raise bad_manifest(
                f"the program has no weight {name}",
                where="the names of parts",
                why=f"it has {len(tensors)} weights, such as {', '.join(sorted(tensors)[:3])}",
                fix="name a weight of the model",
            )
    return Manifest(program.the_mesh, tensors, sharded.options.role or "", generation)


def _names(model: torch.nn.Module | None) -> dict[str, tuple[str, ...]] | None:
    """For each name in a model's state_dict, the tensor's other names."""
    if model is None:
        return None
    same: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        same.setdefault(id(tensor), []).append(name)
    return {
        name: tuple(other for other in group if other != name)
        for group in same.values()
        for name in group
    }


def _packed(sharded: Sharded) -> dict[str, tuple[int, tuple[int, ...]]]:
    """For each packed weight, the dim that it is packed along and the lengths of its parts."""
    program = Canonicalise().apply(sharded.traced.program)
    entries = dict(zip(program.placeholders, program.inputs, strict=True))
    found = {}
    for node, stored in classify(program).items():
        lengths = tuple(length for length, _ in stored.segments)
        shape = tensor_type(node).shape
        if len(lengths) > 1 and sum(lengths) == shape[stored.out_dim]:
            found[entries[node].name] = stored.out_dim, lengths
    return found


def _parts(
    name: str, packed: tuple[int, tuple[int, ...]] | None, given: Sequence[str] | None
) -> tuple[Part, ...]:
    dim, lengths = packed or (0, ())
    called = [f"{name}#{n}" for n in range(len(lengths))] if given is None else list(given)
    if len(called) != len(lengths):
        raise bad_manifest(
            f"{len(called)} names for the {len(lengths)} parts of {name}",
            where=f"{name}: {', '.join(called)}",
            why=f"the model cuts it in runs of {list(lengths)} along dim {dim}"
            if lengths
            else "the model does not cut its features apart",
            fix="name every part of a packed weight, in order",
        )
    starts = [sum(lengths[:n]) for n in range(len(lengths))]
    named = zip(called, starts, lengths, strict=True)
    return tuple(Part(part, dim, start, length) for part, start, length in named)
