"""Rules of Ascend's fused norms, rotary embeddings, gated activation and cache writes.

What a norm or a rotation goes over stays whole, and so does what integers point into; all else
shards. A rotation is linear in what it rotates. The two halves of a gated activation shard alike:
their dim is `[2, n]`, of which n shards.
"""

from __future__ import annotations

from rolemesh.compiler.ir.rule import Kind, OpCall, Rule, RuleBuilder
from rolemesh.compiler.ir.tensor import TensorType
from rolemesh.passes.rules.arguments import argument, dim_argument
from rolemesh.passes.rules.registry import LocalFunction, RuleFunction, replicated_rule

__all__ = ["LOCAL", "RULES", "broadcast_dims", "operand_names"]

_Dims = list[tuple[int, ...]]


def operand_names(call: OpCall) -> list[str]:
    """For each operand the argument it is, as the op's schema calls it."""
    names = [argument.name for argument in call.target._schema.arguments]
    given = [*zip(names, call.args, strict=False), *call.kwargs.items()]
    return [name for name, value in given if isinstance(value, TensorType)]


def broadcast_dims(dims: _Dims, shape: tuple[int, ...], full: tuple[int, ...]) -> _Dims:
    """Dims of a value of a shape with as many dims as `full`, to which it broadcasts."""
    return [
        factors if extent == whole else ()
        for factors, extent, whole in zip(dims, shape, full, strict=True)
    ]


# ------------------------------------------------------------------------------ norms, activations


def _norm(results: str) -> RuleFunction:
    """The rule of a norm whose last operand is gamma; `results` says what each result is.

    `x` is a tensor like the operands, `r` the reciprocal root mean square.
    """

    def norm(call: OpCall) -> Rule:
        x, gamma = call.operands[0], call.operands[-1]
        builder = RuleBuilder()
        lead = builder.dims(x.shape[: x.ndim - gamma.ndim])
        normed = builder.dims(gamma.shape, Kind.REPLICATE)
        forms: dict[str, _Dims] = {"x": [*lead, *normed], "r": [*lead, *[()] * gamma.ndim]}
        operands = [forms["x"]] * (len(call.operands) - 1)
        return builder.build([*operands, normed], [forms[result] for result in results])

    return norm


def swiglu(call: OpCall) -> Rule:
    """`npu.npu_swiglu(x, dim=-1)`: SiLU of the first half of a dim, times the second."""
    x = call.operands[0]
    dim = dim_argument(call, 1, x.ndim, -1)
    builder = RuleBuilder()
    halves = builder.factor(2, Kind.REPLICATE)
    out = builder.dims(call.results[0].shape)
    return builder.build([[*out[:dim], halves + out[dim], *out[dim + 1 :]]], [out])


# ---------------------------------------------------------------------------------------- rotation


def rotary(call: OpCall) -> Rule:
    """`npu.npu_rotary_mul(x, cos, sin, mode, rotate=None)`, `npu.npu_interleave_rope(x, cos, sin)`.

    `rotate` is `[D, D]`.
    """
    x, *angles = call.operands
    builder = RuleBuilder()
    d = builder.factor(x.shape[-1], Kind.REPLICATE)
    dims = [*builder.dims(x.shape[:-1]), d]
    operands = [dims, *(broadcast_dims(dims, angle.shape, x.shape) for angle in angles[:2])]
    if len(angles) > 2:
        operands.append([d, builder.factor(x.shape[-1], Kind.REPLICATE)])
    return builder.build(operands, [dims], linear=((True, *(False,) * len(angles)),))


def apply_rotary_pos_emb(call: OpCall) -> Rule:
    """`npu.npu_apply_rotary_pos_emb(q, k, cos, sin, layout='BSND', ...)`; N is extent 1 in angles.

    Queries and keys have heads of their own, and are partial together.
    """
    query, key, *angles = call.operands
    layout = argument(call, 4, "layout", "BSND")
    if not isinstance(layout, str) or len(layout) != query.ndim:
        return replicated_rule(call)
    builder = RuleBuilder()
    d = builder.factor(query.shape[-1], Kind.REPLICATE)
    q = [*builder.dims(query.shape[:-1]), d]
    k = list(q)
    heads = layout.index("N")
    k[heads] = builder.factor(key.shape[heads])
    operands = [q, k, *(broadcast_dims(q, angle.shape, query.shape) for angle in angles)]
    for angle in operands[2:]:
        angle[heads] = ()
    return builder.build(operands, [q, k], linear=((True, True, False, False),))


# ------------------------------------------------------------------------------------ cache writes


def scatter_nd_update(call: OpCall) -> Rule:
    """`npu.npu_scatter_nd_update(x, indices, updates)`.

    Indices `[..., a]` point into the first a dims of x; updates are `[..., rest of x]`. Every rank
    that holds a part of x needs all rows for it.
    """
    x, indices, _ = call.operands
    builder = RuleBuilder()
    width = indices.shape[-1]
    rest = builder.dims(x.shape[width:])
    dims = [*builder.dims(x.shape[:width], Kind.REPLICATE), *rest]
    rows = builder.dims(indices.shape[:-1], Kind.REPLICATE)
    tuples = builder.factor(width, Kind.REPLICATE)
    return builder.build([dims, [*rows, tuples], [*rows, *rest]], [dims])


def scatter_pa_kv_cache(call: OpCall) -> Rule:
    """`npu.npu_scatter_pa_kv_cache_functional(k, v, k_cache, v_cache, slots, *, cache_mode)`.

    k is `[T, N, D]` and its cache `[blocks, block_size, N, D]`, or `[blocks, N * D / c, block_size,
    c]` in mode `PA_NZ`, the default. Heads shard, and in the first form the head dim too.
    """
    if len(call.operands) != 5 or call.operands[0].ndim != 3:
        return replicated_rule(call)
    fractal = call.kwargs.get("cache_mode", "PA_NZ") == "PA_NZ"
    builder = RuleBuilder()
    tokens = builder.factor(call.operands[0].shape[0], Kind.REPLICATE)
    heads = builder.factor(call.operands[0].shape[1])
    values: list[_Dims] = []
    caches: list[_Dims] = []
    for x, cache in zip(call.operands[:2], call.operands[2:4], strict=True):
        blocks = builder.factor(cache.shape[0], Kind.REPLICATE)
        width = x.shape[2]
        if not fractal:
            size, d = builder.factor(cache.shape[1], Kind.REPLICATE), builder.factor(width)
            values.append([tokens, heads, d])
            caches.append([blocks, size, heads, d])
            continue
        inner = cache.shape[3]
        if width % inner:
            return replicated_rule(call)
        parts = builder.factor(width // inner, Kind.REPLICATE)
        c = builder.factor(inner, Kind.REPLICATE)
        size = builder.factor(cache.shape[2], Kind.REPLICATE)
        values.append([tokens, heads, parts + c])
        caches.append([blocks, heads + parts, size, c])
    return builder.build([*values, *caches, [tokens]], caches)


def _kv_rmsnorm_rope_cache(caches_first: bool) -> RuleFunction:
    """The rule of `npu.npu_kv_rmsnorm_rope_cache` or of its functional variant.

    `(kv, gamma, cos, sin, index, k_cache, ckv_cache, *, scales, v, cache_mode, ...)`. In mode
    `Norm` the caches have a row for each sequence, and sequences shard; pages hold tokens of any.
    The results are the caches and what was stored, in either order.
    """

    def kv_rmsnorm_rope_cache(call: OpCall) -> Rule:
        kv = call.operands[0]
        by_row = call.kwargs.get("cache_mode", "Norm") == "Norm"
        builder = RuleBuilder()
        b = builder.factor(kv.shape[0], Kind.PASS if by_row else Kind.REPLICATE)
        lead = [b, *builder.dims(kv.shape[1:3], Kind.REPLICATE)]
        forms: list[_Dims] = []
        for name, value in zip(operand_names(call), call.operands, strict=True):
            dims = builder.dims(value.shape, Kind.REPLICATE)
            if name in ("kv", "v"):
                dims = [*lead, dims[3]]
            elif name in ("cos", "sin"):
                dims[:3] = broadcast_dims(lead, value.shape[:3], kv.shape[:3])
            elif by_row and name in ("index", "k_cache", "ckv_cache"):
                dims[0] = b
            forms.append(dims)
        shapes = call.results[:2] if not caches_first else call.results[2:]
        stored = [[*lead, builder.factor(x.shape[3], Kind.REPLICATE)] for x in shapes]
        caches = forms[5:7]
        return builder.build(forms, [*caches, *stored] if caches_first else [*stored, *caches])

    return kv_rmsnorm_rope_cache


RULES: dict[str, RuleFunction] = {
    "npu::npu_rms_norm": _norm("xr"),
    "npu::npu_add_rms_norm": _norm("xrx"),
    "npu::npu_add_rms_norm_v2_functional": _norm("rxx"),
    "npu::npu_swiglu": swiglu,
    "npu::npu_rotary_mul": rotary,
    "npu::npu_interleave_rope": rotary,
    "npu::npu_apply_rotary_pos_emb": apply_rotary_pos_emb,
    "npu::npu_scatter_nd_update": scatter_nd_update,
    "npu::npu_scatter_pa_kv_cache_functional": scatter_pa_kv_cache,
    "npu::npu_kv_rmsnorm_rope_cache": _kv_rmsnorm_rope_cache(caches_first=True),
    "npu::npu_kv_rmsnorm_rope_cache_v2_functional": _kv_rmsnorm_rope_cache(caches_first=False),
}
LOCAL: dict[str, LocalFunction] = {}
