"""Gates of mixtures of experts -> npu_moe_gating_top_k.

    topk(softmax(x))                                  softmax over experts
    topk(sigmoid(x) + bias, maybe among best groups)  DeepSeek-V3: what is chosen by bias weighs
                                                      its sigmoid, divided by the sum and scaled

Groups are best by the sum of their best two experts. What a model does with the softmax weights
afterwards stays as it is.

Scores have to be fp32: rounded ones would choose other experts. Both forms take any order among
equal scores. Limits are those of the documentation of `torch_npu.npu_moe_gating_top_k`: the sizes
below, and all operands of one dtype.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import fx

from rolemesh.lowering.ge.fusions.base import Emitter, Found, Fusion, Setting
from rolemesh.lowering.npu.define import define_npu_ops
from rolemesh.passes.patterns import (
    Size,
    argument,
    dtype_of,
    is_call,
    number,
    same_shape,
    shape_of,
    users_of,
)

__all__ = ["moe_gating_top_k"]

aten = torch.ops.aten

_EXPERTS = 2048
"""Most experts; also with the experts of each group rounded up to a multiple of 32."""
_GROUP_UNIT = 32
_SMALLEST_GROUP = 3

_SOFTMAX, _SIGMOID = 0, 1
"""Values of `norm_type`."""
_BEST_TWO = 1
"""The value of `group_select_mode`."""

_NOT = (aten.bitwise_not.default, aten.logical_not.default)
_ZEROS = (aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default)
_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)


def moe_gating_top_k() -> Fusion:
    """The fusion."""
    define_npu_ops()
    ends = frozenset({operator.getitem, aten.div.Tensor, aten.mul.Tensor})
    return Fusion(torch.ops.npu.npu_moe_gating_top_k.default, ends, _find)


class _Groups(NamedTuple):
    """How experts are preselected: the groups there are, and how many of them."""

    total: int = 1
    best: int = 1


def _find(end: fx.Node, setting: Setting) -> Found | None:
    is_part = end.target is operator.getitem
    return _softmax_gate(end, setting) if is_part else _sigmoid_gate(end, setting)


def _softmax_gate(end: fx.Node, setting: Setting) -> Found | None:
    found = _top(end.args[0])
    if found is None:
        return None
    top, scores, k = found
    if not is_call(scores, aten._softmax.default) or argument(scores, "dim") not in (-1, 1):
        return None
    x = scores.args[0]
    assert isinstance(x, fx.Node)
    results = sorted(users_of(top))
    if end is not results[-1] or not _takes(x, scores, k, _Groups(), setting):
        return None

    def emit(new: Emitter) -> Sequence[fx.Node]:
        made = new(torch.ops.npu.npu_moe_gating_top_k.default, x, k, norm_type=_SOFTMAX)
        return [_result(new, made, part.args[1]) for part in results]

    return Found(tuple(results), (top, scores), emit)


def _sigmoid_gate(end: fx.Node, setting: Setting) -> Found | None:
    shares, scale = end, 1.0
    if is_call(end, aten.mul.Tensor):
        factor, source = number(end.args[1]), end.args[0]
        if factor is None:
            return None
        assert isinstance(source, fx.Node)
        shares, scale = source, factor
    elif any(
        is_call(user, aten.mul.Tensor) and number(user.args[1]) is not None for user in end.users
    ):
        return None  # it is matched with its scale
    divided = _shares(shares)
    chosen = argument(divided[0], "index") if divided is not None else None
    found = _part_of_top(chosen, 1)
    if divided is None or found is None:
        return None
    picked, epsilon, inner = divided
    scores, (top, among, k) = picked.args[0], found
    if argument(picked, "dim") not in (-1, 1) or not is_call(scores, aten.sigmoid.default):
        return None
    preselected = _among_groups(among)
    if preselected is None:
        return None
    choice, groups, passed = preselected
    assert isinstance(scores, fx.Node)
    x, bias = scores.args[0], None if choice is scores else _added(choice, scores)
    assert isinstance(x, fx.Node)
    assert isinstance(chosen, fx.Node)
    if not _takes(x, end, k, groups, setting) or (choice is not scores and bias is None):
        return None
    if bias is not None and not (_is_bias_of(bias, x) and bias < chosen):
        return None

    def emit(new: Emitter) -> Sequence[fx.Node]:
        made = new(
            torch.ops.npu.npu_moe_gating_top_k.default,
            x,
            k,
            bias=bias,
            k_group=groups.best,
            group_count=groups.total,
            group_select_mode=_BEST_TWO,
            norm_type=_SIGMOID,
            routed_scaling_factor=scale,
            eps=epsilon,
        )
        return [_result(new, made, 1), _result(new, made, 0)]

    nodes = {shares, picked, *inner, top, *passed, choice, scores} - {end}
    return Found((chosen, end), tuple(nodes), emit)


def _result(new: Emitter, made: fx.Node, index: object) -> fx.Node:
    """Weights (0), or experts (1) as PyTorch numbers them."""
    assert isinstance(index, int)
    part = new.part(made, index)
    return part if index == 0 else new(aten._to_copy.default, part, dtype=torch.int64)


def _top(value: object) -> tuple[fx.Node, fx.Node, int] | None:
    """A choice of the largest along the last dim: itself, what it chooses from, and how many."""
    if not is_call(value, aten.topk.default):
        return None
    assert isinstance(value, fx.Node)
    source, k, dim = value.args[0], argument(value, "k"), argument(value, "dim")
    assert isinstance(source, fx.Node)
    if not isinstance(k, int) or not argument(value, "largest"):
        return None
    return (value, source, k) if dim in (-1, len(shape_of(source)) - 1) else None


def _shares(value: fx.Node) -> tuple[fx.Node, float, list[fx.Node]] | None:
    """Of `x / (sum(x) + epsilon)`, where x is gathered: x, epsilon, and nodes on the way."""
    if not is_call(value, aten.div.Tensor):
        return None
    picked, shifted = value.args
    if not is_call(picked, aten.gather.default) or not is_call(shifted, aten.add.Tensor):
        return None
    assert isinstance(picked, fx.Node)
    assert isinstance(shifted, fx.Node)
    total, epsilon = shifted.args[0], number(shifted.args[1])
    if epsilon is None or argument(shifted, "alpha") != 1 or not _sums(total, picked, keep=True):
        return None
    assert isinstance(total, fx.Node)
    return picked, epsilon, [shifted, total]


def _sums(value: object, source: fx.Node, *, keep: bool) -> bool:
    """Whether a value is the sum of another along its last dim."""
    if not is_call(value, aten.sum.dim_IntList):
        return False
    assert isinstance(value, fx.Node)
    dims = value.args[1]
    last = isinstance(dims, list | tuple) and list(dims) in ([-1], [len(shape_of(source)) - 1])
    plain = argument(value, "dtype") is None and argument(value, "keepdim") is keep
    return last and plain and value.args[0] is source


def _among_groups(among: fx.Node) -> tuple[fx.Node, _Groups, list[fx.Node]] | None:
    """What experts are chosen by, before those outside of the best groups were excluded."""
    if not is_call(among, aten.masked_fill.Scalar):
        return among, _Groups(), []
    choice, excluded, fill = among.args
    assert isinstance(choice, fx.Node)
    if fill != -math.inf or not is_call(excluded, *_NOT):
        return None
    assert isinstance(excluded, fx.Node)
    spread = _spread(excluded.args[0])
    if spread is None:
        return None
    marks, shape, passed = spread
    if not is_call(marks, aten.scatter.value) or marks.args[1] not in (-1, 1) or marks.args[3] != 1:
        return None
    zeros, index = marks.args[0], marks.args[2]
    best = _part_of_top(index, 1)
    pairs = best[1].args[0] if best is not None else None
    two = _part_of_top(pairs, 0)
    if best is None or two is None or two[2] != 2 or not is_call(zeros, *_ZEROS):
        return None
    assert isinstance(pairs, fx.Node)
    grouped = two[1]
    from_choice = is_call(grouped, *_VIEWS) and grouped.args[0] is choice
    if not from_choice or not _sums(best[1], pairs, keep=False):
        return None
    if len(shape) != 3 or not same_shape(shape, shape_of(grouped)):
        return None
    assert isinstance(index, fx.Node)
    assert isinstance(zeros, fx.Node)
    inner = [among, excluded, *passed, marks, zeros, index, *best[:2], pairs, *two[:2]]
    return choice, _Groups(int(shape[1]), best[2]), inner


def _part_of_top(value: object, index: int) -> tuple[fx.Node, fx.Node, int] | None:
    """`_top` of the op whose result number `index` a value is."""
    if not is_call(value, operator.getitem):
        return None
    assert isinstance(value, fx.Node)
    return _top(value.args[0]) if value.args[1] == index else None


def _spread(value: object) -> tuple[fx.Node, Sequence[Size], list[fx.Node]] | None:
    """Marks of groups, each repeated for the experts of its group.

    Returns:
        The marks `[T, G]`, the shape `[T, G, E / G]`, and the nodes on the way.
    """
    passed: list[fx.Node] = []

    def before(value: object, *targets: object) -> object:
        while is_call(value, *targets):
            assert isinstance(value, fx.Node)
            passed.append(value)
            value = value.args[0]
        return value

    merged = before(value, aten._to_copy.default)
    repeated = before(before(merged, *_VIEWS), aten.clone.default)
    single = before(repeated, aten.expand.default)
    if merged is repeated or not is_call(single, aten.unsqueeze.default) or single is repeated:
        return None
    assert isinstance(repeated, fx.Node)
    assert isinstance(single, fx.Node)
    marks, dim = single.args
    assert isinstance(marks, fx.Node)
    passed.append(single)
    return (marks, shape_of(repeated), passed) if dim in (-1, 2) else None


def _added(value: fx.Node, scores: fx.Node) -> fx.Node | None:
    """What is added to the scores."""
    if not is_call(value, aten.add.Tensor) or argument(value, "alpha") != 1:
        return None
    left, right = value.args
    other = right if left is scores else left if right is scores else None
    return other if isinstance(other, fx.Node) else None


def _is_bias_of(bias: fx.Node, x: fx.Node) -> bool:
    return dtype_of(bias) == dtype_of(x) and same_shape(shape_of(bias), shape_of(x)[1:])


def _takes(x: fx.Node, weights: fx.Node, k: int, groups: _Groups, setting: Setting) -> bool:
    experts = shape_of(x)[-1]
    if len(shape_of(x)) != 2 or not isinstance(experts, int) or dtype_of(x) != dtype_of(weights):
        return False
    each = experts // groups.total
    padded = -(-each // _GROUP_UNIT) * _GROUP_UNIT * groups.total
    fits = groups.total == 1 or (each >= _SMALLEST_GROUP and padded <= _EXPERTS)
    documented = experts <= _EXPERTS and fits
    enough = k <= each * groups.best
    return dtype_of(x) is torch.float32 and enough and (documented or not setting.within_limits)
