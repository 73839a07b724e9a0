"""Canonical forms of cross entropy, forward and backward, in ops that shard by vocabulary too.

ATen computes it by ops that read a whole row of logits at once. Written with the row's maximum, its
sum, the logit of the target, and a comparison of columns with the target, every step passes through
a shard of the vocabulary, or leaves one number a row to be reduced:

    shifted = x - amax(x)                           _log_softmax(x)
    logp    = shifted - log(sum(exp(shifted)))
    losses  = -gather(logp, target)                 nll_loss_forward(logp, target)
    loss    = sum(losses) / sum(target != ignored)
    hits    = arange(V) == target                   nll_loss_backward(grad, logp, target)
    picked  = where(hits, -share, 0)
    result  = picked + exp(logp) * share            _log_softmax_backward_data(picked, logp)

where the share of a row is the gradient of its loss, zero for an ignored one. That is how Megatron
computes the loss of vocabulary-parallel logits (`megatron/core/tensor_parallel/cross_entropy.py`):
three numbers a row are exchanged, and none in the backward pass.

Losses with weights of classes, of images and of single rows keep
their ops, and so does a softmax whose result is used otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import fx
from torch._ops import OpOverload

from rolemesh.compiler.ir.program import tensor_type
from rolemesh.compiler.ir.tensor import TensorType
from rolemesh.passes.canonical_forms import Arguments, Emitter, Rewrite

__all__ = ["LOSS_REWRITES"]

aten = torch.ops.aten

_WHERE = aten.where.ScalarOther

_NONE, _MEAN = 0, 1
"""`at::Reduction`; what is left is a sum."""


class _Steps:
    """Emits the steps of one op's form, whose names start with the op's."""

    def __init__(self, new: Emitter, node: fx.Node) -> None:
        self.new = new
        self.name = node.name

    def step(
        self,
        name: str,
        target: OpOverload,
        args: Sequence[object],
        shape: Sequence[int],
        dtype: torch.dtype,
        options: Mapping[str, object] | None = None,
    ) -> fx.Node:
        kind = TensorType(tuple(shape), dtype)
        return self.new.emit_part(f"{self.name}_{name}", target, args, kind, options)

    def like(self, name: str, target: OpOverload, x: fx.Node, *more: object) -> fx.Node:
        """A step with a result of the type of its first operand."""
        return self.step(name, target, (x, *more), *tensor_type(x))

    def cast(self, x: fx.Node, dtype: torch.dtype) -> fx.Node:
        shape, have = tensor_type(x)
        if have == dtype:
            return x
        return self.step("cast", aten._to_copy.default, (x,), shape, dtype, {"dtype": dtype})

    def reduced(self, name: str, target: OpOverload, x: fx.Node) -> fx.Node:
        """`[N, 1]` of `[N, V]`."""
        (rows, _), dtype = tensor_type(x)
        return self.step(name, target, (x, [1], True), (rows, 1), dtype)

    def counts(self, target: fx.Node, ignored: object) -> fx.Node:
        """`[N]`, which rows are not ignored."""
        return self.step(
            "counts", aten.ne.Scalar, (target, ignored), tensor_type(target).shape, torch.bool
        )

    def hits(self, target: fx.Node, counts: fx.Node, columns: int) -> fx.Node:
        """`[N, V]`, true at the target of each row that counts: no column is minus one."""
        (rows,), dtype = tensor_type(target)
        named = self.step("named", _WHERE, (counts, target, -1), (rows,), dtype)
        upright = self.step("target", aten.unsqueeze.default, (named, 1), (rows, 1), dtype)
        options = {"dtype": dtype, **self.new.device_option}
        line = self.step("columns", aten.arange.default, (columns,), (columns,), dtype, options)
        return self.step("hits", aten.eq.Tensor, (line, upright), (rows, columns), torch.bool)


def _is_row_loss(loss: fx.Node) -> bool:
    """Whether a node is the loss of rows of logits, without weights of classes."""
    if loss.target is not aten.nll_loss_forward.default:
        return False
    logp, _, weight = loss.args[:3]
    return weight is None and isinstance(logp, fx.Node) and tensor_type(logp).ndim == 2


def _log_softmax(new: Emitter, node: fx.Node, args: Arguments) -> fx.Node | None:
    if not any(_is_row_loss(user) for user in node.users) or args["dim"] not in (1, -1):
        return None
    x = args["self"]
    assert isinstance(x, fx.Node)
    steps, dtype = _Steps(new, node), tensor_type(node).dtype
    x = steps.cast(x, torch.float32 if dtype.itemsize < 4 else dtype)
    shape, wide = tensor_type(x)
    top = steps.reduced("max", aten.amax.default, x)
    shifted = steps.like("shifted", aten.sub.Tensor, x, top)
    powers = steps.like("powers", aten.exp.default, shifted)
    total = steps.reduced("sum", aten.sum.dim_IntList, powers)
    logarithm = steps.like("log", aten.log.default, total)
    result = (aten.sub.Tensor, (shifted, logarithm), TensorType(shape, wide))
    if wide == dtype:
        return new.emit(*result)
    return steps.cast(new.emit_part(f"{node.name}_wide", *result), dtype)


def _nll_loss_forward(new: Emitter, node: fx.Node, args: Arguments) -> tuple[fx.Node, ...] | None:
    if not _is_row_loss(node):
        return None
    logp, target = args["self"], args["target"]
    assert isinstance(logp, fx.Node)
    assert isinstance(target, fx.Node)
    steps = _Steps(new, node)
    (rows, _), dtype = tensor_type(logp)
    counts = steps.counts(target, args["ignore_index"])
    ids = tensor_type(target).dtype
    named = steps.step("ids", _WHERE, (counts, target, 0), (rows,), ids)
    upright = steps.step("upright", aten.unsqueeze.default, (named, 1), (rows, 1), ids)
    picked = steps.step("picked", aten.gather.default, (logp, 1, upright), (rows, 1), dtype)
    found = steps.step("found", aten.squeeze.dim, (picked, 1), (rows,), dtype)
    against = steps.like("against", aten.neg.default, found)
    losses = steps.step("losses", _WHERE, (counts, against, 0), (rows,), dtype)
    if args["reduction"] == _NONE:
        options = {"dtype": dtype, **new.device_option}
        return losses, steps.step("count", aten.scalar_tensor.default, (0,), (), dtype, options)
    total = steps.step("total", aten.sum.default, (losses,), (), dtype)
    numbers = steps.cast(counts, dtype)
    count = steps.step("count", aten.sum.default, (numbers,), (), dtype)
    if args["reduction"] == _MEAN:
        total = steps.like("mean", aten.div.Tensor, total, count)
    return total, count


def _nll_loss_backward(new: Emitter, node: fx.Node, args: Arguments) -> fx.Node | None:
    grad, logp, target = args["grad_output"], args["self"], args["target"]
    assert isinstance(grad, fx.Node)
    assert isinstance(logp, fx.Node)
    assert isinstance(target, fx.Node)
    if args["weight"] is not None or tensor_type(logp).ndim != 2:
        return None
    steps = _Steps(new, node)
    (rows, columns), dtype = tensor_type(logp)
    if args["reduction"] == _MEAN:
        grad = steps.like("mean", aten.div.Tensor, grad, args["total_weight"])
    counts = steps.counts(target, args["ignore_index"])
    against = steps.like("against", aten.neg.default, grad)
    share = steps.step("share", _WHERE, (counts, against, 0), (rows,), dtype)
    upright = steps.step("upright", aten.unsqueeze.default, (share, 1), (rows, 1), dtype)
    hits = steps.hits(target, counts, columns)
    return new.emit(_WHERE, (hits, upright, 0), tensor_type(node))


def _unaliased(value: object) -> fx.Node:
    """A captured value, without the aliases that autograd saves it behind."""
    assert isinstance(value, fx.Node)
    while value.target in (aten.detach.default, aten.alias.default):
        value = value.all_input_nodes[0]
    return value


def _log_softmax_backward(new: Emitter, node: fx.Node, args: Arguments) -> fx.Node | None:
    softmax = _unaliased(node.args[1])
    if not any(_is_row_loss(user) for user in softmax.users) or args["dim"] not in (1, -1):
        return None
    grad, logp = args["grad_output"], args["output"]
    assert isinstance(grad, fx.Node)
    assert isinstance(logp, fx.Node)
    steps = _Steps(new, node)
    captured = _unaliased(node.args[0])
    if captured.target is aten.nll_loss_backward.default and grad.target is _WHERE:
        share = grad.args[1]  # the one entry of a row, so its sum
        assert isinstance(share, fx.Node)
    else:
        share = steps.reduced("sum", aten.sum.dim_IntList, grad)
    p = steps.like("softmax", aten.exp.default, logp)
    part = steps.like("part", aten.mul.Tensor, p, share)
    kind = tensor_type(node)
    if kind.dtype == tensor_type(grad).dtype:
        return new.emit(aten.sub.Tensor, (grad, part), kind)
    return steps.cast(steps.like("wide", aten.sub.Tensor, grad, part), kind.dtype)


LOSS_REWRITES: Mapping[str, Rewrite] = MappingProxyType(
    {
        "aten::_log_softmax": _log_softmax,
        "aten::nll_loss_forward": _nll_loss_forward,
        "aten::nll_loss_backward": _nll_loss_backward,
        "aten::_log_softmax_backward_data": _log_softmax_backward,
    }
)
"""Op -> its rewrite; see `rolemesh.passes.canonical_forms`."""
