"""Calls one GE op as the executor does, and compares it with a reference in numpy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

from rolemesh.runtime.ge.ops.table import Attributes, OpTable

__all__ = [
    "BF16",
    "F16",
    "F32",
    "F64",
    "FLOATS",
    "I32",
    "I64",
    "Case",
    "Refusal",
    "call",
    "check",
    "check_refused",
    "each_dtype",
    "each_refusal",
    "ints",
    "reals",
    "types_of",
]

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
I32, I64 = torch.int32, torch.int64
FLOATS = (F32, BF16, F16)

Given = Tensor | Sequence[Tensor] | None

Refusal = tuple[str, Mapping[str, Given], Mapping[str, object], str]
"""An op's type, its inputs and attributes, and a pattern that the error's text must have."""

_TOLERANCE = {F64: (1e-9, 1e-9), F32: (1e-5, 1e-6), BF16: (4e-3, 1e-5), F16: (1e-3, 1e-5)}
"""Relative and absolute: one rounding of a result that was computed in float32."""


@dataclass(frozen=True)
class Case:
    """One call of an op.

    Attributes:
        type: The op's type.
        inputs: By name; float32 ones are cast to the dtype under test, others stay.
        expect: From the inputs as arrays (floats in float64), in their order, the result or a
            tuple of results. An array of integers or bools has the dtype that the op must give; a
            result that is floating-point must have `result`.
        attributes: The op's attributes.
        dtypes: What to cast float32 inputs to, one after the other.
        result: The dtype of floating-point results; by default the one under test.
        loose: Factor for the tolerance.
    """

    type: str
    inputs: Mapping[str, Given]
    expect: Callable[..., object]
    attributes: Mapping[str, object] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = FLOATS
    result: torch.dtype | None = None
    loose: float = 1


def reals(*shape: int, low: float = -3, high: float = 3, seed: int = 0) -> Tensor:
    """Values spread evenly over a range, in float32 but exact in bfloat16, in random order."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    values = torch.rand(shape, generator=generator) * (high - low) + low
    return values.bfloat16().float()


def ints(*values: object, dtype: torch.dtype = I64) -> Tensor:
    """An integer tensor from nested lists; one value gives a tensor without dims."""
    return torch.tensor(values[0] if len(values) == 1 else list(values), dtype=dtype)


def call(
    table: OpTable, kind: str, inputs: Mapping[str, Given], attributes: Mapping[str, object]
) -> tuple[Tensor, ...]:
    """Call an op and check what every op promises: see `rolemesh.runtime.ge.ops.table`."""
    op = table.ops[kind]
    fed = {name: value for name, value in inputs.items() if value is not None}
    assert set(fed) <= set(op.inputs), f"{kind} has the inputs {op.inputs}"
    assert set(op.required) <= set(fed), f"{kind} needs {op.required}"
    assert len({tensor.dtype for tensor in _flat(fed, op.equal)}) <= 1, f"{kind}: dtypes differ"
    before = {name: [tensor.clone() for tensor in _flat(fed, [name])] for name in fed}
    arguments = [fed.get(name) for name in op.inputs]
    while arguments and arguments[-1] is None:
        arguments.pop()
    results = op.function(Attributes(attributes, kind), *arguments)
    results = results if isinstance(results, tuple) else (results,)
    memory = {tensor.untyped_storage().data_ptr() for tensor in _flat(fed, fed)} - {0}
    written: dict[int, Tensor] = {}
    for output, name in op.writes.items():
        written |= {output + i: tensor for i, tensor in enumerate(_flat(fed, [name]))}
    for index, result in enumerate(results):
        assert result.is_contiguous(), f"{kind}: output {index} is not contiguous"
        if index in written:
            assert result is written[index], f"{kind}: output {index} is not the input"
        elif not op.view:
            own = result.untyped_storage().data_ptr() not in memory
            assert own, f"{kind}: output {index} shares memory with an input"
    for name, copies in before.items():
        for tensor, copy in zip(_flat(fed, [name]), copies, strict=True):
            if not any(tensor is target for target in written.values()):
                assert torch.equal(
                    tensor.nan_to_num() if tensor.is_floating_point() else tensor,
                    copy.nan_to_num() if copy.is_floating_point() else copy,
                ), f"{kind} changed {name}"
    return results


def check(table: OpTable, case: Case, dtype: torch.dtype) -> None:
    """Call an op on inputs of a dtype and compare the results with the reference."""
    inputs = {name: _cast(value, dtype) for name, value in case.inputs.items()}
    arrays = [_array(value) for value in inputs.values() if value is not None]
    expected = case.expect(*arrays)
    results = call(table, case.type, inputs, case.attributes)
    expectations = expected if isinstance(expected, tuple) else (expected,)
    assert len(results) == len(expectations)
    for result, array in zip(results, expectations, strict=True):
        _compare(result, np.asarray(array), case.result or dtype, case.loose)


def each_dtype(cases: Sequence[Case]) -> pytest.MarkDecorator:
    """Parametrise a test by (case, dtype)."""
    return pytest.mark.parametrize(
        ("case", "dtype"),
        [
            pytest.param(case, dtype, id=f"{case.type}-{i}-{str(dtype).removeprefix('torch.')}")
            for i, case in enumerate(cases)
            for dtype in case.dtypes
        ],
    )


def each_refusal(refusals: Sequence[Refusal]) -> pytest.MarkDecorator:
    """Parametrise a test by the calls that an op refuses."""
    ids = [f"{kind}-{i}" for i, (kind, *_) in enumerate(refusals)]
    return pytest.mark.parametrize("refusal", refusals, ids=ids)


def check_refused(table: OpTable, refusal: Refusal) -> None:
    """Call an op and check that it refuses, with a message."""
    kind, inputs, attributes, message = refusal
    with pytest.raises(ValueError, match=message):
        call(table, kind, inputs, attributes)


def types_of(cases: Sequence[Case]) -> set[str]:
    """The op types that cases call."""
    return {case.type for case in cases}


def _flat(inputs: Mapping[str, Given], names: Sequence[str] | Mapping[str, Given]) -> list[Tensor]:
    found: list[Tensor] = []
    for name in names:
        value = inputs.get(name)
        if value is not None:
            found += [value] if isinstance(value, Tensor) else list(value)
    return found


def _cast(value: Given, dtype: torch.dtype) -> Given:
    """A copy, since a ref op may change it."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        return value.to(dtype, copy=True) if value.dtype == F32 else value.clone()
    return [tensor.to(dtype, copy=True) if tensor.dtype == F32 else tensor for tensor in value]


def _array(value: Given) -> object:
    if isinstance(value, Tensor):
        return value.double().numpy() if value.is_floating_point() else value.clone().numpy()
    return [_array(tensor) for tensor in value or ()]


def _compare(result: Tensor, expected: np.ndarray, dtype: torch.dtype, loose: float) -> None:
    assert list(result.shape) == list(expected.shape)
    if expected.dtype.kind in "fc":
        assert result.dtype == (torch.complex64 if expected.dtype.kind == "c" else dtype)
        wide = torch.from_numpy(expected.copy())
        rtol, atol = (loose * bound for bound in _TOLERANCE.get(result.dtype, _TOLERANCE[F32]))
        computed = result.to(wide.dtype)
        torch.testing.assert_close(computed, wide, rtol=rtol, atol=atol, equal_nan=True)
    else:
        assert result.dtype == torch.from_numpy(expected.copy()).dtype
        assert result.tolist() == expected.tolist()
