"""Classify weights by what the graph does with them, without looking at names.

Five kinds of nodes are anchors: the embedding lookup, cache writes (new values of mutated inputs),
attention (softmax or a fused attention op), top-k selection, and the outputs. A weight's class
follows from what its contraction reads from and leads to when walking to the next contraction or
anchor. Names and tensor-parallel plans shipped with a model can only cross-check this.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import fx

from rolemesh.compiler.ir.program import Input, InputKind, Program, tensor_type, tensor_types
from rolemesh.passes.segments import feature_segments
from rolemesh.passes.stops import (
    CONTRACTIONS,
    SOFTMAX,
    TOPK,
    Stops,
    is_attention,
    is_experts,
    is_grouped,
    is_norm,
)

__all__ = ["StorageClass", "StoredTensor", "classify", "keeps"]

aten = torch.ops.aten


class StorageClass(enum.Enum):
    """What a stored tensor is to the model."""

    EMBEDDING = "embedding"
    LM_HEAD = "lm_head"
    QUERY_DOWN = "query down-projection"
    QUERY = "query"
    KEY_VALUE = "key or value, written to a cache"
    KEY_VALUE_UP = "key and value up-projection, reads a cache"
    INDEXER = "indexer"
    ATTENTION_OUT = "attention output"
    MLP_IN = "mlp in"
    MLP_OUT = "mlp out"
    ROUTER = "router"
    EXPERTS = "experts"
    CACHE = "cache"
    STATE = "recurrent state"
    OTHER = "other"


@dataclass(frozen=True)
class StoredTensor:
    """A stored tensor's class and, for attention weights, its heads.

    Attributes:
        kind: The class.
        heads: Number of heads in the weight's output dim (or input dim, for ATTENTION_OUT);
            the extent of the head dim of a CACHE; heads or channels of a STATE; 0 if it has none.
        out_dim: Which dim of a projection holds its output features: 0 for a `[out, in]` weight
            that is used transposed, as `torch.nn.Linear` does, 1 for an `[in, out]` weight.
        segments: For a weight that packs several projections, the length of each one's run of
            output features, and what it would be by itself.
    """

    kind: StorageClass
    heads: int = 0
    out_dim: int = 0
    segments: tuple[tuple[int, StoredTensor], ...] = ()


_LOOKUPS = frozenset({aten.embedding.default})
_INDEXED = frozenset({aten.index.Tensor, aten.index_select.default})
_THROUGH = frozenset(
    {
        aten.t.default,
        aten.transpose.int,
        aten.permute.default,
        aten.view.default,
        aten.reshape.default,
        aten._to_copy.default,
        aten.clone.default,
    }
)

_NORMS = frozenset(
    {
        aten.native_layer_norm.default,
        aten.mean.dim,
        aten.sum.dim_IntList,
        aten.var.correction,
        aten.var_mean.correction,
        aten.linalg_vector_norm.default,
    }
)
_ROW_WRITES = frozenset(
    {
        aten.index_copy.default,
        aten.index_put.default,
        aten.scatter.src,
        aten.scatter_add.default,
        aten.slice_scatter.default,
        aten.where.self,
    }
)
"""Ops that write rows of a cache."""
_TRANSPOSES = frozenset({aten.t.default, aten.transpose.int, aten.permute.default})


def _is_recurrent(program: Program, state: fx.Node) -> bool:
    """Whether a state is computed anew by every call and has no row for each token.

    A cache gets rows at positions that the call computes, and attention reads it before any
    weight does.
    """
    written = {
        value
        for value, output in zip(program.results, program.outputs, strict=True)
        if output.mutates is not None and program.placeholders[output.mutates] is state
    }
    queue, seen = [state], set()
    while queue:
        node = queue.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.target in SOFTMAX or node.target in TOPK or is_attention(node):
            return False
        if node in written and node.target in _ROW_WRITES:
            return False
        if node.target is not aten.mm.default and node.target is not aten.addmm.default:
            queue.extend(node.users)
    return True


def keeps(node: fx.Node, entry: Input) -> bool:
    """Whether an input is a cache or a recurrent state: what one call keeps for the next one."""
    mutated = entry.mutated and entry.kind is not InputKind.PARAMETER
    return mutated and tensor_type(node).ndim >= 3


def classify(program: Program) -> dict[fx.Node, StoredTensor]:
    """The class of every stored tensor (weights with two dims or more, and caches).

    Args:
        program: A canonicalised, unsharded Program.

    Returns:
        By placeholder. Stored tensors with fewer than two dims are OTHER.
    """
    stops = Stops(program)
    states = {
        node: entry
        for node, entry in zip(program.placeholders, program.inputs, strict=True)
        if entry.is_state
    }
    found: dict[fx.Node, StoredTensor] = {}
    contractions: dict[fx.Node, fx.Node] = {}
    out_dims: dict[fx.Node, int] = {}
    for node, entry in states.items():
        found[node] = StoredTensor(StorageClass.OTHER)
        if keeps(node, entry):
            shape = tensor_type(node).shape
            if _is_recurrent(program, node):
                found[node] = StoredTensor(StorageClass.STATE, shape[1])
            else:
                found[node] = StoredTensor(StorageClass.CACHE, shape[1] if len(shape) == 4 else 0)
        elif entry.mutated and entry.kind is not InputKind.PARAMETER:
            continue
        elif len(tensor_type(node).shape) >= 2:
            _first_use(node, found, contractions, out_dims)
    by_contraction = {contraction: weight for weight, contraction in contractions.items()}
    stored = stops.set_of(states)
    kinds: dict[fx.Node, StorageClass] = {}
    for contraction in by_contraction:
        up, down = stops.up(_activation(contraction)), stops.down(contraction)
        if _ends_an_mlp(stops, contraction, up & ~stored, by_contraction):
            kinds[contraction] = StorageClass.MLP_OUT
            continue
        kind = _by_anchor(stops, contraction, up, down)
        if kind is not None:
            kinds[contraction] = kind
    _by_neighbours(kinds, by_contraction, stops)
    for contraction, weight in by_contraction.items():
        kind, out_dim = kinds.get(contraction, StorageClass.OTHER), out_dims[weight]
        if tensor_type(weight).ndim > 2:  # a stack of matrices: by matrix, or not at all
            found[weight] = StoredTensor(_STACKED.get(kind, StorageClass.OTHER))
            continue
        segments = tuple(
            (segment.length, _segment(stops, contraction, segment.value, kind, out_dim))
            for segment in (feature_segments(contraction) if kind in _PACKED else ())
        )
        heads = _heads(stops, contraction, kind, stops.down(contraction))
        found[weight] = StoredTensor(kind, heads, out_dim, segments)
    return found


_STACKED: Mapping[StorageClass, StorageClass] = MappingProxyType(
    {StorageClass.MLP_IN: StorageClass.EXPERTS, StorageClass.MLP_OUT: StorageClass.EXPERTS}
)
"""What a stack of weights of a class is, where a batched product takes all of them at once."""

_PACKED = frozenset({StorageClass.QUERY, StorageClass.KEY_VALUE, StorageClass.MLP_IN})
"""Classes of weights that may pack several projections."""


def _segment(
    stops: Stops, contraction: fx.Node, value: fx.Node, kind: StorageClass, out_dim: int
) -> StoredTensor:
    """What one segment of a packed projection is."""
    if kind is StorageClass.MLP_IN:
        return StoredTensor(kind, 0, out_dim)
    up, down = stops.up(_activation(contraction)), stops.down(value)
    kind = _by_anchor(stops, contraction, up, down) or StorageClass.OTHER
    return StoredTensor(kind, _heads(stops, value, kind, down), out_dim)


def _first_use(
    weight: fx.Node,
    found: dict[fx.Node, StoredTensor],
    contractions: dict[fx.Node, fx.Node],
    out_dims: dict[fx.Node, int],
) -> None:
    """Follow a weight through views and casts to the op that uses it."""
    queue = [(weight, 1)]
    while queue:
        node, out_dim = queue.pop()
        for user in node.users:
            if user.target in _THROUGH:
                queue.append((user, 1 - out_dim if user.target in _TRANSPOSES else out_dim))
            elif user.target in CONTRACTIONS and weight not in contractions:
                contractions[weight] = user
                out_dims[weight] = out_dim
            elif user.target in _LOOKUPS:
                found[weight] = StoredTensor(StorageClass.EMBEDDING)
            elif is_experts(user) or (
                (user.target in _INDEXED or is_grouped(user)) and tensor_type(weight).ndim == 3
            ):
                found[weight] = StoredTensor(StorageClass.EXPERTS)


def _activation(contraction: fx.Node) -> fx.Node:
    position = 1 if contraction.target in (aten.addmm.default, aten.baddbmm.default) else 0
    node = contraction.args[position]
    assert isinstance(node, fx.Node)
    return node


def _ends_an_mlp(
    stops: Stops, contraction: fx.Node, up: int, projections: Mapping[fx.Node, fx.Node]
) -> bool:
    """Whether an output is what an MLP gives, as where a graph ends in the middle of a model.

    Its last projection reads other projections that nothing else reads, through pointwise ops
    alone. A head reads a norm, or all that was added up before it.

    Args:
        stops: The stops of the graph.
        contraction: The projection.
        up: The stops that its input comes from, without stored tensors such as biases.
        projections: All projections.
    """
    if stops.down(contraction) & ~stops.outputs or not up:
        return False
    itself = stops.set_of([contraction])
    return all(
        node in projections and stops.down(node) == itself for node in stops.nodes(up)
    ) and not _reads_a_norm(contraction)


def _reads_a_norm(contraction: fx.Node) -> bool:
    """Whether a reduction lies between a contraction and those before it."""
    queue, seen = [_activation(contraction)], set()
    while queue:
        node = queue.pop()
        if node in seen or node.op != "call_function" or node.target in CONTRACTIONS:
            continue
        seen.add(node)
        if node.target in _NORMS or is_norm(node):
            return True
        queue.extend(node.all_input_nodes)
    return False


def _by_anchor(stops: Stops, contraction: fx.Node, up: int, down: int) -> StorageClass | None:
    """Classes that anchors next to the contraction decide."""
    if not down & ~stops.outputs:
        return StorageClass.LM_HEAD
    compute = up & stops.calls
    values = compute & (stops.attention | stops.bmm)
    queries = compute & ~values & stops.attending  # a gate's other half
    if values and values | queries == compute and not values & ~_weighted(stops):
        return StorageClass.ATTENTION_OUT
    if up & stops.writes:
        return StorageClass.KEY_VALUE_UP
    weights = down & stops.mm
    if stops.set_of([contraction]) & stops.attending:  # a query may gate what attention gives
        weights = stops.set_of(
            node
            for node in stops.nodes(weights)
            if not stops.up(_activation(node)) & _weighted(stops)
        )
    if not weights and down & stops.writes:
        return StorageClass.KEY_VALUE
    scores = down & stops.bmm
    if not weights and (scores or down & stops.attention):
        leads = stops.below(scores)
        if down & stops.attention or leads & stops.softmax:
            return StorageClass.QUERY
        if (leads | down | stops.below(leads)) & stops.topk:
            return StorageClass.INDEXER
    if not scores and (down | stops.below(down & stops.softmax)) & stops.topk:
        return StorageClass.ROUTER
    return None


def _weighted(stops: Stops) -> int:
    """What gives values weighted by attention scores."""
    return stops.attention | stops.weighting


def _by_neighbours(
    kinds: dict[fx.Node, StorageClass], by_contraction: Mapping[fx.Node, fx.Node], stops: Stops
) -> None:
    """Classes that follow from the classes of the next contractions."""
    projections = stops.set_of(by_contraction)
    attention = stops.set_of(
        node for node, kind in kinds.items() if kind in (StorageClass.QUERY, StorageClass.INDEXER)
    )
    for contraction in by_contraction:
        if contraction in kinds:
            continue
        down = stops.down(contraction)
        following = down & projections
        if following and not following & ~attention:
            kinds[contraction] = StorageClass.QUERY_DOWN
        elif following == down and down.bit_count() == 1:
            (following_one,) = stops.nodes(down)
            if kinds.get(following_one) is not StorageClass.LM_HEAD:
                kinds[contraction] = StorageClass.MLP_IN
    for contraction in by_contraction:
        if kinds.get(contraction) is StorageClass.MLP_IN:
            (following_one,) = stops.nodes(stops.down(contraction))
            kinds.setdefault(following_one, StorageClass.MLP_OUT)


def _heads(stops: Stops, value: fx.Node, kind: StorageClass, down: int) -> int:
    """Heads that a projection's wide dim is made of, read off the reshape next to it.

    Args:
        stops: The stops of the graph.
        value: The projection's result, or a segment of it.
        kind: Its class.
        down: What the value leads to.
    """
    if kind is StorageClass.ATTENTION_OUT:
        return _merged_heads(_activation(value))
    if kind not in (StorageClass.QUERY, StorageClass.KEY_VALUE, StorageClass.KEY_VALUE_UP):
        return 0
    heads = _split_heads(value)
    if kind is StorageClass.KEY_VALUE and not down & ~stops.writes:
        # Rotary embeddings cut a head, too: the heads are those of the cache.
        caches = (tensor_type(node).shape for node in stops.nodes(down))
        return heads if any(len(shape) == 4 and shape[1] == heads for shape in caches) else 0
    return heads


def _merged_heads(node: fx.Node) -> int:
    """Heads of `[.., heads, head_dim] -> [.., heads * head_dim]` upstream of `node`."""
    width = tensor_type(node).shape[-1]
    while node.op == "call_function" and len(tensor_types(node)) == 1 and node.all_input_nodes:
        source = node.all_input_nodes[0]
        shape = tensor_type(source).shape if tensor_types(source) else ()
        if len(shape) >= 3 and tensor_type(node).shape[-1] == width != shape[-1]:
            return shape[-2] if shape[-2] * shape[-1] == width else 0
        node = source
    return 0


def _leading(shape: Sequence[int], width: int) -> int:
    """Extent of the outermost of the last dims that make up `width` together; 0 if none do."""
    product = 1
    for extent in reversed(shape):
        product *= extent
        if product == width:
            return extent
    return 0


def _split_heads(node: fx.Node) -> int:
    """Heads of `[.., heads * width] -> [.., heads, ..]` downstream of `node`."""
    width = tensor_type(node).shape[-1]
    queue = list(node.users)
    for _ in range(16):
        if not queue:
            return 0
        user = queue.pop(0)
        if user.op != "call_function" or len(tensor_types(user)) != 1:
            continue
        shape = tensor_type(user).shape
        if shape and shape[-1] != width:
            heads = _leading(shape, width)
            if heads:
                return heads
        elif shape:
            queue.extend(user.users)
    return 0
