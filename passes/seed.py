"""Seed: fix the layouts that everything else follows from.

Two things get a seed: the tokens (split by sequence or by batch, or whole), and stored tensors, by
their class. Where tokens are split, images are too, by batch. RoPE tables, masks and positions
follow from the tokens. A user's `P` on a parameter name overrides the class; tied weights are one
stored tensor and get one layout.
"""

from __future__ import annotations

import enum
import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import fx

from rolemesh.compiler.ir.dims import Dim
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.placement import (
    REPLICATE,
    Owner,
    Placement,
    Segment,
    Segmented,
    Shard,
    segmented,
)
from rolemesh.compiler.ir.program import Input, Program, tensor_type
from rolemesh.compiler.ir.spec import P
from rolemesh.compiler.ir.tensor import TensorType
from rolemesh.passes.classify import StorageClass, StoredTensor, classify
from rolemesh.passes.rules import default_rules
from rolemesh.passes.rules.registry import Rules
from rolemesh.passes.spread import spread
from rolemesh.passes.tokens import sample_inputs, token_inputs

__all__ = ["Seed", "Storage", "Tokens", "layer_of"]


class Tokens(enum.Enum):
    """How the tokens of a phase lie on the role's axis."""

    WHOLE = "whole"
    SEQUENCE = "by sequence"
    BATCH = "by batch"


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
    UNITS = "split by heads or channels, with all that follows"


@dataclass(frozen=True)
class Seed:
    """The pass.

    Attributes:
        mesh: The mesh to shard for.
        axis: The mesh axis that the role uses.
        tokens: How tokens lie on that axis.
        storage: How each class lies on it; classes left out are replicated.
        annotations: `P` by parameter-name pattern (`fnmatch`), over all axes; the last match wins.
        stored: Layouts of inputs that live as shards already, by position: they stay as they are,
            whatever class this Program would give them. A model that is captured in pieces, or for
            several phases, has one storage.
        rules: Sharding rules, by which the layout of a recurrent state spreads.
    """

    mesh: Mesh
    axis: str
    tokens: Tokens
    storage: Mapping[StorageClass, Storage] = field(default_factory=dict)
    annotations: Mapping[str, P] = field(default_factory=dict)
    stored: Mapping[int, Layout] = field(default_factory=dict)
    rules: Rules = field(default_factory=default_rules)
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
        followed = self._followed(program, classes, ranks)
        others = [stored for node, stored in classes.items() if node not in followed]
        grouped = _grouped_heads(others, ranks)
        layouts: dict[fx.Node, tuple[Layout, ...]] = {}
        seeds: dict[fx.Node, str] = {}
        owners = _Owners(ranks)
        tokens, samples = token_inputs(program), sample_inputs(program)
        for node, entry in zip(program.placeholders, program.inputs, strict=True):
            layout = Layout.replicated(self.mesh)
            placement: Placement = REPLICATE
            seeds[node] = "an input that is no token and not stored: whole"
            if node in tokens:
                placement = self._tokens(tensor_type(node).shape)
                seeds[node] = f"tokens: {self.tokens.value}"
            elif node in samples and self.tokens is not Tokens.WHOLE:
                placement = Shard(0, 1, tensor_type(node).shape[0])
                seeds[node] = "images: by batch"
            elif node in followed:
                placement = followed[node]
                seeds[node] = f"lies as the recurrent state does: {Storage.UNITS.value}"
            elif node in classes:
                placement = self._stored(classes[node], node, grouped, owners, entry)
                seeds[node] = self._why(classes[node])
            layouts[node] = (layout.replace(index, placement),)
        self._annotate(program, layouts, seeds)
        for position, stored_as in self.stored.items():
            node = program.placeholders[position]
            if _has_plain_shards(stored_as, tensor_type(node)):
                layouts[node] = (stored_as,)
                seeds[node] = "stored so by another program over the same model"
        return program.after(self.name, mesh=self.mesh, layouts=layouts, seeds=seeds)

    def _followed(
        self, program: Program, classes: Mapping[fx.Node, StoredTensor], ranks: int
    ) -> dict[fx.Node, Placement]:
        """Placements of recurrent states, and of the tensors that lie as they do because of them.

        States with heads come first: a state of channels next to them (of a convolution) has the
        channels of several things. A state that no projection leads to stays whole.
        """
        found: dict[fx.Node, Placement] = {}
        states = [node for node, stored in classes.items() if stored.kind is StorageClass.STATE]
        if ranks == 1 or self.storage.get(StorageClass.STATE) is not Storage.UNITS:
            return found
        for state in sorted(states, key=lambda node: -tensor_type(node).ndim):
            units = classes[state].heads
            if state in found or units == 1:
                continue
            follows = spread(program, state, Shard(1, 1, units), ranks, self.rules)
            stored = {node: follows[node] for node in follows if node in classes}
            if any(classes[node].kind is not StorageClass.STATE for node in stored):
                found = {**stored, **found}
        return found

    def _stored(
        self, stored: StoredTensor, node: fx.Node, grouped: _Heads, owners: _Owners, entry: Input
    ) -> Placement:
        """How a stored tensor lies; a packed projection segment by segment, unless one owns it."""
        how = self.storage.get(stored.kind, Storage.WHOLE)
        shape = tensor_type(node).shape
        if how is Storage.OWNER or not stored.segments:
            return _placement(how, stored, shape, grouped, owners, entry)
        segments: list[Segment] = []
        for length, part in stored.segments:
            how = self.storage.get(part.kind, Storage.WHOLE)
            extents = tuple(length if dim == part.out_dim else n for dim, n in enumerate(shape))
            placement = _placement(how, part, extents, grouped, owners, entry)
            if isinstance(placement, Segmented):
                segments.extend(placement.segments)
            elif isinstance(placement, Shard) and placement.dim == part.out_dim:
                segments.append(Segment(length, placement.outer, placement.size))
            else:
                segments.append(Segment(length, 1, 0))
        return segmented(stored.out_dim, segments)

    def _why(self, stored: StoredTensor) -> str:
        """Why a stored tensor lies as it does, for people: its class, and the role's storage."""
        if stored.segments:
            return "; ".join(dict.fromkeys(self._why(part) for _, part in stored.segments))
        return f"{stored.kind.value}: {self.storage.get(stored.kind, Storage.WHOLE).value}"

    def _tokens(self, shape: tuple[int, ...]) -> Placement:
        if self.tokens is Tokens.WHOLE:
            return REPLICATE
        dim = 0 if self.tokens is Tokens.BATCH else 1
        return Shard(dim, 1, shape[dim])

    def _annotate(
        self,
        program: Program,
        layouts: dict[fx.Node, tuple[Layout, ...]],
        seeds: dict[fx.Node, str],
    ) -> None:
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
                seeds[node] = f"annotated by the user: {pattern!r} is {spec}"


def _has_plain_shards(layout: Layout, value: TensorType) -> bool:
    """Whether the dims that a layout splits have plain sizes, as the layout of a tensor does."""
    return not any(
        isinstance(value.shape[placement.dim], Dim)
        for placement in layout.placements
        if isinstance(placement, Shard | Segmented)
    )


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


@dataclass(frozen=True)
class _Heads:
    """Key and value heads that split over the ranks: none if there are 0.

    Attributes:
        count: Heads.
        copies: Neighbouring ranks that hold the same head, where there are more ranks than heads.
    """

    count: int = 0
    copies: int = 1

    def placement(self, dim: int, extent: int) -> Placement:
        """How a dim that is made of these heads lies."""
        return segmented(dim, (Segment(extent, 1, self.count, self.copies),))

    def units(self, heads: int) -> int:
        """Units that query heads split in: those that read one key head lie on its ranks."""
        together = self.count and self.copies == 1 and heads % self.count == 0
        return self.count if together else heads


def _grouped_heads(classes: Iterable[StoredTensor], ranks: int) -> _Heads:
    """How the key and value heads of grouped-query attention split over the ranks."""
    parts = [part for s in classes for part in ([p for _, p in s.segments] or [s])]
    counts = {s.heads for s in parts if s.kind is StorageClass.KEY_VALUE and s.heads > 1}
    heads = min(counts, default=0)
    if heads >= ranks or not heads:
        return _Heads(heads)
    queries = {s.heads for s in parts if s.kind is StorageClass.QUERY}
    if ranks % heads or any(count % ranks or count % heads for count in queries):
        return _Heads()
    return _Heads(heads, ranks // heads)


def _placement(
    how: Storage,
    stored: StoredTensor,
    shape: Sequence[int],
    grouped: _Heads,
    owners: _Owners,
    entry: Input,
) -> Placement:
    if how is Storage.WHOLE:
        return REPLICATE
    if how is Storage.OWNER:
        return Owner(owners.rank(stored, entry))
    if how is Storage.CACHE_HEADS:
        splits = grouped.count and stored.heads == grouped.count
        return grouped.placement(1, shape[1]) if splits else REPLICATE
    if how is Storage.ROWS:
        return Shard(0, 1, shape[0])
    if how in (Storage.OUT, Storage.IN):
        dim = stored.out_dim if how is Storage.OUT else 1 - stored.out_dim
        return Shard(dim, 1, shape[dim])
    dim = stored.out_dim if how is Storage.OUT_HEADS else 1 - stored.out_dim
    if stored.kind is StorageClass.KEY_VALUE:
        splits = grouped.count and stored.heads == grouped.count
        return grouped.placement(dim, shape[dim]) if splits else REPLICATE
    units = grouped.units(stored.heads)
    return Shard(dim, 1, units) if units and shape[dim] % units == 0 else REPLICATE
