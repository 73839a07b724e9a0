"""Seed: fix the layouts that everything else follows from.

Two things get a seed: the tokens (split by sequence or by batch, or whole), and stored tensors, by
their class. Where tokens are split, images are too, by batch. RoPE tables, masks and positions
follow from the tokens. A user's `P` on a parameter name overrides the class; tied weights are one
stored tensor and get one layout.

What tokens and classes are is read off the forward part of a Program that computes gradients.
"""

from __future__ import annotations

import enum
import fnmatch
import math
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
    Replicate,
    Segment,
    Segmented,
    Shard,
    segmented,
)
from rolemesh.compiler.ir.program import Input, InputKind, Program, tensor_type
from rolemesh.compiler.ir.spec import P
from rolemesh.compiler.ir.tensor import TensorType
from rolemesh.passes.classify import StorageClass, StoredTensor, classify
from rolemesh.passes.forward_part import forward_part
from rolemesh.passes.rules import default_rules
from rolemesh.passes.rules.registry import Rules
from rolemesh.passes.spread import spread
from rolemesh.passes.tokens import sample_inputs, token_inputs

__all__ = ["AxisUse", "Seed", "Stays", "Storage", "Tokens", "layer_of"]


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
    FULLY = "split by rows, gathered at use"


class Stays(enum.Enum):
    """What collectives on an axis leave where it is, whatever the sizes."""

    NOTHING = "what is cheaper to move is moved"
    TOKENS = "weights are gathered at use, and their gradients summed"
    WEIGHTS = "what is computed of tokens is moved"


@dataclass(frozen=True)
class AxisUse:
    """What a role does with one mesh axis.

    Attributes:
        tokens: How tokens lie on it.
        storage: How each class lies on it; classes left out are replicated.
        stays: What is never moved along it.
        dtensors: Whether weights lie as DTensors and their checkpoints can say, with one box on a
            rank; what does not is replicated.
    """

    tokens: Tokens
    storage: Mapping[StorageClass, Storage] = field(default_factory=dict)
    stays: Stays = Stays.NOTHING
    dtensors: bool = False


@dataclass(frozen=True)
class Seed:
    """The pass.

    Attributes:
        mesh: The mesh to shard for.
        axes: What the role does with each mesh axis that it uses.
        annotations: `P` by parameter-name pattern (`fnmatch`), over all axes; the last match wins.
        stored: Layouts of inputs that live as shards already, by position: they stay as they are,
            whatever class this Program would give them. A model that is captured in pieces, or for
            several phases, has one storage.
        rules: Sharding rules, by which the layout of a recurrent state spreads.
    """

    mesh: Mesh
    axes: Mapping[str, AxisUse] = field(default_factory=dict)
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
        forward, copies = forward_part(program)
        classes = {copies[node]: stored for node, stored in classify(forward).items()}
        tokens = {copies[node] for node in token_inputs(forward)}
        samples = {copies[node] for node in sample_inputs(forward)}
        layouts: dict[fx.Node, tuple[Layout, ...]] = {
            node: (Layout.replicated(self.mesh),) for node in program.placeholders
        }
        seeds: dict[fx.Node, str] = {}
        # A weight is split fully within what the other axes make of it.
        for axis in sorted(self.axes, key=lambda name: _is_full(self.axes[name])):
            index = self.mesh.index(axis)
            one = _AxisSeed(self, program, classes, index, self.axes[axis])
            for node, (placement, why) in one.placements(tokens, samples, layouts).items():
                layouts[node] = (layouts[node][0].replace(index, placement),)
                seeds[node] = f"{seeds[node]}; {why}" if node in seeds else why
        self._annotate(program, layouts, seeds)
        for node in program.placeholders:
            seeds.setdefault(node, "an input that is no token and not stored: whole")
        for position, stored_as in self.stored.items():
            node = program.placeholders[position]
            if _has_plain_shards(stored_as, tensor_type(node)):
                layouts[node] = (stored_as,)
                seeds[node] = "stored so by another program over the same model"
        return program.after(self.name, mesh=self.mesh, layouts=layouts, seeds=seeds)

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


class _AxisSeed:
    """Placements of inputs on one mesh axis."""

    def __init__(
        self,
        seed: Seed,
        program: Program,
        classes: Mapping[fx.Node, StoredTensor],
        index: int,
        use: AxisUse,
    ) -> None:
        self.program = program
        self.classes = classes
        self.mesh = seed.mesh
        self.index = index
        self.ranks = seed.mesh.sizes[index]
        self.use = use
        self.rules = seed.rules

    def placements(
        self,
        tokens: set[fx.Node],
        samples: set[fx.Node],
        layouts: Mapping[fx.Node, tuple[Layout, ...]],
    ) -> dict[fx.Node, tuple[Placement, str]]:
        """By input, how it lies on this axis, and why; what is left out is whole.

        Args:
            tokens: Inputs that hold tokens.
            samples: Inputs that hold images.
            layouts: How inputs lie on axes that were seeded before.
        """
        program, use, classes = self.program, self.use, self.classes
        followed = self._followed(classes)
        others = [stored for node, stored in classes.items() if node not in followed]
        grouped = _grouped_heads(others, self.ranks)
        owners = _Owners(self.ranks)
        found: dict[fx.Node, tuple[Placement, str]] = {}
        for node, entry in zip(program.placeholders, program.inputs, strict=True):
            shape = tensor_type(node).shape
            if node in tokens:
                found[node] = self._tokens(shape), f"tokens: {use.tokens.value}"
            elif node in samples and use.tokens is not Tokens.WHOLE:
                found[node] = Shard(0, 1, shape[0]), "images: by batch"
            elif node in followed:
                why = f"lies as the recurrent state does: {Storage.UNITS.value}"
                found[node] = followed[node], why
            elif _is_full(use) and entry.kind is InputKind.PARAMETER:
                found[node] = self._fully(shape, layouts[node][0]), Storage.FULLY.value
            elif node in classes:
                placement = self._stored(classes[node], node, grouped, owners, entry)
                if use.dtensors and not _is_dtensor(placement, shape, self.ranks):
                    placement = REPLICATE
                found[node] = placement, self._why(classes[node])
        return found

    def _fully(self, shape: tuple[int, ...], layout: Layout) -> Placement:
        """The first dim in chunks, within those of other axes; another dim if these are uneven."""
        for dim in range(len(shape)):
            taken = layout.shards_of(dim)
            outer = math.prod(self.mesh.sizes[i] for _, axes in taken for i in axes)
            even = all(
                shard.outer == 1 and len(axes) == 1 and not shard.size % self.mesh.sizes[axes[0]]
                for shard, axes in taken
            )
            if not taken:
                return Shard(dim, 1, shape[dim])
            if even and not shape[dim] // outer % self.ranks:
                return Shard(dim, outer, shape[dim] // outer)
        return REPLICATE

    def _followed(self, classes: Mapping[fx.Node, StoredTensor]) -> dict[fx.Node, Placement]:
        """Placements of recurrent states, and of the tensors that lie as they do because of them.

        States with heads come first: a state of channels next to them (of a convolution) has the
        channels of several things. A state that no projection leads to stays whole.
        """
        found: dict[fx.Node, Placement] = {}
        states = [node for node, stored in classes.items() if stored.kind is StorageClass.STATE]
        if self.ranks == 1 or self.use.storage.get(StorageClass.STATE) is not Storage.UNITS:
            return found
        for state in sorted(states, key=lambda node: -tensor_type(node).ndim):
            units = classes[state].heads
            if state in found or units == 1:
                continue
            follows = spread(self.program, state, Shard(1, 1, units), self.ranks, self.rules)
            stored = {node: follows[node] for node in follows if node in classes}
            if any(classes[node].kind is not StorageClass.STATE for node in stored):
                found = {**stored, **found}
        return found

    def _stored(
        self, stored: StoredTensor, node: fx.Node, grouped: _Heads, owners: _Owners, entry: Input
    ) -> Placement:
        """How a stored tensor lies; a packed projection segment by segment, unless one owns it."""
        how = self.use.storage.get(stored.kind, Storage.WHOLE)
        shape = tensor_type(node).shape
        if how is Storage.OWNER or not stored.segments:
            return _placement(how, stored, shape, grouped, owners, entry)
        segments: list[Segment] = []
        for length, part in stored.segments:
            how = self.use.storage.get(part.kind, Storage.WHOLE)
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
        return f"{stored.kind.value}: {self.use.storage.get(stored.kind, Storage.WHOLE).value}"

    def _tokens(self, shape: tuple[int, ...]) -> Placement:
        if self.use.tokens is Tokens.WHOLE:
            return REPLICATE
        dim = 0 if self.use.tokens is Tokens.BATCH else 1
        return Shard(dim, 1, shape[dim])


def _is_full(use: AxisUse) -> bool:
    """Whether an axis splits all weights, whatever their class."""
    return Storage.FULLY in use.storage.values()


def _is_dtensor(placement: Placement, shape: Sequence[int], ranks: int) -> bool:
    """Whether it is a placement of DTensor that torch.distributed.checkpoint takes: one box.

    `_StridedShard` describes parts of one length too, each cut by itself. Checkpoints would have
    one offset for all of them.
    """
    if not isinstance(placement, Shard):
        return isinstance(placement, Replicate)
    plain = placement.size == shape[placement.dim]
    return placement.outer == 1 and (plain or not placement.size % ranks)


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
