"""The form of a GE op's semantics, and the tables they are kept in.

A function computes one op: its parameters are the attributes, and then the op's inputs by the names
of its GE definition (`torchair/_ge_concrete_graph/auto_generated_ge_raw_ops.py` quotes it)::

    @OPS.op("GatherV2")
    def gather_v2(a: Attributes, x: Tensor, indices: Tensor, axis: Tensor) -> Tensor: ...


    @OPS.op("ConcatV2", dynamic=("x",))
    def concat_v2(a: Attributes, x: Sequence[Tensor], concat_dim: Tensor) -> Tensor: ...


    @OPS.op("MatMulV2", equal=("x1", "x2"))
    def mat_mul_v2(a: Attributes, x1: Tensor, x2: Tensor, bias: Tensor | None = None) -> Tensor: ...

An input with a default is optional. An op with several outputs returns a tuple. An op that writes
to an input (a ref op) changes that tensor in place and returns it; `writes` says which output is
which input. No other op may return memory that it shares with an input, unless `view=True`.
"""

from __future__ import annotations

import builtins
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

__all__ = ["Attributes", "Function", "Op", "OpTable", "Result", "integers"]

Result = torch.Tensor | tuple[torch.Tensor, ...]
Function = Callable[..., Result]


class Attributes:
    """The attributes of one op, with the types and defaults of its GE definition.

    Args:
        values: Plain values by name: int, float, bool, str, lists of those, or nested lists of
            ints. A data type is its `torchair.ge.DataType` number.
        where: The op's type and name, for errors.
    """

    def __init__(self, values: Mapping[builtins.str, object], where: builtins.str = "") -> None:
        self._values = dict(values)
        self.where = where

    def __contains__(self, name: builtins.str) -> builtins.bool:
        return name in self._values

    def int(self, name: builtins.str, default: builtins.int | None = None) -> builtins.int:
        """An integer."""
        return int(self._get(name, default))  # type: ignore[call-overload]

    def float(self, name: builtins.str, default: builtins.float | None = None) -> builtins.float:
        """A float."""
        return float(self._get(name, default))  # type: ignore[arg-type]

    def bool(self, name: builtins.str, default: builtins.bool | None = None) -> builtins.bool:
        """A boolean."""
        return bool(self._get(name, default))

    def str(self, name: builtins.str, default: builtins.str | None = None) -> builtins.str:
        """A string."""
        return str(self._get(name, default))

    def ints(
        self, name: builtins.str, default: Sequence[builtins.int] | None = None
    ) -> list[builtins.int]:
        """A list of integers."""
        values = self._get(name, default)
        assert isinstance(values, list | tuple)
        return [int(value) for value in values]

    def dtype(self, name: builtins.str, default: torch.dtype | None = None) -> torch.dtype:
        """A data type; an attribute holds its `torchair.ge.DataType` number.

        Raises:
            ValueError: If torch has no such type.
        """
        if name not in self._values and default is not None:
            return default
        number = int(self._get(name, None))  # type: ignore[call-overload]
        if number not in GE_DTYPES:
            raise ValueError(
                f"{self.where}: attribute {name}: no torch dtype has GE number {number}"
            )
        return GE_DTYPES[number]

    def _get(self, name: builtins.str, default: object) -> object:
        value = self._values.get(name, default)
        if value is None:
            raise ValueError(f"{self.where}: attribute {name} is missing")
        return value


@dataclass(frozen=True)
class Op:
    """What one GE op type computes.

    Attributes:
        type: Its name in GE.
        function: Computes it; see the module's docstring.
        required: Inputs that must be fed.
        optional: Inputs that may be unfed.
        dynamic: Inputs that are lists: `x` is fed as `x0`, `x1`, ...
        equal: Inputs whose dtypes must be equal, as far as they are fed.
        writes: Which output is which input, for a ref op.
        view: Whether its result may share memory with an input.
        collective: Whether the function takes a `Communicator` right after the attributes.
    """

    type: str
    function: Function
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    dynamic: tuple[str, ...] = ()
    equal: tuple[str, ...] = ()
    writes: Mapping[int, str] = field(default_factory=dict)
    view: bool = False
    collective: bool = False

    @property
    def inputs(self) -> tuple[str, ...]:
        """All inputs in the order of the function's parameters."""
        return tuple(inspect.signature(self.function).parameters)[1 + self.collective :]


class OpTable:
    """A family of ops, by type; filled by decorators while its module is imported."""

    def __init__(self) -> None:
        self.ops: dict[str, Op] = {}

    def op(
        self,
        *types: str,
        dynamic: Sequence[str] = (),
        equal: Sequence[str] = (),
        writes: Mapping[int, str] | None = None,
        view: bool = False,
        collective: bool = False,
    ) -> Callable[[Function], Function]:
        """Enter a function under one or several op types; see `Op` for the arguments."""

        def enter(function: Function) -> Function:
            parameters = list(inspect.signature(function).parameters.values())[1 + collective :]
            inputs = [p.name for p in parameters]
            optional = [p.name for p in parameters if p.default is not p.empty]
            for name in (*dynamic, *equal, *(writes or {}).values()):
                if name not in inputs:
                    raise ValueError(f"{types}: {name} is no input")
            for kind in types:
                if kind in self.ops:
                    raise ValueError(f"{kind} is in the table twice")
                self.ops[kind] = Op(
                    kind,
                    function,
                    tuple(name for name in inputs if name not in optional),
                    tuple(optional),
                    tuple(dynamic),
                    tuple(equal),
                    dict(writes or {}),
                    view,
                    collective,
                )
            return function

        return enter


def integers(tensor: torch.Tensor) -> list[int]:
    """The values of an integer tensor, such as a shape or axes, flattened."""
    return [int(value) for value in tensor.reshape(-1).tolist()]


GE_DTYPES: Mapping[int, torch.dtype] = {
    0: torch.float32,
    1: torch.float16,
    2: torch.int8,
    3: torch.int32,
    4: torch.uint8,
    6: torch.int16,
    7: torch.uint16,
    8: torch.uint32,
    9: torch.int64,
    10: torch.uint64,
    11: torch.float64,
    12: torch.bool,
    16: torch.complex64,
    17: torch.complex128,
    27: torch.bfloat16,
    35: torch.float8_e5m2,
    36: torch.float8_e4m3fn,
}
"""`torchair.ge.DataType` numbers, which attributes use."""
