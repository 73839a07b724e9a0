"""The table as a whole: which ops of the core opset can be lowered, and where each one leads."""

from __future__ import annotations

import pytest
import torch
from tests.lowering.ge.numerics import final_ops, tensor
from torch._ops import OpOverload

from rolemesh.lowering.ge.convertible import has_converter
from rolemesh.lowering.ge.decompositions import decomposition_table
from rolemesh.lowering.ge.loader import load_torchair

aten = torch.ops.aten

REFUSED = {
    "aten._adaptive_avg_pool3d.default",
    "aten._cdist_forward.default",
    "aten._fft_c2r.default",
    "aten._fft_r2c.default",
    "aten._local_scalar_dense.default",
    "aten._pdist_forward.default",
    "aten.atan2.out",
    "aten.avg_pool3d.default",
    "aten.nonzero.default",
    "aten.resize_.default",
}
"""Core ops without a way to GE: data-dependent ones, and such that no language model has."""


def core_ops() -> list[OpOverload]:
    packets = (getattr(aten, name) for name in dir(aten))
    overloads = (
        getattr(packet, name)
        for packet in packets
        if isinstance(packet, torch._ops.OpOverloadPacket)
        for name in packet.overloads()
    )
    return [op for op in overloads if torch.Tag.core in op.tags]


def test_every_core_op_but_the_refused_ones_can_be_lowered() -> None:
    table = decomposition_table(load_torchair())
    composite = torch.DispatchKey.CompositeImplicitAutograd
    left = {
        str(op)
        for op in core_ops()
        if not has_converter(op)
        and op not in table
        and not op.has_kernel_for_dispatch_key(composite)
    }
    assert left == REFUSED


def test_a_second_table_is_equal() -> None:
    torchair = load_torchair()
    first, second = decomposition_table(torchair), decomposition_table(torchair)
    assert list(first) == list(second)


def test_ops_that_torchair_converts_well_are_left_alone() -> None:
    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.softmax(x @ y, -1), y.sort(dim=-1, stable=True).values])

    kept = [str(node.target) for node in final_ops(function, *(tensor(torch.float32, 4, 4),) * 2)]
    assert kept == [
        "aten.mm.default",
        "aten._softmax.default",
        "aten.sort.stable",
        "<built-in function getitem>",
        "<built-in function getitem>",
        "aten.cat.default",
    ]


@pytest.mark.parametrize(
    "op", [aten.index_put.default, aten.scatter_reduce.two, aten.polar.default]
)
def test_gaps_of_torchair_have_a_decomposition_of_ours(op: OpOverload) -> None:
    assert not has_converter(op)
    assert decomposition_table(load_torchair())[op].__module__.startswith("rolemesh.lowering.ge.")
