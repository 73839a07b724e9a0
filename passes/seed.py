"""Seed: fix the layouts that everything else follows from.

Two things get a seed: the tokens (split by sequence or by batch, or whole), and stored tensors, by
their class. RoPE tables, masks and positions follow from the tokens. A user's `P` on a parameter
name overrides the class; tied weights are one stored tensor and get one layout.
"""

from __future__ import annotations

import enum
import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.layout import REPLICATE, Layout, Owner, Placement, Shard
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.program import Input, InputKind, Program, tensor_type
from rolemesh.compiler.ir.spec import P
from rolemesh.passes.classify import StorageClass, StoredTensor, classify

__all__ = ["Seed", "Storage", "Tokens", "layer_of", "token_inputs"]

aten = torch.ops.aten


class Tokens(enum.Enum):
    """How the tokens of a phase lie on the role's axis."""

    WHOLE = "whole"
    SEQUENCE = "sequence"
    BATCH = "batch"


class Storage(enum.Enum):
    """How a class of stored tensors lies on the role's axis."""

    WHOLE = "replicated"
    OWNER = "whole on the rank layer % ranks"
    OUT = "split by output features"
    IN = "split by input features"
    OUT_HEADS = "split by heads of the output features"
    IN_HEADS = "split by heads of the input features"
    ROWS = "split by rows: vocabulary or experts"
    CACHE_HEADS = "cache split by heads"


@dataclass(frozen=True)
class Seed:
    """The pass.

    Attributes:
        mesh: The mesh to shard for.
        axis: The mesh axis that the role uses.
        tokens: How tokens lie on that axis.
        storage: How each class lies on it; classes left out are replicated.
        annotations: `P` by parameter-name pattern (`fnmatch`), over all axes; the last match wins.
    """

    mesh: Mesh
    axis: str
    tokens: Tokens
    storage: Mapping[StorageClass, Storage] = field(default_factory=dict)
    annotations: Mapping[str, P] = field(default_factory=dict)
    name = "seed"
    requires = "a canonicalised Program without layouts"
    ensures = "a layout per input"

    def apply(self, program: Program) -> Program:
        """The program with a layout for every input.

        Raises:
            RolemeshError: RM008 if a pattern matches no stored tensor; RM002, RM009, RM014 or RM021
                if an annotation does not fit its tensor.
        """
        classes = classify(program)
        index = self.mesh.index(self.axis)
        ranks = self.mesh.sizes[index]
        grouped = _grouped_heads(classes, ranks)
        layouts: dict[fx.Node, tuple[Layout, ...]] = {}
        owners = _Owners(ranks)
        tokens = token_inputs(program)
        for node, entry in zip(program.placeholders, program.inputs, strict=True):
            layout = Layout.replicated(self.mesh)
            placement: Placement = REPLICATE
            if node in tokens:
                placement = self._tokens(tensor_type(node).shape)
            elif node in classes:
                stored = classes[node]
                how = self.storage.get(stored.kind, Storage.WHOLE)
                placement = _placement(how, stored, node, grouped, ranks, owners, entry)
            layouts[node] = (layout.replace(index, placement),)
        self._annotate(program, layouts)
        return program.after(self.name, mesh=self.mesh, layouts=layouts)

    def _tokens(self, shape: tuple[int, ...]) -> Placement:
        if self.tokens is Tokens.WHOLE:
            return REPLICATE
        dim = 0 if self.tokens is Tokens.BATCH else 1
        return Shard(dim, 1, shape[dim])

    def _annotate(self, program: Program, layouts: dict[fx.Node, tuple[Layout, ...]]) -> None:
        for pattern, spec in self.annotations.items():
            matched = [
                (node, entry)
                for node, entry in zip(program.placeholders, program.inputs, strict=True)
                if fnmatch.fnmatchcase(entry.name, pattern)
            ]
            if not matched:
                raise RolemeshError(
                    "RM008",
                    what=f"the pattern {pattern!r} matches no input of the model",
                    where=f"option annotations, {spec}",
                    why=f"names look like {', '.join(e.name for e in program.inputs[:3])}",
                    fix="use the fully qualified parameter name; * matches any characters",
                )
            for node, entry in matched:
                layouts[node] = (spec.layout(tensor_type(node).shape, self.mesh, entry.name),)


class _Owners:
    """Assigns layer-sharded weights to ranks: layer % ranks."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.counts: dict[StorageClass, int] = {}

    def rank(self, stored: StoredTensor, entry: Input) -> int:
        ordinal = self.counts.get(stored.kind, 0)
        self.counts[stored.kind] = ordinal + 1
        layer = layer_of(entry.name)
        return (ordinal if layer is None else layer) % self.ranks


def layer_of(name: str) -> int | None:
    """The layer number in a parameter or module name: its first numeric component."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(found.group(1)) if found else None


def _grouped_heads(classes: Mapping[fx.Node, StoredTensor], ranks: int) -> int:
    """Key/value heads of grouped-query attention if they can split over the ranks, else 0.

    Queries and attention outputs then split in these units too, so that a query head lies on the
    rank of its key head.
    """
    heads = {s.heads for s in classes.values() if s.kind is StorageClass.KEY_VALUE and s.heads > 1}
    return min(heads) if heads and min(heads) >= ranks else 0


def _placement(
    how: Storage,
    stored: StoredTensor,
    node: fx.Node,
    grouped: int,
    ranks: int,
    owners: _Owners,
    entry: Input,
) -> Placement:
    shape = tensor_type(node).shape
    if how is Storage.WHOLE:
        return REPLICATE
    if how is Storage.OWNER:
        return Owner(owners.rank(stored, entry))
    if how is Storage.CACHE_HEADS:
        return Shard(1, 1, grouped) if grouped and stored.heads == grouped else REPLICATE
    if how is Storage.ROWS:
        return Shard(0, 1, shape[0])
    if how in (Storage.OUT, Storage.IN):
        dim = stored.out_dim if how is Storage.OUT else 1 - stored.out_dim
        return Shard(dim, 1, shape[dim])
    dim = stored.out_dim if how is Storage.OUT_HEADS else 1 - stored.out_dim
    if stored.kind is StorageClass.KEY_VALUE and stored.heads != grouped:
        return REPLICATE
    units = grouped if grouped and stored.heads % grouped == 0 else stored.heads
    return Shard(dim, 1, units) if units and shape[dim] % units == 0 else REPLICATE


def token_inputs(program: Program) -> set[fx.Node]:
    """User inputs that hold tokens: ids an embedding looks up, as `[batch, sequence]`."""
    found = set()
    for node, entry in zip(program.placeholders, program.inputs, strict=True):
        if entry.kind is not InputKind.USER or entry.mutated or len(tensor_type(node).shape) < 2:
            continue
        queue, seen = [node], set()
        while queue:
            current = queue.pop()
            if current in seen:
                continue
            seen.add(current)
            for user in current.users:
                if user.target is aten.embedding.default and user.args[1] is current:
                    table = user.args[0]
                    if isinstance(table, fx.Node) and _is_weight(program, table):
                        found.add(node)
                elif user.target in _PASSES_TOKENS:
                    queue.append(user)
    return found


_PASSES_TOKENS = frozenset(
    {aten.view.default, aten.reshape.default, aten._to_copy.default, aten.clone.default}
)


def _is_weight(program: Program, node: fx.Node) -> bool:
    return node.op == "placeholder" and program.inputs[program.placeholders.index(node)].is_state
