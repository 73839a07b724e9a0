"""Rules of convolutions.

`[batch, in channels, *space]` by `[out channels, in channels / groups, *kernel]`. Batch and output
channels pass, input channels are summed, and of several groups each rank computes its own. Space
stays whole, for a kernel reads over the edge of a shard, but where the kernels tile a dim (patches
of an image, a kernel of one): such a dim is `[patches, kernel]`, and patches pass.

A convolution with a bias keeps what is summed whole: were it sharded, every rank would add it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from rolemesh.compiler.ir.rule import Kind, OpCall, Rule, RuleBuilder
from rolemesh.passes.rules.arguments import argument, int_argument
from rolemesh.passes.rules.registry import LocalCall, LocalForm, LocalFunction, RuleFunction

__all__ = ["LOCAL", "RULES"]

_GROUPS = 8
"""Position of the argument `groups`."""

_PLAIN = ((True, False), (False, True))
_BIASED = ((True, False, True), (False, True, True))


def convolution(call: OpCall) -> Rule:
    """`convolution(x, w, bias, stride, padding, dilation, transposed, output_padding, groups)`."""
    x, weight, *rest = call.operands
    result = call.results[0]
    biased = bool(rest)
    summed = Kind.REPLICATE if biased else Kind.REDUCE
    transposed = bool(argument(call, 6, "transposed", False))
    groups = int_argument(call, _GROUPS, "groups", 1)
    space = weight.ndim - 2
    builder = RuleBuilder()
    batch = builder.factor(x.shape[0])
    group = builder.factor(groups) if groups > 1 else ()
    # Within one of several groups channels stay whole: a part of each would be no run of channels
    # for the op.
    inner = summed if groups == 1 else Kind.REPLICATE
    outer = Kind.PASS if groups == 1 else Kind.REPLICATE
    read = builder.factor(x.shape[1] // groups, inner)
    made = builder.factor(result.shape[1] // groups, outer)
    source, kernel, target = [], [], []
    for dim in range(space):
        size, extent = weight.shape[2 + dim], x.shape[2 + dim]
        count = result.shape[2 + dim]
        if not transposed and _tiles(call, dim, size) and count * size == extent:
            patches = builder.factor(count)
            within = builder.factor(size, Kind.REPLICATE) if size != 1 else ()
            source.append(patches + within)
            kernel.append(within)
            target.append(patches)
        else:
            source.append(builder.factor(extent, Kind.REPLICATE))
            kernel.append(builder.factor(size, Kind.REPLICATE))
            target.append(builder.factor(count, Kind.REPLICATE))
    channels = [group + read, made] if transposed else [group + made, read]
    operands = [[batch, group + read, *source], [*channels, *kernel]]
    if biased:
        operands.append([group + made])
    return builder.build(
        operands, [[batch, group + made, *target]], linear=_BIASED if biased else _PLAIN
    )


def _tiles(call: OpCall, dim: int, size: int) -> bool:
    """Whether the kernel's steps along a spatial dim neither overlap nor leave anything out."""

    def of_dim(index: int, name: str, default: int) -> int:
        values = cast(Sequence[int], argument(call, index, name, (default,)))
        return values[dim] if len(values) > 1 else values[0]

    stride, padding = of_dim(3, "stride", 1), of_dim(4, "padding", 0)
    return stride == size and padding == 0 and (size == 1 or of_dim(5, "dilation", 1) == 1)


def convolution_local(local: LocalCall) -> LocalForm:
    """The same call with the groups that this rank has."""
    groups = int_argument(local.call, _GROUPS, "groups", 1)
    if groups == 1:
        return local.call.target, local.args, local.kwargs
    each = local.call.operands[0].shape[1] // groups
    mine = local.operand_shape(0)[1] // each
    if len(local.args) > _GROUPS:
        args = (*local.args[:_GROUPS], mine, *local.args[_GROUPS + 1 :])
        return local.call.target, args, local.kwargs
    return local.call.target, local.args, {**local.kwargs, "groups": mine}


RULES: dict[str, RuleFunction] = {"aten::convolution": convolution}
LOCAL: dict[str, LocalFunction] = {"aten::convolution": convolution_local}
