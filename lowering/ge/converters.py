"""Converters of ops that are one op in GE as well, where torchair has none.

They are registered through torchair's public `register_fx_node_ge_converter`, and build GE ops with
its public `torchair.ge`. torchair keeps the converter on the op itself, so registering twice is the
same as once.

Invariant: tensor operands have one dtype already, which the GE op takes. Decompositions see to it:
`lowering.ge.decompositions` leads here through the prims, which promote nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType, ModuleType
from typing import Protocol

import torch
from torch._ops import OpOverload

from rolemesh.lowering.ge.loader import Torchair
from rolemesh.lowering.npu.define import define_npu_ops

__all__ = ["register_converters"]

aten = torch.ops.aten
prims = torch.ops.prims


class _Value(Protocol):
    """A value of a GE graph under construction, or what is known of one."""

    @property
    def dtype(self) -> int: ...

    @property
    def rank(self) -> int: ...


_Converter = Callable[..., object]


def register_converters(torchair: Torchair) -> None:
    """Teach torchair the ops of this module.

    Args:
        torchair: As `load_torchair` gives it.
    """
    module = torchair.module
    register = module.register_fx_node_ge_converter
    for op, (kind, names, result) in _ELEMENTWISE.items():
        register(op)(_elementwise(module.ge, kind, names, result))
    for op, kind in _REDUCTIONS.items():
        register(op)(_reduction(module.ge, kind))
    register(aten.prod.default)(_product(module.ge))
    register(aten.prod.dim_int)(_product(module.ge))
    register(aten.sort.stable)(_sort(module.ge))
    register(aten.gelu.default)(_gelu(module.ge))
    if not torchair.cann:
        define_npu_ops()
        register(torch.ops.npu.npu_grouped_matmul.default)(_grouped_matmul(module.ge))


_ELEMENTWISE: Mapping[OpOverload, tuple[str, tuple[str, ...], str]] = MappingProxyType(
    {
        prims.atan2.default: ("Atan2", ("x1", "x2"), "y"),
        prims.bitwise_xor.default: ("BitwiseXor", ("x1", "x2"), "y"),
        prims.erfc.default: ("Erfc", ("x",), "y"),
        prims.fmod.default: ("TruncateMod", ("x1", "x2"), "y"),
        prims.shift_left.default: ("LeftShift", ("x", "y"), "z"),
        prims.shift_right_arithmetic.default: ("RightShift", ("x", "y"), "z"),
        prims.trunc.default: ("Trunc", ("input_x",), "output_y"),
    }
)
"""Op -> type, inputs and output of the GE op."""

_REDUCTIONS: Mapping[OpOverload, str] = MappingProxyType(
    {aten.amax.default: "ReduceMax", aten.amin.default: "ReduceMin"}
)
"""Reduction over a list of dims, all if it is empty -> type of the GE op."""


def _elementwise(ge: ModuleType, kind: str, names: Sequence[str], result: str) -> _Converter:
    def convert(*operands: _Value | float) -> object:
        (dtype,) = {x.dtype for x in operands if not isinstance(x, int | float)}
        values = [ge.Const(x, dtype=dtype) if isinstance(x, int | float) else x for x in operands]
        return ge.custom_op(kind, inputs=dict(zip(names, values, strict=True)), outputs=[result])

    return convert


def _reduce(ge: ModuleType, kind: str, x: object, dims: Sequence[int], keepdim: bool) -> object:
    axes = ge.Const(list(dims), dtype=ge.DataType.DT_INT64)
    return ge.custom_op(
        kind,
        inputs={"x": x, "axes": axes},
        outputs=["y"],
        attrs={"keep_dims": ge.attr.Bool(keepdim)},
    )


def _reduction(ge: ModuleType, kind: str) -> _Converter:
    def convert(self: _Value, dim: Sequence[int] = (), keepdim: bool = False) -> object:
        return _reduce(ge, kind, self, dim or range(self.rank), keepdim)

    return convert


def _product(ge: ModuleType) -> _Converter:
    """The result of integers and truth values is int64, and products are taken in that."""

    def convert(
        self: _Value,
        dim: int | None = None,
        keepdim: bool = False,
        *,
        dtype: object = None,
        meta_outputs: _Value,
    ) -> object:
        x = self
        if self.dtype != meta_outputs.dtype:
            x = ge.Cast(self, dst_type=meta_outputs.dtype)
        return _reduce(ge, "ReduceProd", x, range(self.rank) if dim is None else [dim], keepdim)

    return convert


def _gelu(ge: ModuleType) -> _Converter:
    """Torchair's own converter takes the tanh form for both."""

    def convert(self: _Value, *, approximate: str = "none") -> object:
        form = ge.attr.Str(approximate)
        return ge.custom_op(
            "GeluV2", inputs={"x": self}, outputs=["y"], attrs={"approximate": form}
        )

    return convert


def _grouped_matmul(ge: ModuleType) -> _Converter:
    """Without quantisation: torchair's own imports torch_npu, whose dtypes it compares with."""

    def convert(
        x: Sequence[_Value],
        weight: Sequence[_Value],
        *,
        bias: Sequence[_Value] | None = None,
        group_list: _Value | None = None,
        split_item: int = 0,
        group_type: int = -1,
        group_list_type: int = 0,
        meta_outputs: Sequence[_Value],
    ) -> object:
        kinds, of = ge.DataType, x[0].dtype

        def absent(dtype: int) -> list[object]:
            return [ge.Cast(ge.Const([], dtype=kinds.DT_FLOAT), dst_type=dtype)]

        return ge.custom_op(
            "GroupedMatmul",
            inputs={
                "x": x,
                "weight": weight,
                "bias": bias or absent(kinds.DT_FLOAT if of == kinds.DT_BF16 else of),
                "scale": absent(kinds.DT_UINT64),
                "offset": absent(kinds.DT_FLOAT),
                "antiquant_scale": absent(kinds.DT_FLOAT16),
                "antiquant_offset": absent(kinds.DT_FLOAT16),
                "group_list": group_list,
                "per_token_scale": None,
            },
            outputs=[("y", len(meta_outputs))],
            attrs={
                "split_item": ge.attr.Int(split_item),
                "dtype": ge.attr.Int(-1),
                "transpose_weight": ge.attr.Bool(False),
                "transpose_x": ge.attr.Bool(False),
                "group_type": ge.attr.Int(group_type),
                "group_list_type": ge.attr.Int(group_list_type),
                "act_type": ge.attr.Int(0),
            },
        )

    return convert


def _sort(ge: ModuleType) -> _Converter:
    """Of the last dim: GE sorts no other one. Its places are int32."""

    def convert(
        self: _Value, *, stable: bool | None, dim: int = -1, descending: bool = False
    ) -> tuple[object, object]:
        if dim not in (-1, self.rank - 1):
            raise ValueError(f"GE sorts the last dim, not dim {dim} of {self.rank}")
        values, places = ge.custom_op(
            "Sort",
            inputs={"x": self},
            outputs=["y1", "y2"],
            attrs={
                "axis": ge.attr.Int(-1),
                "descending": ge.attr.Bool(descending),
                "stable": ge.attr.Bool(bool(stable)),
            },
        )
        return values, ge.Cast(places, dst_type=ge.DataType.DT_INT64)

    return convert
