"""Cases of single functions whose GE graph must compute what the eager function does.

A case runs with its inputs in two memory orders, which must not matter. A dynamic one is also
converted once, with a symbol for a size, and run for two sizes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import pytest
import torch
from tests.lowering.ge.lowered import dynamic_examples, module_of, signature_of
from torch import Tensor, fx
from torch.testing import assert_close

from rolemesh.lowering.ge.engine import running_on
from rolemesh.lowering.ge.loader import load_torchair
from rolemesh.lowering.ge.options import GeOptions
from rolemesh.lowering.ge.target import lower_ge, prepare
from rolemesh.runtime.ge.engine import ReferenceEngine

__all__ = [
    "BOOL",
    "FLOATS",
    "HALF",
    "INTS",
    "ONE",
    "Case",
    "Function",
    "check_dynamic",
    "check_static",
    "compare",
    "final_ops",
    "lowered",
    "parametrize",
    "parametrize_dynamic",
    "tensor",
]

ONE = (torch.float32,)
FLOATS = (*ONE, torch.bfloat16)
HALF = (*FLOATS, torch.float16)
INTS = (torch.int64,)
BOOL = (torch.bool,)

Function = Callable[..., Tensor | Sequence[Tensor]]

_OPTIONS = GeOptions(fuse=False, frozen_parameters=False)
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.complex64: 1e-5}
_SIZES = (11, 13)


@dataclass(frozen=True)
class Case:
    """One function and what to call it with.

    Attributes:
        function: A function of tensors that returns a tensor or several.
        shapes: Shapes of its inputs, such as `"4 n; 3 n"`, where n may be dynamic. Before a shape
            may be a dtype of its own: `b:` for truth values, `6:` for integers from 0 to 5.
        dtypes: Dtypes of the other inputs to run it for.
        dynamic: Whether to run it with n dynamic as well.
        constants: Further inputs, the same for all dtypes and sizes.
        reorder: Whether to run it with another memory order too; not all eager kernels can.
    """

    function: Function
    shapes: str = "3 n"
    dtypes: Sequence[torch.dtype] = FLOATS
    dynamic: bool = False
    constants: tuple[Tensor, ...] = ()
    reorder: bool = True

    def inputs(self, dtype: torch.dtype, size: int) -> tuple[Tensor, ...]:
        """All inputs, with `size` for n."""
        made = [
            _input(kind, [size if dim == "n" else int(dim) for dim in dims], dtype, place)
            for place, (kind, dims) in enumerate(self._parsed())
        ]
        return (*made, *self.constants)

    def dims(self) -> dict[int, list[int]]:
        """By input, the dims whose size is n."""
        found = {
            i: [d for d, n in enumerate(dims) if n == "n"]
            for i, (_, dims) in enumerate(self._parsed())
        }
        return {place: dims for place, dims in found.items() if dims}

    def _parsed(self) -> list[tuple[str, list[str]]]:
        matches = [re.fullmatch(r"\s*(?:(\w+):)?(.*)", part) for part in self.shapes.split(";")]
        return [(match[1] or "", match[2].split()) for match in matches if match]


def _input(kind: str, shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    if kind == "b":
        return tensor(torch.bool, *shape, seed=seed)
    if kind:
        return torch.randint(int(kind), tuple(shape), generator=_generator(seed))
    return tensor(dtype, *shape, seed=seed)


def tensor(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    """Different values: floats and integers around zero, and truth values."""
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, generator=_generator(seed), dtype=torch.float32).to(dtype)
    low, high = (0, 2) if dtype is torch.bool else (-9, 10)
    return torch.randint(low, high, shape, generator=_generator(seed)).to(dtype)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed + 7)


def parametrize(cases: Mapping[str, Case]) -> pytest.MarkDecorator:
    """One test for each case and dtype: arguments `case` and `dtype`."""
    return pytest.mark.parametrize(
        ("case", "dtype"),
        [
            pytest.param(case, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}")
            for name, case in cases.items()
            for dtype in case.dtypes
        ],
    )


def parametrize_dynamic(cases: Mapping[str, Case]) -> pytest.MarkDecorator:
    """One test for each dynamic case: argument `case`."""
    return pytest.mark.parametrize(
        "case", [pytest.param(case, id=name) for name, case in cases.items() if case.dynamic]
    )


def check_static(case: Case, dtype: torch.dtype) -> None:
    """Compare with eager; for the first dtype also with the dims of inputs in opposite order."""
    inputs = case.inputs(dtype, _SIZES[0])
    orders = [inputs]
    if case.reorder and dtype is case.dtypes[0]:
        orders.append(tuple(map(_reordered, inputs)))
    for given in orders:
        run = lowered(case.function, given)
        with running_on(ReferenceEngine()):
            compare(run(*given), case.function(*given))


def check_dynamic(case: Case) -> None:
    """Convert once with n dynamic, and compare with eager for two sizes."""
    dtype = case.dtypes[0]
    run = lowered(case.function, case.inputs(dtype, _SIZES[0]), case.dims())
    for size in _SIZES:
        given = case.inputs(dtype, size)
        with running_on(ReferenceEngine()):
            compare(run(*given), case.function(*given))


def lowered(
    function: Function,
    inputs: Sequence[Tensor],
    dims: Mapping[int, Sequence[int]] = MappingProxyType({}),
) -> Callable[..., Sequence[Tensor | None]]:
    """A function as a GE graph, to be called on an engine.

    Args:
        function: The function.
        inputs: Inputs like those that it will be called with.
        dims: By input, the dims that are dynamic.
    """
    module, outputs = _module(function, inputs)
    signature = signature_of(len(inputs), outputs)
    return lower_ge(module, dynamic_examples(inputs, dims), signature, _OPTIONS)


def final_ops(function: Function, *inputs: Tensor) -> list[fx.Node]:
    """The ops that are handed to torchair."""
    module, outputs = _module(function, inputs)
    fakes = dynamic_examples(inputs, {})
    signature = signature_of(len(inputs), outputs)
    graph, _ = prepare(module, fakes, signature, _OPTIONS, load_torchair())
    return [node for node in graph.graph.nodes if node.op == "call_function"]


def compare(found: Sequence[Tensor | None], wanted: Tensor | Sequence[Tensor]) -> None:
    """Check that results equal the eager ones, but for rounding."""
    for got, want in zip(found, _several(wanted), strict=True):
        tolerance = _TOLERANCE.get(want.dtype, 0.0)
        assert_close(got, want, rtol=tolerance, atol=tolerance, equal_nan=True)


def _module(function: Function, inputs: Sequence[Tensor]) -> tuple[fx.GraphModule, int]:
    outputs = len(_several(function(*inputs)))
    return module_of(lambda *args: _several(function(*args)), len(inputs), outputs), outputs


def _several(found: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (found,) if isinstance(found, Tensor) else tuple(found)


def _reordered(x: Tensor) -> Tensor:
    """The same values with the dims in the opposite order in memory."""
    order = tuple(reversed(range(x.dim())))
    return x.permute(order).contiguous().permute(order)
