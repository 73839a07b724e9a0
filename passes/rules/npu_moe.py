"""Rules of Ascend's fused ops for experts; `lowering/npu` says what the ops compute.

Routing is about all tokens at once: where a row goes depends on the experts of every other token.
So `npu_moe_init_routing_v2` needs all tokens, and grouped products all rows and all experts. What
shards is the features of a row (H, and the K and N of products), and, where each token is computed
alone, the tokens: in the gate, and where rows come together again, which reads all rows but only
the routes of its own tokens.

Products that are fused with a collective have no rule: they belong to lowered programs.
"""

from __future__ import annotations

from collections.abc import Sequence

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.rule import Kind, OpCall, Rule, RuleBuilder
from rolemesh.compiler.ir.tensor import TensorType
from rolemesh.passes.rules.arguments import argument
from rolemesh.passes.rules.einsum import parse
from rolemesh.passes.rules.npu import operand_names
from rolemesh.passes.rules.registry import LocalFunction, RuleFunction, replicated_rule

__all__ = ["LOCAL", "RULES"]

_Dims = Sequence[tuple[int, ...]]

_GATE = {
    count: parse(f"t e!{', e!' * (count - 1)} -> t k!, t k!, t e!", "npu::npu_moe_gating_top_k")
    for count in (1, 2)
}


def gating_top_k(call: OpCall) -> Rule:
    """`npu_moe_gating_top_k(x, k, *, bias=None, ...)`: tokens pass."""
    return _GATE[len(call.operands)](call)


def init_routing(call: OpCall) -> Rule:
    """`npu_moe_init_routing_v2(x, expert_idx, *, scale=None, ...)`: features pass."""
    builder = RuleBuilder()
    given = dict(zip(operand_names(call), call.operands, strict=True))
    t, k = builder.dims(given["expert_idx"].shape, Kind.REPLICATE)
    h = builder.factor(given["x"].shape[1])
    dims: dict[str, _Dims] = {"x": [t, h], "expert_idx": [t, k], "scale": [t]}
    rows, row_idx, tokens, _ = call.results
    r = builder.factor(rows.shape[0], Kind.REPLICATE)
    whole = [builder.dims(value.shape, Kind.REPLICATE) for value in (row_idx, tokens)]
    return builder.build([dims[name] for name in given], [[r, h], *whole, [r]])


def finalize_routing(call: OpCall) -> Rule:
    """`npu_moe_finalize_routing(rows, skip1, skip2, bias, scales, map, ...)`: linear in rows.

    Tokens and features pass. The map has the routes of a token next to each other, or a whole
    number of tokens apart, by `drop_pad_mode`.
    """
    builder = RuleBuilder()
    given = dict(zip(operand_names(call), call.operands, strict=True))
    tokens, features = call.results[0].shape
    t, h = builder.factor(tokens), builder.factor(features)
    routes = given["expanded_src_to_dst_row"].shape[0]
    k = builder.factor(routes // max(tokens, 1), Kind.REPLICATE)
    rows = given["expanded_permuted_rows"].shape[:-1]
    experts = given["bias"].shape[:-1] if "bias" in given else ()
    by_choice = argument(call, 7, "drop_pad_mode") in (None, 0, 1)
    dims: dict[str, _Dims] = {
        "expanded_permuted_rows": [*builder.dims(rows, Kind.REPLICATE), h],
        "skip1": [t, h],
        "skip2": [t, h],
        "bias": [*builder.dims(experts, Kind.REPLICATE), h],
        "scales": [t, k],
        "expanded_src_to_dst_row": [k + t if by_choice else t + k],
        "export_for_source_row": [t, k],
    }
    summands = ("expanded_permuted_rows", "skip1", "skip2", "bias")
    linear = [tuple(name in summands for name in given)]
    return builder.build([dims[name] for name in given], [[t, h]], linear=linear)


def grouped_matmul(call: OpCall) -> Rule:
    """`npu_grouped_matmul(x, weight, *, bias=None, group_list=None, ...)`: one x, groups of rows.

    The sum over K shards unless there is a bias, which every rank would add. With several x, a
    shard of one K would make the other products wrong: they stay whole.
    """
    names = _items(call)
    weight = call.operands[names.index("weight")]
    if names.count("x") > 1 or not call.kwargs.get("split_item"):
        return replicated_rule(call)
    builder = RuleBuilder()
    x = call.operands[names.index("x")]
    r = builder.factor(x.shape[0], Kind.REPLICATE)
    k = builder.factor(x.shape[1], Kind.REPLICATE if "bias" in names else Kind.REDUCE)
    n = builder.factor(weight.shape[-1])
    groups = weight.shape[0] if weight.ndim == 3 else names.count("weight")
    e = builder.factor(groups, Kind.REPLICATE)
    lead = [e] if weight.ndim == 3 else []
    dims: dict[str, _Dims] = {
        "x": [r, k],
        "weight": [*lead, k, n],
        "bias": [*lead, n],
        "group_list": [e],
    }
    linear = [tuple(name in (term, "bias") for name in names) for term in ("x", "weight")]
    return builder.build([dims[name] for name in names], [[r, n]], linear=linear)


def _items(call: OpCall) -> list[str]:
    """For each operand the argument it is, or is an item of."""
    names = [argument.name for argument in call.target._schema.arguments]
    given = [*zip(names, call.args, strict=False), *call.kwargs.items()]
    return [name for name, value in given for _ in _tensors(value)]


def _tensors(value: object) -> Sequence[TensorType]:
    if isinstance(value, TensorType):  # which is a tuple too
        return [value]
    items = value if isinstance(value, list | tuple) else ()
    return [item for item in items if isinstance(item, TensorType)]


def fused_collective(call: OpCall) -> Rule:
    """No rule: what the ranks exchange is not for the model to say."""
    raise RolemeshError(
        "RM010",
        what=f"{call.target} cannot be sharded",
        where=f"{call.target} with operands {', '.join(map(str, call.operands))}",
        why="it exchanges with ranks of its own choice, and rolemesh chooses what ranks exchange",
        fix="write the matrix product alone: it is fused with its collective when it is lowered",
    )


RULES: dict[str, RuleFunction] = {
    "npu::npu_moe_gating_top_k": gating_top_k,
    # The numbers of routes, its last result, count all tokens.
    "npu::npu_moe_gating_top_k_softmax": replicated_rule,
    "npu::npu_moe_init_routing_v2": init_routing,
    "npu::npu_moe_finalize_routing": finalize_routing,
    "npu::npu_grouped_matmul": grouped_matmul,
    "npu::npu_mm_reduce_scatter_base": fused_collective,
    "npu::npu_all_gather_base_mm": fused_collective,
    "npu::npu_mm_all_reduce_base": fused_collective,
    "npu::npu_all_to_all_matmul": fused_collective,
}
LOCAL: dict[str, LocalFunction] = {}
