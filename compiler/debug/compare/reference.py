"""What the single device computes, value by value, and which node of a stage must equal which.

A value is matched by the name of its node, and one that a pass moved by the name of what it moved
(`Origin.value`). Of another type or shape it is no match.

Memory that nobody has written to (`empty_like`) holds NaN, or the largest integer, inside
`known_memory`: so it is equal everywhere, and shows where it is read.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import fx
from torch.fx.node import Argument

from rolemesh.compiler.ir.dialect import WAIT, is_bundle
from rolemesh.compiler.ir.program import Program, origin, tensor_types
from rolemesh.lowering.provenance import add_note

__all__ = [
    "Reference",
    "Values",
    "known_memory",
    "results_of",
    "run_single",
    "value_name",
    "value_names",
]

Values = dict[str, object]
"""By node name: a tensor, or the tuple of an op with several results."""


@dataclass(frozen=True, eq=False)
class Reference:
    """Values on the single device.

    Attributes:
        program: The Program whose nodes they are named by, of plain sizes.
        values: The values.
        outputs: The outputs; None for one that is None.
    """

    program: Program
    values: Values
    outputs: tuple[torch.Tensor | None, ...]

    @classmethod
    def of(cls, program: Program, values: Values) -> Reference:
        """The values of a Program that ran on one device."""
        found = (values[v.name] if isinstance(v, fx.Node) else None for v in program.results)
        return cls(
            program, values, tuple(v if isinstance(v, torch.Tensor) else None for v in found)
        )

    def find(self, node: fx.Node) -> list[torch.Tensor] | None:
        """The results that a node must have; None if there is nothing to compare them with."""
        names = value_names(node)
        if any(name not in self.values for name in names):
            return None
        found = [result for name in names for result in results_of(self.values[name])]
        types = tensor_types(node)
        fits = len(found) == len(types) and all(
            tuple(value.shape) == tuple(kind.shape) and value.dtype == kind.dtype
            for value, kind in zip(found, types, strict=True)
        )
        return found if fits else None

    def tensor(self, name: str) -> torch.Tensor:
        """The value of a node with one result; as `placed.Picks`, of ids."""
        value = self.values[name]
        assert isinstance(value, torch.Tensor), name
        return value


@contextmanager
def known_memory() -> Iterator[None]:
    """Give memory that nobody has written to a known content; see the module docstring."""
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deterministic")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warns)
            torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]


def value_name(node: fx.Node) -> str:
    """The name of the value that a node computes, or moves."""
    return origin(node).value or node.name


def value_names(node: fx.Node) -> list[str]:
    """The names of the values that a node computes, or moves as one."""
    bundle = node
    if bundle.target is WAIT:
        (bundle,) = bundle.all_input_nodes
    if not is_bundle(bundle):
        return [value_name(node)]
    readers = [reader for user in node.users for reader in (user, *user.users)]
    picks = {reader.args[1]: reader for reader in readers if reader.target is operator.getitem}
    return [value_name(pick) for _, pick in sorted(picks.items())]


def results_of(value: object) -> list[torch.Tensor]:
    """The tensors of a value: itself, or those of an op with several results."""
    items = value if isinstance(value, tuple | list) else (value,)
    return [item for item in items if isinstance(item, torch.Tensor)]


def run_single(
    program: Program, inputs: Sequence[torch.Tensor], values: Values | None = None
) -> Values:
    """Run a Program's ops on one device and keep every value.

    Args:
        program: A Program of plain sizes without mesh ops.
        inputs: Its inputs, whole.
        values: Where to put the values; what an op that raises leaves there was computed before.
    """
    found: Values = {} if values is None else values
    for node, tensor in zip(program.placeholders, inputs, strict=True):
        found[node.name] = tensor

    def value(node: fx.Node) -> Argument:
        return cast(Argument, found[node.name])

    with torch.no_grad(), known_memory():
        for node in program.ops:
            args = fx.map_arg(node.args, value)
            kwargs = fx.map_arg(dict(node.kwargs), value)
            assert callable(node.target)
            try:
                found[node.name] = node.target(*args, **kwargs)
            except Exception as error:
                add_note(error, node)
                raise
    return found
