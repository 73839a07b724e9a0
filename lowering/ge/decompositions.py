"""The decompositions that a graph is traced with before torchair converts it.

Four sources, each only where the ones before it leave an op that torchair cannot convert:

1. torchair's own decompositions;
2. ours (`INDEXING`, `MATH`, `ATTENTION`, `COLLECTIVES`, those of composite ops), and `DTYPES`, for
   operands that converters get wrong or refuse;
3. torch's, for every functional op without a converter, and for `_RIGHT_IN_TORCH`;
4. `PRIMS`, which lead back to ATen from the prims that torch's end in.

What still has no converter then is refused by `lowering.ge.convertible`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping

import torch
from torch._ops import OpOverload

from rolemesh.lowering.composite.define import decompositions
from rolemesh.lowering.ge.converters import register_converters
from rolemesh.lowering.ge.convertible import has_converter
from rolemesh.lowering.ge.decompositions_attention import ATTENTION, grouped_rows
from rolemesh.lowering.ge.decompositions_collectives import COLLECTIVES
from rolemesh.lowering.ge.decompositions_dtypes import DTYPES
from rolemesh.lowering.ge.decompositions_indexing import INDEXING
from rolemesh.lowering.ge.decompositions_math import MATH, PRIMS
from rolemesh.lowering.ge.loader import Torchair

__all__ = ["decomposition_table"]

aten = torch.ops.aten

_RIGHT_IN_TORCH = (
    aten._safe_softmax.default,  # the converter gives NaN for rows that see nothing
    aten.baddbmm.default,  # the converter multiplies floats by an integer
    aten.logsumexp.default,  # the converter fills tensors of 16 bits with a value of 32
    aten.nan_to_num.default,  # the converter fails for values that are not given
    aten.replication_pad1d.default,  # the converter pads floats with an integer
    aten.std.correction,  # the converter takes integer corrections only
)
"""Ops whose converters are wrong or incomplete, and whose decompositions in torch are right."""


def decomposition_table(torchair: Torchair) -> dict[OpOverload, Callable[..., object]]:
    """What to trace in place of ops, for a graph that torchair is to convert.

    It registers our converters too, since they decide what needs a decomposition.

    Args:
        torchair: As `load_torchair` gives it.

    Returns:
        Op -> function of the same arguments. It may return NotImplemented: the op then stays.
    """
    register_converters(torchair)
    utils = torchair.module._utils
    table: dict[OpOverload, Callable[..., object]] = utils.get_npu_default_decompositions()
    utils.add_npu_patch(table, torchair.module.CompilerConfig())
    others = (_transformers(), decompositions())
    for ours in (DTYPES, INDEXING, MATH, ATTENTION, COLLECTIVES, PRIMS, *others):
        table.update(ours)
    for op, function in _torch().items():
        if op not in table and (op in _RIGHT_IN_TORCH or not has_converter(op)):
            table[op] = function
    return table


def _torch() -> Mapping[OpOverload, Callable[..., object]]:
    """Torch's decompositions of functional ops.

    Those that the dispatcher decomposes itself are left to it, which knows more forms of them.
    """
    from torch._decomp import decomposition_table as registered

    return _functional(len(registered))


@functools.cache
def _functional(number: int) -> Mapping[OpOverload, Callable[..., object]]:
    """Those among the first `number` that are registered: more may be, with a later import."""
    from torch._decomp import decomposition_table as registered

    composite = torch.DispatchKey.CompositeImplicitAutograd
    return {
        op: function
        for op, function in itertools.islice(registered.items(), number)
        if isinstance(op, OpOverload)
        and op.namespace == "aten"
        and not op._schema.is_mutable
        and not op.has_kernel_for_dispatch_key(composite)
    }


def _transformers() -> dict[OpOverload, Callable[..., object]]:
    """The matmul over groups that `transformers` defines as an op, once it is imported."""
    found = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
    return {} if found is None else {found.default: grouped_rows}
