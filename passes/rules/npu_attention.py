"""Rules of Ascend's fused attention, of its sparse attention, and of the indexer before that.

A layout names the dims of queries and keys: B batch, S or T tokens, N heads, D head dim, H for
`(N D)`. Heads shard; with grouped queries the head dim of q is `[key heads, group]`, so that a
shard of the key heads takes their queries along. Batch shards where each sequence has its own rows
and its lengths are tensors or none at all: lengths given as integers are part of the program, and
that is the same on all ranks. Query rows shard where what a row sees does not depend on its
position. Keys stay whole, and so do pages, of which any sequence may have any. The indexer sums
over heads before it ranks, so its heads stay whole as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from rolemesh.compiler.ir.rule import Kind, OpCall, Rule, RuleBuilder
from rolemesh.compiler.ir.tensor import TensorType
from rolemesh.passes.rules.npu import operand_names
from rolemesh.passes.rules.registry import (
    LocalCall,
    LocalForm,
    LocalFunction,
    RuleFunction,
    replicated_rule,
)

__all__ = ["LOCAL", "RULES"]

_Dim = tuple[int, ...]
_Dims = list[_Dim]

_RESULT = {
    "BNSD_BSND": "BSND",
    "BSH_BNSD": "BNSD",
    "BSND_BNSD": "BNSD",
    "BSH_NBSD": "NBSD",
    "BSND_NBSD": "NBSD",
    "BNSD_NBSD": "NBSD",
    "NTD_TND": "TND",
    "TND_NTD": "NTD",
}
"""Layout of the result of fused attention, by `input_layout`, where it is another."""

_WHOLE_TRIANGLE = (2, 3, 4)
"""Sparse modes with a diagonal, whose mask is the same for all shapes."""


@dataclass(frozen=True)
class _Heads:
    """Factors of heads.

    Attributes:
        query: Of the queries: the key heads and the group, or one factor.
        key: Of the keys; none if there is one head for all.
        group: Of the queries that share a key head.
    """

    query: _Dim
    key: _Dim
    group: _Dim

    @classmethod
    def of(cls, builder: RuleBuilder, query: int, key: int) -> _Heads:
        """New factors for numbers of heads, of which the second divides the first."""
        if key == 1:
            heads = builder.factor(query)
            return cls(heads, (), heads)
        shared = builder.factor(key)
        group = builder.factor(query // key) if query > key else ()
        return cls(shared + group, shared, group)


def _lay_out(layout: str, dims: Mapping[str, _Dim]) -> _Dims:
    """Dims in a layout's order; H is heads and head dim."""
    return [dims["N"] + dims["D"] if letter == "H" else dims[letter] for letter in layout]


def _integers(call: OpCall, name: str) -> Sequence[object] | None:
    return cast("Sequence[object] | None", call.kwargs.get(name))


# ------------------------------------------------------------------------------- fused attention


@dataclass(frozen=True)
class _Names:
    """What a version of fused attention calls its arguments."""

    heads: str
    query_lengths: str
    key_lengths: str


_KNOWN = {"query", "key", "value", "query_rope", "key_rope", "atten_mask", "pse_shift",
          "block_table", "learnable_sink"}  # fmt: skip
"""Tensors that the rule has dims for; others belong to quantization, padding or prefixes."""

_V1 = _Names("num_heads", "actual_seq_lengths", "actual_seq_lengths_kv")
_V2 = _Names("num_query_heads", "actual_seq_qlen", "actual_seq_kvlen")


class _Fused:
    """The rule of one call of fused attention.

    The mask and the position bias have dims for as many rows and keys as there are, or more: then
    they stay whole, and rows too. `sparse_mode` and limits do not apply to a single row, so a
    shard of one row must not bring them back: rows shard with `sparse_mode` 0 or 1 only.
    """

    def __init__(self, call: OpCall, names: _Names) -> None:
        self.call = call
        self.values = dict(zip(operand_names(call), call.operands, strict=True))
        self.layout = str(call.kwargs.get("input_layout", "BSH"))
        self.dims = self.layout.partition("_")[0]
        self.packed = "T" in self.dims
        self.paged = "block_table" in self.values
        self.mode = cast(int, call.kwargs.get("sparse_mode", 0))
        self.query_heads = cast(int, call.kwargs.get(names.heads, 1))
        self.key_heads = cast(int, call.kwargs.get("num_key_value_heads", 0)) or self.query_heads
        self.query_lengths = _integers(call, names.query_lengths)
        self.key_lengths = _integers(call, names.key_lengths)
        self.builder = RuleBuilder()

    def rule(self) -> Rule:
        """The rule; replicated for options that it does not know."""
        query, key = self.values["query"], self.values["key"]
        if not self.values.keys() <= _KNOWN or len(self.dims) != query.ndim:
            return replicated_rule(self.call)
        builder = self.builder
        heads = _Heads.of(builder, self.query_heads, self.key_heads)
        self.extents = dict(zip(self.dims, query.shape, strict=True))
        rows = self.extents.get("T" if self.packed else "S", 1)
        batch = self.extents.get("B", 1)
        if self.packed and self.paged:
            batch = self.values["block_table"].shape[0]
        dims: dict[str, _Dim] = {
            "B": builder.factor(batch, Kind.PASS if self._batch_shards() else Kind.REPLICATE),
            "S": builder.factor(rows, Kind.PASS if self._rows_shard() else Kind.REPLICATE),
            "N": heads.query,
        }
        dims["T"] = dims["S"]
        tokens = 0 if self.paged else key.shape[self.dims.index("T" if self.packed else "S")]
        columns = builder.factor(tokens, Kind.REPLICATE)
        widths: dict[str, _Dim] = {}
        for name in ("key", "value", "key_rope"):
            if name in self.values:
                widths[name] = self._width(name)
        for name, of in (("query", "key"), ("query_rope", "key_rope")):
            if of in widths:
                widths[name] = widths[of]
        operands = [
            self._operand(name, value, dims, heads, columns, widths)
            for name, value in self.values.items()
        ]
        out = {**dims, "D": widths["value"]}
        lse = [dims["S"], heads.query, ()]
        if not self.packed:
            lse = [dims["B"] if "B" in self.dims else (), heads.query, dims["S"], ()]
        if self.call.results[1].ndim == 1:
            lse = [builder.factor(0, Kind.REPLICATE)]
        return builder.build(operands, [_lay_out(_RESULT.get(self.layout, self.layout), out), lse])

    def _batch_shards(self) -> bool:
        lengths = [x for x in (self.query_lengths, self.key_lengths) if x is not None]
        return "B" in self.dims and all(len(found) == 1 for found in lengths)

    def _rows_shard(self) -> bool:
        if self.packed or self.query_lengths is not None or self.mode in _WHOLE_TRIANGLE:
            return False
        mask = self.values.get("atten_mask")
        if mask is not None and self.mode == 0 and self._limited():
            return False
        # Two dims are rows and keys, but sequences and keys if there is one row.
        if mask is not None and (mask.ndim == 2 or mask.shape[-2] != self.extents["S"]):
            return False
        bias = self.values.get("pse_shift")
        return bias is None or bias.shape[-2] == self.extents["S"]

    def _limited(self) -> bool:
        """Whether `pre_tokens` or `next_tokens` reach less far than the rows and keys."""
        key = self.values["key"]
        farthest = max(self.extents["S"], max(key.shape) * (key.shape[0] if self.paged else 1))
        limits = (self.call.kwargs.get(name, farthest) for name in ("pre_tokens", "next_tokens"))
        return any(cast(int, limit) < farthest for limit in limits)

    def _width(self, name: str) -> _Dim:
        """A factor for the head dim of keys or values."""
        value = self.values[name]
        width = value.shape[-1]
        if self.paged and value.ndim == 5:
            width = value.shape[2] * value.shape[4]
        elif value.ndim == 3 and (self.paged or self.dims == "BSH"):
            width //= self.key_heads
        return self.builder.factor(width, Kind.REPLICATE)

    def _operand(
        self,
        name: str,
        value: TensorType,
        dims: dict[str, _Dim],
        heads: _Heads,
        columns: _Dim,
        widths: dict[str, _Dim],
    ) -> _Dims:
        if name in ("query", "query_rope"):
            return _lay_out(self.dims, {**dims, "D": widths[name]})
        if name in ("key", "value", "key_rope"):
            if self.paged:
                return self._pages(value, heads.key, widths[name])
            of = {"B": dims["B"], "S": columns, "T": columns, "N": heads.key, "D": widths[name]}
            return _lay_out(self.dims, of)
        if name == "learnable_sink":
            return [heads.query]
        if name == "block_table":
            return [dims["B"], self.builder.factor(value.shape[1], Kind.REPLICATE)]
        return self._mask(name, value, dims, heads, columns)

    def _pages(self, value: TensorType, heads: _Dim, width: _Dim) -> _Dims:
        whole = self.builder.dims(value.shape, Kind.REPLICATE)
        if value.ndim == 3:
            return [*whole[:2], heads + width]
        if value.ndim == 4:
            return [whole[0], heads, whole[2], width]
        return [whole[0], heads, *whole[2:]]

    def _mask(
        self, name: str, value: TensorType, dims: dict[str, _Dim], heads: _Heads, columns: _Dim
    ) -> _Dims:
        whole = self.builder.dims(value.shape, Kind.REPLICATE)
        if name == "atten_mask" and self.mode in _WHOLE_TRIANGLE:
            return whole
        full = [dims["B"], heads.query, dims["S"], columns][-value.ndim :]
        if value.ndim == 2 and self.extents["S"] == 1:
            full = [dims["B"], columns]
        elif value.ndim == 3:
            full[0] = dims["B"]
        return [
            () if extent == 1 else wanted if extent == self._extent(wanted) else found
            for extent, wanted, found in zip(value.shape, full, whole, strict=True)
        ]

    def _extent(self, factors: _Dim) -> int:
        extent = 1
        for factor in factors:
            extent *= self.builder.sizes[factor]
        return extent


def _local_heads(names: _Names) -> LocalFunction:
    """Numbers of heads as a rank has them."""

    def local_heads(local: LocalCall) -> LocalForm:
        fused = _Fused(local.call, names)
        kwargs = dict(local.kwargs)
        place = {name: index for index, name in enumerate(fused.values)}

        def share(name: str, dim: int, heads: int) -> int:
            whole = local.call.operands[place[name]].shape[dim]
            return local.operand_shape(place[name])[dim] * heads // whole

        at = fused.dims.index("H" if "H" in fused.dims else "N")
        kwargs[names.heads] = share("query", at, fused.query_heads)
        if fused.paged:
            at = 2 if fused.values["key"].ndim == 3 else 1
        if kwargs.get("num_key_value_heads"):
            kwargs["num_key_value_heads"] = share("key", at, fused.key_heads)
        return local.call.target, local.args, kwargs

    return local_heads


# ------------------------------------------------------------------------------- sparse attention


class _Sparse:
    """Dims of a call of sparse attention or of its indexer."""

    def __init__(self, call: OpCall, layout_keys: str, heads_shard: bool) -> None:
        self.call = call
        self.values = dict(zip(operand_names(call), call.operands, strict=True))
        query, key = self.values["query"], self.values["key"]
        self.layout = str(call.kwargs.get("layout_query", "BSND"))
        layout_key = str(call.kwargs.get(layout_keys, "BSND"))
        self.paged = layout_key == "PA_BSND"
        self.layout_key = "BSND" if self.paged else layout_key
        self.packed = self.layout == "TND"
        by_position = self.packed or call.kwargs.get("sparse_mode", 3) != 0
        lengths = "actual_seq_lengths_query" in self.values
        builder = self.builder = RuleBuilder()
        key_heads = key.shape[self.layout_key.index("N")]
        if heads_shard:
            self.heads = _Heads.of(builder, query.shape[-2], key_heads)
        else:
            whole = builder.factor(query.shape[-2], Kind.REPLICATE)
            shared = builder.factor(key_heads, Kind.REPLICATE) if key_heads > 1 else ()
            self.heads = _Heads(whole, shared, ())
        # Lengths of packed tokens are ends, which count from the first sequence.
        ends = self.packed or self.layout_key == "TND"
        batch = self._batch()
        self.b = builder.factor(batch, Kind.REPLICATE if ends else Kind.PASS)
        rows = query.shape[0 if self.packed else 1]
        self.s = builder.factor(rows, Kind.REPLICATE if by_position or lengths else Kind.PASS)
        tokens = key.shape[0 if self.layout_key == "TND" else 1]
        self.t = builder.factor(tokens, Kind.REPLICATE)
        self.blocks = builder.factor(key.shape[0], Kind.REPLICATE)

    def _batch(self) -> int:
        if not self.packed:
            return self.values["query"].shape[0]
        lengths = self.values.get("actual_seq_lengths_query")
        return lengths.shape[0] if lengths is not None else 1

    def rows(self, *rest: _Dim) -> _Dims:
        """Dims of a tensor with a row for each query."""
        return [*([self.s] if self.packed else [self.b, self.s]), *rest]

    def keys(self, width: _Dim) -> _Dims:
        """Dims of keys or values."""
        lead = [self.t] if self.layout_key == "TND" else [self.b, self.t]
        if self.paged:
            lead = [self.blocks, self.t]
        return [*lead, self.heads.key, width]

    def operand(self, name: str, value: TensorType, latent: _Dim) -> _Dims:
        """Dims of one operand; `latent` is the head dim of query, key and value."""
        if name == "query":
            return self.rows(self.heads.query, latent)
        if name in ("key", "value"):
            return self.keys(latent)
        if name == "weights":
            return self.rows(self.heads.query)
        if name == "sinks":
            return [self.heads.query]
        if name.startswith("actual_seq_lengths"):
            return [self.b]
        last = self.builder.factor(value.shape[-1], Kind.REPLICATE)
        if name == "block_table":
            return [self.b, last]
        if name == "sparse_indices":
            return self.rows(self.heads.key, last)
        return self.rows(self.heads.query, last) if name == "query_rope" else self.keys(last)

    def operands(self) -> list[_Dims]:
        """Dims of all operands."""
        latent = self.builder.factor(self.values["query"].shape[-1], Kind.REPLICATE)
        return [self.operand(name, value, latent) for name, value in self.values.items()]


def lightning_indexer(call: OpCall) -> Rule:
    """`npu.npu_lightning_indexer(q, k, weights, *, lengths, block_table, layouts, ...)`."""
    sparse = _Sparse(call, "layout_key", heads_shard=False)
    operands = sparse.operands()
    indices, values = call.results
    builder = sparse.builder
    dims = sparse.rows(sparse.heads.key, builder.factor(indices.shape[-1], Kind.REPLICATE))
    asked = values.ndim == indices.ndim
    return builder.build(operands, [dims, dims if asked else [builder.factor(0, Kind.REPLICATE)]])


def sparse_flash_attention(call: OpCall) -> Rule:
    """`npu.npu_sparse_flash_attention(q, k, v, sparse_indices, scale, *, ropes, lengths, ...)`."""
    sparse = _Sparse(call, "layout_kv", heads_shard=True)
    operands = sparse.operands()
    builder, heads = sparse.builder, sparse.heads
    out = operands[0]
    softmax: _Dims = [builder.factor(0, Kind.REPLICATE)]
    if call.results[1].ndim > 1:
        softmax = [heads.key, sparse.s, heads.group]
        if not sparse.packed:
            softmax = [sparse.b, *softmax]
    return builder.build(operands, [out, softmax, softmax])


_FUSED = "npu::npu_fused_infer_attention_score"
RULES: dict[str, RuleFunction] = {
    _FUSED: lambda call: _Fused(call, _V1).rule(),
    f"{_FUSED}_v2": lambda call: _Fused(call, _V2).rule(),
    "npu::npu_lightning_indexer": lightning_indexer,
    "npu::npu_sparse_flash_attention": sparse_flash_attention,
}
LOCAL: dict[str, LocalFunction] = {_FUSED: _local_heads(_V1), f"{_FUSED}_v2": _local_heads(_V2)}
